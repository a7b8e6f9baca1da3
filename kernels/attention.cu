// attention.cu - causal attention over prefix trees of segments, forward and backward.
// Shapes      q, o, d_o, dq [query rows, heads, head_dim]; k, v, dk, dv [key rows, kv_heads, head_dim]; lse, delta
//             [query rows, heads] f32; segments [n, 6]
// Launch      attention, _queries: grid = (query rows group / 64 + n, kv_heads, chunks of head_dim), block = 128;
//             attention_keys: grid = (key rows / 64 + n, kv_heads, chunks); blocks find their tile in the table of segments,
//             those behind the last one leave
// Traffic     forward q, o once, k and v once for each tile of 64 rows that sees them (from the second-level cache, mostly);
//             4 pairs head_dim FLOPs, backward 14 (scores and dP twice: the price of a fixed order without a matrix of pairs);
//             bound: tensor cores, decoding: memory
// Repeatable  yes: no atomics; dq, dk and dv each have one owner who sums in a fixed order
// Requires    any head_dim, group, depth of tree and alignment (16-byte copies where rows start at such boundaries);
//             positions below 2^30; check_segments holds; shared memory as cuda.rs reckons it
// Oracle      src/ops/attention/reference.rs
//
// Rows. The 64 rows of a tile are queries with all heads of their group, one after the other: keys are read once for a group,
// a decoded token fills as many rows as its group has heads, and short completions waste less of a tile. A warp has 16 rows.
//
// Order. A row meets its keys in tiles that start at multiples of a constant of the absolute position, from the last one it
// sees back to the first. What it does not see weighs exactly 0 and changes no bit of its sums. So a row's result
// depends neither on the rows beside it, nor on where keys lie: prompt shared or copied, packed batch or slot of a cache.
// Backwards, because the way from a leaf to its root is what the table holds: a block climbs as it goes, at any depth.
//
// Not numbers. 0 times NaN is NaN: where a mask hides a row of V (in the backward: of K, Q or dO) from some rows of a tile and
// not from others, the tile is searched, and what is not finite is added to those who see it and replaced by 0 (`quarantine`).
#include "tile.cuh"

constexpr int THREADS = 128;
// Rows of a block: sixteen for each warp.
constexpr int ROWS = 64;
// Tiles of T with COLS columns. Those of floats are lower, so that 99 KiB hold what a block needs at head_dim 128.
template <class T, int COLS> struct Tiles {
  static constexpr int LD = padded<T>(COLS);
  // Keys of a tile of the forward.
  static constexpr int KEYS = sizeof(T) == 2 ? 64 : 32;
  // Rows of the tiles that pass by in the backward, and how many of a kind are there at a time.
  static constexpr int STREAM = sizeof(T) == 2 ? 32 : 16, STAGES = sizeof(T) == 2 ? 2 : 1;
};

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
// Score of what is not seen.
__device__ __forceinline__ float nothing() { return __uint_as_float(0xff800000u); }
// Position of a row that is not there: no window reaches from it to a key.
constexpr unsigned NOWHERE = 0xc0000000u;

// ---- the table of segments -------------------------------------------------------------------------------------------

constexpr unsigned NO_PARENT = 0xffffffffu;

struct Segment {
  unsigned start, len, parent, position, query_start, queries;
};

// A tile of a segment.
struct Place {
  unsigned segment, tile;
};

// The place of this block among the tiles of all segments, `tiles(segment)` of each, in order of the table; false behind the
// last one. Every warp looks for itself, 32 segments at a time.
template <class Tiles> __device__ __forceinline__ bool find_place(Place &place, unsigned segments, Tiles tiles) {
  const unsigned lane = threadIdx.x % WARP;
  unsigned before = 0;
  for (unsigned base = 0; base < segments; base += WARP) {
    const unsigned mine = base + lane < segments ? tiles(base + lane) : 0;
    unsigned end = before + mine;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
      const unsigned other = __shfl_up_sync(ALL, end, step);
      if (lane >= step) end += other - before;
    }
    const unsigned behind = __ballot_sync(ALL, blockIdx.x < end);
    if (behind) {
      const int owner = __ffs(behind) - 1;
      place.segment = base + owner;
      place.tile = blockIdx.x - __shfl_sync(ALL, end - mine, owner);
      return true;
    }
    before = __shfl_sync(ALL, end, WARP - 1);
  }
  return false;
}

// Where the keys of a path lie: from `position` on `shift` rows further, those before in the segments above.
struct Path {
  const Segment *table;
  unsigned parent, position, shift;
  __device__ __forceinline__ void enter(unsigned segment) {
    const Segment s = table[segment];
    parent = s.parent, position = s.position, shift = s.start - s.position;
  }
  // Leaves the segments that begin behind `at`.
  __device__ __forceinline__ void climb(unsigned at) {
    while (at < position) enter(parent);
  }
};
__device__ __forceinline__ unsigned key_row(Path path, unsigned at) {
  path.climb(at);
  return at + path.shift;
}

// Rows of a segment: row r is query r / group with head r % group of the kv head.
struct Rows {
  unsigned group, first, position;
  // Of (query row, head) among all.
  __device__ __forceinline__ unsigned long long at(unsigned r) const {
    return static_cast<unsigned long long>(first + r / group) * (gridDim.y * group) + blockIdx.y * group + r % group;
  }
  __device__ __forceinline__ unsigned position_of(unsigned r) const { return position + r / group; }
};
__device__ __forceinline__ Rows rows_of(const Segment &s, unsigned group) { return {group, s.query_start, s.position + s.len - s.queries}; }

// ---- tiles -----------------------------------------------------------------------------------------------------------

// A tile of N rows lies in panels of COLS columns, one behind the other.
template <int N, int COLS, class T, class Row>
__device__ __forceinline__ void load_panels(T *shared, unsigned head_dim, bool vectors, Row row) {
  constexpr int LD = Tiles<T, COLS>::LD;
  for (unsigned from = 0; from < head_dim; from += COLS, shared += N * LD)
    load_tile<N, COLS, THREADS>(shared, LD, min(head_dim - from, static_cast<unsigned>(COLS)), vectors, [&](int i) {
      const T *p = row(i);
      return p == nullptr ? p : p + from;
    });
}

// acc += A B^T over head_dim, for this warp's rows of a tile of ROWS and a tile of B_ROWS.
template <int COLS, int B_ROWS, int N, class T>
__device__ __forceinline__ void dots(Acc<16, N> &acc, const T *a, const T *b, unsigned head_dim) {
  constexpr int LD = Tiles<T, COLS>::LD;
  for (unsigned from = 0; from < head_dim; from += COLS, a += ROWS * LD, b += B_ROWS * LD)
    product<BY_ROWS, BY_ROWS>(acc, a, LD, b, LD, min((head_dim - from + 15) / 16 * 16, static_cast<unsigned>(COLS)));
}

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Visits the elements of a tile that load_tile left to this thread.
template <int N, int COLS, class T, class Visit> __device__ __forceinline__ void each_own(T *tile, Visit visit) {
  constexpr int LD = Tiles<T, COLS>::LD, W = Pack<T>::N, CHUNKS = COLS / W;
  for (int at = threadIdx.x; at < N * CHUNKS; at += THREADS)
    for (int e = 0; e < W; e++) visit(tile[at / CHUNKS * LD + at % CHUNKS * W + e]);
}
template <int N, int COLS, class T> __device__ __forceinline__ bool own_all_finite(T *tile) {
  bool all = true;
  each_own<N, COLS>(tile, [&](const T &x) { all = all && finite(wide(x)); });
  return all;
}

// A barrier of the block; true if any thread came with true. `told` has room for two turns: a fast warp speaks again while a
// slow one still listens.
__device__ __forceinline__ bool meet(bool found, unsigned turn, unsigned *told) {
  told += turn % 2 * (THREADS / WARP);
  const bool any = __any_sync(ALL, found);
  if (threadIdx.x % WARP == 0) told[threadIdx.x / WARP] = any;
  __syncthreads();
  bool all = false;
#pragma unroll
  for (int warp = 0; warp < THREADS / WARP; warp++) all = all || told[warp] != 0;
  return all;
}

// Of a tile [N, COLS] that weights of 0 will meet: what is not finite goes to the sums of those who see it, and becomes 0.
template <int N, int COLS, class T, class Sees>
__device__ __forceinline__ void quarantine(Acc<16, COLS> &acc, T *tile, Sees sees) {
#pragma unroll 1
  for (int k = 0; k < N; k++)
#pragma unroll
    for (int j = 0; j < COLS / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float x = wide(tile[k * Tiles<T, COLS>::LD + acc_col(j, e)]);
        if (!finite(x) && sees(e / 2, k)) acc.v[0][j][e] += x;
      }
  __syncthreads();
  each_own<N, COLS>(tile, [](T &x) {
    if (!finite(wide(x))) x = narrow<T>(0.0f);
  });
  __syncthreads();
}

// Writes this warp's rows times their factors, `row(i)` being where row i of the sixteen goes, if anywhere. They pass through
// `shared`, rows of a tile that no other warp reads.
template <int COLS, class T, class Row>
__device__ __forceinline__ void store_rows(const Acc<16, COLS> &acc, const float (&factor)[2], T *shared, unsigned cols, bool vectors, Row row) {
  constexpr int LD = Tiles<T, COLS>::LD, W = Pack<T>::N, CHUNKS = COLS / W;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < COLS / 8; j++)
#pragma unroll
    // Masked terms leave the sign of a zero open: here it becomes plus.
    for (int e = 0; e < 4; e++) shared[acc_row(0, e) * LD + acc_col(j, e)] = narrow<T>(acc.v[0][j][e] * factor[e / 2] + 0.0f);
  __syncwarp();
  for (int at = threadIdx.x % WARP; at < 16 * CHUNKS; at += WARP) {
    const int i = at / CHUNKS, c = at % CHUNKS * W;
    const T *from = shared + i * LD + c;
    T *to = row(i);
    if (to == nullptr) continue;
    if (vectors) {
      if (c < cols) store_pack(to + c, load_pack(from));
    } else {
      for (int e = 0; e < W; e++)
        if (c + e < cols) to[c + e] = from[e];
    }
  }
}

// Rows of a tensor with so many elements each start at 16-byte boundaries.
template <class T> __device__ __forceinline__ bool by_vectors(const T *p, unsigned head_dim) { return aligned16(p) && head_dim % Pack<T>::N == 0; }

// ---- what a block of queries knows --------------------------------------------------------------------------------------

// Up to ROWS rows of a segment and one kv head; a lane has rows `mine[0]`, `mine[1]` of the results of its warp.
struct Queries {
  Rows rows;
  unsigned first, count, window;
  // What any row sees: [from, end).
  unsigned from, end;
  unsigned mine[2], position[2];

  __device__ __forceinline__ bool find(Path &path, const unsigned *segments, unsigned n, unsigned group, unsigned window_) {
    path.table = reinterpret_cast<const Segment *>(segments);
    const auto tiles = [&](unsigned i) { return (path.table[i].queries * group + ROWS - 1) / ROWS; };
    Place place;
    if (!find_place(place, n, tiles)) return false;
    const Segment s = path.table[place.segment];
    // The last tile first: it sees the most.
    first = (tiles(place.segment) - 1 - place.tile) * ROWS;
    count = min(s.queries * group - first, static_cast<unsigned>(ROWS));
    rows = rows_of(s, group), window = window_;
    end = rows.position_of(first + count - 1) + 1;
    const unsigned lowest = rows.position_of(first);
    from = lowest + 1 > window ? lowest + 1 - window : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      mine[h] = threadIdx.x / WARP * 16 + acc_row(0, 2 * h);
      position[h] = mine[h] < count ? rows.position_of(first + mine[h]) : NOWHERE;
    }
    path.enter(place.segment);
    return true;
  }
  // Whether this warp has a row.
  __device__ __forceinline__ bool active() const { return threadIdx.x / WARP * 16 < count; }
  // Whether some row does not see some key of [key, key + keys).
  __device__ __forceinline__ bool masks(unsigned key, unsigned keys) const {
    return rows.position_of(first) + 1 < key + keys || end - 1 - key >= window;
  }
  __device__ __forceinline__ bool sees(int h, unsigned key) const { return position[h] - key < window; }
  // Row i of the block in a tensor of (query row, head), if it is there.
  template <class T> __device__ __forceinline__ T *in(T *x, unsigned i, unsigned head_dim) const { return i < count ? x + rows.at(first + i) * head_dim : nullptr; }
  // The key at a position, if any row sees it.
  template <class T> __device__ __forceinline__ const T *key_in(const T *x, const Path &path, unsigned at, unsigned head_dim) const {
    if (at < from || at >= end) return nullptr;
    return x + (static_cast<unsigned long long>(key_row(path, at)) * gridDim.y + blockIdx.y) * head_dim;
  }
};

// ---- forward ---------------------------------------------------------------------------------------------------------

// One tile of the online softmax for a lane's two rows: scores become 2^(factor s - top), 0 where `sees` is not; `top` and
// `total` (of this lane's columns) are brought up to date, `shrink` is what all that was summed before must be multiplied by.
// Products are not to be contracted into sums: both ways through a mask must round alike.
template <int N, class Sees>
__device__ __forceinline__ void softmax(Acc<16, N> &s, float factor, float (&top)[2], float (&total)[2], float (&shrink)[2], Sees sees) {
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
KERNEL(128) attention(const unsigned *segments, const T *q, const T *k, const T *v, T *o, float *lse, unsigned n, unsigned group, unsigned head_dim, unsigned window, float scale) {
  constexpr int LD = Tiles<T, COLS>::LD, KEYS = Tiles<T, COLS>::KEYS;
  DYNAMIC_SHARED(T, q_tile);
  SHARED(unsigned, told, 2 * THREADS / WARP);
  Queries b;
  Path path;
  if (!b.find(path, segments, n, group, window)) return;
  const unsigned panels = (head_dim + COLS - 1) / COLS, chunk = blockIdx.z * COLS;
  const unsigned cols = min(head_dim - chunk, static_cast<unsigned>(COLS));
  T *k_tile = q_tile + panels * ROWS * LD, *v_tile = k_tile + panels * KEYS * LD, *q_rows = q_tile + threadIdx.x / WARP * 16 * LD;
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
    load_tile<KEYS, COLS, THREADS>(v_tile, LD, cols, v_vectors, [&](int i) {
      const T *row = b.key_in(v, path, key + i, head_dim);
      return row == nullptr ? row : row + chunk;
    });
    cp_async_commit();
    Acc<16, KEYS> p;
    clear(p);
    if (b.active()) dots<COLS, KEYS>(p, q_rows, k_tile, head_dim);
    cp_async_wait<0>();
    const bool masks = b.masks(key, KEYS);
    const bool odd = meet(masks && !own_all_finite<KEYS, COLS>(v_tile), turn, told);
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
    if (blockIdx.z == 0 && threadIdx.x % 4 == 0 && b.mine[h] < b.count) lse[b.rows.at(b.first + b.mine[h])] = (top[h] + log2f(total[h])) * LN2;
  }
  store_rows(acc, inverse, q_rows, cols, by_vectors(o, head_dim), [&](int i) {
    T *row = b.in(o, threadIdx.x / WARP * 16 + i, head_dim);
    return row == nullptr ? row : row + chunk;
  });
}
INSTANCES(attention, (float, 32), (float, 64), (float, 96), (float, 128), (bf16, 32), (bf16, 64), (bf16, 96), (bf16, 128))

// ---- backward --------------------------------------------------------------------------------------------------------

// A product of two rows as `dots` has it, for the rows of this lane: [16, 16] products of which the diagonal is wanted. So
// dP - delta is exactly 0 for a row that sees a single key.
template <int COLS, class T> __device__ __forceinline__ void row_dots(float (&delta)[2], const T *a, const T *b, unsigned head_dim) {
  Acc<16, 16> all;
  clear(all);
  dots<COLS, ROWS>(all, a, b, head_dim);
  const int lane = threadIdx.x % WARP, row = lane / 4;
#pragma unroll
  for (int h = 0; h < 2; h++) delta[h] = __shfl_sync(ALL, row % 2 ? all.v[0][h][2 * h + 1] : all.v[0][h][2 * h], lane / 4 * 4 + row / 2);
}

// dq of a tile of rows, and delta = d_o . o for the kernel after it. o passes through the place of q.
template <class T, int COLS>
KERNEL(128) attention_queries(const unsigned *segments, const T *d_o, const T *q, const T *k, const T *v, const T *o, const float *lse, float *delta, T *dq, unsigned n, unsigned group, unsigned head_dim, unsigned window, float scale) {
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
    load_panels<KEYS, COLS>(k_tiles + stage * tile, head_dim, k_vectors, [&](int i) { return b.key_in(k, path, key + i, head_dim); });
    load_panels<KEYS, COLS>(v_tiles + stage * tile, head_dim, v_vectors, [&](int i) { return b.key_in(v, path, key + i, head_dim); });
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
    const bool odd = meet(masks && !own_all_finite<KEYS, COLS>(k_chunk), turn, told);
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
  store_rows(acc, {scale, scale}, q_rows, min(head_dim - blockIdx.z * COLS, static_cast<unsigned>(COLS)), by_vectors(dq, head_dim), [&](int i) {
    T *row = b.in(dq, warp * 16 + i, head_dim);
    return row == nullptr ? row : row + blockIdx.z * COLS;
  });
}
INSTANCES(attention_queries, (float, 32), (float, 64), (float, 96), (float, 128), (bf16, 32), (bf16, 64), (bf16, 96), (bf16, 128))

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
KERNEL(128) attention_keys(const unsigned *segments, const T *d_o, const T *q, const T *k, const T *v, const float *lse, const float *delta, T *dk, T *dv, unsigned n, unsigned group, unsigned head_dim, unsigned window, float scale) {
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
  const auto key_at = [&](unsigned i) { return (static_cast<unsigned long long>(s.start + first_key + i) * gridDim.y + blockIdx.y) * head_dim; };
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
    const bool odd = meet(masks && !(own_all_finite<N, COLS>(q_chunk) && own_all_finite<N, COLS>(d_o_chunk)), turn, told);
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
  store_rows(dk_acc, {scale, scale}, k_rows, cols, by_vectors(dk, head_dim), [&](int i) { return out(dk, i); });
  store_rows(dv_acc, {1.0f, 1.0f}, v_rows, cols, by_vectors(dv, head_dim), [&](int i) { return out(dv, i); });
}
INSTANCES(attention_keys, (float, 32), (float, 64), (float, 96), (float, 128), (bf16, 32), (bf16, 64), (bf16, 96), (bf16, 128))
