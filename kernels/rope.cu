// rope.cu - rotary position embedding in place, both directions.
// Shapes      x [rows, heads * head_dim]; positions [rows]; cos, sin [positions, half] f32, 2 half <= head_dim
// Launch      grid = rows heads (half / N) / 256, block = 256, with N = 16 / sizeof(T): a thread has N pairs
// Traffic     4 rows heads half sizeof(T), the tables from the cache; bound: memory
// Repeatable  yes, no reduction
// Requires    any alignment (16-byte accesses where all heads allow them)
// Oracle      src/ops/rope/reference.rs
#include "elements.cuh"

// `sign` is 1, or -1 for the rotation back.
template <class T>
KERNEL(256) rope(T *x, const unsigned *positions, const float *cos, const float *sin, unsigned rows, unsigned heads, unsigned head_dim, unsigned half, float sign) {
  constexpr int N = Pack<T>::N;
  const unsigned runs = (half + N - 1) / N;
  const unsigned long long at = my_elements<1>(), row = at / runs / heads;
  if (row >= rows) return;
  const unsigned pair = static_cast<unsigned>(at % runs) * N;
  const bool vectors = head_dim % N == 0 && half % N == 0 && aligned16(x) && aligned16(cos) && aligned16(sin);
  T *low = x + at / runs * head_dim, *high = low + half;
  const unsigned long long angles = static_cast<unsigned long long>(positions[row]) * half;
  const Floats<N> c = load<N>(cos + angles, pair, half, vectors), s = load<N>(sin + angles, pair, half, vectors);
  Floats<N> a = load<N>(low, pair, half, vectors), b = load<N>(high, pair, half, vectors);
#pragma unroll
  for (int e = 0; e < N; e++) {
    const float was = a.v[e], turn = s.v[e] * sign;
    a.v[e] = was * c.v[e] - b.v[e] * turn;
    b.v[e] = b.v[e] * c.v[e] + was * turn;
  }
  store<N>(low, pair, half, vectors, a);
  store<N>(high, pair, half, vectors, b);
}
