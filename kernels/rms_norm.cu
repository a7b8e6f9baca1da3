// rms_norm.cu - RMS normalization, forward and backward.
// Shapes      x, y, dy, dx [rows, hidden]; weight [hidden]; rstd [rows] f32; partial [chunks, hidden] f32
// Launch      rows: grid = rows / (256 / GROUP), block = 256; columns: grid = (hidden / (32 N), chunks), block = 256, with
//             N = 16 / sizeof(T)
// Traffic     forward 2 rows hidden sizeof(T); backward 4 rows hidden sizeof(T), and 2 again for dweight; bound: memory
// Repeatable  yes, fixed-order reductions
// Requires    hidden >= 1; any alignment (16-byte accesses where all rows allow them)
// Oracle      src/ops/rms_norm/reference.rs
#include "columns.cuh"
#include "norm.cuh"

template <class T, int GROUP>
KERNEL(256) rms_norm(const T *x, const T *weight, T *y, float *rstd, unsigned rows, unsigned hidden, float eps) {
  constexpr int N = Pack<T>::N;
  SHARED(float, partial, WARP);
  const bool vectors = hidden % N == 0 && aligned16(x) && aligned16(weight) && aligned16(y);
  const Row<GROUP> row = my_row<GROUP>(rows);
  x += row.index * hidden;
  y += row.index * hidden;
  float squares = 0.0f;
  for (unsigned at = row.lane * N; at < hidden; at += GROUP * N) {
    const Floats<N> v = load<N>(x, at, hidden, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) squares += v.v[e] * v.v[e];
  }
  const float r = 1.0f / sqrtf(row_sum<GROUP>(squares, partial) / hidden + eps);
  if (!row.there) return;
  for (unsigned at = row.lane * N; at < hidden; at += GROUP * N) {
    const Floats<N> w = load<N>(weight, at, hidden, vectors);
    Floats<N> v = load<N>(x, at, hidden, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) v.v[e] = v.v[e] * r * w.v[e];
    store<N>(y, at, hidden, vectors, v);
  }
  if (row.lane == 0) rstd[row.index] = r;
}
INSTANCES(rms_norm, (float, 8), (float, 32), (float, 256), (bf16, 8), (bf16, 32), (bf16, 256))

// dx += rstd (dy w - x rstd^2 mean(dy w x))
template <class T, int GROUP>
KERNEL(256) rms_norm_backward(const T *dy, const T *x, const T *weight, const float *rstd, T *dx, unsigned rows, unsigned hidden) {
  constexpr int N = Pack<T>::N;
  SHARED(float, partial, WARP);
  const bool vectors = hidden % N == 0 && aligned16(dy) && aligned16(x) && aligned16(weight) && aligned16(dx);
  const Row<GROUP> row = my_row<GROUP>(rows);
  dy += row.index * hidden;
  x += row.index * hidden;
  dx += row.index * hidden;
  float along = 0.0f;
  for (unsigned at = row.lane * N; at < hidden; at += GROUP * N) {
    const Floats<N> d = load<N>(dy, at, hidden, vectors), v = load<N>(x, at, hidden, vectors);
    const Floats<N> w = load<N>(weight, at, hidden, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) along += d.v[e] * w.v[e] * v.v[e];
  }
  const float r = rstd[row.index], scale = r * r * (row_sum<GROUP>(along, partial) / hidden);
  if (!row.there) return;
  for (unsigned at = row.lane * N; at < hidden; at += GROUP * N) {
    const Floats<N> d = load<N>(dy, at, hidden, vectors), v = load<N>(x, at, hidden, vectors);
    const Floats<N> w = load<N>(weight, at, hidden, vectors);
    Floats<N> sum = load<N>(dx, at, hidden, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) sum.v[e] += r * (d.v[e] * w.v[e] - v.v[e] * scale);
    store<N>(dx, at, hidden, vectors, sum);
  }
}
INSTANCES(rms_norm_backward, (float, 8), (float, 32), (float, 256), (bf16, 8), (bf16, 32), (bf16, 256))

// partial[chunk] = sum over the chunk's rows of dy x rstd
template <class T>
KERNEL(256) rms_norm_columns(const T *dy, const T *x, const float *rstd, float *partial, unsigned rows, unsigned hidden, unsigned chunk_rows) {
  constexpr int N = Pack<T>::N;
  SHARED(float, strips, COLUMN_STRIPS * WARP * N);
  const bool vectors = hidden % N == 0 && aligned16(dy) && aligned16(x);
  const auto term = [&](unsigned row, unsigned col, float(&sum)[1][N]) {
    const unsigned long long at = static_cast<unsigned long long>(row) * hidden;
    const Floats<N> d = load<N>(dy + at, col, hidden, vectors), v = load<N>(x + at, col, hidden, vectors);
    const float r = rstd[row];
#pragma unroll
    for (int e = 0; e < N; e++) sum[0][e] += d.v[e] * v.v[e] * r;
  };
  column_sums<N, 1>(my_chunk(rows, chunk_rows), hidden, strips, term, [&](int, unsigned col, float sum) {
    partial[static_cast<unsigned long long>(blockIdx.y) * hidden + col] = sum;
  });
}
