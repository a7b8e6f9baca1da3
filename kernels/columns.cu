// columns.cu - the sum of a matrix over its rows, added to the gradient of what every row shares.
// Shapes      x [rows, cols]; partial [chunks, cols], out [cols] f32
// Launch      sum: grid = (cols / (32 N), chunks), add: grid = cols / 32; block = 256, with N = 16 / sizeof(T)
// Traffic     rows cols sizeof(T), and 8 chunks cols; bound: memory
// Repeatable  yes, the rows of a chunk and then the chunks in one order
// Requires    any shape, any alignment (16-byte accesses where all rows allow them)
// Oracle      src/ops/linear/reference.rs (dbias), and those of the norms
#include "columns.cuh"

template <class T>
KERNEL(256) sum_columns(const T *x, float *partial, unsigned rows, unsigned cols, unsigned chunk_rows) {
  constexpr int N = Pack<T>::N;
  SHARED(float, strips, COLUMN_STRIPS * WARP * N);
  const bool vectors = cols % N == 0 && aligned16(x);
  const auto term = [&](unsigned row, unsigned col, float(&sum)[1][N]) {
    const Floats<N> v = load<N>(x + static_cast<unsigned long long>(row) * cols, col, cols, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) sum[0][e] += v.v[e];
  };
  column_sums<N, 1>(my_chunk(rows, chunk_rows), cols, strips, term, [&](int, unsigned col, float sum) {
    partial[static_cast<unsigned long long>(blockIdx.y) * cols + col] = sum;
  });
}

// The chunks, whichever kernel made them.
KERNEL(256) add_chunks(const float *partial, float *out, unsigned chunks, unsigned cols) {
  SHARED(float, strips, COLUMN_STRIPS * WARP);
  const auto term = [&](unsigned chunk, unsigned col, float(&sum)[1][1]) {
    sum[0][0] += partial[static_cast<unsigned long long>(chunk) * cols + col];
  };
  column_sums<1, 1>({0, chunks}, cols, strips, term, [&](int, unsigned col, float sum) { out[col] += sum; });
}
