// logprob_head.cu - the head: hidden rows to log-probabilities of given tokens and to the entropy, and the gradient by the
// logits, which exist one tile at a time in registers.
// Shapes      h [rows, hidden], weight [vocab, hidden] T; target [rows] u32; logp, lse, entropy and their gradients [rows]
//             f32; partial [3, splits, rows] f32; dl [rows, ld] T
// Launch      tiles: grid = (16, splits, groups of 16 row tiles), block = 256, dynamic shared memory = 92160 bytes (three
//             stages of rows of 64 + 16 bytes); combine: rows / 256; dh: any
// FLOPs       2 rows hidden vocab, and 20 for each logit
// Traffic     a tile reads (128 + 256) hidden sizeof(T) for 2 128 256 hidden FLOPs, 85 FLOPs a byte in bf16, from L2: the
//             16 row tiles of a group share weights, its splits share h. From memory: the weights once for each group, h once.
//             Partials 12 bytes for each row and 1024 entries; dl once
// Repeatable  yes; a logit is one sum over hidden in ascending order, the sums over a row's entries have an order that
//             depends on the vocabulary alone
// Requires    hidden >= 1, vocab < 2^32 - 1024; any alignment (copies of 16 bytes where all rows are aligned, else scalar)
// Oracle      src/ops/logprob_head/reference.rs
#include "tile.cuh"

constexpr int THREADS = 256, STAGES = 3;
// A tile of logits, by eight warps of 64 x 64: of the shapes whose sums fit into registers the one that reads least.
constexpr int ROWS = 128, ENTRIES = 256, WARP_TILE = 64, WARPS_WIDE = ENTRIES / WARP_TILE;
using Tile = Acc<WARP_TILE, WARP_TILE>;
// Rows of a tile that one thread has elements of: [i][h] is acc_row(i, 2 h).
constexpr int OWN = WARP_TILE / 16;

// e^x is 0 long before: a bound on x that keeps 0 * -inf, which is no number, out of sums of e^x x.
constexpr float LOWEST = -1e4f;
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// One step of the main loop in shared memory: 64 bytes of each row of both operands.
template <class T> struct Stage {
  static constexpr int DEPTH = 64 / sizeof(T), LD = padded<T>(DEPTH), LEN = (ROWS + ENTRIES) * LD;
};

// First row of this block's tile. Blocks that run together are 16 row tiles beside each other and some splits.
__device__ __forceinline__ unsigned first_row() { return ROWS * (blockIdx.z * gridDim.x + blockIdx.x); }
// First row and entry of this warp's part of a tile.
__device__ __forceinline__ int warp_row() { return threadIdx.x / WARP / WARPS_WIDE * WARP_TILE; }
__device__ __forceinline__ int warp_entry() { return threadIdx.x / WARP % WARPS_WIDE * WARP_TILE; }

// The logits of rows `row`.. and entries `first`..`last`, tile by tile: use(part, entry) gets each warp's part of a tile, whose
// first column is `entry`. What lies outside rows and entries is 0. Calls a barrier before the first use.
template <class T, class Use>
__device__ __forceinline__ void for_each_tile(const T *h, const T *weight, unsigned rows, unsigned hidden, unsigned row, unsigned first, unsigned last, Use use) {
  constexpr int DEPTH = Stage<T>::DEPTH, LD = Stage<T>::LD;
  DYNAMIC_SHARED(T, stages);
  const bool vectors = aligned16(h) && aligned16(weight) && hidden % Pack<T>::N == 0;
  // One group of copies for each step, empty ones past the last: the count that is waited for stays the same. Steps go on
  // from tile to tile, so the copies of the next one start before this one is done.
  unsigned entry_to_fetch = first, k_to_fetch = 0, fetched = 0;
  const auto fetch = [&] {
    if (entry_to_fetch < last) {
      T *stage = stages + fetched % STAGES * Stage<T>::LEN;
      const unsigned entry = entry_to_fetch, k = k_to_fetch;
      const int cols = static_cast<int>(min(hidden - k, static_cast<unsigned>(DEPTH)));
      load_tile<ROWS, DEPTH, THREADS, true>(stage, LD, cols, vectors, [&](int i) { return row + i < rows ? h + static_cast<unsigned long long>(row + i) * hidden + k : nullptr; });
      load_tile<ENTRIES, DEPTH, THREADS, true>(stage + ROWS * LD, LD, cols, vectors, [&](int i) { return entry + i < last ? weight + static_cast<unsigned long long>(entry + i) * hidden + k : nullptr; });
      fetched++;
      k_to_fetch += DEPTH;
      if (k_to_fetch >= hidden) k_to_fetch = 0, entry_to_fetch += ENTRIES;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < STAGES - 1; step++) fetch();
  unsigned step = 0;
  for (unsigned entry = first; entry < last; entry += ENTRIES) {
    Tile part;
    clear(part);
    for (unsigned k = 0; k < hidden; k += DEPTH, step++) {
      // After the barrier all copies of this step are there, and everyone is done with the stage that is filled next.
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      fetch();
      const T *stage = stages + step % STAGES * Stage<T>::LEN;
      product<BY_ROWS, BY_ROWS>(part, stage + warp_row() * LD, LD, stage + (ROWS + warp_entry()) * LD, LD, DEPTH);
    }
    use(part, entry + warp_entry());
  }
}

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

// Of the logits l of a row that went by: their maximum, sum e^(l - max) and sum e^(l - max) (l - max).
struct Softmax {
  float max, sum, weighted;
};

// What is subtracted in exponents: the maximum, or 0 where all is -inf.
__device__ __forceinline__ float base_of(float max) { return max == minus_infinity() ? 0.0f : max; }

// The same sums below a larger maximum.
__device__ __forceinline__ Softmax below(const Softmax &s, float max) {
  const float x = s.max - base_of(max), shrink = __expf(x);
  return {max, shrink * s.sum, shrink * fmaf(fmaxf(x, LOWEST), s.sum, s.weighted)};
}

__device__ __forceinline__ Softmax merged(const Softmax &a, const Softmax &b) {
  const float max = fmaxf(a.max, b.max);
  const Softmax x = below(a, max), y = below(b, max);
  return {max, x.sum + y.sum, x.weighted + y.weighted};
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
    }
}

// One block for 128 rows and a split of `span` entries: the split's softmax sums, and the target's logit where it lies in it.
template <class T>
KERNEL(256) logprob_head(const T *h, const T *weight, const unsigned *target, float *partial, float *logp, unsigned rows, unsigned hidden, unsigned vocab, unsigned span) {
  SHARED(unsigned, targets, ROWS);
  SHARED(float, parts, 3 * WARPS_WIDE * ROWS);
  const unsigned row = first_row(), split = blockIdx.y;
  if (row >= rows) return;
  if (threadIdx.x < ROWS) targets[threadIdx.x] = row + threadIdx.x < rows ? target[row + threadIdx.x] : ~0u;
  Softmax own[OWN][2];
#pragma unroll
  for (int i = 0; i < OWN; i++) own[i][0] = own[i][1] = {minus_infinity(), 0.0f, 0.0f};

  for_each_tile(h, weight, rows, hidden, row, split * span, min((split + 1) * span, vocab), [&](Tile &part, unsigned entry) {
    if (entry + WARP_TILE > vocab) {
#pragma unroll
      for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < WARP_TILE / 8; j++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (entry + acc_col(j, e) >= vocab) part.v[i][j][e] = minus_infinity();
    }
    for_each_target(part, targets + warp_row(), entry, [&](int r, float logit) { logp[row + warp_row() + r] = logit; });
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) add(own[i][h], part, i, h);
  });

  // A row's entries lie with four lanes of four warps.
#pragma unroll
  for (int i = 0; i < OWN; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Softmax s = own[i][h];
#pragma unroll
      for (int lane = 1; lane < 4; lane *= 2)
        s = merged(s, {__shfl_xor_sync(ALL, s.max, lane), __shfl_xor_sync(ALL, s.sum, lane), __shfl_xor_sync(ALL, s.weighted, lane)});
      float *part = parts + warp_entry() / WARP_TILE * ROWS + warp_row() + acc_row(i, 2 * h);
      if (threadIdx.x % 4 == 0) part[0] = s.max, part[WARPS_WIDE * ROWS] = s.sum, part[2 * WARPS_WIDE * ROWS] = s.weighted;
    }
  __syncthreads();
  if (threadIdx.x >= ROWS || row + threadIdx.x >= rows) return;
  const auto part = [&](int warp) {
    const float *part = parts + warp * ROWS + threadIdx.x;
    return Softmax{part[0], part[WARPS_WIDE * ROWS], part[2 * WARPS_WIDE * ROWS]};
  };
  Softmax s = part(0);
#pragma unroll
  for (int warp = 1; warp < WARPS_WIDE; warp++) s = merged(s, part(warp));
  const unsigned long long plane = static_cast<unsigned long long>(gridDim.y) * rows;
  float *out = partial + static_cast<unsigned long long>(split) * rows + row + threadIdx.x;
  out[0] = s.max, out[plane] = s.sum, out[2 * plane] = s.weighted;
}

// Puts a row's splits together, in order; `logp` holds the target's logit before, and nothing where there is no such entry.
KERNEL(256) logprob_head_combine(const float *partial, const unsigned *target, float *logp, float *lse, float *entropy, unsigned rows, unsigned splits, unsigned vocab) {
  const unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const unsigned long long plane = static_cast<unsigned long long>(splits) * rows;
  const auto part = [&](unsigned split) {
    const float *part = partial + static_cast<unsigned long long>(split) * rows + row;
    return Softmax{part[0], part[plane], part[2 * plane]};
  };
  Softmax s = part(0);
  for (unsigned split = 1; split < splits; split++) s = merged(s, part(split));
  const float log = logf(s.sum);
  lse[row] = s.max + log;
  logp[row] = target[row] < vocab ? logp[row] - (s.max + log) : __uint_as_float(0x7fc00000u);
  if (entropy) entropy[row] = log - s.weighted / s.sum;
}

// ---- backward --------------------------------------------------------------------------------------------------------

// Two neighbours of a row of dl.
template <class T> struct __align__(2 * sizeof(T)) Pair {
  T v[2];
};

// The gradient by the logits of 128 rows and 256 of `entries` entries, the first of which is entry `first` of the vocabulary:
// dl = dlogp (1[target] - p) - dentropy p (ln p + entropy). dl is aligned to 16 bytes, ld even; no dentropy: null.
template <class T>
KERNEL(256) logprob_head_dlogits(const T *h, const T *weight, const unsigned *target, const float *lse, const float *dlogp, const float *dentropy, const float *entropy, T *dl, unsigned rows, unsigned hidden, unsigned first, unsigned entries, unsigned ld) {
  SHARED(unsigned, targets, ROWS);
  SHARED(float, of_row, 4 * ROWS);
  const unsigned row = first_row(), start = blockIdx.y * ENTRIES;
  if (row >= rows) return;
  if (threadIdx.x < ROWS) {
    const unsigned at = min(row + threadIdx.x, rows - 1);
    targets[threadIdx.x] = target[at] - first;
    of_row[threadIdx.x] = lse[at];
    of_row[ROWS + threadIdx.x] = dlogp[at];
    of_row[2 * ROWS + threadIdx.x] = dentropy ? dentropy[at] : 0.0f;
    of_row[3 * ROWS + threadIdx.x] = dentropy ? entropy[at] : 0.0f;
  }
  for_each_tile(h, weight, rows, hidden, row, start, min(start + ENTRIES, entries), [&](Tile &part, unsigned entry) {
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
