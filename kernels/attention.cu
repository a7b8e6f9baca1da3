// attention.cu - causal attention over prefix trees of segments: training, scoring and decoding.
// Shapes      q, o [query rows, heads, head_dim]; k, v [key rows, kv_heads, head_dim]; lse [query rows, heads] f32;
//             segments [n, 6]
// Launch      grid = (query rows group / 64 + n, kv_heads, chunks of head_dim), block = 128; blocks find their tile in the
//             table of segments, those behind the last one leave
// Shared      51 KiB in bf16 and 66 in f32 at head_dim 128; 85 and 116 at 256
// Traffic     q, o once; k, v once for each tile of 64 rows that sees them (mostly from the second-level cache); 4 head_dim
//             FLOPs a pair; bound: tensor cores, when decoding memory
// Repeatable  yes: each row has one owner who sums in a fixed order
// Requires    any head_dim, group, depth of trees and alignment (16-byte copies where rows start at such boundaries);
//             positions below 2^30; a table as check_segments wants it; shared memory as cuda.rs reckons it
// Oracle      src/ops/attention/reference.rs
#include "attention.cuh"

// One tile of the online softmax for a lane's two rows: scores become 2^(factor s - top), 0 where `sees` is not; `top` and
// `total` (of this lane's columns) are brought up to date, `shrink` is what all that was summed before must be multiplied by.
// Products are not to be contracted into sums: both ways through a mask must round alike.
template <int N, class Sees>
__device__ __forceinline__ void softmax(Acc<16, N> &s, float factor, float (&top)[2], float (&total)[2], float (&shrink)[2],
                                        Sees sees) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float high = top[h];
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; e++) {
        const float x = sees(h, acc_col(j, e)) ? __fmul_rn(s.v[0][j][e], factor) : nothing();
        s.v[0][j][e] = x;
        // NaN is passed over here; the sum below keeps it visible.
        high = x > high ? x : high;
      }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float other = __shfl_xor_sync(ALL, high, step);
      high = other > high ? other : high;
    }
    // A row that has seen nothing yet stays where it is: 2^(-inf - 0) = 0.
    const float base = high == nothing() ? 0.0f : high;
    shrink[h] = exp2f(top[h] - base);
    top[h] = high;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; e++) {
        s.v[0][j][e] = exp2f(s.v[0][j][e] - base);
        sum += s.v[0][j][e];
      }
    total[h] = fmaf(total[h], shrink[h], sum);
  }
}

// Columns [COLS blockIdx.z, + COLS) of o: further chunks of a wide head reckon its scores again. K and V take turns: while one
// is worked on, the other is on its way.
template <class T, int COLS>
KERNEL(128) attention(const unsigned *segments, const T *q, const T *k, const T *v, T *o, float *lse, unsigned n, unsigned group,
                      unsigned head_dim, unsigned window, float scale) {
  constexpr int LD = Tiles<T, COLS>::LD, KEYS = Tiles<T, COLS>::KEYS;
  DYNAMIC_SHARED(T, q_tile);
  SHARED(unsigned, told, 2 * THREADS / WARP);
  Queries b;
  Path path;
  if (!b.find(path, segments, n, group, window)) return;
  const unsigned panels = (head_dim + COLS - 1) / COLS, chunk = blockIdx.z * COLS;
  const unsigned cols = min(head_dim - chunk, static_cast<unsigned>(COLS));
  T *k_tile = q_tile + panels * ROWS * LD, *v_tile = k_tile + panels * KEYS * LD;
  T *q_rows = q_tile + threadIdx.x / WARP * 16 * LD;
  const bool k_vectors = by_vectors(k, head_dim), v_vectors = by_vectors(v, head_dim);
  const auto load_keys = [&](unsigned key) {
    path.climb(key + KEYS - 1);
    load_panels<KEYS, COLS>(k_tile, head_dim, k_vectors, [&](int i) { return b.key_in(k, path, key + i, head_dim); });
    cp_async_commit();
  };

  const unsigned last = b.from / KEYS * KEYS;
  unsigned key = (b.end - 1) / KEYS * KEYS;
  load_panels<ROWS, COLS>(q_tile, head_dim, by_vectors(q, head_dim), [&](int i) { return b.in(q, i, head_dim); });
  load_keys(key);
  Acc<16, COLS> acc;
  clear(acc);
  float top[2] = {nothing(), nothing()}, total[2] = {0.0f, 0.0f};
  for (unsigned turn = 0;; turn++, key -= KEYS) {
    cp_async_wait<0>();
    __syncthreads();
    load_tile<KEYS, COLS, THREADS, false>(v_tile, LD, cols, v_vectors, [&](int i) {
      const T *row = b.key_in(v, path, key + i, head_dim);
      return row == nullptr ? row : row + chunk;
    });
    cp_async_commit();
    Acc<16, KEYS> p;
    clear(p);
    if (b.active()) dots<COLS, KEYS>(p, q_rows, k_tile, head_dim);
    cp_async_wait<0>();
    const bool masks = b.masks(key, KEYS);
    const bool odd = meet(masks && !own_finite<KEYS, COLS>(v_tile, v_vectors), turn, told);
    if (key > last) load_keys(key - KEYS);
    if (b.active()) {
      float shrink[2];
      softmax(p, scale * LOG2E, top, total, shrink, [&](int h, int j) { return !masks || b.sees(h, key + j); });
#pragma unroll
      for (int j = 0; j < COLS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc.v[0][j][e] = __fmul_rn(acc.v[0][j][e], shrink[e / 2]);
    }
    if (odd) quarantine<KEYS, COLS>(acc, v_tile, [&](int h, int j) { return b.sees(h, key + j); });
    if (b.active()) product_of<T, BY_COLS>(acc, p, v_tile, LD);
    if (key == last) break;
  }

  if (!b.active()) return;
  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) total[h] += __shfl_xor_sync(ALL, total[h], step);
    inverse[h] = 1.0f / total[h];
    if (blockIdx.z == 0 && threadIdx.x % 4 == 0 && b.mine[h] < b.count)
      lse[b.rows.at(b.first + b.mine[h])] = (top[h] + log2f(total[h])) * LN2;
  }
  store_rows(acc, inverse, q_rows, cols, by_vectors(o, head_dim), [&](int i) {
    T *row = b.in(o, threadIdx.x / WARP * 16 + i, head_dim);
    return row == nullptr ? row : row + chunk;
  });
}
INSTANCES(attention, (float, 32), (float, 64), (float, 128), (bf16, 32), (bf16, 64), (bf16, 96), (bf16, 128))
