// swiglu.cu - gated activation, forward and backward.
// Shapes      all [n]
// Launch      grid = n / (256 N), block = 256, with N = 16 / sizeof(T)
// Traffic     forward 3 n sizeof(T), backward 5 n sizeof(T); bound: memory
// Repeatable  yes, no reduction
// Requires    any alignment (16-byte accesses where all tensors allow them)
// Oracle      src/ops/swiglu/reference.rs
#include "elements.cuh"

template <class T>
KERNEL(256) swiglu(const T *gate, const T *up, T *y, unsigned long long n) {
  constexpr int N = Pack<T>::N;
  const bool vectors = aligned16(gate) && aligned16(up) && aligned16(y);
  const unsigned long long at = my_elements<N>();
  const Floats<N> u = load<N>(up, at, n, vectors);
  Floats<N> g = load<N>(gate, at, n, vectors);
#pragma unroll
  for (int e = 0; e < N; e++) g.v[e] = g.v[e] / (1.0f + expf(-g.v[e])) * u.v[e];
  store<N>(y, at, n, vectors, g);
}

template <class T>
KERNEL(256) swiglu_backward(const T *dy, const T *gate, const T *up, T *dgate, T *dup, unsigned long long n) {
  constexpr int N = Pack<T>::N;
  const bool vectors = aligned16(dy) && aligned16(gate) && aligned16(up) && aligned16(dgate) && aligned16(dup);
  const unsigned long long at = my_elements<N>();
  const Floats<N> d = load<N>(dy, at, n, vectors);
  Floats<N> g = load<N>(gate, at, n, vectors), u = load<N>(up, at, n, vectors);
#pragma unroll
  for (int e = 0; e < N; e++) {
    const float x = g.v[e], s = 1.0f / (1.0f + expf(-x));
    g.v[e] = d.v[e] * u.v[e] * (s + x * s * (1.0f - s));
    u.v[e] = d.v[e] * x * s;
  }
  store<N>(dgate, at, n, vectors, g);
  store<N>(dup, at, n, vectors, u);
}
