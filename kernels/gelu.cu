// gelu.cu - Gaussian error linear unit, exact or with tanh, forward and backward.
// Shapes      all [n]
// Launch      grid = n / (256 N), block = 256, with N = 16 / sizeof(T)
// Traffic     forward 2 n sizeof(T), backward 3 n sizeof(T); bound: memory
// Repeatable  yes, no reduction
// Requires    any alignment (16-byte accesses where all tensors allow them)
// Oracle      src/ops/gelu/reference.rs
#include "elements.cuh"

// Template arguments: ops::gelu::Curve.
constexpr int EXACT = 0, TANH = 1;
// 1 / sqrt(2), 1 / sqrt(2 pi); u = LINEAR x + CUBE x^3
constexpr float SQRT_HALF = 0.70710678f, PEAK = 0.39894228f, LINEAR = 0.79788456f, CUBE = 0.035677408f;

// Beyond +-30 the tanh curve is exactly 0 or x, and its powers of x would overflow. NaN stays.
template <int CURVE> __device__ __forceinline__ float tame(float x) {
  constexpr float SATURATED = 30.0f;
  return CURVE == EXACT ? x : x > SATURATED ? SATURATED : x < -SATURATED ? -SATURATED : x;
}

// P(x) of a tame x. tanh: sigmoid(2 u), since 1 + tanh would cancel for negative u.
template <int CURVE> __device__ __forceinline__ float gelu_gate(float x) {
  return CURVE == EXACT ? 0.5f + 0.5f * erff(x * SQRT_HALF) : 1.0f / (1.0f + expf(-2.0f * (x * (CUBE * x * x + LINEAR))));
}

template <class T, int CURVE>
KERNEL(256) gelu(const T *x, T *y, unsigned long long n) {
  constexpr int N = Pack<T>::N;
  const bool vectors = aligned16(x) && aligned16(y);
  const unsigned long long at = my_elements<N>();
  Floats<N> v = load<N>(x, at, n, vectors);
#pragma unroll
  for (int e = 0; e < N; e++) v.v[e] *= gelu_gate<CURVE>(tame<CURVE>(v.v[e]));
  store<N>(y, at, n, vectors, v);
}
INSTANCES(gelu, (float, 0), (float, 1), (bf16, 0), (bf16, 1))

template <class T, int CURVE>
KERNEL(256) gelu_backward(const T *dy, const T *x, T *dx, unsigned long long n) {
  constexpr int N = Pack<T>::N;
  const bool vectors = aligned16(dy) && aligned16(x) && aligned16(dx);
  const unsigned long long at = my_elements<N>();
  const Floats<N> d = load<N>(dy, at, n, vectors);
  Floats<N> v = load<N>(x, at, n, vectors);
#pragma unroll
  for (int e = 0; e < N; e++) {
    const float tamed = tame<CURVE>(v.v[e]), p = gelu_gate<CURVE>(tamed);
    const float slope = CURVE == EXACT ? PEAK * expf(-0.5f * tamed * tamed)
                                       : p * (1.0f - p) * 2.0f * (3.0f * CUBE * tamed * tamed + LINEAR);
    v.v[e] = d.v[e] * (p + tamed * slope);
  }
  store<N>(dx, at, n, vectors, v);
}
INSTANCES(gelu_backward, (float, 0), (float, 1), (bf16, 0), (bf16, 1))
