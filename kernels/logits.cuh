// logits.cuh - tiles of logits, hidden rows times a head, in the registers of a block: what walks the vocabulary without a
// [rows, vocab] matrix.
#pragma once
#include "tile.cuh"

constexpr int THREADS = 256, STAGES = 3;
// A tile of logits, by eight warps of 64 x 64: of the shapes whose sums fit into registers the one that reads least.
constexpr int ROWS = 128, ENTRIES = 256, WARP_TILE = 64, WARPS_WIDE = ENTRIES / WARP_TILE;
using Tile = Acc<WARP_TILE, WARP_TILE>;
// Rows of a tile that one thread has elements of: [i][h] is acc_row(i, 2 h).
constexpr int OWN = WARP_TILE / 16;

// One step of the main loop in shared memory: 64 bytes of each row of both operands.
template <class T> struct Stage {
  static constexpr int DEPTH = 64 / sizeof(T), LD = padded<T>(DEPTH), LEN = (ROWS + ENTRIES) * LD;
};

// First row of this block's tile. Blocks that run together are 16 row tiles beside each other and some splits.
__device__ __forceinline__ unsigned first_row() { return ROWS * (blockIdx.z * gridDim.x + blockIdx.x); }
// First row and entry of this warp's part of a tile.
__device__ __forceinline__ int warp_row() { return threadIdx.x / WARP / WARPS_WIDE * WARP_TILE; }
__device__ __forceinline__ int warp_entry() { return threadIdx.x / WARP % WARPS_WIDE * WARP_TILE; }

// The logits, times `scale`, of rows `row`.. and entries `first`..`last`, tile by tile: use(part, entry) gets each warp's part of a tile, whose
// first column is `entry`. What lies outside rows and entries is 0. Calls a barrier before the first use.
template <class T, class Use>
__device__ __forceinline__ void for_each_tile(const T *h, const T *weight, float scale, unsigned rows, unsigned hidden, unsigned row, unsigned first, unsigned last, Use use) {
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
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int j = 0; j < WARP_TILE / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) part.v[i][j][e] = __fmul_rn(part.v[i][j][e], scale);
    use(part, entry + warp_entry());
  }
}

// ---- what is made of a tile -------------------------------------------------------------------------------------------

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// What is subtracted in exponents: the maximum, or 0 where all is -inf.
__device__ __forceinline__ float base_of(float max) { return max == minus_infinity() ? 0.0f : max; }

// Entries from `end` on, whose probability is 0.
__device__ __forceinline__ void cut(Tile &part, unsigned entry, unsigned end) {
  if (entry + WARP_TILE <= end) return;
#pragma unroll
  for (int i = 0; i < OWN; i++)
#pragma unroll
    for (int j = 0; j < WARP_TILE / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (entry + acc_col(j, e) >= end) part.v[i][j][e] = minus_infinity();
}

// Sums over a row's entries, which lie with four lanes of four warps: use(row, sums) gets those of each row of the tile once.
// S has N numbers, `at` names them and `merged` adds two; `parts` is shared, N WARPS_WIDE ROWS floats. Waits once.
template <class S, class Use>
__device__ __forceinline__ void merge_rows(S (&own)[OWN][2], float *parts, Use use) {
#pragma unroll
  for (int i = 0; i < OWN; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      S s = own[i][h];
#pragma unroll
      for (int lane = 1; lane < 4; lane *= 2) {
        S other;
#pragma unroll
        for (int n = 0; n < S::N; n++) other.at(n) = __shfl_xor_sync(ALL, s.at(n), lane);
        s = merged(s, other);
      }
      if (threadIdx.x % 4 != 0) continue;
      float *part = parts + warp_entry() / WARP_TILE * ROWS + warp_row() + acc_row(i, 2 * h);
#pragma unroll
      for (int n = 0; n < S::N; n++) part[n * WARPS_WIDE * ROWS] = s.at(n);
    }
  __syncthreads();
  if (threadIdx.x >= ROWS) return;
  const auto part = [&](int warp) {
    S s;
#pragma unroll
    for (int n = 0; n < S::N; n++) s.at(n) = parts[(n * WARPS_WIDE + warp) * ROWS + threadIdx.x];
    return s;
  };
  S s = part(0);
#pragma unroll
  for (int warp = 1; warp < WARPS_WIDE; warp++) s = merged(s, part(warp));
  use(threadIdx.x, s);
}

// The sums of a row and a run of the vocabulary, in memory as [runs, N, rows].
template <class S> __device__ __forceinline__ void store_sums(float *partial, unsigned run, unsigned rows, unsigned row, S s) {
  float *to = partial + static_cast<unsigned long long>(run) * S::N * rows + row;
#pragma unroll
  for (int n = 0; n < S::N; n++) to[static_cast<unsigned long long>(n) * rows] = s.at(n);
}
template <class S> __device__ __forceinline__ S load_sums(const float *partial, unsigned run, unsigned rows, unsigned row) {
  const float *from = partial + static_cast<unsigned long long>(run) * S::N * rows + row;
  S s;
#pragma unroll
  for (int n = 0; n < S::N; n++) s.at(n) = from[static_cast<unsigned long long>(n) * rows];
  return s;
}

// Two neighbours of a row.
template <class T> struct __align__(2 * sizeof(T)) Pair {
  T v[2];
};
