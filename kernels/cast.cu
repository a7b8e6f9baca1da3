// cast.cu - a copy between float and bfloat16.
// Shapes      from, to [n]
// Launch      grid = n / (256 * 8), block = 256
// Traffic     6 n; bound: memory
// Repeatable  yes, no reduction
// Requires    any alignment (16-byte accesses where both tensors allow them)
// Oracle      to nearest even, as half::bf16::from_f32; every NaN becomes a NaN
#include "elements.cuh"

template <class From, class To>
KERNEL(256) cast(const From *from, To *to, unsigned long long n) {
  constexpr int N = 8;
  const bool vectors = aligned16(from) && aligned16(to);
  const unsigned long long at = my_elements<N>();
  store<N>(to, at, n, vectors, load<N>(from, at, n, vectors));
}
INSTANCES(cast, (float, bf16), (bf16, float))
