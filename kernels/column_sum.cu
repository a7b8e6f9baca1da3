// column_sum.cu - sums of the columns of a matrix: the gradient of a bias.
// Shapes      x [rows, cols]; partial [chunks, cols] f32, chunk i has rows [i * height, (i + 1) * height); sum [cols] f32, +=
// Launch      column_sum: grid = (ceil(cols / 32), chunks), block = 256; add_chunks: grid = ceil(cols / 256), block = 256
// Traffic     rows cols sizeof(T), and 8 chunks cols; bound: memory
// Repeatable  yes, fixed-order reductions: within a chunk eight interleaved sums, added in order; then chunk by chunk
// Requires    any shape and alignment
// Oracle      src/ops/linear/reference.rs
#include "dev.cuh"

template <class T>
KERNEL(256) column_sum(const T *x, float *partial, unsigned rows, unsigned cols, unsigned height) {
  constexpr unsigned LANES = 256 / WARP;
  SHARED(float, sums, LANES * WARP);
  const unsigned col = blockIdx.x * WARP + threadIdx.x % WARP, lane = threadIdx.x / WARP;
  const unsigned first = blockIdx.y * height, end = min(rows, first + height);
  float sum = 0.0f;
  if (col < cols)
    for (unsigned row = first + lane; row < end; row += LANES) sum += wide(x[static_cast<unsigned long long>(row) * cols + col]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane != 0 || col >= cols) return;
  for (unsigned other = 1; other < LANES; other++) sum += sums[other * WARP + threadIdx.x];
  partial[static_cast<unsigned long long>(blockIdx.y) * cols + col] = sum;
}

KERNEL(256) add_chunks(const float *partial, float *sum, unsigned chunks, unsigned cols) {
  const unsigned col = blockIdx.x * 256 + threadIdx.x;
  if (col >= cols) return;
  float x = 0.0f;
  for (unsigned chunk = 0; chunk < chunks; chunk++) x += partial[static_cast<unsigned long long>(chunk) * cols + col];
  sum[col] += x;
}
