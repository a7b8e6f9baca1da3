// emulator.h - CUDA's language for a C++17 compiler, included by kernels/dev.cuh under CUVEE_EMULATOR. A thread of a block
// is a fibre (runtime.cpp); blocks run one after the other. What warps do together (shuffles, votes, mma, ldmatrix,
// __syncwarp) happens when the last lane arrives. A kernel that breaks a rule ends with the rule's name, file and line.
#pragma once
#include <math.h>
#include <stddef.h>
#include <string.h>

#include <tuple>
#include <type_traits>

// ---- language --------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- the runtime (runtime.cpp) ---------------------------------------------------------------------------------------

namespace emulator {

// A place in a kernel, for messages; as a default argument it is the caller's.
struct Place {
  const char *file;
  int line;
};
#define CUVEE_HERE emulator::Place here = {__builtin_FILE(), __builtin_LINE()}

struct Thread {
  uint3 index;
  unsigned linear, lane, warp;
};
extern Thread *current;
extern uint3 block_index, block_size, grid_size;

enum class Lane { INDEX, UP, DOWN, XOR };

[[noreturn]] void fail(Place here, const char *format, ...) __attribute__((format(printf, 2, 3)));
void barrier(Place here, int site);
void sync_warp(unsigned mask, Place here);
void shuffle(Lane from, unsigned mask, const void *in, void *out, size_t bytes, int argument, int width, Place here);
unsigned ballot(unsigned mask, bool vote, Place here);
void mma(float *d, const unsigned *a, unsigned b0, unsigned b1, Place here);
void ldmatrix(unsigned *r, const void *row, bool transposed, Place here);
void cp_async(void *shared, const void *global, bool there, Place here);
void cp_async_commit();
void cp_async_wait(unsigned newest, Place here);
// Storage of this block under this key, poisoned with NaN.
void *shared(const void *key, size_t bytes, size_t align, Place here);
void *dynamic_shared(Place here);
void atomic(const void *p, size_t bytes);

// A kernel under its name. Arguments are copied when it is launched, as the driver does.
struct Entry {
  const char *name;
  void *(*copy)(void **arguments);
  void (*run)(void *copied);
  void (*drop)(void *copied);
  Entry(const char *name, void *(*copy)(void **), void (*run)(void *), void (*drop)(void *));
};
template <class... A> struct Kernel {
  using Arguments = std::tuple<A...>;
  template <size_t... I> static void *copy(void **from, std::index_sequence<I...>) { return new Arguments(*static_cast<A *>(from[I])...); }
  static void *copy(void **from) { return copy(from, std::index_sequence_for<A...>()); }
  template <void (*KERNEL)(A...)> static void run(void *copied) { std::apply(KERNEL, *static_cast<Arguments *>(copied)); }
  static void drop(void *copied) { delete static_cast<Arguments *>(copied); }
};
template <class... A> Kernel<A...> kernel_of(void (*)(A...));
// Makes the kernel known to the driver.
#define CUVEE_ENTRY(k) \
  static const emulator::Entry k##_entry(#k, decltype(emulator::kernel_of(k))::copy, decltype(emulator::kernel_of(k))::run<k>, decltype(emulator::kernel_of(k))::drop)

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

#define SHARED(T, name, n)          \
  static const char name##_key = 0; \
  T(&name)[n] = *static_cast<T(*)[n]>(emulator::shared(&name##_key, sizeof(T) * (n), 16, {__FILE__, __LINE__}))
#define DYNAMIC_SHARED(T, name) T *name = static_cast<T *>(emulator::dynamic_shared({__FILE__, __LINE__}))

// ---- barriers and warps ----------------------------------------------------------------------------------------------

// The counter tells two barriers of one line apart.
#define __syncthreads() emulator::barrier({__FILE__, __LINE__}, __COUNTER__)
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, CUVEE_HERE) { emulator::sync_warp(mask, here); }

namespace emulator {
template <class T> __forceinline__ T shuffled(Lane from, unsigned mask, T value, int argument, int width, Place here) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable<T>::value, "a shuffle moves plain values of up to 16 bytes");
  T out;
  shuffle(from, mask, &value, &out, sizeof(T), argument, width, here);
  return out;
}
}  // namespace emulator
template <class T> __forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUVEE_HERE) { return emulator::shuffled(emulator::Lane::INDEX, mask, value, lane, width, here); }
template <class T> __forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUVEE_HERE) { return emulator::shuffled(emulator::Lane::UP, mask, value, static_cast<int>(delta), width, here); }
template <class T> __forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUVEE_HERE) { return emulator::shuffled(emulator::Lane::DOWN, mask, value, static_cast<int>(delta), width, here); }
template <class T> __forceinline__ T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, CUVEE_HERE) { return emulator::shuffled(emulator::Lane::XOR, mask, value, flip, width, here); }
__forceinline__ unsigned __ballot_sync(unsigned mask, int vote, CUVEE_HERE) { return emulator::ballot(mask, vote != 0, here); }
__forceinline__ int __any_sync(unsigned mask, int vote, CUVEE_HERE) { return emulator::ballot(mask, vote != 0, here) != 0; }
__forceinline__ int __all_sync(unsigned mask, int vote, CUVEE_HERE) { return emulator::ballot(mask, vote == 0, here) == 0; }

// ---- tensor cores and asynchronous copies, as dev.cuh declares them --------------------------------------------------

__forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void *row, CUVEE_HERE) { emulator::ldmatrix(r, row, false, here); }
__forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void *row, CUVEE_HERE) { emulator::ldmatrix(r, row, true, here); }
__forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, CUVEE_HERE) { emulator::mma(d, a, b0, b1, here); }
__forceinline__ void cp_async_16(void *shared, const void *global, bool there = true, CUVEE_HERE) { emulator::cp_async(shared, global, there, here); }
__forceinline__ void cp_async_commit() { emulator::cp_async_commit(); }
template <int N> __forceinline__ void cp_async_wait(CUVEE_HERE) { emulator::cp_async_wait(N, here); }

// ---- atomics: fibres never run at the same time ----------------------------------------------------------------------

#define CUVEE_ATOMIC(name, result)                                                                                    \
  template <class T> __attribute__((no_sanitize("thread"), noinline)) T name(T *p, std::common_type_t<T> value) {     \
    emulator::atomic(p, sizeof(T));                                                                                   \
    const T old = *p;                                                                                                 \
    *p = result;                                                                                                      \
    return old;                                                                                                       \
  }
CUVEE_ATOMIC(atomicAdd, old + value)
CUVEE_ATOMIC(atomicMax, old < value ? value : old)
CUVEE_ATOMIC(atomicMin, value < old ? value : old)
CUVEE_ATOMIC(atomicAnd, old &value)
CUVEE_ATOMIC(atomicOr, old | value)
CUVEE_ATOMIC(atomicExch, value)
template <class T> __attribute__((no_sanitize("thread"), noinline)) T atomicCAS(T *p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  emulator::atomic(p, sizeof(T));
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- numbers ---------------------------------------------------------------------------------------------------------

namespace emulator {
template <class To, class From> __attribute__((always_inline)) inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulator
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits<double>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits<long long>(x); }

// The fast forms of the GPU are off by a few units in the last place; these are not.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
#define __log2f(x) log2f(x)
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> void __stcs(T *p, T value) { *p = value; }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
#define __trap() emulator::fail({__FILE__, __LINE__}, "__trap()")
