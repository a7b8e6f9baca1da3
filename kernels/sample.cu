// sample.cu - draws a token of each row of logits: edits, temperature, top-k, nucleus, min-p, inverse of the cumulative
// distribution.
// Shapes      logits [rows, vocab] f32, the same afterwards; row [rows, 13] u32: what Row in src/ops/sample/mod.rs names;
//             edits [edits] u32, saved [edits] f32; ids [rows] u32; odds [rows, 3] u32: f32 ln weight, mass low, mass high
// Launch      grid = rows, block = 512, 64 KiB of dynamic shared memory (a threshold is searched)
// Traffic     greedy: reads the logits once, twice with edits. Drawing reads them 3 times, top-k 9 times more, a nucleus 9 times
//             more, min-p once more, from the L2 cache; weights are made anew each time. bound: latency of one block
// Repeatable  yes: all sums are of integers, so no order of addition matters, and CPU and GPU choose the same token
// Requires    vocab >= 1, < 2^19; any alignment; an id at most once among a row's edits
// Oracle      src/ops/sample/reference.rs; src/ops/sample/cpu.rs bit for bit
#include "elements.cuh"
#include "philox.cuh"

using Mass = unsigned long long;

constexpr int SAMPLE_THREADS = 512, SAMPLE_WARPS = SAMPLE_THREADS / WARP;
// What src/ops/sample/mod.rs calls them: set in the id where its logit is no number.
constexpr unsigned NOT_A_NUMBER = 1u << 31, INFINITE = 1u << 30, BANNED = 1u << 31;
constexpr Mass WHOLE = ~0ull;

// How a row's token is drawn: Row in src/ops/sample/mod.rs.
struct Row {
  unsigned stream[2], position, seed[2];
  float temperature;
  unsigned share[2];
  float min_p;
  unsigned top_k;
  float repetition_penalty;
  unsigned first_edit, edits;
};
__device__ __forceinline__ Mass whole(const unsigned (&halves)[2]) { return halves[0] | static_cast<Mass>(halves[1]) << 32; }

__device__ __forceinline__ Mass warp_total(Mass x) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}
// Upper half of the product.
__device__ __forceinline__ Mass high64(Mass a, Mass b) {
  const Mass a0 = a & ALL, a1 = a >> 32, b0 = b & ALL, b1 = b >> 32;
  const Mass middle = a1 * b0 + (a0 * b0 >> 32);
  return a1 * b1 + (middle >> 32) + ((a0 * b1 + (middle & ALL)) >> 32);
}

// Larger for the larger logit and then for the smaller id; what is no number comes first.
__device__ __forceinline__ Mass rank(float logit, unsigned id) {
  const unsigned bits = __float_as_uint(logit + 0.0f); // -0 is 0
  const unsigned order = (bits & 0x7fffffffu) > 0x7f800000u || bits == 0x7f800000u ? ALL : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<Mass>(order) << 32 | ~id;
}
__device__ __forceinline__ float ranked_logit(Mass rank) {
  const unsigned order = static_cast<unsigned>(rank >> 32);
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

// e^x for x <= 0, operation for operation as ops/simd.rs: exp_of_negative; 0 for what is no number.
__device__ __forceinline__ float weight_of(float x) {
  constexpr float ROUND = 12582912.0f;
  const float shifted = fmaf(x, 1.44269504f, ROUND), n = shifted - ROUND;
  const float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, x));
  float p = 1.9875691e-4f;
  p = fmaf(p, r, 1.3981999e-3f);
  p = fmaf(p, r, 8.333452e-3f);
  p = fmaf(p, r, 4.1665796e-2f);
  p = fmaf(p, r, 1.6666665e-1f);
  p = fmaf(p, r, 5e-1f);
  const float y = fmaf(p, r * r, r) + 1.0f;
  const unsigned exponent = __float_as_uint(shifted) - __float_as_uint(ROUND) + 127u;
  return x >= -87.3f ? y * __uint_as_float(exponent << 23) : 0.0f;
}
// A weight as an integer: 2^44 for the likeliest token, so that 2^19 of them fit.
__device__ __forceinline__ Mass mass_of(float weight) { return static_cast<Mass>(weight * 17592186044416.0f); }

// A row of logits as weights: 1 for the likeliest, of rank `best`.
struct Weights {
  const float *logits;
  unsigned vocab;
  bool vectors;
  float top, temperature;

  __device__ __forceinline__ float of(float logit) const { return weight_of((logit - top) / temperature); }
  __device__ __forceinline__ float at(unsigned id) const { return of(logits[id]); }
  // Calls use(id, weight) for this thread's share of all ids.
  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
    for (unsigned at = threadIdx.x * 4; at < vocab; at += SAMPLE_THREADS * 4) {
      const Floats<4> v = load<4>(logits, at, vocab, vectors);
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (at + e < vocab) use(at + e, of(v.v[e]));
    }
  }
};

// The sum over all threads. `sums` is shared, [2][SAMPLE_WARPS]: a turn writes the half that the last one does not read.
__device__ __forceinline__ Mass block_total(Mass mine, Mass *sums, int &turn) {
  mine = warp_total(mine);
  turn ^= 1;
  if (threadIdx.x % WARP == 0) sums[turn * SAMPLE_WARPS + threadIdx.x / WARP] = mine;
  __syncthreads();
  Mass total = 0;
  for (int i = 0; i < SAMPLE_WARPS; i++) total += sums[turn * SAMPLE_WARPS + i];
  return total;
}

// The largest rank of all logits.
__device__ __forceinline__ Mass best_of(const float *logits, unsigned vocab, bool vectors, Mass *values) {
  const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  Mass best = 0;
  for (unsigned at = threadIdx.x * 4; at < vocab; at += SAMPLE_THREADS * 4) {
    const Floats<4> v = load<4>(logits, at, vocab, vectors);
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (at + e < vocab) best = max(best, rank(v.v[e], at + e));
  }
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) best = max(best, __shfl_xor_sync(ALL, best, step));
  if (lane == 0) values[warp] = best;
  __syncthreads();
  for (int i = 0; i < SAMPLE_WARPS; i++) best = max(best, values[i]);
  return best;
}

// The first id at which the masses of the ids up to it exceed `target`, which their sum does: every warp adds up a piece, and
// the piece that goes past the target is cut again.
template <class Of>
__device__ __forceinline__ unsigned first_past(unsigned vocab, Mass target, Mass *sums, int &turn, Of mass) {
  const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  unsigned first = 0, end = vocab;
  while (end - first > 1) {
    const unsigned piece = (end - first + SAMPLE_WARPS - 1) / SAMPLE_WARPS;
    const unsigned from = min(end, first + warp * piece), to = min(end, from + piece);
    Mass mine = 0;
#pragma unroll 4
    for (unsigned id = from + lane; id < to; id += WARP) mine += mass(id);
    mine = warp_total(mine);
    turn ^= 1;
    if (lane == 0) sums[turn * SAMPLE_WARPS + warp] = mine;
    __syncthreads();
    unsigned past = 0;
    for (; past < SAMPLE_WARPS - 1 && target >= sums[turn * SAMPLE_WARPS + past]; past++) target -= sums[turn * SAMPLE_WARPS + past];
    first = min(end, first + past * piece);
    end = min(end, first + piece);
  }
  return first;
}

// The bits of the largest weight for which those of it and above hold `wanted`, and what those above it hold.
struct Cut {
  unsigned least;
  Mass above;
};

// Finds it four bits at a time, from what the tokens hold by their next four bits: each thread adds up its own tokens in a
// column of `columns` [16][SAMPLE_THREADS], each warp adds the columns of one value into `values` [16], which are shared.
template <class Of>
__device__ __forceinline__ Cut cut_of(const Weights &weights, Mass wanted, Mass *values, Of held) {
  DYNAMIC_SHARED(Mass, columns);
  Cut cut{0, 0};
  for (int shift = 28; shift >= 0; shift -= 4) {
    for (int value = 0; value < 16; value++) columns[value * SAMPLE_THREADS + threadIdx.x] = 0;
    weights.for_each([&](unsigned, float weight) {
      const unsigned value = (__float_as_uint(weight) ^ cut.least) >> shift; // past 15: another prefix
      if (value < 16) columns[value * SAMPLE_THREADS + threadIdx.x] += held(weight);
    });
    __syncthreads();
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Mass mine = 0;
    for (int i = lane; i < SAMPLE_THREADS; i += WARP) mine += columns[warp * SAMPLE_THREADS + i];
    mine = warp_total(mine);
    if (lane == 0) values[warp] = mine;
    __syncthreads();
    unsigned value = 15;
    for (; value && cut.above + values[value] < wanted; value--) cut.above += values[value];
    cut.least |= value << shift;
  }
  return cut;
}

// What is drawn from: tokens of a larger weight than `least`, and of those of this weight the ids up to `last`.
struct Kept {
  unsigned least, last;
  Mass mass;

  __device__ __forceinline__ Mass of(float weight, unsigned id) const {
    const unsigned bits = __float_as_uint(weight);
    return bits > least || (bits == least && id <= last) ? mass_of(weight) : 0;
  }
};

// All of a weight of these bits or more.
__device__ __forceinline__ Kept kept_from(const Weights &weights, unsigned least, Mass *sums, int &turn) {
  Mass mine = 0;
  weights.for_each([&](unsigned, float weight) { mine += __float_as_uint(weight) >= least ? mass_of(weight) : 0; });
  return {least, weights.vocab, block_total(mine, sums, turn)};
}

__device__ __forceinline__ Kept kept_of(const Weights &weights, const Row &row, Mass *values, Mass *sums, int &turn) {
  unsigned floor = 0;
  if (row.top_k && row.top_k < weights.vocab) floor = cut_of(weights, row.top_k, values, [](float) { return Mass(1); }).least;
  Kept kept = kept_from(weights, floor, sums, turn);
  const Mass share = whole(row.share);
  if (kept.mass && share != WHOLE) {
    const Mass wanted = max(high64(kept.mass, share) + (kept.mass * share != 0), Mass(1));
    const Cut cut = cut_of(weights, wanted, values, [](float weight) { return mass_of(weight); });
    const Mass one = mass_of(__uint_as_float(cut.least)), ties = (wanted - cut.above + one - 1) / one;
    kept.least = cut.least;
    kept.last = first_past(weights.vocab, ties - 1, sums, turn, [&](unsigned id) { return Mass(__float_as_uint(weights.at(id)) == cut.least); });
    kept.mass = cut.above + ties * one;
  }
  const unsigned min_p = __float_as_uint(row.min_p);
  return min_p > kept.least ? kept_from(weights, min_p, sums, turn) : kept;
}

KERNEL(512) sample(float *logits, const unsigned *rows, const unsigned *edits, float *saved, unsigned *ids, unsigned *odds, unsigned vocab) {
  SHARED(Mass, values, SAMPLE_WARPS);
  SHARED(Mass, sums, 2 * SAMPLE_WARPS);
  logits += static_cast<unsigned long long>(blockIdx.x) * vocab;
  const Row row = reinterpret_cast<const Row *>(rows)[blockIdx.x];
  edits += row.first_edit;
  saved += row.first_edit;
  ids += blockIdx.x;
  odds += 3 * blockIdx.x;
  const bool vectors = vocab % 4 == 0 && aligned16(logits);

  Mass best = best_of(logits, vocab, vectors, values);
  const bool bad = best >> 32 == ALL;
  if (!bad && row.edits) {
    for (unsigned i = threadIdx.x; i < row.edits; i += SAMPLE_THREADS) {
      float &logit = logits[edits[i] & ~BANNED];
      saved[i] = logit;
      logit = edits[i] & BANNED ? __uint_as_float(0xff800000u) : logit < 0.0f ? logit * row.repetition_penalty : logit / row.repetition_penalty;
    }
    __syncthreads();
    best = best_of(logits, vocab, vectors, values);
  }
  const unsigned likeliest = ~static_cast<unsigned>(best);
  unsigned drawn = likeliest | (!bad ? 0 : logits[likeliest] == logits[likeliest] ? INFINITE : NOT_A_NUMBER);
  float ln_weight = 0.0f;
  Mass mass = mass_of(1.0f);
  if (!bad && row.temperature != 0.0f) {
    const Weights weights{logits, vocab, vectors, ranked_logit(best), row.temperature};
    int turn = 0;
    const Kept kept = kept_of(weights, row, values, sums, turn);
    if (kept.mass) {
      const Random random = philox(whole(row.seed), whole(row.stream), row.position);
      const Mass target = high64(random.word[0] | static_cast<Mass>(random.word[1]) << 32, kept.mass);
      drawn = first_past(vocab, target, sums, turn, [&](unsigned id) { return kept.of(weights.at(id), id); });
      ln_weight = (logits[drawn] - weights.top) / row.temperature;
      mass = kept.mass;
    }
  }
  if (threadIdx.x == 0) {
    *ids = drawn;
    odds[0] = __float_as_uint(ln_weight);
    odds[1] = static_cast<unsigned>(mass);
    odds[2] = static_cast<unsigned>(mass >> 32);
  }
  if (!bad && row.edits) {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < row.edits; i += SAMPLE_THREADS) logits[edits[i] & ~BANNED] = saved[i];
  }
}
