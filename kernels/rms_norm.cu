// rms_norm.cu - RMS normalization, forward and backward.
// Shapes      x, y, dy, dx [rows, hidden]; weight, dweight [hidden]; rstd [rows] f32; partial [chunks, hidden] f32
// Launch      rows: grid = rows, block = 256; columns: grid = (hidden / 32, chunks), block = 256
// Traffic     forward 2 rows hidden sizeof(T); backward 4 rows hidden sizeof(T), and 2 again for dweight; bound: memory
// Repeatable  yes, fixed-order reductions
// Requires    hidden >= 1; any alignment (vector body, scalar tail)
// Oracle      src/ops/rms_norm/reference.rs
#include "dev.cuh"

// One block for each row: a row's result depends on its own length alone.
template <class T>
KERNEL(256) rms_norm(const T *x, const T *weight, T *y, float *rstd, unsigned hidden, float eps) {
  SHARED(float, partial, 32);
  x += static_cast<unsigned long long>(blockIdx.x) * hidden;
  y += static_cast<unsigned long long>(blockIdx.x) * hidden;
  float squares = 0.0f;
  for (unsigned i = threadIdx.x; i < hidden; i += blockDim.x) squares += wide(x[i]) * wide(x[i]);
  const float r = rsqrtf(block_sum(squares, partial) / hidden + eps);
  for (unsigned i = threadIdx.x; i < hidden; i += blockDim.x) y[i] = narrow<T>(wide(x[i]) * r * wide(weight[i]));
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}
