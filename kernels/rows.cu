// rows.cu - rows picked by index: gather, scatter, and the sum that gather's backward is.
// Shapes      x, y, dy, dx [.., cols]; from, to, index [rows] u32; order, sorted [rows] u32
// Launch      move: grid = rows (cols / N) / 256, block = 256; rank: grid = rows / 8, block = 256 (a warp a row);
//             add: grid = (rows, cols / (128 N)), block = 128; N = 16 / sizeof(T)
// Traffic     move 2 rows cols sizeof(T), one more to add; backward rows cols (sizeof(T) + 2 sizeof(O)) and rows^2 compares
//             of indices in the cache: 67 M for 8192 rows, a tenth of the time of 4096 columns
// Repeatable  yes: rows that go to one place are added in their own order
// Requires    any alignment (16-byte accesses where all rows allow them)
// Oracle      src/ops/rows/reference.rs
#include "elements.cuh"

// y[to[i]] = or += x[from[i]]; no table stands for i itself.
template <class T>
KERNEL(256) move_rows(const T *x, const unsigned *from, T *y, const unsigned *to, unsigned rows, unsigned cols, unsigned add) {
  constexpr int N = Pack<T>::N;
  const unsigned runs = (cols + N - 1) / N;
  const unsigned long long at = my_elements<1>(), row = at / runs;
  if (row >= rows) return;
  const unsigned col = static_cast<unsigned>(at % runs) * N;
  const bool vectors = cols % N == 0 && aligned16(x) && aligned16(y);
  x += (from ? from[row] : row) * cols;
  y += (to ? to[row] : row) * cols;
  Floats<N> v = load<N>(x, col, cols, vectors);
  if (add) {
    const Floats<N> was = load<N>(y, col, cols, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) v.v[e] += was.v[e];
  }
  store<N>(y, col, cols, vectors, v);
}

// The rows in the order of their index, equal ones as they come: a row's place is the number of rows before it. A warp
// counts for one row. There is no faster sort at the sizes of a batch: 8192 rows are 0.01 ms of compares.
KERNEL(256) rank_rows(const unsigned *index, unsigned *order, unsigned *sorted, unsigned rows) {
  const unsigned row = blockIdx.x * (256 / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (row >= rows) return;
  const unsigned mine = index[row];
  unsigned before = 0;
#pragma unroll 4
  for (unsigned i = lane; i < row; i += WARP) before += index[i] <= mine;
#pragma unroll 4
  for (unsigned i = row + 1 + lane; i < rows; i += WARP) before += index[i] < mine;
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) before += __shfl_xor_sync(ALL, before, step);
  if (lane == 0) {
    order[before] = row;
    sorted[before] = mine;
  }
}

// dx[sorted[p]] += the sum over the run of equal indices that starts at p, one row after the other.
template <class T, class O>
KERNEL(128) add_rows(const T *dy, const unsigned *order, const unsigned *sorted, O *dx, unsigned rows, unsigned cols) {
  constexpr int N = Pack<T>::N;
  const unsigned place = blockIdx.x, col = (blockIdx.y * 128 + threadIdx.x) * N, target = sorted[place];
  if ((place && sorted[place - 1] == target) || col >= cols) return;
  const bool vectors = cols % N == 0 && aligned16(dy) && aligned16(dx);
  dx += static_cast<unsigned long long>(target) * cols;
  Floats<N> sum = load<N>(dx, col, cols, vectors);
  // Four rows on their way at once: a frequent token has hundreds.
  constexpr int AHEAD = 4;
  bool more = true;
  for (unsigned i = place; more; i += AHEAD) {
    Floats<N> d[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      more = i + k < rows && sorted[i + k] == target;
      d[k] = load<N>(dy + (more ? static_cast<unsigned long long>(order[i + k]) * cols : 0), col, more ? cols : 0, vectors);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
#pragma unroll
      for (int e = 0; e < N; e++) sum.v[e] += d[k].v[e];
  }
  store<N>(dx, col, cols, vectors, sum);
}
INSTANCES(add_rows, (float, float), (bf16, bf16), (bf16, float))
