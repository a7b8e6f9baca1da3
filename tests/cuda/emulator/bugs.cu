// bugs.cu - kernels that are wrong on purpose, and some that are right: what the emulator is tested with (../bugs.rs).
#include "emulator.h"

constexpr unsigned ALL = 0xffffffffu;

// Of 256 threads: x holds 4096 floats, y 512; 8192 bytes of dynamic shared memory; `zero` is 0.
#define BUG(name)                                               \
  extern "C" void name(const float *x, float *y, unsigned zero); \
  CUVEE_ENTRY(name);                                            \
  extern "C" __global__ void name(const float *x, float *y, unsigned zero)

// ---- right: must not be reported ---------------------------------------------------------------------------------------

BUG(right_reverse) {
  SHARED(float, s, 256);
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[blockIdx.x * 256 + threadIdx.x] = s[255 - threadIdx.x];
}
BUG(right_warp) {
  SHARED(float, s, 256);
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
BUG(right_half_warps) {
  SHARED(float, s, 256);
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  s[threadIdx.x] = threadIdx.x;
  __syncwarp(half);
  y[threadIdx.x] = s[threadIdx.x ^ 1] + __shfl_xor_sync(half, 1.0f, 8);
}
BUG(right_copy) {
  DYNAMIC_SHARED(float, s);
  cp_async_16(s + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_16(s + 1024 + threadIdx.x * 4, x, false);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  y[threadIdx.x] = s[1023 - threadIdx.x];
  cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x + 256] = s[2047 - threadIdx.x];
}

// ---- barriers ----------------------------------------------------------------------------------------------------------

BUG(missing_barrier) {
  SHARED(float, s, 256);
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[255 - threadIdx.x];
}
BUG(missing_second_barrier) {
  SHARED(float, s, 256);
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const float v = s[(threadIdx.x + 1) % 256];
  s[threadIdx.x] = v;
  y[threadIdx.x] = v;
}
BUG(divergent_barrier) {
  if (threadIdx.x < 16) {
    y[threadIdx.x] = 0;
    __syncthreads();
  } else {
    y[threadIdx.x] = 1;
    __syncthreads();
  }
}
BUG(barrier_of_some) {
  if (threadIdx.x >= 32) return;
  y[threadIdx.x] = 0;
  __syncthreads();
}
BUG(missing_syncwarp) {
  SHARED(float, s, 256);
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
// A shuffle meets all lanes, and orders no memory.
BUG(shuffle_for_syncwarp) {
  SHARED(float, s, 256);
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = __shfl_xor_sync(ALL, 1.0f, 1);
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
BUG(divergent_shuffle) {
  float v = threadIdx.x;
  if (threadIdx.x & 1) v = __shfl_xor_sync(ALL, v, 1);
  __syncthreads();
  y[threadIdx.x] = v;
}
BUG(two_shuffles) {
  float v = threadIdx.x;
  if (threadIdx.x & 1) v = __shfl_xor_sync(ALL, v, 1);
  else v = __shfl_down_sync(ALL, v, 1);
  y[threadIdx.x] = v;
}
BUG(shuffle_outside_mask) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

// ---- memory ------------------------------------------------------------------------------------------------------------

BUG(blocks_race) { y[threadIdx.x] += 1.0f; }
BUG(threads_race) { y[threadIdx.x / 2] = threadIdx.x; }
BUG(unwritten_shared) {
  SHARED(float, s, 256);
  if (threadIdx.x < 128) s[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x] > 0.0f ? 1.0f : 2.0f;
}
BUG(missing_copy_wait) {
  SHARED(float, s, 1024);
  cp_async_16(s + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x * 4];
  cp_async_wait<0>();
}
BUG(missing_copy_barrier) {
  SHARED(float, s, 1024);
  cp_async_16(s + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = s[1020 - threadIdx.x * 4];
}
BUG(copy_left_behind) {
  SHARED(float, s, 1024);
  cp_async_16(s + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  y[threadIdx.x] = 0;
}
BUG(copy_into_read) {
  SHARED(float, s, 1024);
  s[threadIdx.x * 4] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = s[1020 - threadIdx.x * 4];
  cp_async_16(s + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
}
BUG(misaligned_copy) {
  SHARED(float, s, 1024);
  cp_async_16(s + threadIdx.x * 4, x + threadIdx.x * 4 + 1);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = s[threadIdx.x * 4];
}
BUG(write_past_the_end) { y[threadIdx.x + 512 + zero] = 1.0f; }
BUG(read_past_the_end) { y[threadIdx.x] = x[threadIdx.x + 4096 + zero]; }
BUG(shared_past_the_end) {
  SHARED(float, s, 256);
  s[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 1 + zero];
}
BUG(dynamic_past_the_end) {
  DYNAMIC_SHARED(float, s);
  s[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 2048 + zero];
}
BUG(local_past_the_end) {
  float a[8];
  for (unsigned i = 0; i < 8; i++) a[i] = x[i];
  y[threadIdx.x] = a[(threadIdx.x + zero) % 9];
}
BUG(misaligned_vector) { y[threadIdx.x] = reinterpret_cast<const float4 *>(x + 1 + zero)[threadIdx.x].x; }
BUG(null_pointer) {
  float *nothing = reinterpret_cast<float *>(reinterpret_cast<unsigned long long>(y) & zero);
  nothing[threadIdx.x] = 1.0f;
}
BUG(too_much_shared) {
  SHARED(float, s, 12289);
  s[threadIdx.x] = y[threadIdx.x];
}
BUG(no_dynamic_shared) {
  DYNAMIC_SHARED(float, s);
  s[threadIdx.x] = y[threadIdx.x];
}

// ---- fragments ---------------------------------------------------------------------------------------------------------

// y [16, 8] += a [16, 16] b in bfloat16, by one warp. x holds a by rows and, from 256 on, b: [8, 16], whose rows are columns of the
// product, and from 384 on the same as [16, 8].
static __device__ void multiply(const float *x, float *y, bool transposed) {
  SHARED(unsigned short, sa, 16 * 24);
  SHARED(unsigned short, sb, 16 * 24);
  const unsigned lane = threadIdx.x, m = lane / 8, row = lane % 8;
  const auto narrow = [](float number) { return static_cast<unsigned short>(__float_as_uint(number) >> 16); };
  for (unsigned i = lane; i < 256; i += 32) sa[i / 16 * 24 + i % 16] = narrow(x[i]);
  for (unsigned i = lane; i < 256; i += 32) sb[i / 16 * 24 + i % 16] = 0;
  __syncwarp();
  for (unsigned i = lane; i < 128; i += 32) {
    if (transposed) sb[i / 8 * 24 + i % 8] = narrow(x[384 + i]);
    else sb[i / 16 * 24 + i % 16] = narrow(x[256 + i]);
  }
  __syncwarp();
  unsigned a[4], b[4];
  ldmatrix_x4(a, sa + (row + 8 * (m % 2)) * 24 + 8 * (m / 2));
  if (transposed) ldmatrix_x4_trans(b, sb + (8 * (m % 2) + row) * 24 + 8 * (m / 2));
  else ldmatrix_x4(b, sb + (8 * (m / 2) + row) * 24 + 8 * (m % 2));
  float sum[4];
  for (unsigned e = 0; e < 4; e++) sum[e] = y[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2];
  mma_m16n8k16(sum, a, b[0], b[1]);
  for (unsigned e = 0; e < 4; e++) y[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sum[e];
}
BUG(right_product) {
  if (threadIdx.x < 32) multiply(x, y, false);
}
BUG(right_transposed_product) {
  if (threadIdx.x < 32) multiply(x, y, true);
}
