// race.cpp - data races, shared memory that nobody wrote, and asynchronous copies in flight. Kernels are compiled with
// -fsanitize=thread and its library is not linked: the compiler calls __tsan_read4 and the like before every access, and
// they are here. Not to be compiled with that flag itself.
//
// Two accesses of different threads to the same bytes, at least one of them a write that is not atomic, race unless
//   - they are of one block, and a __syncthreads lies between them, or
//   - they are of one warp, and a __syncwarp that both lanes join lies between them (a shuffle orders no memory), or
//   - they are of different launches.
// Found in any order of threads: what counts is what the kernel orders, not what happened first.
#include <dlfcn.h>
#include <stdio.h>
#include <sys/mman.h>

#include "runtime.h"

namespace emulator {

constexpr size_t UNIT = 2;  // bytes that a cell stands for: the smallest type that kernels use
constexpr unsigned SOME = 0xffff, WARPS = 32, LANES = 32;

// The last access of a kind; block 0: none. Threads that read at the same time are SOME thread, of one warp or of SOME.
struct Access {
  uint32_t block, barrier, sync_warp, code;
  uint16_t thread, warp;
};
struct Cell {
  Access write, read;
  uint32_t in_flight;  // block that has an asynchronous copy to here on its way
  bool atomic, read_by_blocks;
};

static Cell *reserve() {
  const size_t bytes = RANGE_BYTES / UNIT * sizeof(Cell);
  void *cells = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cells == MAP_FAILED) {
    perror("emulator: reserving the race check's memory");
    abort();
  }
  return static_cast<Cell *>(cells);
}

static Cell *const cells = reserve();
static uint32_t block, first_block = 1, next_block = 1, barriers;
// How many __syncwarp this warp has had; the last one of all lanes; the last one of each two.
static struct {
  uint32_t count, all, joined[LANES][LANES];
} warp_state[WARPS];

void race_launch() { first_block = next_block; }
void race_block() {
  block = next_block++;
  barriers = 0;
  memset(warp_state, 0, sizeof warp_state);
}
void race_barrier() { barriers++; }
void race_sync_warp(unsigned warp, unsigned lanes, bool all) {
  auto &state = warp_state[warp];
  state.count++;
  if (all) {
    state.all = state.count;
    return;
  }
  for (unsigned i = 0; i < LANES; i++)
    for (unsigned j = 0; j < LANES; j++)
      if ((lanes >> i & 1) && (lanes >> j & 1)) state.joined[i][j] = state.count;
}

// Whether an access comes before all that the current thread does now.
static bool ordered(const Access &a) {
  if (a.block < first_block) return true;
  if (a.block != block) return false;
  if (a.thread == current->linear || a.barrier < barriers) return true;
  if (a.warp != current->warp) return false;
  const auto &state = warp_state[a.warp];
  return state.all > a.sync_warp || (a.thread != SOME && state.joined[a.thread % LANES][current->lane] > a.sync_warp);
}

static char *library() {
  static char *base = nullptr;
  Dl_info info;
  if (base == nullptr && dladdr(reinterpret_cast<void *>(library), &info)) base = static_cast<char *>(info.dli_fbase);
  return base;
}

// Found out only where it is needed.
struct Code {
  const void *pc;
  Place here;
};

[[noreturn]] static void report(const char *what, const Access &other, size_t at, Code code) {
  const bool is_shared = at < SHARED_BYTES;
  const std::string here = code.pc ? lines_of(code.pc) : std::string(code.here.file) + ":" + std::to_string(code.here.line);
  std::string more;
  if (other.block != 0) {
    more = "; the other access: " + (other.code ? lines_of(library() + other.code) : "an asynchronous copy");
    if (other.thread != SOME) more += ", thread " + std::to_string(other.thread);
    if (other.block != block) more += ", block " + std::to_string(other.block - first_block);
  }
  fail_with(here + ": " + what + (is_shared ? " in shared memory" : " in global memory") + more);
}

enum class Kind { READ, WRITE, ATOMIC, COPY_ISSUED, COPY_LANDED };

static void remember_read(Cell &cell, uint32_t code) {
  Access &a = cell.read;
  if (a.block < first_block) cell.read_by_blocks = false;
  else if (a.block != block) cell.read_by_blocks = true;
  uint16_t thread = static_cast<uint16_t>(current->linear), warp = static_cast<uint16_t>(current->warp);
  if (a.block == block && a.barrier == barriers && a.thread != thread && !ordered(a)) {
    thread = SOME;
    if (a.warp != warp) warp = SOME;
  }
  a = {block, barriers, warp_state[current->warp].count, code, thread, warp};
}

static void check(Cell &cell, size_t at, Kind kind, Code code, uint32_t code_offset) {
  const bool writes = kind != Kind::READ;
  if (at < SHARED_BYTES && cell.write.block != block) {  // of a block before this one
    cell.write = {};
    cell.atomic = false;
    if (cell.read.block != block) cell.read = {};
    if (!writes && cell.in_flight != block) report("read of what nobody wrote", cell.write, at, code);
  }
  if (kind == Kind::COPY_LANDED) cell.in_flight = 0;
  else if (cell.in_flight == block) report(writes ? "write to what an asynchronous copy is writing" : "read of what an asynchronous copy is still writing (no cp_async_wait)", cell.write, at, code);
  if (!(kind == Kind::ATOMIC && cell.atomic) && !ordered(cell.write)) report(writes ? "race: a write after a write" : "race: a read after a write", cell.write, at, code);
  if (kind == Kind::READ) return remember_read(cell, code_offset);
  const bool other_blocks = cell.read_by_blocks && cell.read.block >= first_block;
  if (other_blocks || !ordered(cell.read)) report("race: a write after a read", cell.read, at, code);
  if (kind == Kind::COPY_ISSUED) {
    cell.in_flight = block;
    return;
  }
  cell.write = {block, barriers, warp_state[current->warp].count, code_offset, static_cast<uint16_t>(current->linear), static_cast<uint16_t>(current->warp)};
  cell.atomic = kind == Kind::ATOMIC;
}

static void access(const void *p, size_t bytes, Kind kind, Code code) {
  const size_t at = static_cast<size_t>(static_cast<const char *>(p) - range);
  if (at >= RANGE_BYTES || current == nullptr) return;
  if (bytes < UNIT) fail_with(lines_of(code.pc) + ": an access to a single byte, which the race check does not follow: use a wider type");
  const uint32_t offset = code.pc ? static_cast<uint32_t>(static_cast<const char *>(code.pc) - library()) : 0;
  for (size_t i = 0; i < bytes; i += UNIT) check(cells[(at + i) / UNIT], at + i, kind, code, offset);
}

void race_read(const void *p, size_t bytes, Place here) { access(p, bytes, Kind::READ, {nullptr, here}); }
void race_atomic(const void *p, size_t bytes, const void *pc) { access(p, bytes, Kind::ATOMIC, {pc, {}}); }
void race_copy_issued(const Copy &copy, Place here) {
  if (copy.there) access(copy.from, 16, Kind::READ, {nullptr, here});
  access(copy.to, 16, Kind::COPY_ISSUED, {nullptr, here});
}
void race_copy_landed(const Copy &copy, Place here) { access(copy.to, 16, Kind::COPY_LANDED, {nullptr, here}); }

}  // namespace emulator

// ---- what the compiler calls -------------------------------------------------------------------------------------------

using emulator::access;
using emulator::Kind;
#define CODE \
  { __builtin_return_address(0), {} }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
#define CUVEE_ACCESSES(n)                                                       \
  void __tsan_read##n(void *p) { access(p, n, Kind::READ, CODE); }              \
  void __tsan_write##n(void *p) { access(p, n, Kind::WRITE, CODE); }            \
  void __tsan_unaligned_read##n(void *p) { access(p, n, Kind::READ, CODE); }    \
  void __tsan_unaligned_write##n(void *p) { access(p, n, Kind::WRITE, CODE); }  \
  void __tsan_volatile_read##n(void *p) { access(p, n, Kind::READ, CODE); }     \
  void __tsan_volatile_write##n(void *p) { access(p, n, Kind::WRITE, CODE); }
CUVEE_ACCESSES(1)
CUVEE_ACCESSES(2)
CUVEE_ACCESSES(4)
CUVEE_ACCESSES(8)
CUVEE_ACCESSES(16)
void __tsan_read_range(void *p, size_t n) { access(p, n, Kind::READ, CODE); }
void __tsan_write_range(void *p, size_t n) { access(p, n, Kind::WRITE, CODE); }
void *__tsan_memcpy(void *to, const void *from, size_t n) {
  access(from, n, Kind::READ, CODE);
  access(to, n, Kind::WRITE, CODE);
  return memcpy(to, from, n);
}
void *__tsan_memmove(void *to, const void *from, size_t n) {
  access(from, n, Kind::READ, CODE);
  access(to, n, Kind::WRITE, CODE);
  return memmove(to, from, n);
}
void *__tsan_memset(void *to, int value, size_t n) {
  access(to, n, Kind::WRITE, CODE);
  return memset(to, value, n);
}
}
