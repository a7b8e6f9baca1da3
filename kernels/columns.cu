// columns.cu - the second half of a sum over rows: what the chunks came to, added to the gradient of a weight.
// Shapes      partial [chunks, cols], out [cols] f32
// Launch      grid = cols / 32, block = 256
// Traffic     4 chunks cols; bound: latency
// Repeatable  yes, the chunks in one order
// Requires    any shape, any alignment
// Oracle      those of the ops that use it
#include "columns.cuh"

KERNEL(256) add_columns(const float *partial, float *out, unsigned chunks, unsigned cols) {
  SHARED(float, strips, COLUMN_STRIPS * WARP);
  const auto term = [&](unsigned chunk, unsigned col, float(&sum)[1][1]) {
    sum[0][0] += partial[static_cast<unsigned long long>(chunk) * cols + col];
  };
  column_sums<1, 1>({0, chunks}, cols, strips, term, [&](int, unsigned col, float sum) { out[col] += sum; });
}
