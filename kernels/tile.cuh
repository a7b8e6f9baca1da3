// tile.cuh - products of tiles in shared memory, by one warp: bf16 on tensor cores, f32 by fused multiply-adds, results in
// the same places. Every element of a result is one sum over k in ascending order (tensor cores: sixteen at a time), so it
// depends on nothing but its own row and column.
#pragma once
#include "dev.cuh"

// Two neighbours from an even place, in one access.
struct __align__(8) Two {
  float v[2];
};

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

// A result into shared memory, from an 8-byte boundary on, `ld` even (a multiple of 32 and 8 more: no two lanes meet in a bank).
template <int M, int N> __device__ __forceinline__ void store_acc(float *to, int ld, const Acc<M, N> &acc) {
#pragma unroll
  for (int i = 0; i < M / 16; i++)
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) *reinterpret_cast<Two *>(to + acc_row(i, 2 * h) * ld + acc_col(j, 0)) = {{acc.v[i][j][2 * h], acc.v[i][j][2 * h + 1]}};
}

// How a tile of a product lies in memory: element (i, k) at [i * ld + k], or at [k * ld + i].
enum Lies { BY_ROWS, BY_COLS };

// Leading dimension of a tile in shared memory with `cols` columns: rows start at 16-byte boundaries, in other banks.
template <class T> constexpr int padded(int cols) { return cols + 16 / static_cast<int>(sizeof(T)); }

__device__ __forceinline__ void load_two(float &first, float &second, const float *p) {
  const Two two = *reinterpret_cast<const Two *>(p);
  first = two.v[0], second = two.v[1];
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

// The f32 fragments at depths k and k + 1: of A rows i + l / 4 and 8 further, of B rows n + 2 (l % 4) and the next. Two floats
// are read at a time where they are neighbours; with the leading dimension of `padded` no two lanes meet in a bank.
template <Lies HOW> __device__ __forceinline__ void load_a(float (&r)[2][2], const float *p, int ld, int i, int k) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float *at = p + (HOW == BY_ROWS ? acc_row(0, 2 * h) * ld : acc_row(0, 2 * h)) + (HOW == BY_ROWS ? i * ld + k : k * ld + i);
    if (HOW == BY_ROWS) load_two(r[h][0], r[h][1], at);
    else r[h][0] = at[0], r[h][1] = at[ld];
  }
}
template <Lies HOW> __device__ __forceinline__ void load_b(float (&r)[2][2], const float *p, int ld, int n, int k) {
  const int row = n + acc_col(0, 0);
  if (HOW == BY_ROWS) {
    load_two(r[0][0], r[0][1], p + row * ld + k);
    load_two(r[1][0], r[1][1], p + (row + 1) * ld + k);
  } else {
    load_two(r[0][0], r[1][0], p + k * ld + row);
    load_two(r[0][1], r[1][1], p + (k + 1) * ld + row);
  }
}

// acc += A B^T over `depth` (a multiple of 16), A [M, depth] and B [N, depth] in shared memory from 16-byte boundaries, their
// leading dimensions multiples of sixteen bytes.
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
#pragma unroll 1
  for (int k = 0; k < depth; k += 2) {
    float fa[M / 16][2][2];
#pragma unroll
    for (int i = 0; i < M / 16; i++) load_a<A>(fa[i], a, lda, 16 * i, k);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      float fb[2][2];
      load_b<B>(fb, b, ldb, 8 * j, k);
#pragma unroll
      for (int d = 0; d < 2; d++)
#pragma unroll
        for (int i = 0; i < M / 16; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) acc.v[i][j][e] = fmaf(fa[i][e / 2][d], fb[e % 2][d], acc.v[i][j][e]);
    }
  }
}

// acc += P B^T with P [M, K] a result of this warp, narrowed to T, and B [N, K] in shared memory: the second product of
// attention. P goes from registers to registers: a result lies as the first operand does.
template <class T, Lies B, int M, int K, int N>
__device__ __forceinline__ void product_of(Acc<M, N> &acc, const Acc<M, K> &p, const bf16 *b, int ldb) {
#pragma unroll
  for (int k = 0; k < K / 16; k++) {
    unsigned fa[M / 16][4];
#pragma unroll
    for (int i = 0; i < M / 16; i++)
#pragma unroll
      for (int r = 0; r < 4; r++) fa[i][r] = pack2(p.v[i][2 * k + r / 2][r % 2 * 2], p.v[i][2 * k + r / 2][r % 2 * 2 + 1]);
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
      unsigned fb[4];
      load_b<B>(fb, b, ldb, 16 * j, 16 * k);
#pragma unroll
      for (int i = 0; i < M / 16; i++) {
        mma_m16n8k16(acc.v[i][2 * j], fa[i], fb[0], fb[1]);
        mma_m16n8k16(acc.v[i][2 * j + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}
// As floats, an element of P is with the lane of its row that has its column.
template <class T, Lies B, int M, int K, int N>
__device__ __forceinline__ void product_of(Acc<M, N> &acc, const Acc<M, K> &p, const float *b, int ldb) {
  const int quad = threadIdx.x % WARP & ~3;
#pragma unroll
  for (int k = 0; k < K; k += 2) {
    float fa[M / 16][2][2];
#pragma unroll
    for (int i = 0; i < M / 16; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) fa[i][e / 2][e % 2] = __shfl_sync(ALL, p.v[i][k / 8][e], quad + k % 8 / 2);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      float fb[2][2];
      load_b<B>(fb, b, ldb, 8 * j, k);
#pragma unroll
      for (int d = 0; d < 2; d++)
#pragma unroll
        for (int i = 0; i < M / 16; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) acc.v[i][j][e] = fmaf(fa[i][e / 2][d], fb[e % 2][d], acc.v[i][j][e]);
    }
  }
}

// Starts to copy a [ROWS, COLS] tile into shared memory, by all THREADS threads of the block; `row(i)` points to row i in
// global memory or is null, `cols` of its elements exist, and zeros stand for the rest. With `vectors`, rows start at 16-byte
// boundaries and `cols` is a multiple of sixteen bytes. Complete after cp_async_commit, cp_async_wait and a barrier. A thread's
// TURNS are written out where a row is found cheaply: the compiler does not see that their number is known.
template <int ROWS, int COLS, int THREADS, bool WRITTEN_OUT, class T, class Row>
__device__ __forceinline__ void load_tile(T *shared, int ld, int cols, bool vectors, Row row) {
  constexpr int N = Pack<T>::N, CHUNKS = COLS / N;
  static_assert(COLS % N == 0, "rows are copied sixteen bytes at a time");
  const auto copy = [&](int at) {
    const int i = at / CHUNKS, c = at % CHUNKS * N;
    const T *from = row(i);
    const bool there = from != nullptr && c < cols;
    cp_async_16(shared + i * ld + c, there ? from + c : from, there);
  };
  if (vectors && WRITTEN_OUT) {
    constexpr int TURNS = (ROWS * CHUNKS + THREADS - 1) / THREADS;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const int at = threadIdx.x + turn * THREADS;
      if (ROWS * CHUNKS % THREADS == 0 || at < ROWS * CHUNKS) copy(at);
    }
  } else if (vectors) {
#pragma unroll
    for (int at = threadIdx.x; at < ROWS * CHUNKS; at += THREADS) copy(at);
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < ROWS * COLS; at += THREADS) {
      const int i = at / COLS, c = at % COLS;
      const T *from = row(i);
      shared[i * ld + c] = from != nullptr && c < cols ? from[c] : narrow<T>(0.0f);
    }
  }
}
