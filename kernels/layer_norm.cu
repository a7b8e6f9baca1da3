// layer_norm.cu - layer normalization, forward and backward.
// Shapes      x, y, dy, dx [rows, hidden]; weight, bias [hidden]; stats [rows, 2] f32; partial [2, chunks, hidden] f32
// Launch      rows: grid = rows / (256 / GROUP), block = 256; columns: grid = (hidden / (32 N), chunks), block = 256, with
//             N = 16 / sizeof(T)
// Traffic     forward 2 rows hidden sizeof(T) (x is read three times, from the cache after the first); backward 4 rows
//             hidden sizeof(T), and 2 again for dweight and dbias; bound: memory
// Repeatable  yes, fixed-order reductions
// Requires    hidden >= 1; any alignment (16-byte accesses where all rows allow them)
// Oracle      src/ops/layer_norm/reference.rs
#include "columns.cuh"
#include "norm.cuh"

// The variance is summed from centred values: mean(x^2) - mean^2 cancels where the mean is large.
template <class T, int GROUP>
KERNEL(256) layer_norm(const T *x, const T *weight, const T *bias, T *y, float *stats, unsigned rows, unsigned hidden, float eps) {
  constexpr int N = Pack<T>::N;
  SHARED(float, partial, 2 * WARP);
  const bool vectors = hidden % N == 0 && aligned16(x) && aligned16(weight) && aligned16(bias) && aligned16(y);
  const Row<GROUP> row = my_row<GROUP>(rows);
  x += row.index * hidden;
  y += row.index * hidden;
  float sum = 0.0f, squares = 0.0f;
  for (unsigned at = row.lane * N; at < hidden; at += GROUP * N) {
    const Floats<N> v = load<N>(x, at, hidden, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) sum += v.v[e];
  }
  const float mean = row_sum<GROUP>(sum, partial) / hidden;
  for (unsigned at = row.lane * N; at < hidden; at += GROUP * N) {
    const Floats<N> v = load<N>(x, at, hidden, vectors);
#pragma unroll
    for (int e = 0; e < N; e++)
      if (at + e < hidden) squares += (v.v[e] - mean) * (v.v[e] - mean);
  }
  const float r = 1.0f / sqrtf(row_sum<GROUP>(squares, partial + WARP) / hidden + eps);
  if (!row.there) return;
  for (unsigned at = row.lane * N; at < hidden; at += GROUP * N) {
    const Floats<N> w = load<N>(weight, at, hidden, vectors), b = load<N>(bias, at, hidden, vectors);
    Floats<N> v = load<N>(x, at, hidden, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) v.v[e] = (v.v[e] - mean) * r * w.v[e] + b.v[e];
    store<N>(y, at, hidden, vectors, v);
  }
  if (row.lane == 0) {
    stats[2 * row.index] = mean;
    stats[2 * row.index + 1] = r;
  }
}
INSTANCES(layer_norm, (float, 8), (float, 32), (float, 256), (bf16, 8), (bf16, 32), (bf16, 256))

// dx += rstd (dy w - mean(dy w) - n mean(dy w n)), n = (x - mean) rstd
template <class T, int GROUP>
KERNEL(256) layer_norm_backward(const T *dy, const T *x, const T *weight, const float *stats, T *dx, unsigned rows, unsigned hidden) {
  constexpr int N = Pack<T>::N;
  SHARED(float, partial, 2 * WARP);
  const bool vectors = hidden % N == 0 && aligned16(dy) && aligned16(x) && aligned16(weight) && aligned16(dx);
  const Row<GROUP> row = my_row<GROUP>(rows);
  dy += row.index * hidden;
  x += row.index * hidden;
  dx += row.index * hidden;
  const float mean = stats[2 * row.index], r = stats[2 * row.index + 1];
  float plain = 0.0f, along = 0.0f;
  for (unsigned at = row.lane * N; at < hidden; at += GROUP * N) {
    const Floats<N> d = load<N>(dy, at, hidden, vectors), v = load<N>(x, at, hidden, vectors);
    const Floats<N> w = load<N>(weight, at, hidden, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) {
      plain += d.v[e] * w.v[e];
      along += d.v[e] * w.v[e] * ((v.v[e] - mean) * r);
    }
  }
  const float mean_d = row_sum<GROUP>(plain, partial) / hidden, mean_dn = row_sum<GROUP>(along, partial + WARP) / hidden;
  if (!row.there) return;
  for (unsigned at = row.lane * N; at < hidden; at += GROUP * N) {
    const Floats<N> d = load<N>(dy, at, hidden, vectors), v = load<N>(x, at, hidden, vectors);
    const Floats<N> w = load<N>(weight, at, hidden, vectors);
    Floats<N> sum = load<N>(dx, at, hidden, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) sum.v[e] += r * (d.v[e] * w.v[e] - mean_d - (v.v[e] - mean) * r * mean_dn);
    store<N>(dx, at, hidden, vectors, sum);
  }
}
INSTANCES(layer_norm_backward, (float, 8), (float, 32), (float, 256), (bf16, 8), (bf16, 32), (bf16, 256))

// partial[0, chunk] = sum over the chunk's rows of dy n, partial[1, chunk] that of dy
template <class T>
KERNEL(256) layer_norm_columns(const T *dy, const T *x, const float *stats, float *partial, unsigned rows, unsigned hidden, unsigned chunk_rows) {
  constexpr int N = Pack<T>::N;
  SHARED(float, strips, COLUMN_STRIPS * 2 * WARP * N);
  const bool vectors = hidden % N == 0 && aligned16(dy) && aligned16(x);
  const auto term = [&](unsigned row, unsigned col, float(&sum)[2][N]) {
    const unsigned long long at = static_cast<unsigned long long>(row) * hidden;
    const Floats<N> d = load<N>(dy + at, col, hidden, vectors), v = load<N>(x + at, col, hidden, vectors);
    const float mean = stats[2ull * row], r = stats[2ull * row + 1];
#pragma unroll
    for (int e = 0; e < N; e++) {
      sum[0][e] += d.v[e] * ((v.v[e] - mean) * r);
      sum[1][e] += d.v[e];
    }
  };
  column_sums<N, 2>(my_chunk(rows, chunk_rows), hidden, strips, term, [&](int s, unsigned col, float sum) {
    partial[(static_cast<unsigned long long>(s) * gridDim.y + blockIdx.y) * hidden + col] = sum;
  });
}
