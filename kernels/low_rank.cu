// low_rank.cu - weights of adapters, by row, on what they make of their input.
// Shapes      t [rows, rank]; weights [rows, adapters] f32; owner [rank] u32, each < adapters; n = rows rank
// Launch      grid = n / 256, block = 256: a thread has one element
// Traffic     2 n sizeof(T), weights and owner from the cache; bound: memory
// Repeatable  yes, no reduction
// Requires    any alignment
// Oracle      src/ops/low_rank/reference.rs
#include "elements.cuh"

template <class T>
KERNEL(256) blend_columns(T *t, const float *weights, const unsigned *owner, unsigned rank, unsigned adapters, unsigned long long n) {
  const unsigned long long at = my_elements<1>();
  if (at >= n) return;
  t[at] = narrow<T>(wide(t[at]) * weights[at / rank * adapters + owner[at % rank]]);
}
