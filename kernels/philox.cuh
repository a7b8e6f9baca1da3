// philox.cuh - Philox4x32-10, number for number as src/device/philox.rs: a pure function of (seed, stream, counter).
#pragma once
#include "dev.cuh"

struct Random {
  unsigned word[4];
};

__device__ __forceinline__ Random philox(unsigned long long seed, unsigned long long stream, unsigned long long counter) {
  unsigned x[4] = {static_cast<unsigned>(counter), static_cast<unsigned>(counter >> 32), static_cast<unsigned>(stream), static_cast<unsigned>(stream >> 32)};
  unsigned key[2] = {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const unsigned high0 = __umulhi(0xD2511F53u, x[0]), low0 = 0xD2511F53u * x[0];
    const unsigned high1 = __umulhi(0xCD9E8D57u, x[2]), low1 = 0xCD9E8D57u * x[2];
    x[0] = high1 ^ x[1] ^ key[0];
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ key[1];
    x[3] = low0;
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return {{x[0], x[1], x[2], x[3]}};
}
