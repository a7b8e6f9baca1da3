// norm.cuh - rows and the threads that share them: GROUP neighbours take a row, a few lanes of a warp, a warp or the whole
// block, so that short rows (the norms of heads) waste none. A row's sums have one order, which its length alone decides.
#pragma once
#include "elements.cuh"

constexpr int NORM_THREADS = 256;

template <int GROUP> struct Row {
  unsigned lane;
  unsigned long long index;
  // Threads past the last row go through the motions of the last one, since the shuffles want all lanes; they write nothing.
  bool there;
};

template <int GROUP> __device__ __forceinline__ Row<GROUP> my_row(unsigned rows) {
  const unsigned row = blockIdx.x * (NORM_THREADS / GROUP) + threadIdx.x / GROUP;
  return {threadIdx.x % GROUP, row < rows ? row : rows - 1, row < rows};
}

// Over the threads of a row; every one gets it. `partial` is shared, a float for each warp; only whole blocks need it.
template <int GROUP> __device__ __forceinline__ float row_sum(float x, float *partial) {
  if constexpr (GROUP > WARP) {
    return block_sum(x, partial);
  } else {
#pragma unroll
    for (int step = GROUP / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
  }
}
