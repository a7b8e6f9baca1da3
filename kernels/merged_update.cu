// merged_update.cu - everything that happens to a weight in one optimizer step, in one pass.
// Shapes      all [n]; grad, weight (the master where there is one), m, v f32; rounded bf16 or null
// Launch      grid = n / (256 * 4), block = 256
// Traffic     28 n bytes, 30 n with a bf16 weight; bound: memory
// Repeatable  yes, no reduction
// Requires    any alignment (16-byte accesses where all tensors allow them)
// Oracle      src/ops/merged_update/reference.rs
#include "elements.cuh"

// A rule says by how much a weight goes down, from its gradient (clipped) and its state (updated in place).
struct AdamW {
  float beta1, fresh1, beta2, fresh2;
  // lr / c1, 1 / sqrt(c2)
  float rate, root;
  float eps;

  __device__ __forceinline__ float direction(float g, float &m, float &v) const {
    m = beta1 * m + fresh1 * g;
    v = beta2 * v + fresh2 * g * g;
    return rate * m / (sqrtf(v) * root + eps);
  }
};

// The pass: a weight keeps the share `keep` (decay) and goes where the rule says.
template <class Rule>
__device__ __forceinline__ void update(const Rule &rule, const float *grad, float *weight, bf16 *rounded, float *m, float *v, unsigned long long n, float clip, float keep) {
  constexpr int N = 4;
  const bool vectors = aligned16(grad) && aligned16(weight) && aligned16(rounded) && aligned16(m) && aligned16(v);
  const unsigned long long at = my_elements<N>();
  const Floats<N> g = load<N>(grad, at, n, vectors);
  Floats<N> w = load<N>(weight, at, n, vectors), first = load<N>(m, at, n, vectors), second = load<N>(v, at, n, vectors);
#pragma unroll
  for (int e = 0; e < N; e++) w.v[e] = w.v[e] * keep - rule.direction(g.v[e] * clip, first.v[e], second.v[e]);
  store<N>(m, at, n, vectors, first);
  store<N>(v, at, n, vectors, second);
  store<N>(weight, at, n, vectors, w);
  if (rounded) store<N>(rounded, at, n, vectors, w);
}

KERNEL(256) update_adamw(const float *grad, float *weight, bf16 *rounded, float *m, float *v, unsigned long long n, float clip, float keep, float beta1, float fresh1, float beta2, float fresh2, float rate, float root, float eps) {
  update(AdamW{beta1, fresh1, beta2, fresh2, rate, root, eps}, grad, weight, rounded, m, v, n, clip, keep);
}
