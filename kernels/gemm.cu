// gemm.cu - matrix products of any shape, and what follows them in a linear layer.
// Shapes      C[m, n] = or += scale A[m, k] B[k, n] + bias[n] + residual[m, n]; A stored by rows (ACOLS = 0: a[i * lda + p]) or
//             transposed (1: a[p * lda + i]); B transposed, as weights are (BCOLS = 0: b[j * ldb + p]), or by rows (1:
//             b[p * ldb + j]); bias like A and B, residual like C and with its leading dimension; either may be null
// Launch      grid = tiles of C, block = 128, dynamic shared memory for STAGES steps of A and B, or the tile
//             [M, N + 8] of floats if that is more (products.rs); TILE 0: 128 x 128, 1: 64 x 64,
//             2: 16 x 64 for the few rows of decoding
// FLOPs       2 m n k; from global memory each tile of C reads (M + N) k elements, from L2 but for the first of each group
// Repeatable  yes; an element of C is one sum over k in ascending order (bf16: sixteen at a time on tensor cores, float: a
//             chain of fused multiply-adds) whatever the tile, so it depends on its row of A and its column of B alone.
//             Bias and residual are added to the sum: as its start they would cost its low bits
// Requires    any m, n, k, alignment and leading dimension (copies of 16 bytes where everything is aligned, else scalar)
// Oracle      src/ops/linear/reference.rs
#include "tile.cuh"

constexpr int THREADS = 128, STAGES = 4, AHEAD = STAGES - 1;

// What one block computes at a time: an [M, N] tile of C by four warps, in steps of DEPTH elements of k.
template <class T, int TILE> struct Tile {
  static constexpr int M = TILE == 0 ? 128 : TILE == 1 ? 64 : 16, N = TILE == 0 ? 128 : 64;
  static constexpr int WARPS_M = TILE == 2 ? 1 : 2, WARPS_N = 4 / WARPS_M;
  static constexpr int WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
  static constexpr int DEPTH = 64 / sizeof(T);
  // Of the finished tile in shared memory: quads of lanes that store pairs of floats meet no other in a bank.
  static constexpr int LD = N + 8;
};

// A [ROWS, DEPTH] tile of an operand in shared memory.
template <class T, Lies LIES, int ROWS, int DEPTH> struct Staged {
  static constexpr int LD = padded<T>(LIES == BY_ROWS ? DEPTH : ROWS);
  static constexpr int LEN = LD * (LIES == BY_ROWS ? ROWS : DEPTH);

  // Starts to copy rows first.. at depth k0.. of an operand [rows, depth] that lies in the same way; zeros around it.
  static __device__ __forceinline__ void load(T *tile, const T *p, unsigned ld, bool vectors, unsigned rows, unsigned depth, unsigned first, unsigned k0) {
    if (LIES == BY_ROWS) {
      load_tile<ROWS, DEPTH, THREADS, true>(tile, LD, static_cast<int>(min(depth - k0, static_cast<unsigned>(DEPTH))), vectors,
                                      [&](int i) { return first + i < rows ? p + static_cast<unsigned long long>(first + i) * ld + k0 : nullptr; });
    } else {
      load_tile<DEPTH, ROWS, THREADS, true>(tile, LD, static_cast<int>(min(rows - first, static_cast<unsigned>(ROWS))), vectors,
                                      [&](int d) { return k0 + d < depth ? p + static_cast<unsigned long long>(k0 + d) * ld + first : nullptr; });
    }
  }
  // Where the warp's part of it starts.
  static __device__ __forceinline__ const T *at(const T *tile, int row) { return tile + row * (LIES == BY_ROWS ? LD : 1); }
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

// Four neighbours of a row of C.
template <class O> struct __align__(4 * sizeof(O)) Quad {
  O v[4];
};
template <class O> __device__ __forceinline__ bool aligned_quad(const O *p) { return reinterpret_cast<unsigned long long>(p) % sizeof(Quad<O>) == 0; }

// An element of C: its sum over k, and what comes after that.
template <class T, class O>
__device__ __forceinline__ O finished(float sum, float scale, bool accumulate, O before, const T *bias, unsigned col, const O *residual, O beside) {
  sum *= scale;
  if (accumulate) sum += wide(before);
  if (bias) sum += wide(bias[col]);
  if (residual) sum += wide(beside);
  return narrow<O>(sum);
}

template <class T, class O, int ACOLS, int BCOLS, int TILE>
KERNEL(128, 2) gemm(const T *a, const T *b, O *c, const T *bias, const O *residual, unsigned m, unsigned n, unsigned k, unsigned lda, unsigned ldb, unsigned ldc, float scale, unsigned accumulate) {
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
  const int warp = threadIdx.x / WARP, warp_m = warp / Shape::WARPS_N * Shape::WARP_M, warp_n = warp % Shape::WARPS_N * Shape::WARP_N;
  Acc<Shape::WARP_M, Shape::WARP_N> acc;
  clear(acc);
  // Copies run AHEAD steps before the products, one group for each step, empty past the last: the count to wait for stays.
  for (unsigned step = 0; step < steps + AHEAD; step++) {
    if (step >= AHEAD) {
      // Then all copies for this product are there, and everyone is done with the stage that is filled next.
      cp_async_wait<AHEAD - 1>();
      __syncthreads();
    }
    if (step < steps) {
      T *stage = stages + step % STAGES * (A::LEN + B::LEN);
      A::load(stage, a, lda, a_vectors, m, k, row, step * DEPTH);
      B::load(stage + A::LEN, b, ldb, b_vectors, n, k, col, step * DEPTH);
    }
    cp_async_commit();
    if (step >= AHEAD) {
      const T *stage = stages + (step - AHEAD) % STAGES * (A::LEN + B::LEN);
      product<A_LIES, B_LIES>(acc, A::at(stage, warp_m), A::LD, B::at(stage + A::LEN, warp_n), B::LD, DEPTH);
    }
  }

  // Through shared memory, in the place of the stages, so that a warp writes whole rows of the tile.
  float *tile = reinterpret_cast<float *>(stages);
  __syncthreads();
  store_acc(tile + warp_m * Shape::LD + warp_n, Shape::LD, acc);
  __syncthreads();
  constexpr int V4 = 4, ACROSS = Shape::N / V4;
  const unsigned s = col + threadIdx.x % ACROSS * V4;
  const bool vectors = ldc % V4 == 0 && s + V4 <= n && aligned_quad(c) && aligned_quad(residual);
#pragma unroll 1
  for (int i = threadIdx.x / ACROSS; i < Shape::M && row + i < m; i += THREADS / ACROSS) {
    const unsigned long long at = static_cast<unsigned long long>(row + i) * ldc + s;
    const float *sums = tile + i * Shape::LD + (s - col);
    if (vectors) {
      Quad<O> before = {}, beside = {}, after;
      if (accumulate) before = *reinterpret_cast<const Quad<O> *>(c + at);
      if (residual) beside = *reinterpret_cast<const Quad<O> *>(residual + at);
#pragma unroll
      for (int e = 0; e < V4; e++) after.v[e] = finished(sums[e], scale, accumulate, before.v[e], bias, s + e, residual, beside.v[e]);
      *reinterpret_cast<Quad<O> *>(c + at) = after;
    } else {
#pragma unroll 1
      for (int e = 0; e < V4 && s + e < n; e++)
        c[at + e] = finished(sums[e], scale, accumulate, accumulate ? c[at + e] : O{}, bias, s + e, residual, residual ? residual[at + e] : O{});
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
