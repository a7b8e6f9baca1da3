// attention_backward.cu - the backward of causal attention over prefix trees of segments.
// Shapes      q, o, d_o, dq [rows, heads, head_dim]; k, v, dk, dv [rows, kv_heads, head_dim]; lse, delta [rows, heads] f32;
//             segments [n, 6]
// Launch      attention_queries, which writes delta, then attention_keys: grid = (rows group / 64 + n or rows / 64 + n,
//             kv_heads, chunks of head_dim), block = 128; blocks find their tile in the table of segments
// Shared      68 KiB in bf16 and 83 in f32 at head_dim 128; 136 and 165 at 256 (which 8.0 has not)
// Traffic     q, o, d_o, dq once and k, v once for each tile of rows that sees them; then k, v, dk, dv once and q, d_o once for
//             each tile of keys that they see; 14 head_dim FLOPs a pair, 4 of them for scores and dP a second time: the price of
//             a fixed order without atomics and without a matrix of pairs; bound: tensor cores
// Repeatable  yes: each row of dq, dk and dv has one owner who sums in a fixed order
// Requires    as attention.cu; every row is a query and a key; a tree's segments are adjacent
// Oracle      src/ops/attention/reference.rs
#include "attention.cuh"

// A product of two rows as `dots` has it, for the rows of this lane: [16, 16] products of which the diagonal is wanted. So
// dP - delta is exactly 0 for a row that sees a single key.
template <int COLS, class T>
__device__ __forceinline__ void row_dots(float (&delta)[2], const T *a, const T *b, unsigned head_dim) {
  Acc<16, 16> all;
  clear(all);
  dots<COLS, ROWS>(all, a, b, head_dim);
  const int lane = threadIdx.x % WARP, row = lane / 4;
#pragma unroll
  for (int h = 0; h < 2; h++)
    delta[h] = __shfl_sync(ALL, row % 2 ? all.v[0][h][2 * h + 1] : all.v[0][h][2 * h], lane / 4 * 4 + row / 2);
}

// dq of a tile of rows, and delta = d_o . o for the kernel after it. o passes through the place of q.
template <class T, int COLS>
KERNEL(128) attention_queries(const unsigned *segments, const T *d_o, const T *q, const T *k, const T *v, const T *o,
                              const float *lse, float *delta, T *dq, unsigned n, unsigned group, unsigned head_dim,
                              unsigned window, float scale) {
  constexpr int LD = Tiles<T, COLS>::LD, KEYS = Tiles<T, COLS>::STREAM, STAGES = Tiles<T, COLS>::STAGES;
  DYNAMIC_SHARED(T, q_tile);
  SHARED(unsigned, told, 2 * THREADS / WARP);
  Queries b;
  Path path;
  if (!b.find(path, segments, n, group, window)) return;
  const unsigned panels = (head_dim + COLS - 1) / COLS, tile = panels * KEYS * LD, warp = threadIdx.x / WARP;
  T *d_o_tile = q_tile + panels * ROWS * LD, *k_tiles = d_o_tile + panels * ROWS * LD, *v_tiles = k_tiles + STAGES * tile;
  T *q_rows = q_tile + warp * 16 * LD, *d_o_rows = d_o_tile + warp * 16 * LD;
  const bool k_vectors = by_vectors(k, head_dim), v_vectors = by_vectors(v, head_dim);
  const auto load_keys = [&](unsigned key, unsigned stage) {
    path.climb(key + KEYS - 1);
    const auto row = [&](const T *x, int i) { return b.key_in(x, path, key + i, head_dim); };
    load_panels<KEYS, COLS>(k_tiles + stage * tile, head_dim, k_vectors, [&](int i) { return row(k, i); });
    load_panels<KEYS, COLS>(v_tiles + stage * tile, head_dim, v_vectors, [&](int i) { return row(v, i); });
    cp_async_commit();
  };

  load_panels<ROWS, COLS>(q_tile, head_dim, by_vectors(o, head_dim), [&](int i) { return b.in(o, i, head_dim); });
  load_panels<ROWS, COLS>(d_o_tile, head_dim, by_vectors(d_o, head_dim), [&](int i) { return b.in(d_o, i, head_dim); });
  cp_async_commit();
  const unsigned last = b.from / KEYS * KEYS;
  unsigned key = (b.end - 1) / KEYS * KEYS;
  load_keys(key, 0);
  float lse2[2] = {0.0f, 0.0f}, d[2] = {0.0f, 0.0f};
  cp_async_wait<1>();
  __syncthreads();
  if (b.active()) row_dots<COLS>(d, d_o_rows, q_rows, head_dim);
  __syncthreads();
  load_panels<ROWS, COLS>(q_tile, head_dim, by_vectors(q, head_dim), [&](int i) { return b.in(q, i, head_dim); });
  cp_async_commit();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (b.mine[h] >= b.count) continue;
    const unsigned long long at = b.rows.at(b.first + b.mine[h]);
    lse2[h] = lse[at] * LOG2E;
    if (blockIdx.z == 0 && threadIdx.x % 4 == 0) delta[at] = d[h];
  }
  Acc<16, COLS> acc;
  clear(acc);
  for (unsigned turn = 0;; turn++, key -= KEYS) {
    const unsigned stage = turn % STAGES;
    const T *k_tile = k_tiles + stage * tile, *v_tile = v_tiles + stage * tile;
    T *k_chunk = k_tiles + stage * tile + blockIdx.z * KEYS * LD;
    cp_async_wait<0>();
    const bool masks = b.masks(key, KEYS);
    const bool odd = meet(masks && !own_finite<KEYS, COLS>(k_chunk, k_vectors), turn, told);
    if (STAGES == 2 && key > last) load_keys(key - KEYS, 1 - stage);
    Acc<16, KEYS> s, ds;
    clear(s);
    clear(ds);
    if (b.active()) {
      dots<COLS, KEYS>(s, q_rows, k_tile, head_dim);
      dots<COLS, KEYS>(ds, d_o_rows, v_tile, head_dim);
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float p = exp2f(fmaf(s.v[0][j][e], scale * LOG2E, -lse2[e / 2])), x = p * (ds.v[0][j][e] - d[e / 2]);
          ds.v[0][j][e] = !masks || b.sees(e / 2, key + acc_col(j, e)) ? x : 0.0f;
        }
    }
    if (odd) quarantine<KEYS, COLS>(acc, k_chunk, [&](int h, int j) { return b.sees(h, key + j); });
    if (b.active()) product_of<T, BY_COLS>(acc, ds, k_chunk, LD);
    if (key == last) break;
    if (STAGES == 1) {
      __syncthreads();
      load_keys(key - KEYS, 0);
    }
  }

  if (!b.active()) return;
  const unsigned cols = min(head_dim - blockIdx.z * COLS, static_cast<unsigned>(COLS));
  __syncwarp();  // every lane is done with the rows of q
  store_rows(acc, {scale, scale}, q_rows, cols, by_vectors(dq, head_dim), [&](int i) {
    T *row = b.in(dq, warp * 16 + i, head_dim);
    return row == nullptr ? row : row + blockIdx.z * COLS;
  });
}
INSTANCES(attention_queries, (float, 32), (float, 64), (float, 128), (bf16, 32), (bf16, 64), (bf16, 96), (bf16, 128))

// The tiles of query rows that see some of a segment's keys [key, key_end): its own, then those of its descendants, in order
// of the table. A tree's segments are adjacent: the next root ends the search, 32 segments at a time.
template <int N> struct Readers {
  const Segment *table;
  unsigned segments, ancestor, group, key, key_end, window;
  // The 32 segments from `base` on: descendants not visited yet, and whether the tree ends among them.
  unsigned base, waiting;
  bool ends;
  // The tile: rows [first, end) of a segment, N at most.
  Rows rows;
  unsigned first, end;

  __device__ __forceinline__ void look() {
    const unsigned i = base + threadIdx.x % WARP;
    const bool beyond = i >= segments || (i > ancestor && table[i].parent == NO_PARENT);
    unsigned up = beyond ? NO_PARENT : i;
    while (up != NO_PARENT && up > ancestor) up = table[up].parent;
    waiting = __ballot_sync(ALL, up == ancestor);
    const unsigned roots = __ballot_sync(ALL, beyond);
    ends = roots != 0;
    if (ends) waiting &= (roots & -roots) - 1;
  }
  __device__ __forceinline__ void start() {
    base = ancestor, first = 0, end = 0;
    look();
  }
  // Goes to the next tile; false behind the last one.
  __device__ __forceinline__ bool next() {
    first += N;
    while (first >= end) {
      while (waiting == 0) {
        if (ends) return false;
        base += WARP;
        look();
      }
      const unsigned i = base + __ffs(waiting) - 1;
      waiting &= waiting - 1;
      const Segment s = table[i];
      const unsigned until = min(s.position + s.len, key_end - 1 + window);
      rows = rows_of(s, group);
      first = i == ancestor ? (key - s.position) * group : 0;
      end = until > s.position ? (until - s.position) * group : 0;
    }
    return true;
  }
  // Whether some row of the tile does not see some key.
  __device__ __forceinline__ bool masks() const {
    return rows.position_of(first) + 1 < key_end || rows.position_of(min(first + N, end) - 1) - key >= window;
  }
};

// dk and dv of a tile of keys: everyone who sees them passes by. P^T and dS^T [keys, rows] are the products' results as they
// are needed: keys along the rows, so that nothing is transposed and nothing shared but the tiles.
template <class T, int COLS>
KERNEL(128) attention_keys(const unsigned *segments, const T *d_o, const T *q, const T *k, const T *v, const float *lse,
                           const float *delta, T *dk, T *dv, unsigned n, unsigned group, unsigned head_dim, unsigned window,
                           float scale) {
  constexpr int LD = Tiles<T, COLS>::LD, N = Tiles<T, COLS>::STREAM, STAGES = Tiles<T, COLS>::STAGES;
  DYNAMIC_SHARED(T, k_tile);
  SHARED(unsigned, told, 2 * THREADS / WARP);
  SHARED(float, lse2_of, 2 * N);
  SHARED(float, delta_of, 2 * N);
  SHARED(unsigned, position_of, 2 * N);
  const Segment *table = reinterpret_cast<const Segment *>(segments);
  Place place;
  if (!find_place(place, n, [&](unsigned i) { return (table[i].len + ROWS - 1) / ROWS; })) return;
  const unsigned panels = (head_dim + COLS - 1) / COLS, tile = panels * N * LD, warp = threadIdx.x / WARP;
  T *v_tile = k_tile + panels * ROWS * LD, *q_tiles = v_tile + panels * ROWS * LD, *d_o_tiles = q_tiles + STAGES * tile;
  T *k_rows = k_tile + warp * 16 * LD, *v_rows = v_tile + warp * 16 * LD;

  const Segment s = table[place.segment];
  const unsigned first_key = place.tile * ROWS, keys = min(s.len - first_key, static_cast<unsigned>(ROWS));
  // Key i of the tile in a tensor of (key row, kv head), if it is there.
  const auto key_at = [&](unsigned i) {
    return (static_cast<unsigned long long>(s.start + first_key + i) * gridDim.y + blockIdx.y) * head_dim;
  };
  load_panels<ROWS, COLS>(k_tile, head_dim, by_vectors(k, head_dim), [&](int i) { return i < keys ? k + key_at(i) : nullptr; });
  load_panels<ROWS, COLS>(v_tile, head_dim, by_vectors(v, head_dim), [&](int i) { return i < keys ? v + key_at(i) : nullptr; });
  const bool active = warp * 16 < keys, q_vectors = by_vectors(q, head_dim), d_o_vectors = by_vectors(d_o, head_dim);
  const unsigned key = s.position + first_key, mine[2] = {key + warp * 16 + acc_row(0, 0), key + warp * 16 + acc_row(0, 2)};

  Readers<N> readers = {table, n, place.segment, group, key, key + keys, window};
  readers.start();
  // Of row threadIdx.x of the tile that is on its way.
  float next_lse2 = 0.0f, next_delta = 0.0f;
  unsigned next_position = NOWHERE;
  const auto load_rows = [&](unsigned stage) {
    const auto row = [&](const T *x, unsigned i) {
      const unsigned r = readers.first + i;
      return r < readers.end ? x + readers.rows.at(r) * head_dim : nullptr;
    };
    load_panels<N, COLS>(q_tiles + stage * tile, head_dim, q_vectors, [&](int i) { return row(q, i); });
    load_panels<N, COLS>(d_o_tiles + stage * tile, head_dim, d_o_vectors, [&](int i) { return row(d_o, i); });
    cp_async_commit();
    const unsigned r = readers.first + threadIdx.x;
    const bool there = threadIdx.x < N && r < readers.end;
    next_lse2 = there ? lse[readers.rows.at(r)] * LOG2E : 0.0f;
    next_delta = there ? delta[readers.rows.at(r)] : 0.0f;
    next_position = there ? readers.rows.position_of(r) : NOWHERE;
  };

  bool more = readers.next();
  load_rows(0);
  Acc<16, COLS> dk_acc, dv_acc;
  clear(dk_acc);
  clear(dv_acc);
  for (unsigned turn = 0; more; turn++) {
    const unsigned stage = turn % STAGES, turns = turn % 2 * N;
    const T *q_tile = q_tiles + stage * tile, *d_o_tile = d_o_tiles + stage * tile;
    T *q_chunk = q_tiles + stage * tile + blockIdx.z * N * LD, *d_o_chunk = d_o_tiles + stage * tile + blockIdx.z * N * LD;
    const bool masks = readers.masks();
    if (threadIdx.x < N) {
      lse2_of[turns + threadIdx.x] = next_lse2;
      delta_of[turns + threadIdx.x] = next_delta;
      position_of[turns + threadIdx.x] = next_position;
    }
    cp_async_wait<0>();
    const auto own_numbers = [&] { return own_finite<N, COLS>(q_chunk, q_vectors) && own_finite<N, COLS>(d_o_chunk, d_o_vectors); };
    const bool odd = meet(masks && !own_numbers(), turn, told);
    more = readers.next();
    if (STAGES == 2 && more) load_rows(1 - stage);
    const auto sees = [&](int h, int row) { return position_of[turns + row] - mine[h] < window; };
    Acc<16, N> p, ds;
    clear(p);
    clear(ds);
    if (active) {
      dots<COLS, N>(p, k_rows, q_tile, head_dim);
      dots<COLS, N>(ds, v_rows, d_o_tile, head_dim);
#pragma unroll
      for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int row = acc_col(j, e);
          const float x = exp2f(fmaf(p.v[0][j][e], scale * LOG2E, -lse2_of[turns + row]));
          const float dx = x * (ds.v[0][j][e] - delta_of[turns + row]);
          const bool seen = !masks || sees(e / 2, row);
          p.v[0][j][e] = seen ? x : 0.0f;
          ds.v[0][j][e] = seen ? dx : 0.0f;
        }
    }
    if (odd) {
      quarantine<N, COLS>(dv_acc, d_o_chunk, sees);
      quarantine<N, COLS>(dk_acc, q_chunk, sees);
    }
    if (active) {
      product_of<T, BY_COLS>(dv_acc, p, d_o_chunk, LD);
      product_of<T, BY_COLS>(dk_acc, ds, q_chunk, LD);
    }
    if (STAGES == 1 && more) {
      __syncthreads();
      load_rows(0);
    }
  }

  if (!active) return;
  const unsigned cols = min(head_dim - blockIdx.z * COLS, static_cast<unsigned>(COLS));
  const auto out = [&](T *x, int i) { return warp * 16 + i < keys ? x + key_at(warp * 16 + i) + blockIdx.z * COLS : nullptr; };
  __syncwarp();  // every lane is done with the rows of k and v
  store_rows(dk_acc, {scale, scale}, k_rows, cols, by_vectors(dk, head_dim), [&](int i) { return out(dk, i); });
  store_rows(dv_acc, {1.0f, 1.0f}, v_rows, cols, by_vectors(dv, head_dim), [&](int i) { return out(dv, i); });
}
INSTANCES(attention_keys, (float, 32), (float, 64), (float, 128), (bf16, 32), (bf16, 64), (bf16, 96), (bf16, 128))
