// merged_update.cu - everything that happens to a weight in one optimizer step: in one pass, or, where the whole update must be
// known before any of it is applied (OnTIES' threshold, rescaling), in two.
// Shapes      all [n]; grad, full (the weight, or its master), wide (a weight beside a master), m, v, since_merge, average,
//             tau_wide, scratch f32; narrow, tau_narrow bf16; what is not there is null. lost [2] u32
//             bins [2048], state [2], cut [3] u32, sums [2, n / 16384] f32: of the first pass, see below
// Launch      one pass and the second: grid = n / 1024, block = 256; the first and its refinements: grid = n / 16384
// Traffic     28 n bytes for AdamW, 30 n with bf16 weights or tau_ref; two passes: 24 n + 4 n, and for OnTIES' threshold 8 n more,
//             then 14 n; bound: memory
// Repeatable  yes: counts are of integers, sums are made block by block and added in double in one order
// Requires    any alignment (16-byte accesses where all tensors allow them), n < 2^32
// Oracle      src/ops/merged_update/reference.rs; masks bit for bit
#include "elements.cuh"
#include "philox.cuh"

// Passes: AdamW and nothing else, all there is, the update of what is sparsified, what is left to do with it.
constexpr int PLAIN = 0, WHOLE = 1, FIRST = 2, SECOND = 3;
// How the update and tau_ref come together: Merge of src/ops/merged_update/mod.rs.
constexpr unsigned DROP = 1, BEFORE = 2, AFTER = 3;
// What numbers are drawn for: its Purpose.
constexpr unsigned long long UPDATE = 0, TAU_REF = 1, GRADIENT = 2, ROUNDING = 3;

constexpr int N = 4, UPDATE_THREADS = 256;
constexpr unsigned UPDATE_CHUNK = 16384;
// A magnitude has 31 bits, which are in its order: 11 are counted in the first pass, then 10, then 10 of those that share the
// bits before.
constexpr unsigned HIGH_BINS = 2048, BINS = 1024, BIN_THREADS = 1024;

__device__ __forceinline__ unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// ---- draws -----------------------------------------------------------------------------------------------------------

struct Draws {
  // The step in the counter's place.
  unsigned long long seed, stream, step;

  // Of elements at .. at + 4, where 4 divides `at`.
  __device__ __forceinline__ Random of(unsigned long long purpose, unsigned long long at) const { return philox(seed, stream, step | purpose << 32 | at / 4); }
};

// Elements whose word is below the threshold are kept, and scaled; 2^32 keeps all as they are.
struct Keep {
  unsigned long long threshold;
  float scale;

  __device__ __forceinline__ void apply(Floats<N> &x, const Draws &draws, unsigned long long purpose, unsigned long long at) const {
    if (threshold >> 32) return;
    const Random random = draws.of(purpose, at);
#pragma unroll
    for (int e = 0; e < N; e++) x.v[e] = random.word[e] < threshold ? x.v[e] * scale : 0.0f;
  }
};

// a + b, up or down with the probability of the distance: the rounding error of the nearest sum is known exactly (Knuth's
// two-sum), and it goes to the neighbour on that side as often as it is part of the gap. Not to be fused with what made b.
__device__ __forceinline__ float stochastic_sum(float a, float b, unsigned word) {
  const float nearest = __fadd_rn(a, b), other = __fsub_rn(nearest, a);
  const float error = __fadd_rn(__fsub_rn(a, __fsub_rn(nearest, other)), __fsub_rn(b, other));
  // Away from zero is one more in the bits.
  const bool grows = (error > 0.0f) == (nearest > 0.0f);
  const unsigned bits = __float_as_uint(nearest);
  const float neighbour = __uint_as_float(grows ? bits + 1 : bits - 1);
  const float gap = fabsf(__fsub_rn(neighbour, nearest));
  return static_cast<float>(word) * 2.3283064e-10f * gap < fabsf(error) ? neighbour : nearest;
}
// The upper half of a float, one more as often as the lower half is part of 2^16; NaN and infinities as they are.
__device__ __forceinline__ float stochastic_bf16(float x, unsigned word) {
  const unsigned bits = __float_as_uint(x);
  return magnitude_bits(x) < 0x7f800000u ? __uint_as_float((bits + (word & 0xffffu)) & 0xffff0000u) : x;
}

// ---- stages ----------------------------------------------------------------------------------------------------------

struct Adam {
  float clip, beta1, fresh1, beta2, fresh2, rate, root, eps;

  __device__ __forceinline__ float update(float g, float &m, float &v) const {
    m = beta1 * m + fresh1 * g;
    v = beta2 * v + fresh2 * g * g;
    return -(rate * m / (sqrtf(v) * root + eps));
  }
};

// What is added of an update and of tau_ref, where signs decide.
__device__ __forceinline__ float agreed(unsigned merge, float of_update, float of_tau_ref, float update, float tau_ref) {
  if (merge == BEFORE) {
    const float elected = tau_ref + update >= 0.0f ? 1.0f : -1.0f;
    return of_update * (update * elected < 0.0f ? 0.0f : update) + of_tau_ref * (tau_ref * elected < 0.0f ? 0.0f : tau_ref);
  }
  const float x = of_update * update, y = of_tau_ref * tau_ref;
  const bool oppose = (x < 0.0f && y > 0.0f) || (x > 0.0f && y < 0.0f);
  if (!oppose) return x + y;
  return fabsf(x) == fabsf(y) ? 0.0f : fabsf(x) > fabsf(y) ? x : y;
}

template <int PASS>
KERNEL(256) merged_update(const float *grad, float *full, float *wide, bf16 *narrow, float *m, float *v, float *since_merge, float *average, const float *tau_wide, const bf16 *tau_narrow, float *scratch, const unsigned *cut, float *sums, unsigned *bins, unsigned *lost, unsigned long long n, float clip, float beta1, float fresh1, float beta2, float fresh2, float rate, float root, float eps, float decay, unsigned decay_last, unsigned merges, unsigned merge, unsigned long long gradient_threshold, float gradient_scale, unsigned long long update_threshold, float update_scale, unsigned long long tau_threshold, float of_update, float of_tau_ref, float ema, float share, unsigned stochastic, unsigned long long seed, unsigned long long stream, unsigned long long step) {
  constexpr int RUNS = PASS == FIRST ? UPDATE_CHUNK / (N * UPDATE_THREADS) : 1;
  SHARED(unsigned, counts, HIGH_BINS);
  SHARED(float, warps, 2 * WARP);
  const Adam adam{clip, beta1, fresh1, beta2, fresh2, rate, root, eps};
  const Draws draws{seed, stream, step};
  const bool vectors = aligned16(grad) && aligned16(full) && aligned16(wide) && aligned16(narrow) && aligned16(m) && aligned16(v) && aligned16(since_merge) && aligned16(average) && aligned16(tau_wide) && aligned16(tau_narrow) && aligned16(scratch);
  const bool trims = PASS == FIRST && bins;
  float before = 0.0f, after = 0.0f;
  if (trims) {
    for (unsigned i = threadIdx.x; i < HIGH_BINS; i += UPDATE_THREADS) counts[i] = 0;
    __syncthreads();
  }
  for (int run = 0; run < RUNS; run++) {
    const unsigned long long at = (static_cast<unsigned long long>(blockIdx.x) * RUNS + run) * N * UPDATE_THREADS + threadIdx.x * N;
    Floats<N> update;
    Floats<N> since = {};
    if (PASS != PLAIN && since_merge) since = load<N>(since_merge, at, n, vectors);
    if (PASS == SECOND) {
      update = load<N>(scratch, at, n, vectors);
      const unsigned threshold = cut[0];
      const float factor = __uint_as_float(cut[1]), bound = __uint_as_float(cut[2]);
#pragma unroll
      for (int e = 0; e < N; e++) {
        const float scaled = update.v[e] * factor;
        // A NaN stays one.
        const float bounded = scaled > bound ? bound : scaled < -bound ? -bound : scaled;
        update.v[e] = magnitude_bits(update.v[e]) >= threshold ? bounded : 0.0f;
      }
    } else {
      Floats<N> g = load<N>(grad, at, n, vectors), first = load<N>(m, at, n, vectors), second = load<N>(v, at, n, vectors);
      if (PASS != PLAIN) Keep{gradient_threshold, gradient_scale}.apply(g, draws, GRADIENT, at);
#pragma unroll
      for (int e = 0; e < N; e++) update.v[e] = adam.update(g.v[e] * clip, first.v[e], second.v[e]);
      store<N>(m, at, n, vectors, first);
      store<N>(v, at, n, vectors, second);
      if (PASS != PLAIN && since_merge) {
#pragma unroll
        for (int e = 0; e < N; e++) (merges ? update : since).v[e] = update.v[e] + since.v[e];
        if (!merges) store<N>(since_merge, at, n, vectors, since);
      }
    }
    if (PASS == FIRST) {
#pragma unroll
      for (int e = 0; e < N; e++) {
        if (at + e >= n) continue;
        const unsigned bits = magnitude_bits(update.v[e]);
        before += __uint_as_float(bits);
        // Zeros, which can be most of an embedding's, are left out: nothing is smaller.
        if (trims && bits) atomicAdd(&counts[bits >> 20], 1u);
      }
    }
    if (PASS == WHOLE || PASS == FIRST) Keep{update_threshold, update_scale}.apply(update, draws, UPDATE, at);
    if (PASS == FIRST) {
#pragma unroll
      for (int e = 0; e < N; e++) after += at + e < n ? fabsf(update.v[e]) : 0.0f;
      store<N>(scratch, at, n, vectors, update);
      continue;
    }

    Floats<N> tau_ref = {};
    if (PASS != PLAIN && tau_wide) tau_ref = load<N>(tau_wide, at, n, vectors);
    if (PASS != PLAIN && tau_narrow) tau_ref = load<N>(tau_narrow, at, n, vectors);
    if (PASS != PLAIN && merge == DROP) {
      Floats<N> kept = tau_ref;
      if (of_tau_ref != 0.0f) Keep{tau_threshold, 1.0f}.apply(kept, draws, TAU_REF, at);
#pragma unroll
      for (int e = 0; e < N; e++) update.v[e] = of_update * update.v[e] + (of_tau_ref != 0.0f ? of_tau_ref * kept.v[e] : 0.0f);
    }
    if (PASS != PLAIN && (merge == BEFORE || merge == AFTER)) {
#pragma unroll
      for (int e = 0; e < N; e++) update.v[e] = agreed(merge, of_update, of_tau_ref, update.v[e], tau_ref.v[e]);
    }
    // A merge replaces what the steps since the last one did.
    if (PASS != PLAIN && since_merge && merges) {
#pragma unroll
      for (int e = 0; e < N; e++) update.v[e] -= since.v[e];
      store<N>(since_merge, at, n, vectors, Floats<N>{});
    }

    Floats<N> w = full ? load<N>(full, at, n, vectors) : load<N>(narrow, at, n, vectors), pulled = {};
    Random random = {};
    if (PASS != PLAIN && average) pulled = load<N>(average, at, n, vectors);
    if (PASS != PLAIN && stochastic) random = draws.of(ROUNDING, at);
#pragma unroll
    for (int e = 0; e < N; e++) {
      const float old = w.v[e], u = update.v[e];
      float sum = u - decay * (decay_last ? old + u : old);
      if (PASS != PLAIN && average) {
        const float moved = old + sum;
        pulled.v[e] += ema * (moved - pulled.v[e]);
        sum += ema * (pulled.v[e] - moved);
      }
      w.v[e] = PASS != PLAIN && stochastic ? stochastic_sum(old, sum, random.word[e]) : old + sum;
      if (PASS != PLAIN && !full) w.v[e] = stochastic_bf16(w.v[e], random.word[e]);
      // Counts of a block are whole numbers that a float holds.
      if (at + e < n && u != 0.0f) {
        before += 1.0f;
        after += w.v[e] == old ? 1.0f : 0.0f;
      }
    }
    if (PASS != PLAIN && average) store<N>(average, at, n, vectors, pulled);
    if (full) store<N>(full, at, n, vectors, w);
    if (PASS != PLAIN && full && share != 0.0f) {
#pragma unroll
      for (int e = 0; e < N; e++) w.v[e] += share * tau_ref.v[e];
    }
    if (PASS != PLAIN && wide) store<N>(wide, at, n, vectors, w);
    if (narrow) store<N>(narrow, at, n, vectors, w);
  }
  if (PASS != FIRST && !lost) return;
  before = block_sum(before, warps);
  after = block_sum(after, warps + WARP);
  if (PASS != FIRST && threadIdx.x == 0) {
    atomicAdd(&lost[0], static_cast<unsigned>(before));
    atomicAdd(&lost[1], static_cast<unsigned>(after));
  }
  if (PASS == FIRST && threadIdx.x == 0) {
    sums[blockIdx.x] = before;
    sums[gridDim.x + blockIdx.x] = after;
  }
  // The sums' barriers stand between the counts and here.
  if (trims)
    for (unsigned i = threadIdx.x; i < HIGH_BINS; i += UPDATE_THREADS)
      if (counts[i]) atomicAdd(&bins[i], counts[i]);
}
INSTANCES(merged_update, (0), (1), (2), (3))

// ---- OnTIES' threshold, and what a second pass does to an update ---------------------------------------------------------

struct Bin {
  unsigned at, rank;
};

// The bin of the `rank`-th largest, and which of that bin it is; what was not counted is in bin 0. `found` is shared,
// [WARP + 2]. For a block of 1024 threads, each of which has size / 1024 <= 2 bins.
__device__ __forceinline__ Bin find_bin(const unsigned *bins, unsigned size, unsigned rank, unsigned *found) {
  const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, own = size / BIN_THREADS;
  const unsigned first = size - 1 - threadIdx.x * own;
  const unsigned upper = bins[first], mine = upper + (own == 2 ? bins[first - 1] : 0);
  unsigned up_to = mine;
#pragma unroll
  for (unsigned step = 1; step < WARP; step *= 2) {
    const unsigned lower = __shfl_up_sync(ALL, up_to, step);
    if (lane >= step) up_to += lower;
  }
  if (lane == WARP - 1) found[warp] = up_to;
  __syncthreads();
  for (unsigned i = 0; i < warp; i++) up_to += found[i];
  const unsigned above = up_to - mine;
  if (above < rank && rank <= up_to) {
    const bool in_upper = rank <= above + upper;
    found[WARP] = in_upper ? first : first - 1;
    found[WARP + 1] = rank - above - (in_upper ? 0 : upper);
  } else if (threadIdx.x == BIN_THREADS - 1 && up_to < rank) {
    found[WARP] = 0;
    found[WARP + 1] = rank - up_to;
  }
  __syncthreads();
  return {found[WARP], found[WARP + 1]};
}

// state: bits of the threshold that are known, and its rank among what shares them.
KERNEL(1024) update_clear(unsigned *bins, unsigned *state, unsigned rank) {
  for (unsigned i = threadIdx.x; i < HIGH_BINS; i += BIN_THREADS) bins[i] = 0;
  if (threadIdx.x < 2) state[threadIdx.x] = threadIdx.x == 0 ? 0 : rank;
}

// The next bits of the threshold; leaves empty bins.
KERNEL(1024) update_pick(unsigned *bins, unsigned *state, unsigned size, unsigned shift) {
  SHARED(unsigned, found, WARP + 2);
  const Bin bin = find_bin(bins, size, state[1], found);
  for (unsigned i = threadIdx.x * (size / BIN_THREADS); i < (threadIdx.x + 1) * (size / BIN_THREADS); i++) bins[size - 1 - i] = 0;
  if (threadIdx.x == 0) {
    state[0] |= bin.at << shift;
    state[1] = bin.rank;
  }
}

// Counts the ten bits below `shift` of what shares the threshold's upper ones; sums what is above all of these.
KERNEL(256) update_refine(const float *scratch, const unsigned *state, unsigned *bins, float *sums, unsigned long long n, unsigned shift) {
  SHARED(unsigned, counts, BINS);
  SHARED(float, warps, WARP);
  const bool vectors = aligned16(scratch);
  const unsigned known = state[0] >> shift;
  float above = 0.0f;
  for (unsigned i = threadIdx.x; i < BINS; i += UPDATE_THREADS) counts[i] = 0;
  __syncthreads();
#pragma unroll 4
  for (unsigned run = 0; run < UPDATE_CHUNK; run += N * UPDATE_THREADS) {
    const unsigned long long at = static_cast<unsigned long long>(blockIdx.x) * UPDATE_CHUNK + run + threadIdx.x * N;
    const Floats<N> x = load<N>(scratch, at, n, vectors);
#pragma unroll
    for (int e = 0; e < N; e++) {
      const unsigned bits = magnitude_bits(x.v[e]);
      above += bits >> shift > known ? __uint_as_float(bits) : 0.0f;
      if (bits && bits >> shift == known) atomicAdd(&counts[bits >> (shift - 10) & (BINS - 1)], 1u);
    }
  }
  above = block_sum(above, warps);
  if (threadIdx.x == 0) sums[gridDim.x + blockIdx.x] = above;
  // The sum's barrier stands between the counts and here.
  for (unsigned i = threadIdx.x; i < BINS; i += UPDATE_THREADS)
    if (counts[i]) atomicAdd(&bins[i], counts[i]);
}

// Over a block of 1024 threads, in one order; the first thread gets it. `partial` is shared, one double for each warp.
__device__ __forceinline__ double block_total(double x, double *partial) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
  __syncthreads();
  x = 0.0;
  for (int i = 0; i < WARP; i++) x += partial[i];
  return x;
}

// cut: bits of the smallest magnitude that is kept, of the factor and of the bound of what is kept.
KERNEL(1024) update_cut(const float *sums, const unsigned *bins, const unsigned *state, unsigned *cut, unsigned blocks, unsigned trims, unsigned rescale, float least, float eps, float bound) {
  SHARED(unsigned, found, WARP + 2);
  SHARED(double, totals, 2 * WARP);
  unsigned threshold = 0;
  double before = 0.0, after = 0.0;
  for (unsigned i = threadIdx.x; i < blocks; i += BIN_THREADS) {
    before += sums[i];
    after += sums[blocks + i];
  }
  if (trims) {
    const Bin bin = find_bin(bins, BINS, state[1], found);
    threshold = state[0] | bin.at;
    // These bins are one number wide.
    if (threadIdx.x >= bin.at) after += static_cast<double>(bins[threadIdx.x]) * __uint_as_float(state[0] | threadIdx.x);
  }
  before = block_total(before, totals);
  after = block_total(after, totals + WARP);
  if (threadIdx.x != 0) return;
  const bool rescales = rescale && before >= least;
  cut[0] = threshold;
  cut[1] = __float_as_uint(rescales ? static_cast<float>(before / (after + eps)) : 1.0f);
  cut[2] = rescales ? __float_as_uint(bound) : 0x7f800000u;
}
