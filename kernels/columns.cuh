// columns.cuh - sums over the rows of a matrix, column by column, in one order: a block has a chunk of the rows and 32 N
// columns; its warps take every eighth row, and their sums are added warp by warp. What a chunk comes to goes into the
// workspace, and `add_chunks` (columns.cu) adds the chunks.
#pragma once
#include "elements.cuh"

// Warps of a block: blocks have 256 threads.
constexpr int COLUMN_STRIPS = 8;

struct Rows {
  unsigned first, last;
};

__device__ __forceinline__ Rows my_chunk(unsigned rows, unsigned chunk_rows) {
  const unsigned first = blockIdx.y * chunk_rows;
  return {first, first + chunk_rows < rows ? first + chunk_rows : rows};
}

// SUMS sums of each column: `term(row, col, sum)` adds row's terms of columns col .. col + N to sum[..][0 .. N], and
// `finish(s, col, sum)` gets sum s of a column. `strips` is shared, COLUMN_STRIPS * SUMS * N * WARP floats.
template <int N, int SUMS, class Term, class Finish>
__device__ __forceinline__ void column_sums(Rows rows, unsigned cols, float *strips, Term term, Finish finish) {
  constexpr int OF_STRIP = SUMS * N * WARP;
  const unsigned lane = threadIdx.x % WARP, strip = threadIdx.x / WARP, tile = blockIdx.x * WARP * N;
  float sum[SUMS][N] = {};
  if (tile + lane * N < cols) {
#pragma unroll 4
    for (unsigned row = rows.first + strip; row < rows.last; row += COLUMN_STRIPS) term(row, tile + lane * N, sum);
  }
#pragma unroll
  for (int s = 0; s < SUMS; s++)
#pragma unroll
    for (int e = 0; e < N; e++) strips[strip * OF_STRIP + (s * N + e) * WARP + lane] = sum[s][e];
  __syncthreads();
  for (unsigned at = threadIdx.x; at < OF_STRIP; at += COLUMN_STRIPS * WARP) {
    const unsigned col = tile + at % WARP * N + at / WARP % N;
    if (col >= cols) continue;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < COLUMN_STRIPS; i++) total += strips[i * OF_STRIP + at];
    finish(at / (N * WARP), col, total);
  }
}
