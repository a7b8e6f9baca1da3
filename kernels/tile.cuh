// tile.cuh - products of tiles in shared memory, by one warp: bf16 on tensor cores, f32 by fused multiply-adds, results in
// the same places. Every element of a result is one sum over k in ascending order (tensor cores: sixteen at a time), so it
// depends on nothing but its own row and column.
#pragma once
#include "dev.cuh"

// A warp's result: [M, N] floats. Lane l holds of v[i][j] rows 16 i + l / 4 (elements 0, 1) and 8 further (2, 3), columns
// 8 j + 2 (l % 4) and the next.
template <int M, int N> struct Acc {
  static_assert(M % 16 == 0 && N % 16 == 0, "fragments are 16 x 8, loaded two at a time");
  float v[M / 16][N / 8][4];
};

// Row and column of an element of `Acc` in this lane.
__device__ __forceinline__ int acc_row(int i, int e) { return 16 * i + (threadIdx.x % WARP) / 4 + 8 * (e / 2); }
__device__ __forceinline__ int acc_col(int j, int e) { return 8 * j + 2 * (threadIdx.x % 4) + e % 2; }

template <int M, int N> __device__ __forceinline__ void clear(Acc<M, N> &acc) {
#pragma unroll
  for (int i = 0; i < M / 16; i++)
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc.v[i][j][e] = 0.0f;
}

// How a tile of a product lies in memory: element (i, k) at [i * ld + k], or at [k * ld + i].
enum Lies { BY_ROWS, BY_COLS };

// Leading dimension of a tile in shared memory with `cols` columns: rows start at 16-byte boundaries, in other banks.
template <class T> constexpr int padded(int cols) { return cols + 16 / static_cast<int>(sizeof(T)); }

template <class T, Lies HOW> __device__ __forceinline__ float tile_at(const T *p, int ld, int i, int k) {
  return wide(HOW == BY_ROWS ? p[i * ld + k] : p[k * ld + i]);
}

// The 16 x 16 fragment of A at row i, depth k.
template <Lies HOW> __device__ __forceinline__ void load_a(unsigned (&r)[4], const bf16 *p, int ld, int i, int k) {
  const int lane = threadIdx.x % WARP, m = lane / 8, row = lane % 8;
  if (HOW == BY_ROWS) ldmatrix_x4(r, p + (i + 8 * (m % 2) + row) * ld + k + 8 * (m / 2));
  else ldmatrix_x4_trans(r, p + (k + 8 * (m / 2) + row) * ld + i + 8 * (m % 2));
}
// The fragments of B for rows n .. n + 15, depth k: r[0], r[1] of the first eight, r[2], r[3] of the others.
template <Lies HOW> __device__ __forceinline__ void load_b(unsigned (&r)[4], const bf16 *p, int ld, int n, int k) {
  const int lane = threadIdx.x % WARP, m = lane / 8, row = lane % 8;
  if (HOW == BY_ROWS) ldmatrix_x4(r, p + (n + 8 * (m / 2) + row) * ld + k + 8 * (m % 2));
  else ldmatrix_x4_trans(r, p + (k + 8 * (m % 2) + row) * ld + n + 8 * (m / 2));
}

// acc += A B^T over `depth` (a multiple of 16), A [M, depth] and B [N, depth] in shared memory.
template <Lies A, Lies B, int M, int N>
__device__ __forceinline__ void product(Acc<M, N> &acc, const bf16 *a, int lda, const bf16 *b, int ldb, int depth) {
#pragma unroll 2
  for (int k = 0; k < depth; k += 16) {
    unsigned fa[M / 16][4];
#pragma unroll
    for (int i = 0; i < M / 16; i++) load_a<A>(fa[i], a, lda, 16 * i, k);
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
      unsigned fb[4];
      load_b<B>(fb, b, ldb, 16 * j, k);
#pragma unroll
      for (int i = 0; i < M / 16; i++) {
        mma_m16n8k16(acc.v[i][2 * j], fa[i], fb[0], fb[1]);
        mma_m16n8k16(acc.v[i][2 * j + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}
template <Lies A, Lies B, int M, int N>
__device__ __forceinline__ void product(Acc<M, N> &acc, const float *a, int lda, const float *b, int ldb, int depth) {
#pragma unroll 2
  for (int k = 0; k < depth; k++) {
    float fa[M / 16][2];
#pragma unroll
    for (int i = 0; i < M / 16; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) fa[i][h] = tile_at<float, A>(a, lda, acc_row(i, 2 * h), k);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float b0 = tile_at<float, B>(b, ldb, acc_col(j, 0), k), b1 = tile_at<float, B>(b, ldb, acc_col(j, 1), k);
#pragma unroll
      for (int i = 0; i < M / 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc.v[i][j][e] = fmaf(fa[i][e / 2], e % 2 ? b1 : b0, acc.v[i][j][e]);
    }
  }
}

// acc += P B^T with P [M, K] a result of this warp, narrowed to T: the second product of attention.
template <class T, Lies B, int M, int K, int N>
__device__ __forceinline__ void product_of(Acc<M, N> &acc, const Acc<M, K> &p, const bf16 *b, int ldb) {
#pragma unroll
  for (int k = 0; k < K / 16; k++)
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
      unsigned fb[4];
      load_b<B>(fb, b, ldb, 16 * j, 16 * k);
#pragma unroll
      for (int i = 0; i < M / 16; i++) {
        const float(&low)[4] = p.v[i][2 * k], (&high)[4] = p.v[i][2 * k + 1];
        const unsigned fa[4] = {pack2(low[0], low[1]), pack2(low[2], low[3]), pack2(high[0], high[1]), pack2(high[2], high[3])};
        mma_m16n8k16(acc.v[i][2 * j], fa, fb[0], fb[1]);
        mma_m16n8k16(acc.v[i][2 * j + 1], fa, fb[2], fb[3]);
      }
    }
}
template <class T, Lies B, int M, int K, int N>
__device__ __forceinline__ void product_of(Acc<M, N> &acc, const Acc<M, K> &p, const float *b, int ldb) {
  const int quad = threadIdx.x % WARP & ~3;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int owner = quad + k % 8 / 2;
    float fa[M / 16][2];
#pragma unroll
    for (int i = 0; i < M / 16; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) fa[i][h] = __shfl_sync(ALL, p.v[i][k / 8][2 * h + k % 2], owner);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float b0 = tile_at<float, B>(b, ldb, acc_col(j, 0), k), b1 = tile_at<float, B>(b, ldb, acc_col(j, 1), k);
#pragma unroll
      for (int i = 0; i < M / 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc.v[i][j][e] = fmaf(fa[i][e / 2], e % 2 ? b1 : b0, acc.v[i][j][e]);
    }
  }
}

// Starts to copy a [ROWS, COLS] tile into shared memory, by all THREADS threads of the block; `row(i)` points to row i in
// global memory or is null, `cols` of its elements exist, and zeros stand for the rest. With `vectors`, rows start at 16-byte
// boundaries and `cols` is a multiple of sixteen bytes. Complete after cp_async_commit, cp_async_wait and a barrier.
template <int ROWS, int COLS, int THREADS, class T, class Row>
__device__ __forceinline__ void load_tile(T *shared, int ld, int cols, bool vectors, Row row) {
  constexpr int N = Pack<T>::N, CHUNKS = COLS / N;
  static_assert(COLS % N == 0, "rows are copied sixteen bytes at a time");
  for (int at = threadIdx.x; at < ROWS * CHUNKS; at += THREADS) {
    const int i = at / CHUNKS, c = at % CHUNKS * N;
    const T *from = row(i);
    T *to = shared + i * ld + c;
    if (vectors) {
      const bool there = from != nullptr && c < cols;
      cp_async_16(to, there ? from + c : from, there);
    } else {
      for (int e = 0; e < N; e++) to[e] = from != nullptr && c + e < cols ? from[c + e] : narrow<T>(0.0f);
    }
  }
}
