// dev.cuh - where kernels meet the machine: one spelling for nvcc, NVRTC and the emulator of the tests. The only file with
// inline PTX or #ifdef. Includes no CUDA header, so that NVRTC needs no include path.
#pragma once

// A kernel is `KERNEL(threads of a block)`; build.rs makes entry points of it (src/device/cuda/signature.rs).
#define KERNEL(...) __device__ __forceinline__ void
// Which instances of a template are made, where not float and bf16.
#define INSTANCES(...)

#ifdef CUVEE_EMULATOR
#include "emulator.h"
#else
// An array that a block shares, and the dynamic shared memory of the launch, from a 128-byte boundary.
#define SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define DYNAMIC_SHARED(T, name)                                        \
  extern __shared__ __align__(128) unsigned char dynamic_shared_[];   \
  T *name = reinterpret_cast<T *>(dynamic_shared_)
#endif

constexpr unsigned ALL = 0xffffffffu;
constexpr int WARP = 32;

// ---- numbers ---------------------------------------------------------------------------------------------------------

// The upper half of a float.
struct __align__(2) bf16 {
  unsigned short bits;
};

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
#ifdef CUVEE_EMULATOR
// To nearest even; every NaN becomes 0x7fff, as the instruction has it.
__device__ __forceinline__ unsigned short bf16_bits(float x) {
  unsigned u = __float_as_uint(x);
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : static_cast<unsigned short>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
// Two to a register, the first in the lower half.
__device__ __forceinline__ unsigned pack2(float low, float high) { return bf16_bits(low) | static_cast<unsigned>(bf16_bits(high)) << 16; }
#else
__device__ __forceinline__ unsigned short bf16_bits(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ unsigned pack2(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
#endif
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return {bf16_bits(x)}; }

// ---- memory ----------------------------------------------------------------------------------------------------------

// Sixteen bytes, the widest load there is.
template <class T> struct __align__(16) Pack {
  static constexpr int N = 16 / sizeof(T);
  T v[N];
};

__device__ __forceinline__ bool aligned16(const void *p) { return (reinterpret_cast<unsigned long long>(p) & 15) == 0; }
template <class T> __device__ __forceinline__ Pack<T> load_pack(const T *p) { return *reinterpret_cast<const Pack<T> *>(p); }
template <class T> __device__ __forceinline__ void store_pack(T *p, const Pack<T> &x) { *reinterpret_cast<Pack<T> *>(p) = x; }

#ifndef CUVEE_EMULATOR
__device__ __forceinline__ unsigned shared_address(const void *p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Sixteen bytes into shared memory behind the thread's back; zeros where there is nothing to copy.
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until all but the newest N groups of this thread are there.
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"); }

// ---- tensor cores ----------------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8, and gets elements
// (l / 4, 2 (l % 4)) and the next of each; `trans` those of the transposed matrices.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// d += a b: a [16, 16], b [16, 8] bfloat16, d [16, 8] float. Lane l holds d (l / 4, 2 (l % 4)), the next, and the same of
// row l / 4 + 8.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// ---- sums ------------------------------------------------------------------------------------------------------------

// Over a warp, in one order; every lane gets it.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// Over a block of up to 1024 threads, warp by warp; every thread gets it. `partial` is shared, one float for each warp, and
// may be used again after the next barrier.
__device__ __forceinline__ float block_sum(float x, float *partial) {
  const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  x = warp_sum(x);
  if (lane == 0) partial[threadIdx.x / WARP] = x;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}
