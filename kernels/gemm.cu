// gemm.cu - matrix products of any shape, and what follows them in a linear layer.
// Shapes      C[m, n] = or += A[m, k] B[k, n] + bias[n] + residual[m, n]; A stored by rows (ACOLS = 0: a[i * lda + p]) or
//             transposed (1: a[p * lda + i]); B transposed, as weights are (BCOLS = 0: b[j * ldb + p]), or by rows (1:
//             b[p * ldb + j]); bias like A and B, residual like C and with its leading dimension; either may be null
// Launch      grid = tiles of C, block = 128, dynamic shared memory = Tile<T, TILE>::BYTES; TILE 0: 128 x 128, 1: 64 x 64,
//             2: 16 x 64 for the few rows of decoding
// FLOPs       2 m n k; from global memory each tile of C reads (M + N) k elements, from L2 but for the first of each group
// Repeatable  yes; an element of C is one sum over k in ascending order (bf16: sixteen at a time on tensor cores, float: a
//             chain of fused multiply-adds) whatever the tile, so it depends on its row of A and its column of B alone.
//             Bias and residual are added to the sum: as its start they would cost its low bits
// Requires    any m, n, k, alignment and leading dimension (copies of 16 bytes where everything is aligned, else scalar)
// Oracle      src/ops/linear/reference.rs
#include "tile.cuh"

constexpr int THREADS = 128, STAGES = 4;

// What one block computes at a time: an [M, N] tile of C by four warps, in steps of DEPTH elements of k.
template <class T, int TILE> struct Tile {
  static constexpr int M = TILE == 0 ? 128 : TILE == 1 ? 64 : 16, N = TILE == 0 ? 128 : 64;
  static constexpr int WARPS_M = TILE == 2 ? 1 : 2, WARPS_N = 4 / WARPS_M;
  static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
  static constexpr int DEPTH = 64 / sizeof(T);
};

// A [ROWS, DEPTH] tile of an operand in shared memory.
template <class T, Lies LIES, int ROWS, int DEPTH> struct Staged {
  static constexpr int LD = padded<T>(LIES == BY_ROWS ? DEPTH : ROWS);
  static constexpr int LEN = LD * (LIES == BY_ROWS ? ROWS : DEPTH);

  // Starts to copy rows first.. at depth k0.. of an operand [rows, depth] that lies in the same way; zeros around it.
  static __device__ __forceinline__ void load(T *tile, const T *p, unsigned ld, bool vectors, unsigned rows, unsigned depth, unsigned first, unsigned k0) {
    if (LIES == BY_ROWS) {
      load_tile<ROWS, DEPTH, THREADS>(tile, LD, static_cast<int>(min(depth - k0, static_cast<unsigned>(DEPTH))), vectors,
                                      [&](int i) { return first + i < rows ? p + static_cast<unsigned long long>(first + i) * ld + k0 : nullptr; });
    } else {
      load_tile<DEPTH, ROWS, THREADS>(tile, LD, static_cast<int>(min(rows - first, static_cast<unsigned>(ROWS))), vectors,
                                      [&](int d) { return k0 + d < depth ? p + static_cast<unsigned long long>(k0 + d) * ld + first : nullptr; });
    }
  }
  // Where the warp's part of it starts.
  static __device__ __forceinline__ const T *at(const T *tile, int row) { return tile + row * (LIES == BY_ROWS ? LD : 1); }
};

// Two neighbours of a row of C.
template <class O> struct __align__(2 * sizeof(O)) Pair {
  O v[2];
};

// Row and column of the tile of C that this block makes: tiles in groups of eight rows of tiles, column by column, so that
// the blocks that run together share their operands in L2.
__device__ __forceinline__ void place(unsigned tiles_m, unsigned tiles_n, unsigned &tile_m, unsigned &tile_n) {
  constexpr unsigned GROUP = 8;
  const unsigned first = blockIdx.x / (GROUP * tiles_n) * GROUP, within = blockIdx.x % (GROUP * tiles_n);
  const unsigned height = min(GROUP, tiles_m - first);
  tile_m = first + within % height;
  tile_n = within / height;
}

template <class T, class O, int ACOLS, int BCOLS, int TILE>
KERNEL(128) gemm(const T *a, const T *b, O *c, const T *bias, const O *residual, unsigned m, unsigned n, unsigned k, unsigned lda, unsigned ldb, unsigned ldc, unsigned accumulate) {
  using Shape = Tile<T, TILE>;
  constexpr int DEPTH = Shape::DEPTH;
  constexpr Lies A_LIES = ACOLS ? BY_COLS : BY_ROWS, B_LIES = BCOLS ? BY_COLS : BY_ROWS;
  using A = Staged<T, A_LIES, Shape::M, DEPTH>;
  using B = Staged<T, B_LIES, Shape::N, DEPTH>;
  DYNAMIC_SHARED(T, stages);
  unsigned tile_m, tile_n;
  place((m + Shape::M - 1) / Shape::M, (n + Shape::N - 1) / Shape::N, tile_m, tile_n);
  const unsigned row = tile_m * Shape::M, col = tile_n * Shape::N, steps = (k + DEPTH - 1) / DEPTH;

  constexpr unsigned V = Pack<T>::N;
  const bool a_vectors = aligned16(a) && lda % V == 0 && (ACOLS ? m : k) % V == 0;
  const bool b_vectors = aligned16(b) && ldb % V == 0 && (BCOLS ? n : k) % V == 0;
  // One group of copies for each step, empty ones past the last: the count that is waited for stays the same.
  const auto fetch = [&](unsigned step) {
    if (step < steps) {
      T *stage = stages + step % STAGES * (A::LEN + B::LEN);
      A::load(stage, a, lda, a_vectors, m, k, row, step * DEPTH);
      B::load(stage + A::LEN, b, ldb, b_vectors, n, k, col, step * DEPTH);
    }
    cp_async_commit();
  };

  const int warp = threadIdx.x / WARP, warp_m = warp / Shape::WARPS_N * Shape::WARP_M, warp_n = warp % Shape::WARPS_N * Shape::WARP_N;
  Acc<Shape::WARP_M, Shape::WARP_N> acc;
  clear(acc);
#pragma unroll
  for (int step = 0; step < STAGES - 1; step++) fetch(step);
  for (unsigned step = 0; step < steps; step++) {
    // After the barrier all copies of this step are there, and everyone is done with the stage that is filled next.
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    fetch(step + STAGES - 1);
    const T *stage = stages + step % STAGES * (A::LEN + B::LEN);
    product<A_LIES, B_LIES>(acc, A::at(stage, warp_m), A::LD, B::at(stage + A::LEN, warp_n), B::LD, DEPTH);
  }

  const bool pairs = ldc % 2 == 0 && reinterpret_cast<unsigned long long>(c) % sizeof(Pair<O>) == 0 && reinterpret_cast<unsigned long long>(residual) % sizeof(Pair<O>) == 0;
#pragma unroll
  for (int i = 0; i < Shape::WARP_M / 16; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const unsigned r = row + warp_m + acc_row(i, 2 * h);
      if (r >= m) continue;
      const unsigned long long line = static_cast<unsigned long long>(r) * ldc;
#pragma unroll
      for (int j = 0; j < Shape::WARP_N / 8; j++) {
        const unsigned s = col + warp_n + acc_col(j, 0);
        float x[2] = {acc.v[i][j][2 * h], acc.v[i][j][2 * h + 1]};
        const auto finished = [&](float x, unsigned s, O before, O beside) {
          if (accumulate) x += wide(before);
          if (bias) x += wide(bias[s]);
          if (residual) x += wide(beside);
          return narrow<O>(x);
        };
        if (pairs && s + 1 < n) {
          Pair<O> before = {}, beside = {};
          if (accumulate) before = *reinterpret_cast<const Pair<O> *>(c + line + s);
          if (residual) beside = *reinterpret_cast<const Pair<O> *>(residual + line + s);
          *reinterpret_cast<Pair<O> *>(c + line + s) = {{finished(x[0], s, before.v[0], beside.v[0]), finished(x[1], s + 1, before.v[1], beside.v[1])}};
        } else {
          for (int e = 0; e < 2; e++)
            if (s + e < n) c[line + s + e] = finished(x[e], s + e, accumulate ? c[line + s + e] : O{}, residual ? residual[line + s + e] : O{});
        }
      }
    }
}
// y = x W^T, also with float logits; dx = dy W, also with a float accumulator; dW = dy^T x.
INSTANCES(gemm,
          (float, float, 0, 0, 0), (float, float, 0, 0, 1), (float, float, 0, 0, 2),
          (bf16, bf16, 0, 0, 0), (bf16, bf16, 0, 0, 1), (bf16, bf16, 0, 0, 2),
          (bf16, float, 0, 0, 0), (bf16, float, 0, 0, 1), (bf16, float, 0, 0, 2),
          (float, float, 0, 1, 0), (float, float, 0, 1, 1),
          (bf16, bf16, 0, 1, 0), (bf16, bf16, 0, 1, 1),
          (bf16, float, 0, 1, 0), (bf16, float, 0, 1, 1),
          (float, float, 1, 1, 0), (float, float, 1, 1, 1),
          (bf16, float, 1, 1, 0), (bf16, float, 1, 1, 1))
