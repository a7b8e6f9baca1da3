// lerp.cu - a tensor moves towards another: y <- keep y + share x.
// Shapes      all [n]; x, y (the master where there is one) f32; rounded bf16 or null
// Launch      grid = n / (256 * 4), block = 256
// Traffic     12 n bytes, 14 n with a bf16 tensor; bound: memory
// Repeatable  yes, no reduction
// Requires    any alignment (16-byte accesses where all tensors allow them)
// Oracle      src/ops/lerp/reference.rs
#include "elements.cuh"

KERNEL(256) lerp(const float *x, float *y, bf16 *rounded, unsigned long long n, float keep, float share) {
  constexpr int N = 4;
  const bool vectors = aligned16(x) && aligned16(y) && aligned16(rounded);
  const unsigned long long at = my_elements<N>();
  const Floats<N> to = load<N>(x, at, n, vectors);
  Floats<N> v = load<N>(y, at, n, vectors);
#pragma unroll
  for (int e = 0; e < N; e++) v.v[e] = keep * v.v[e] + share * to.v[e];
  store<N>(y, at, n, vectors, v);
  if (rounded) store<N>(rounded, at, n, vectors, v);
}
