// sum_squares.cu - sum of squares of a tensor.
// Shapes      x [n]; partial [n / 16384] f32; sum [1] f32
// Launch      grid = n / 16384, block = 256; then one block of 1024
// Traffic     n sizeof(T); bound: memory
// Repeatable  yes: a block has 16384 elements whatever the grid, each thread every 256th run of them, and the blocks' sums
//             are added in double in one order. At most 16 squares meet one by one in float, so 10^9 elements cost no digits.
// Requires    any alignment (16-byte accesses where x allows them)
// Oracle      src/ops/sum_squares/reference.rs
#include "elements.cuh"

constexpr unsigned SUM_CHUNK = 16384;

template <class T>
KERNEL(256) sum_squares(const T *x, float *partial, unsigned long long n) {
  constexpr int N = Pack<T>::N;
  SHARED(float, warps, WARP);
  const bool vectors = aligned16(x);
  const unsigned long long first = static_cast<unsigned long long>(blockIdx.x) * SUM_CHUNK;
  float squares[N] = {};
#pragma unroll 4
  for (unsigned at = threadIdx.x * N; at < SUM_CHUNK; at += 256 * N) {
    const Floats<N> v = load<N>(x, first + at, n, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) squares[e] += v.v[e] * v.v[e];
  }
#pragma unroll
  for (int width = N / 2; width; width /= 2)
#pragma unroll
    for (int e = 0; e < width; e++) squares[e] += squares[e + width];
  const float sum = block_sum(squares[0], warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

KERNEL(1024) add_squares(const float *partial, float *sum, unsigned count) {
  SHARED(double, warps, WARP);
  double mine = 0.0;
  for (unsigned i = threadIdx.x; i < count; i += 1024) mine += partial[i];
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) mine += __shfl_xor_sync(ALL, mine, step);
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < WARP; i++) mine += warps[i];
  sum[0] = static_cast<float>(mine);
}
