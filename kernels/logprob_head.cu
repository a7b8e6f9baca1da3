// logprob_head.cu - the head: hidden rows to log-probabilities of given tokens and to the entropy, and the gradient by the
// logits, which exist one tile at a time in registers.
// Shapes      h [rows, hidden], weight [vocab, hidden] T; target [rows] u32; logp, lse, entropy, ln_sum_p2 and the
//             gradients of the first and third [rows] f32; partial [splits, 4, rows] f32; dl [rows, ld] T
// Launch      tiles: grid = (16, splits, groups of 16 row tiles), block = 256, dynamic shared memory = 92160 bytes (three
//             stages of rows of 64 + 16 bytes); combine: rows / 256; dh: any
// FLOPs       2 rows hidden vocab, and 20 for each logit
// Traffic     a tile reads (128 + 256) hidden sizeof(T) for 2 128 256 hidden FLOPs, 85 FLOPs a byte in bf16, from L2: the
//             16 row tiles of a group share weights, its splits share h. From memory: the weights once for each group, h once.
//             Partials 16 bytes for each row and 1024 entries; dl once
// Repeatable  yes; a logit is one sum over hidden in ascending order, the sums over a row's entries have an order that
//             depends on the vocabulary alone
// Requires    hidden >= 1, vocab < 2^32 - 1024; any alignment (copies of 16 bytes where all rows are aligned, else scalar)
// Oracle      src/ops/logprob_head/reference.rs
#include "logits.cuh"

// e^x is 0 long before: a bound on x that keeps 0 * -inf, which is no number, out of sums of e^x x.
constexpr float LOWEST = -1e4f;

// Calls use(row, logit) with the target's logit of each of the warp's rows, in the lane that holds it.
template <class Use>
__device__ __forceinline__ void for_each_target(Tile &part, const unsigned *target, unsigned entry, Use use) {
#pragma unroll
  for (int i = 0; i < OWN; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = acc_row(i, 2 * h);
      const unsigned at = target[row] - entry - acc_col(0, 0);
      if (at >= WARP_TILE || at % 8 > 1) continue;
#pragma unroll
      for (unsigned j = 0; j < WARP_TILE / 8; j++)
#pragma unroll
        for (unsigned e = 0; e < 2; e++)
          if (at == 8 * j + e) use(row, part.v[i][j][2 * h + e]);
    }
}

// ---- forward ---------------------------------------------------------------------------------------------------------

// Of the logits l of a row that went by: their maximum, sum e^(l - max), sum e^(l - max) (l - max) and sum e^(2 (l - max)).
struct Softmax {
  static constexpr int N = 4;
  float max, sum, weighted, squares;
  __device__ __forceinline__ float &at(int n) { return n == 0 ? max : n == 1 ? sum : n == 2 ? weighted : squares; }
};

// The same sums below a larger maximum.
__device__ __forceinline__ Softmax below(const Softmax &s, float max) {
  const float x = s.max - base_of(max), shrink = __expf(x);
  return {max, shrink * s.sum, shrink * fmaf(fmaxf(x, LOWEST), s.sum, s.weighted), shrink * shrink * s.squares};
}

__device__ __forceinline__ Softmax merged(const Softmax &a, const Softmax &b) {
  const float max = fmaxf(a.max, b.max);
  const Softmax x = below(a, max), y = below(b, max);
  return {max, x.sum + y.sum, x.weighted + y.weighted, x.squares + y.squares};
}

// Adds this thread's logits of row [i][h]. A NaN is passed over by the maximum and stays in the sums.
__device__ __forceinline__ void add(Softmax &s, const Tile &part, int i, int h) {
  float max = s.max;
#pragma unroll
  for (int j = 0; j < WARP_TILE / 8; j++) max = fmaxf(max, fmaxf(part.v[i][j][2 * h], part.v[i][j][2 * h + 1]));
  s = below(s, max);
  const float base = base_of(max);
#pragma unroll
  for (int j = 0; j < WARP_TILE / 8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float x = part.v[i][j][2 * h + e] - base, exp = __expf(x);
      s.sum += exp;
      s.weighted = fmaf(exp, fmaxf(x, LOWEST), s.weighted);
      s.squares = fmaf(exp, exp, s.squares);
    }
}

// One block for 128 rows and a split of `span` entries: the split's softmax sums, and the target's logit where it lies in it.
template <class T>
KERNEL(256) logprob_head(const T *h, const T *weight, const unsigned *target, float *partial, float *logp, float scale, unsigned rows, unsigned hidden, unsigned vocab, unsigned span) {
  SHARED(unsigned, targets, ROWS);
  SHARED(float, parts, Softmax::N *WARPS_WIDE *ROWS);
  const unsigned row = first_row(), split = blockIdx.y;
  if (row >= rows) return;
  if (threadIdx.x < ROWS) targets[threadIdx.x] = row + threadIdx.x < rows ? target[row + threadIdx.x] : ~0u;
  Softmax own[OWN][2];
#pragma unroll
  for (int i = 0; i < OWN; i++) own[i][0] = own[i][1] = {minus_infinity(), 0.0f, 0.0f, 0.0f};

  for_each_tile(h, weight, scale, rows, hidden, row, split * span, min((split + 1) * span, vocab), [&](Tile &part, unsigned entry) {
    cut(part, entry, vocab);
    for_each_target(part, targets + warp_row(), entry, [&](int r, float logit) { logp[row + warp_row() + r] = logit; });
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) add(own[i][h], part, i, h);
  });

  merge_rows(own, parts, [&](unsigned r, const Softmax &s) {
    if (row + r < rows) store_sums(partial, split, rows, row + r, s);
  });
}

// Puts a row's splits together, in order; `logp` holds the target's logit before, and nothing where there is no such entry.
KERNEL(256) logprob_head_combine(const float *partial, const unsigned *target, float *logp, float *lse, float *entropy, float *ln_sum_p2, unsigned rows, unsigned splits, unsigned vocab) {
  const unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  Softmax s = load_sums<Softmax>(partial, 0, rows, row);
  for (unsigned split = 1; split < splits; split++) s = merged(s, load_sums<Softmax>(partial, split, rows, row));
  const float log = logf(s.sum);
  lse[row] = s.max + log;
  logp[row] = target[row] < vocab ? logp[row] - (s.max + log) : __uint_as_float(0x7fc00000u);
  if (entropy) entropy[row] = log - s.weighted / s.sum;
  if (ln_sum_p2) ln_sum_p2[row] = logf(s.squares) - 2.0f * log;
}

// ---- backward --------------------------------------------------------------------------------------------------------

// The gradient by the logits of 128 rows and 256 of `entries` entries, the first of which is entry `first` of the vocabulary:
// dl = scale (dlogp (1[target] - p) - dentropy p (ln p + entropy)). dl is aligned to 16 bytes, ld even; no dentropy: null.
template <class T>
KERNEL(256) logprob_head_dlogits(const T *h, const T *weight, const unsigned *target, const float *lse, const float *dlogp, const float *dentropy, const float *entropy, T *dl, float scale, unsigned rows, unsigned hidden, unsigned first, unsigned entries, unsigned ld) {
  SHARED(unsigned, targets, ROWS);
  SHARED(float, of_row, 4 * ROWS);
  const unsigned row = first_row(), start = blockIdx.y * ENTRIES;
  if (row >= rows) return;
  if (threadIdx.x < ROWS) {
    const unsigned at = min(row + threadIdx.x, rows - 1);
    targets[threadIdx.x] = target[at] - first;
    of_row[threadIdx.x] = lse[at];
    of_row[ROWS + threadIdx.x] = scale * dlogp[at];
    of_row[2 * ROWS + threadIdx.x] = dentropy ? scale * dentropy[at] : 0.0f;
    of_row[3 * ROWS + threadIdx.x] = dentropy ? entropy[at] : 0.0f;
  }
  for_each_tile(h, weight, scale, rows, hidden, row, start, min(start + ENTRIES, entries), [&](Tile &part, unsigned entry) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float *mine = of_row + warp_row() + acc_row(i, 2 * h);
        const float lse = mine[0], dlogp = mine[ROWS], dentropy = mine[2 * ROWS], entropy = mine[3 * ROWS];
#pragma unroll
        for (int j = 0; j < WARP_TILE / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float &x = part.v[i][j][2 * h + e];
            const float ln_p = x - lse;
            x = -__expf(ln_p) * fmaf(dentropy, fmaxf(ln_p, LOWEST) + entropy, dlogp);
          }
      }
    for_each_target(part, targets + warp_row(), entry, [&](int r, float &x) { x += of_row[ROWS + warp_row() + r]; });
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const unsigned r = row + warp_row() + acc_row(i, 2 * h);
        if (r >= rows) continue;
#pragma unroll
        for (int j = 0; j < WARP_TILE / 8; j++) {
          const unsigned col = entry + acc_col(j, 0);
          const Pair<T> both = {{narrow<T>(part.v[i][j][2 * h]), narrow<T>(part.v[i][j][2 * h + 1])}};
          if (col < entries) *reinterpret_cast<Pair<T> *>(dl + static_cast<unsigned long long>(r) * ld + col) = both;
        }
      }
  });
}

// dh += what was summed over all entries, rounded once.
template <class T>
KERNEL(256) logprob_head_dh(const float *sum, T *dh, unsigned long long n) {
  const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
  for (unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) dh[i] = narrow<T>(wide(dh[i]) + sum[i]);
}
INSTANCES(logprob_head_dh, (bf16))
