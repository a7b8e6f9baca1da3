// elements.cuh - a thread's share of a row or a tensor: N neighbours as floats, in the widest loads and stores that fit.
// Which thread has which elements never depends on where they lie, so neither do the sums made of them.
#pragma once
#include "dev.cuh"

template <int N> struct Floats {
  float v[N];
};

// N elements as they lie in memory; beyond 16 bytes, several accesses.
template <class T, int N> struct __align__(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Run {
  T v[N];
};

// Elements at .. at + N of the `len` that p points to, zeros past their end. With `vectors`, p + at is a 16-byte boundary
// wherever `at` is a multiple of N.
template <int N, class T>
__device__ __forceinline__ Floats<N> load(const T *p, unsigned long long at, unsigned long long len, bool vectors) {
  Floats<N> x;
  if (vectors && at + N <= len) {
    const Run<T, N> run = *reinterpret_cast<const Run<T, N> *>(p + at);
#pragma unroll
    for (int e = 0; e < N; e++) x.v[e] = wide(run.v[e]);
  } else {
#pragma unroll
    for (int e = 0; e < N; e++) x.v[e] = at + e < len ? wide(p[at + e]) : 0.0f;
  }
  return x;
}

template <int N, class T>
__device__ __forceinline__ void store(T *p, unsigned long long at, unsigned long long len, bool vectors, const Floats<N> &x) {
  if (vectors && at + N <= len) {
    Run<T, N> run;
#pragma unroll
    for (int e = 0; e < N; e++) run.v[e] = narrow<T>(x.v[e]);
    *reinterpret_cast<Run<T, N> *>(p + at) = run;
  } else {
#pragma unroll
    for (int e = 0; e < N; e++)
      if (at + e < len) p[at + e] = narrow<T>(x.v[e]);
  }
}

// The first element of this thread where every thread of a one-dimensional grid has N.
template <int N> __device__ __forceinline__ unsigned long long my_elements() {
  return (static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
}
