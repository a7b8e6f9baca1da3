// token_kl.cu - KL(policy || reference) of each row over the whole vocabulary, for one frozen reference after the other beside
// one chunk of the policy's logits, and the gradient by those.
// Shapes      h [rows, hidden], weight [entries, hidden] T: the policy's, or a reference's with its own hidden size; logits,
//             terms [rows, ld] f32 and dl [rows, ld] T of one chunk of `entries` entries; sums of the policy [splits, 2, rows]
//             and of a reference [splits, 3, rows] f32; kl, dkl [K, all rows], lse [1 + K, all rows] f32
// Launch      policy, reference: grid = (16, runs of `span` entries, groups of 16 row tiles), dlogits: (16, entries / 256, groups);
//             block = 256, dynamic shared memory = 92160 bytes (three stages of rows of 64 + 16 bytes); combine: rows / 256
// FLOPs       2 rows hidden vocab for the policy and again for each reference, in both directions, and 20 for each logit
// Traffic     as logprob_head, and the policy's logits: written once, read once by each reference, from L2 (a chunk has 4096
//             entries); in the backward of several references the f32 terms of a chunk besides, read and written by each
// Repeatable  yes; a logit is one sum over hidden in ascending order, the sums over a row's entries have an order that
//             depends on the vocabulary alone, references are added in theirs
// Requires    hidden >= 1, vocab < 2^32 - 1024; h, weight: any alignment; logits, terms, dl aligned to 16 bytes, ld even
// Oracle      src/ops/token_kl/reference.rs
#include "logits.cuh"

// Where this thread's part of row `r` of a tile begins in a matrix of rows of `ld`; its pairs are 8 columns apart.
template <class T> __device__ __forceinline__ T *row_of(T *matrix, unsigned r, unsigned ld, unsigned entry) {
  return matrix + static_cast<unsigned long long>(r) * ld + entry + acc_col(0, 0);
}

// ---- forward ---------------------------------------------------------------------------------------------------------

// Of the logits l of a row that went by: their maximum and sum e^(l - max).
struct Softmax {
  static constexpr int N = 2;
  float max, sum;
  __device__ __forceinline__ float &at(int n) { return n == 0 ? max : sum; }
};

// The same of a reference's m, and sum e^(l - max l) (l - m) over the entries of both, max l being known.
struct Against {
  static constexpr int N = 3;
  Softmax m;
  float weighted;
  __device__ __forceinline__ float &at(int n) { return n == 2 ? weighted : m.at(n); }
};

// What sums lose when the maximum becomes larger.
__device__ __forceinline__ float shrink(float old, float max) { return __expf(old - base_of(max)); }

__device__ __forceinline__ Softmax merged(const Softmax &a, const Softmax &b) {
  const float max = fmaxf(a.max, b.max);
  return {max, fmaf(shrink(a.max, max), a.sum, shrink(b.max, max) * b.sum)};
}
__device__ __forceinline__ Against merged(const Against &a, const Against &b) { return {merged(a.m, b.m), a.weighted + b.weighted}; }

// p x, 0 where p is: x may be infinite, or no number, where two logits are -inf.
__device__ __forceinline__ float weighted(float p, float x) { return p == 0.0f ? 0.0f : p * x; }

// Adds this thread's logits of row [i][h]. A NaN is passed over by the maximum and stays in the sum.
__device__ __forceinline__ void add(Softmax &s, const Tile &part, int i, int h) {
  float max = s.max;
#pragma unroll
  for (int j = 0; j < WARP_TILE / 8; j++) max = fmaxf(max, fmaxf(part.v[i][j][2 * h], part.v[i][j][2 * h + 1]));
  const float base = base_of(max);
  s = {max, shrink(s.max, max) * s.sum};
#pragma unroll
  for (int j = 0; j < WARP_TILE / 8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) s.sum += __expf(part.v[i][j][2 * h + e] - base);
}

// One block for 128 rows and a run of `span` entries: the policy's logits, -inf in the column behind an odd number of them; and
// the run's softmax sums, where they are asked for.
template <class T>
KERNEL(256) token_kl_policy(const T *h, const T *weight, float *logits, float *partial, float scale, unsigned rows, unsigned hidden, unsigned entries, unsigned span, unsigned ld) {
  SHARED(float, parts, Softmax::N *WARPS_WIDE *ROWS);
  const unsigned row = first_row(), run = blockIdx.y;
  if (row >= rows) return;
  Softmax own[OWN][2];
#pragma unroll
  for (int i = 0; i < OWN; i++) own[i][0] = own[i][1] = {minus_infinity(), 0.0f};

  for_each_tile(h, weight, scale, rows, hidden, row, run * span, min((run + 1) * span, entries), [&](Tile &part, unsigned entry) {
    cut(part, entry, entries);
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const unsigned r = row + warp_row() + acc_row(i, 2 * h);
        float *to = row_of(logits, r, ld, entry);
#pragma unroll
        for (int j = 0; j < WARP_TILE / 8; j++)
          if (r < rows && entry + acc_col(j, 0) < entries) *reinterpret_cast<Pair<float> *>(to + 8 * j) = {{part.v[i][j][2 * h], part.v[i][j][2 * h + 1]}};
        add(own[i][h], part, i, h);
      }
  });

  if (!partial) return;
  merge_rows(own, parts, [&](unsigned r, const Softmax &s) {
    if (row + r < rows) store_sums(partial, run, rows, row + r, s);
  });
}

// The same block beside a reference's logits: the run's sums of both. `policy` has the run's sums of the policy.
template <class T>
KERNEL(256) token_kl_reference(const T *h, const T *weight, const float *logits, const float *policy, float *partial, float scale, unsigned rows, unsigned hidden, unsigned entries, unsigned span, unsigned ld) {
  SHARED(float, base_of_row, ROWS);
  SHARED(float, parts, Against::N *WARPS_WIDE *ROWS);
  const unsigned row = first_row(), run = blockIdx.y;
  if (row >= rows) return;
  if (threadIdx.x < ROWS) base_of_row[threadIdx.x] = base_of(load_sums<Softmax>(policy, run, rows, min(row + threadIdx.x, rows - 1)).max);
  Against own[OWN][2];
#pragma unroll
  for (int i = 0; i < OWN; i++) own[i][0] = own[i][1] = {{minus_infinity(), 0.0f}, 0.0f};

  for_each_tile(h, weight, scale, rows, hidden, row, run * span, min((run + 1) * span, entries), [&](Tile &part, unsigned entry) {
    cut(part, entry, entries);
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int at = warp_row() + acc_row(i, 2 * h);
        const float base = base_of_row[at];
        const float *from = row_of(logits, row + at, ld, entry);
#pragma unroll
        for (int j = 0; j < WARP_TILE / 8; j++) {
          if (row + at >= rows || entry + acc_col(j, 0) >= entries) continue;
          const Pair<float> l = *reinterpret_cast<const Pair<float> *>(from + 8 * j);
#pragma unroll
          for (int e = 0; e < 2; e++) own[i][h].weighted += weighted(__expf(l.v[e] - base), l.v[e] - part.v[i][j][2 * h + e]);
        }
        add(own[i][h].m, part, i, h);
      }
  });

  merge_rows(own, parts, [&](unsigned r, const Against &s) {
    if (row + r < rows) store_sums(partial, run, rows, row + r, s);
  });
}

// Puts the splits of `rows` rows together, in order: of all rows those from `first` on, for the reference of this number.
// KL = sum p (l - m) - (lse - ref_lse), the log-sum-exps compared by their parts: they are large, what they differ by need not be.
KERNEL(256) token_kl_combine(const float *policy, const float *reference, float *kl, float *lse, unsigned number, unsigned all, unsigned first, unsigned rows, unsigned splits) {
  const unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  Softmax p = load_sums<Softmax>(policy, 0, rows, row);
  Against q = load_sums<Against>(reference, 0, rows, row);
  for (unsigned split = 1; split < splits; split++) {
    const Softmax next = load_sums<Softmax>(policy, split, rows, row);
    Against other = load_sums<Against>(reference, split, rows, row);
    const float old = p.max;
    p = merged(p, next);
    q.weighted = weighted(shrink(old, p.max), q.weighted);
    other.weighted = weighted(shrink(next.max, p.max), other.weighted);
    q = merged(q, other);
  }
  const float log_p = logf(p.sum), log_q = logf(q.m.sum);
  const unsigned long long of_ref = static_cast<unsigned long long>(number) * all;
  lse += first + row, kl += of_ref + first + row;
  *lse = p.max + log_p;
  lse[of_ref + all] = q.m.max + log_q;
  *kl = q.weighted / p.sum - ((p.max - q.m.max) + (log_p - log_q));
}

// ---- backward --------------------------------------------------------------------------------------------------------

// What one reference adds to the gradient by the policy's logits of 128 rows and 256 entries: scale dkl (ln p - ln q - kl), to `terms`,
// which the `first` reference writes; the last one, which has a `dl`, gives it p times their sum.
template <class T>
KERNEL(256) token_kl_dlogits(const T *h, const T *weight, const float *logits, const float *lse, const float *ref_lse, const float *kl, const float *dkl, float *terms, T *dl, float scale, unsigned rows, unsigned hidden, unsigned entries, unsigned ld, unsigned first) {
  SHARED(float, of_row, 4 * ROWS);
  const unsigned row = first_row(), start = blockIdx.y * ENTRIES;
  if (row >= rows) return;
  if (threadIdx.x < ROWS) {
    const unsigned at = min(row + threadIdx.x, rows - 1);
    of_row[threadIdx.x] = lse[at];
    of_row[ROWS + threadIdx.x] = ref_lse[at];
    of_row[2 * ROWS + threadIdx.x] = kl[at];
    of_row[3 * ROWS + threadIdx.x] = scale * dkl[at];
  }
  for_each_tile(h, weight, scale, rows, hidden, row, start, min(start + ENTRIES, entries), [&](Tile &part, unsigned entry) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int at = warp_row() + acc_row(i, 2 * h);
        if (row + at >= rows) continue;
        const float *mine = of_row + at;
        const float lse = mine[0], ref_lse = mine[ROWS], kl = mine[2 * ROWS], dkl = mine[3 * ROWS];
        const float *from = row_of(logits, row + at, ld, entry);
        float *term = row_of(terms, row + at, ld, entry);
        T *to = row_of(dl, row + at, ld, entry);
#pragma unroll
        for (int j = 0; j < WARP_TILE / 8; j++) {
          if (entry + acc_col(j, 0) >= entries) continue;
          const Pair<float> l = *reinterpret_cast<const Pair<float> *>(from + 8 * j);
          Pair<float> sum = {{0.0f, 0.0f}};
          if (!first) sum = *reinterpret_cast<const Pair<float> *>(term + 8 * j);
#pragma unroll
          for (int e = 0; e < 2; e++) sum.v[e] = fmaf(dkl, (l.v[e] - lse) - (part.v[i][j][2 * h + e] - ref_lse) - kl, sum.v[e]);
          if (dl) {
            const Pair<T> both = {{narrow<T>(weighted(__expf(l.v[0] - lse), sum.v[0])), narrow<T>(weighted(__expf(l.v[1] - lse), sum.v[1]))}};
            *reinterpret_cast<Pair<T> *>(to + 8 * j) = both;
          } else {
            *reinterpret_cast<Pair<float> *>(term + 8 * j) = sum;
          }
        }
      }
  });
}
