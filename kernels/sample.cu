// sample.cu - draws a token of each row of logits: temperature, nucleus, inverse of the cumulative distribution.
// Shapes      logits [rows, vocab] f32, overwritten; draws [rows, 3] u32: stream low, high, position; ids [rows] u32
// Launch      grid = rows, block = 512, 64 KiB of dynamic shared memory where share < 2^64 - 1 (a nucleus is searched)
// Traffic     greedy: reads the logits once. Drawing reads them 3 times and writes once, a nucleus reads them 9 times more,
//             from the L2 cache; bound: latency of one block
// Repeatable  yes: all sums are of integers, so no order of addition matters, and CPU and GPU choose the same token
// Requires    vocab >= 1, < 2^19; any alignment
// Oracle      src/ops/sample/reference.rs; src/ops/sample/cpu.rs bit for bit
#include "elements.cuh"
#include "philox.cuh"

using Mass = unsigned long long;

constexpr int SAMPLE_THREADS = 512, SAMPLE_WARPS = SAMPLE_THREADS / WARP;
// What src/ops/sample/mod.rs calls them: set in the id where its logit is no number.
constexpr unsigned NOT_A_NUMBER = 1u << 31, INFINITE = 1u << 30;
constexpr Mass WHOLE = ~0ull;

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

// The first id at which the masses of the ids up to it exceed `target`, which their sum does: every warp adds up a piece, and
// the piece that goes past the target is cut again. `sums` is shared, [2][SAMPLE_WARPS]: a turn writes the half that the last
// one does not read.
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

// The smallest set of likeliest tokens that holds a share: those of a larger weight than `least`, and of those of this weight
// the ids up to `last`.
struct Nucleus {
  unsigned least, last;
  Mass mass;

  __device__ __forceinline__ Mass of(float weight, unsigned id) const {
    const unsigned bits = __float_as_uint(weight);
    return bits > least || (bits == least && id <= last) ? mass_of(weight) : 0;
  }
};

// Finds `least` four bits at a time, from the masses of the tokens by their next four bits: each thread adds up its own tokens
// in a column of `columns` [16][SAMPLE_THREADS], each warp adds the columns of one value into `values` [16], which are shared.
__device__ __forceinline__ Nucleus nucleus_of(const float *weights, unsigned vocab, bool vectors, Mass total, Mass share, Mass *values, Mass *sums, int &turn) {
  DYNAMIC_SHARED(Mass, columns);
  const Mass wanted = high64(total, share) + (total * share != 0);
  Mass above = 0;
  unsigned least = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
    for (int value = 0; value < 16; value++) columns[value * SAMPLE_THREADS + threadIdx.x] = 0;
    for (unsigned at = threadIdx.x * 4; at < vocab; at += SAMPLE_THREADS * 4) {
      const Floats<4> w = load<4>(weights, at, vocab, vectors);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const unsigned value = (__float_as_uint(w.v[e]) ^ least) >> shift; // past 15: another prefix
        if (value < 16) columns[value * SAMPLE_THREADS + threadIdx.x] += mass_of(w.v[e]);
      }
    }
    __syncthreads();
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Mass mine = 0;
    for (int i = lane; i < SAMPLE_THREADS; i += WARP) mine += columns[warp * SAMPLE_THREADS + i];
    mine = warp_total(mine);
    if (lane == 0) values[warp] = mine;
    __syncthreads();
    unsigned value = 15;
    for (; value && above + values[value] < wanted; value--) above += values[value];
    least |= value << shift;
  }
  const Mass one = mass_of(__uint_as_float(least)), ties = (wanted - above + one - 1) / one;
  const unsigned last = first_past(vocab, ties - 1, sums, turn, [&](unsigned id) { return Mass(__float_as_uint(weights[id]) == least); });
  return {least, last, above + ties * one};
}

// `temperature` 0 takes the likeliest; `share` is that of the nucleus in 2^-64, WHOLE for all tokens.
KERNEL(512) sample(float *logits, const unsigned *draws, unsigned *ids, unsigned vocab, float temperature, unsigned long long share, unsigned long long seed) {
  SHARED(Mass, values, SAMPLE_WARPS);
  SHARED(Mass, sums, 2 * SAMPLE_WARPS);
  const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  logits += static_cast<unsigned long long>(blockIdx.x) * vocab;
  draws += 3 * blockIdx.x;
  ids += blockIdx.x;
  const bool vectors = vocab % 4 == 0 && aligned16(logits);

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
  const unsigned likeliest = ~static_cast<unsigned>(best);
  const bool bad = best >> 32 == ALL;
  if (bad || temperature == 0.0f) {
    if (threadIdx.x == 0) *ids = likeliest | (!bad ? 0 : logits[likeliest] == logits[likeliest] ? INFINITE : NOT_A_NUMBER);
    return;
  }

  const float top = ranked_logit(best);
  Mass mine = 0;
  for (unsigned at = threadIdx.x * 4; at < vocab; at += SAMPLE_THREADS * 4) {
    Floats<4> v = load<4>(logits, at, vocab, vectors);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      v.v[e] = weight_of((v.v[e] - top) / temperature);
      if (at + e < vocab) mine += mass_of(v.v[e]);
    }
    store<4>(logits, at, vocab, vectors, v);
  }
  int turn = 0;
  mine = warp_total(mine);
  if (lane == 0) sums[warp] = mine;
  __syncthreads();
  Mass total = 0;
  for (int i = 0; i < SAMPLE_WARPS; i++) total += sums[i];
  Nucleus nucleus{0, vocab, total};
  if (total && share != WHOLE) nucleus = nucleus_of(logits, vocab, vectors, total, share, values, sums, turn);
  const Random random = philox(seed, draws[0] | static_cast<Mass>(draws[1]) << 32, draws[2]);
  const Mass target = high64(random.word[0] | static_cast<Mass>(random.word[1]) << 32, nucleus.mass);
  const unsigned drawn = first_past(vocab, target, sums, turn, [&](unsigned id) { return nucleus.of(logits[id], id); });
  if (threadIdx.x == 0) *ids = total ? drawn : likeliest;
}
