// runtime.h - what the parts of the emulator know of each other.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>

#include "emulator.h"

namespace emulator {

// ---- memory: all of the device's and the block's shared memory lies in one reserved range ------------------------------

constexpr size_t SHARED_BYTES = 227 << 10;        // of a block, as compute capability 9.0 has it
constexpr size_t STATIC_SHARED_BYTES = 48 << 10;  // without being asked for at the launch
constexpr size_t DEVICE_BYTES = size_t(4) << 30;  // what the device says it has
constexpr size_t RANGE_BYTES = size_t(16) << 30;   // addresses are never used twice

extern char *range;        // shared memory first
void *device_alloc(size_t bytes);
bool device_free(void *p);
// Whether these bytes lie in one allocation.
bool device_has(const void *p, size_t bytes);
size_t device_used();

// ---- launches ----------------------------------------------------------------------------------------------------------

struct Launch {
  const Entry *entry;
  void *arguments;
  uint3 grid, block;
  size_t shared_bytes;
};
const Entry *find_entry(const char *name);
// Order of threads: 0 ascending, 1 descending, another number: random, and other ones at each launch.
uint64_t seed();
// What a kernel did wrong; empty = nothing.
std::string run(const Launch &launch);
// Ends the launch with this message.
[[noreturn]] void fail_with(std::string message);
// File and line of a code address, with its callers where it was inlined.
std::string lines_of(const void *pc);

// ---- memory accesses (race.cpp) ----------------------------------------------------------------------------------------

struct Copy {
  char *to;
  const char *from;
  unsigned group;
  bool there, landed;
};
#ifdef CUVEE_RACE
void race_launch();
void race_block();
void race_barrier();
void race_sync_warp(unsigned warp, unsigned lanes, bool all);
void race_read(const void *p, size_t bytes, Place here);
void race_atomic(const void *p, size_t bytes, const void *pc);
void race_copy_issued(const Copy &copy, Place here);
void race_copy_landed(const Copy &copy, Place here);
#else
inline void race_launch() {}
inline void race_block() {}
inline void race_barrier() {}
inline void race_sync_warp(unsigned, unsigned, bool) {}
inline void race_read(const void *, size_t, Place) {}
inline void race_atomic(const void *, size_t, const void *) {}
inline void race_copy_issued(const Copy &, Place) {}
inline void race_copy_landed(const Copy &, Place) {}
#endif

}  // namespace emulator
