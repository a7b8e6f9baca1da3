// attention.cuh - what the forward and the backward of attention share: the table of segments, tiles, the rows of a block.
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
#pragma once
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
__device__ __forceinline__ Rows rows_of(const Segment &s, unsigned group) {
  return {group, s.query_start, s.position + s.len - s.queries};
}

// ---- tiles -----------------------------------------------------------------------------------------------------------

// A tile of N rows lies in panels of COLS columns, one behind the other.
template <int N, int COLS, class T, class Row>
__device__ __forceinline__ void load_panels(T *shared, unsigned head_dim, bool vectors, Row row) {
  constexpr int LD = Tiles<T, COLS>::LD;
  for (unsigned from = 0; from < head_dim; from += COLS, shared += N * LD)
    load_tile<N, COLS, THREADS, false>(shared, LD, min(head_dim - from, static_cast<unsigned>(COLS)), vectors, [&](int i) {
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

// Whether what this thread had to load of a tile, element by element or by vectors, is finite.
template <int N, int COLS, class T> __device__ __forceinline__ bool own_finite(const T *tile, bool vectors) {
  constexpr int LD = Tiles<T, COLS>::LD, W = Pack<T>::N;
  bool all = true;
  if (vectors) {
    for (int at = threadIdx.x * W; at < N * COLS; at += THREADS * W) {
      const Pack<T> x = load_pack(tile + at / COLS * LD + at % COLS);
#pragma unroll
      for (int e = 0; e < W; e++) all = all && finite(wide(x.v[e]));
    }
  } else {
    for (int at = threadIdx.x; at < N * COLS; at += THREADS) all = all && finite(wide(tile[at / COLS * LD + at % COLS]));
  }
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
  for (int at = threadIdx.x; at < N * COLS; at += THREADS) {
    T &x = tile[at / COLS * Tiles<T, COLS>::LD + at % COLS];
    if (!finite(wide(x))) x = narrow<T>(0.0f);
  }
  __syncthreads();
}

// Writes this warp's rows times their factors, `row(i)` being where row i of the sixteen goes, if anywhere. They pass through
// `shared`, rows of a tile that no other warp reads and that this one is done with.
template <int COLS, class T, class Row>
__device__ __forceinline__ void store_rows(const Acc<16, COLS> &acc, const float (&factor)[2], T *shared, unsigned cols, bool vectors,
                                           Row row) {
  constexpr int LD = Tiles<T, COLS>::LD, W = Pack<T>::N, CHUNKS = COLS / W;
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
template <class T> __device__ __forceinline__ bool by_vectors(const T *p, unsigned head_dim) {
  return aligned16(p) && head_dim % Pack<T>::N == 0;
}

// ---- what a block of queries knows --------------------------------------------------------------------------------------

// Up to ROWS rows of a segment and one kv head; a lane has rows `mine[0]`, `mine[1]` of the results of its warp.
struct Queries {
  Rows rows;
  unsigned first, count, window;
  // What any row sees: [from, end).
  unsigned from, end;
  unsigned mine[2], position[2];

  __device__ __forceinline__ bool find(Path &path, const unsigned *segments, unsigned n, unsigned group, unsigned most) {
    path.table = reinterpret_cast<const Segment *>(segments);
    const auto tiles = [&](unsigned i) { return (path.table[i].queries * group + ROWS - 1) / ROWS; };
    Place place;
    if (!find_place(place, n, tiles)) return false;
    const Segment s = path.table[place.segment];
    // The last tile first: it sees the most.
    first = (tiles(place.segment) - 1 - place.tile) * ROWS;
    count = min(s.queries * group - first, static_cast<unsigned>(ROWS));
    rows = rows_of(s, group), window = most;
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
  template <class T> __device__ __forceinline__ T *in(T *x, unsigned i, unsigned head_dim) const {
    return i < count ? x + rows.at(first + i) * head_dim : nullptr;
  }
  // The key at a position, if any row sees it.
  template <class T>
  __device__ __forceinline__ const T *key_in(const T *x, const Path &path, unsigned at, unsigned head_dim) const {
    if (at < from || at >= end) return nullptr;
    return x + (static_cast<unsigned long long>(key_row(path, at)) * gridDim.y + blockIdx.y) * head_dim;
  }
};
