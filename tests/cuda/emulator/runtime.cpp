// runtime.cpp - fibres, blocks, warps, shared and device memory. Not to be compiled with -fsanitize=thread: what the runtime
// does is no access of the kernel's.
#include "runtime.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <set>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
constexpr bool ASAN = true;
#else
constexpr bool ASAN = false;
#define __asan_poison_memory_region(p, n) (void)0
#define __asan_unpoison_memory_region(p, n) (void)0
#define __sanitizer_start_switch_fiber(save, bottom, size) (void)(save)
#define __sanitizer_finish_switch_fiber(save, bottom, size) (void)(save)
#endif

namespace emulator {

constexpr unsigned MAX_THREADS = 1024, LANES = 32, EVERY_LANE = 0xffffffffu;
constexpr size_t PAGE = 4096, STACK = ASAN ? 256 << 10 : 64 << 10;
constexpr unsigned POISON = 0xff;  // NaN as float and as bfloat16

// ---- device memory -----------------------------------------------------------------------------------------------------

static std::map<char *, size_t> allocations;  // start -> bytes
static size_t used_bytes;
static char *next_page;

static char *reserve() {
  void *all = mmap(nullptr, RANGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) {
    perror("emulator: reserving addresses");
    abort();
  }
  const size_t shared = (SHARED_BYTES + PAGE - 1) / PAGE * PAGE;
  mprotect(all, shared, PROT_READ | PROT_WRITE);
  next_page = static_cast<char *>(all) + shared + PAGE;
  return static_cast<char *>(all);
}
char *range = reserve();

// Ends at a page that cannot be touched: an access behind it is seen in every mode, exactly by AddressSanitizer, else after
// up to 255 bytes.
void *device_alloc(size_t bytes) {
  const size_t size = (bytes + 255) / 256 * 256, pages = (size + PAGE - 1) / PAGE * PAGE;
  if (used_bytes + bytes > DEVICE_BYTES || next_page + pages + PAGE > range + RANGE_BYTES) return nullptr;
  char *first = next_page, *start = first + pages - size;
  if (mprotect(first, pages, PROT_READ | PROT_WRITE) != 0) return nullptr;
  memset(first, POISON, pages);
  __asan_poison_memory_region(first, pages + PAGE);
  __asan_unpoison_memory_region(start, bytes);
  next_page += pages + PAGE;
  allocations[start] = bytes;
  used_bytes += bytes;
  return start;
}

bool device_free(void *p) {
  const auto found = allocations.find(static_cast<char *>(p));
  if (found == allocations.end()) return false;
  char *first = reinterpret_cast<char *>(reinterpret_cast<uintptr_t>(p) / PAGE * PAGE);
  const size_t pages = (found->first + found->second - first + PAGE - 1) / PAGE * PAGE;
  __asan_poison_memory_region(first, pages);
  madvise(first, pages, MADV_DONTNEED);
  mprotect(first, pages, PROT_NONE);
  used_bytes -= found->second;
  allocations.erase(found);
  return true;
}

bool device_has(const void *p, size_t bytes) {
  const char *start = static_cast<const char *>(p);
  auto after = allocations.upper_bound(const_cast<char *>(start));
  if (after == allocations.begin()) return false;
  --after;
  return start + bytes <= after->first + after->second;
}

size_t device_used() { return used_bytes; }

// ---- state of a launch -------------------------------------------------------------------------------------------------

enum class State { READY, AT_BARRIER, AT_COLLECTIVE, DONE };

struct Fibre : Thread {
  void *stack_pointer;  // null: not started
  char *stack;
  State state;
  const char *what;  // waits at this
  Place where;
  int site;
  const void *pc;  // last call into the runtime
  std::vector<Copy> copies;
  unsigned groups;
  void *fake_stack;
};

// What a lane brought to a collective.
struct Deposit {
  const void *in;
  void *out;
  int argument;
};
struct Collective;
using Meeting = void (*)(Deposit *lanes, unsigned mask, const Collective &which);
struct Collective {
  const char *name;
  Meeting meeting;
  unsigned mask, arrived;
  Place where;
  Lane from;
  int width;
  size_t bytes;
};
struct Warp {
  unsigned alive;
  std::vector<Collective> open;
  Deposit lanes[LANES];
};
struct Slot {
  const void *key;
  void *storage;
};

Thread *current;
uint3 block_index, block_size, grid_size;

static std::vector<Fibre> fibres(MAX_THREADS);
static Warp warps[MAX_THREADS / LANES];
static const Launch *launched;
static unsigned threads, done, at_barrier;
static std::string failure;
static const void *failure_pc;
static bool failure_has_place;
static uint64_t random_state;
static void *scheduler_pointer, *scheduler_fake_stack;
static void *scheduler_bottom;
static size_t scheduler_size;

// ---- order of threads --------------------------------------------------------------------------------------------------

// A ring: no fibre is in it twice.
static unsigned ready[MAX_THREADS], ready_first, ready_count;

uint64_t seed() {
  static const char *text = getenv("CUVEE_EMULATOR_SEED");
  static const uint64_t number = text ? strtoull(text, nullptr, 10) : 0;
  return number;
}

static uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

static void make_ready(Fibre &fibre) {
  fibre.state = State::READY;
  ready[(ready_first + ready_count++) % MAX_THREADS] = fibre.linear;
}

static void make_all_ready() {
  for (unsigned i = 0; i < threads; i++) make_ready(fibres[seed() == 1 ? threads - 1 - i : i]);
}

static Fibre *next_ready() {
  if (ready_count == 0 || !failure.empty()) return nullptr;
  if (seed() > 1) std::swap(ready[ready_first], ready[(ready_first + random_number() % ready_count) % MAX_THREADS]);
  Fibre *next = &fibres[ready[ready_first]];
  ready_first = (ready_first + 1) % MAX_THREADS;
  ready_count--;
  return next;
}

// ---- fibres ------------------------------------------------------------------------------------------------------------

// Saves what a function must keep, changes stacks, takes it back.
extern "C" void cuvee_emulator_switch(void **save, void *to);
#ifndef __x86_64__
#error "the emulator switches fibres in x86-64 assembly"
#endif
__asm__(R"(
.text
.globl cuvee_emulator_switch
.hidden cuvee_emulator_switch
.type cuvee_emulator_switch,@function
cuvee_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuvee_emulator_switch,.-cuvee_emulator_switch
)");

static std::vector<char *> free_stacks;

static char *new_stack() {
  if (free_stacks.empty()) {
    char *memory = static_cast<char *>(mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(memory, PAGE, PROT_NONE);
    return memory + PAGE;
  }
  char *stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

static void fibre_main();

static void give_stack(Fibre &fibre) {
  fibre.stack = new_stack();
  // Stacks start at different lines of the cache: with all at the same place of a page they would push each other out.
  const size_t colour = fibre.linear * 5 % 64 * 64;
  void **top = reinterpret_cast<void **>(fibre.stack + STACK - colour);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void *>(fibre_main);
  for (int i = 3; i <= 8; i++) top[-i] = nullptr;
  fibre.stack_pointer = top - 8;
}

static void take_stack(Fibre &fibre) {
  if (fibre.stack == nullptr) return;
  free_stacks.push_back(fibre.stack);
  fibre.stack = nullptr;
}

// Goes on with this fibre, or with the scheduler; `save` is null for one that will not come back.
static void switch_to(Fibre *next, void **save, void **fake_stack) {
  static void *nowhere;
  current = next;
  if (next == nullptr) {
    __sanitizer_start_switch_fiber(fake_stack, scheduler_bottom, scheduler_size);
    cuvee_emulator_switch(save ? save : &nowhere, scheduler_pointer);
  } else {
    if (next->stack == nullptr) give_stack(*next);
    __sanitizer_start_switch_fiber(fake_stack, next->stack, STACK);
    cuvee_emulator_switch(save ? save : &nowhere, next->stack_pointer);
  }
}

static void wait() {
  Fibre *fibre = static_cast<Fibre *>(current);
  switch_to(next_ready(), &fibre->stack_pointer, &fibre->fake_stack);
  __sanitizer_finish_switch_fiber(fibre->fake_stack, nullptr, nullptr);
}

static void meet(Warp &warp, size_t which);

static __attribute__((noinline)) void finish(Fibre &fibre) {
  fibre.state = State::DONE;
  done++;
  if (!fibre.copies.empty() && failure.empty()) failure = "a thread ends with asynchronous copies that nobody waited for";
  Warp &warp = warps[fibre.warp];
  warp.alive &= ~(1u << fibre.lane);
  for (size_t i = 0; i < warp.open.size(); i++) {
    if (warp.open[i].arrived == (warp.open[i].mask & warp.alive)) meet(warp, i--);
  }
}

// Never returns, so that AddressSanitizer must not mark its frame on a stack that the next fibre gets.
static __attribute__((no_sanitize("address"))) void fibre_main() {
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  for (;;) {
    launched->entry->run(launched->arguments);
    Fibre &fibre = *static_cast<Fibre *>(current);
    finish(fibre);
    Fibre *next = next_ready();
    if (next != nullptr && next->stack == nullptr) {
      // Begins on this stack: kernels without barriers never switch.
      std::swap(next->stack, fibre.stack);
      current = next;
      continue;
    }
    // Nobody takes the stack before we have left it: `next` has its own.
    take_stack(fibre);
    switch_to(next, nullptr, nullptr);
  }
}

// ---- failures ----------------------------------------------------------------------------------------------------------

// File and line of an address, from the debug information; with its callers where it was inlined.
std::string lines_of(const void *pc) {
  Dl_info info;
  if (pc == nullptr || !dladdr(pc, &info)) return "?";
  char command[1200], line[1024];
  const size_t offset = static_cast<const char *>(pc) - 1 - static_cast<const char *>(info.dli_fbase);
  snprintf(command, sizeof command, "LD_PRELOAD= addr2line -ie '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  std::string all, last;
  FILE *out = popen(command, "r");
  while (out != nullptr && fgets(line, sizeof line, out)) {
    std::string one = line;
    one = one.substr(0, one.find_first_of("\n ("));
    const size_t kernels = one.rfind("/kernels/");
    one = kernels == std::string::npos ? one.substr(one.rfind('/') + 1) : one.substr(kernels + 1);
    if (one.rfind("emulator.h:", 0) == 0 || one == last || one.find('?') != std::string::npos) continue;
    all += (all.empty() ? "" : " < ") + one;
    last = one;
  }
  if (out != nullptr) pclose(out);
  return all.empty() ? "?" : all;
}

static void note(Place here, const std::string &text, const void *pc = nullptr) {
  if (!failure.empty()) return;
  failure = std::string(here.file) + ":" + std::to_string(here.line) + ": " + text;
  failure_pc = pc;
  failure_has_place = true;
}

void fail_with(std::string message) {
  const Fibre &fibre = *static_cast<Fibre *>(current);
  const uint3 b = block_index;
  if (failure.empty()) {
    failure = message + " [thread " + std::to_string(fibre.linear) + " of block " + std::to_string(b.x) + " " + std::to_string(b.y) + " " + std::to_string(b.z) + "]";
  }
  switch_to(nullptr, nullptr, nullptr);
  abort();
}

void fail(Place here, const char *format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  failure_pc = static_cast<Fibre *>(current)->pc;
  failure_has_place = here.file != nullptr;
  fail_with(failure_has_place ? std::string(here.file) + ":" + std::to_string(here.line) + ": " + text : text);
}

// A kernel that reads or writes what is not there.
static void on_signal(int, siginfo_t *info, void *context) {
  if (current == nullptr) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  Fibre &fibre = *static_cast<Fibre *>(current);
  const char *at = static_cast<char *>(info->si_addr);
  const bool overflow = at >= fibre.stack - PAGE && at < fibre.stack;
  fibre.pc = reinterpret_cast<const void *>(static_cast<ucontext_t *>(context)->uc_mcontext.gregs[REG_RIP] + 1);
  if (overflow) fail({nullptr, 0}, "a thread needs more than %zu bytes of stack", STACK);
  const auto after = allocations.upper_bound(const_cast<char *>(at));
  if (reinterpret_cast<uintptr_t>(at) < 65536) fail({nullptr, 0}, "access through a null pointer, or sixteen bytes that are not aligned");
  if (at >= range && at < range + RANGE_BYTES && after != allocations.begin()) {
    const auto before = std::prev(after);
    fail({nullptr, 0}, "access %zd bytes behind the start of an allocation of %zu", at - before->first, before->second);
  }
  fail({nullptr, 0}, "access to memory that is not there, at %p", static_cast<const void *>(at));
}

static void catch_signals() {
  if (ASAN) return;  // which says more
  static char stack[64 << 10];
  stack_t other = {};
  other.ss_sp = stack;
  other.ss_size = sizeof stack;
  sigaltstack(&other, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

// ---- trace: which barriers run, for the mutation runner ----------------------------------------------------------------

static void trace(Place here) {
  static const char *path = getenv("CUVEE_EMULATOR_TRACE");
  if (path == nullptr) return;
  static std::set<std::string> seen;
  const std::string line = std::string(launched->entry->name) + " " + here.file + ":" + std::to_string(here.line) + "\n";
  if (!seen.insert(line).second) return;
  if (FILE *file = fopen(path, "a")) {
    fputs(line.c_str(), file);
    fclose(file);
  }
}

#define ENTER(fibre)                             \
  Fibre &fibre = *static_cast<Fibre *>(current); \
  fibre.pc = __builtin_return_address(0)

// ---- barriers ----------------------------------------------------------------------------------------------------------

void barrier(Place here, int site) {
  ENTER(fibre);
  trace(here);
  fibre.state = State::AT_BARRIER;
  fibre.what = "__syncthreads";
  fibre.where = here;
  fibre.site = site;
  at_barrier++;
  wait();
}

static void release_barrier() {
  const Fibre *first = nullptr;
  for (unsigned i = 0; i < threads; i++) {
    const Fibre &fibre = fibres[i];
    if (fibre.state != State::AT_BARRIER) continue;
    if (first == nullptr) first = &fibre;
    if (fibre.site == first->site && fibre.where.line == first->where.line && strcmp(fibre.where.file, first->where.file) == 0) continue;
    const std::string other = std::string(first->where.file) + ":" + std::to_string(first->where.line);
    return note(fibre.where, "divergent __syncthreads: thread " + std::to_string(fibre.linear) + " waits here, thread " + std::to_string(first->linear) + " at " + other, fibre.pc);
  }
  if (at_barrier != threads) {
    const std::string count = std::to_string(at_barrier) + " of " + std::to_string(threads);
    return note(first->where, "__syncthreads reached by " + count + " threads; the others have ended", first->pc);
  }
  race_barrier();
  at_barrier = 0;
  make_all_ready();
}

static void report_deadlock() {
  std::map<std::string, unsigned> waiting;
  Place place = {"kernel", 0};
  for (unsigned i = 0; i < threads; i++) {
    const Fibre &fibre = fibres[i];
    if (fibre.state == State::DONE) continue;
    place = fibre.where;
    waiting[std::string(fibre.what) + " of " + place.file + ":" + std::to_string(place.line)]++;
  }
  std::string text = "deadlock:";
  for (const auto &entry : waiting) text += " " + std::to_string(entry.second) + " threads wait at " + entry.first + ";";
  note(place, text + " " + std::to_string(done) + " have ended");
}

// ---- collectives -------------------------------------------------------------------------------------------------------

static void meet(Warp &warp, size_t which) {
  const Collective collective = warp.open[which];
  const unsigned lanes = collective.mask & warp.alive;
  warp.open[which] = warp.open.back();
  warp.open.pop_back();
  collective.meeting(warp.lanes, lanes, collective);
  const unsigned first = static_cast<unsigned>(&warp - warps) * LANES;
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    Fibre &fibre = fibres[first + static_cast<unsigned>(__builtin_ctz(left))];
    if (fibre.state == State::AT_COLLECTIVE) make_ready(fibre);
  }
}

static void collective(Fibre &fibre, Collective wanted, Deposit deposit) {
  Warp &warp = warps[fibre.warp];
  const unsigned bit = 1u << fibre.lane;
  if (!(wanted.mask & bit)) fail(wanted.where, "%s: the calling lane is not in the mask %08x", wanted.name, wanted.mask);
  size_t which = 0;
  while (which < warp.open.size() && !(warp.open[which].mask & wanted.mask)) which++;
  if (which == warp.open.size()) warp.open.push_back(wanted);
  Collective &open = warp.open[which];
  if (open.mask != wanted.mask || open.meeting != wanted.meeting || open.from != wanted.from) {
    fail(wanted.where, "divergent warp: %s (mask %08x) meets %s (mask %08x) of %s:%d", wanted.name, wanted.mask, open.name, open.mask, open.where.file, open.where.line);
  }
  open.arrived |= bit;
  warp.lanes[fibre.lane] = deposit;
  if (open.arrived == (open.mask & warp.alive)) return meet(warp, which);
  fibre.state = State::AT_COLLECTIVE;
  fibre.what = wanted.name;
  fibre.where = wanted.where;
  wait();
}

// Only this orders memory between the lanes of a warp; shuffles and votes do not.
void sync_warp(unsigned mask, Place here) {
  ENTER(fibre);
  trace(here);
  const Meeting nothing = [](Deposit *, unsigned lanes, const Collective &) {
    const Fibre &any = *static_cast<Fibre *>(current);
    race_sync_warp(any.warp, lanes, lanes == warps[any.warp].alive);
  };
  collective(fibre, {"__syncwarp", nothing, mask, 0, here, Lane::INDEX, 0, 0}, {});
}

static void exchange(Deposit *lanes, unsigned mask, const Collective &which) {
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left), first = lane & ~(which.width - 1), end = first + which.width, argument = lanes[lane].argument;
    int from = lane;
    if (which.from == Lane::INDEX) from = first + (argument & (which.width - 1));
    if (which.from == Lane::UP) from = lane - argument < first ? lane : lane - argument;
    if (which.from == Lane::DOWN) from = lane + argument >= end ? lane : lane + argument;
    if (which.from == Lane::XOR) from = (lane ^ argument) >= end ? lane : lane ^ argument;
    if (!(mask >> from & 1)) fail(which.where, "%s: lane %d reads lane %d, which does not take part (mask %08x)", which.name, lane, from, mask);
    memcpy(lanes[lane].out, lanes[from].in, which.bytes);
  }
}

void shuffle(Lane from, unsigned mask, const void *in, void *out, size_t bytes, int argument, int width, Place here) {
  ENTER(fibre);
  static const char *const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  collective(fibre, {names[static_cast<int>(from)], exchange, mask, 0, here, from, width, bytes}, {in, out, argument});
}

unsigned ballot(unsigned mask, bool vote, Place here) {
  ENTER(fibre);
  unsigned votes;
  const Meeting count = [](Deposit *lanes, unsigned voters, const Collective &) {
    unsigned all = 0;
    for (unsigned left = voters; left != 0; left &= left - 1) all |= static_cast<unsigned>(lanes[__builtin_ctz(left)].argument) << __builtin_ctz(left);
    for (unsigned left = voters; left != 0; left &= left - 1) *static_cast<unsigned *>(lanes[__builtin_ctz(left)].out) = all;
  };
  collective(fibre, {"vote", count, mask, 0, here, Lane::INDEX, 0, 0}, {nullptr, &votes, vote});
  return votes;
}

static void need_whole_warp(unsigned mask, const Collective &which) {
  if (mask != EVERY_LANE) fail(which.where, "%s needs all lanes of a warp, and has %08x", which.name, mask);
}

// ---- tensor cores: layouts of lanes as the PTX ISA draws them ----------------------------------------------------------

struct Fragments {
  const unsigned *a;
  unsigned b[2];
};
static float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
static float high_half(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

static void multiply(Deposit *lanes, unsigned mask, const Collective &which) {
  need_whole_warp(mask, which);
  float a[16][16], b[16][8], d[16][8];
  for (unsigned l = 0; l < LANES; l++) {
    const Fragments &in = *static_cast<const Fragments *>(lanes[l].in);
    const float *sum = static_cast<const float *>(lanes[l].out);
    const unsigned group = l / 4, pair = l % 4 * 2;
    for (unsigned r = 0; r < 4; r++) {
      const unsigned row = group + r % 2 * 8, column = pair + r / 2 * 8;
      a[row][column] = low_half(in.a[r]);
      a[row][column + 1] = high_half(in.a[r]);
    }
    for (unsigned r = 0; r < 2; r++) {
      b[pair + r * 8][group] = low_half(in.b[r]);
      b[pair + r * 8 + 1][group] = high_half(in.b[r]);
    }
    for (unsigned r = 0; r < 4; r++) d[group + r / 2 * 8][pair + r % 2] = sum[r];
  }
  for (unsigned i = 0; i < 16; i++)
    for (unsigned k = 0; k < 16; k++)
      for (unsigned j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (unsigned l = 0; l < LANES; l++) {
    float *sum = static_cast<float *>(lanes[l].out);
    for (unsigned r = 0; r < 4; r++) sum[r] = d[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
  }
}

void mma(float *d, const unsigned *a, unsigned b0, unsigned b1, Place here) {
  ENTER(fibre);
  const Fragments in = {a, {b0, b1}};
  collective(fibre, {"mma.m16n8k16", multiply, EVERY_LANE, 0, here, Lane::INDEX, 0, 0}, {&in, d, 0});
}

static void load_matrices(Deposit *lanes, unsigned mask, const Collective &which) {
  need_whole_warp(mask, which);
  const bool transposed = which.bytes != 0;
  for (unsigned m = 0; m < 4; m++) {
    for (unsigned l = 0; l < LANES; l++) {
      const unsigned group = l / 4, pair = l % 4 * 2;
      const auto at = [&](unsigned row, unsigned column) -> unsigned { return static_cast<const unsigned short *>(lanes[m * 8 + row].in)[column]; };
      const unsigned low = transposed ? at(pair, group) : at(group, pair);
      const unsigned high = transposed ? at(pair + 1, group) : at(group, pair + 1);
      static_cast<unsigned *>(lanes[l].out)[m] = low | high << 16;
    }
  }
}

void ldmatrix(unsigned *r, const void *row, bool transposed, Place here) {
  ENTER(fibre);
  const char *at = static_cast<const char *>(row);
  if (at < range || at + 16 > range + SHARED_BYTES) fail(here, "ldmatrix: the row is not in shared memory");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail(here, "ldmatrix: the row does not start at a 16-byte boundary");
  race_read(row, 16, here);
  const char *name = transposed ? "ldmatrix.trans" : "ldmatrix";
  collective(fibre, {name, load_matrices, EVERY_LANE, 0, here, transposed ? Lane::XOR : Lane::INDEX, 0, transposed}, {row, r, 0});
}

// ---- asynchronous copies -----------------------------------------------------------------------------------------------

static void land(const Copy &copy) {
  if (copy.there) memcpy(copy.to, copy.from, 16);
  else memset(copy.to, 0, 16);
}

// The hardware may copy at any time between here and the wait: order 0 as late as it can be, 1 at once, others by chance.
void cp_async(void *shared, const void *global, bool there, Place here) {
  ENTER(fibre);
  char *to = static_cast<char *>(shared);
  if (to < range || to + 16 > range + SHARED_BYTES) fail(here, "cp.async: the destination is not in shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail(here, "cp.async: the destination does not start at a 16-byte boundary");
  if (there && reinterpret_cast<uintptr_t>(global) % 16 != 0) fail(here, "cp.async: the source does not start at a 16-byte boundary");
  const bool now = seed() == 1 || (seed() > 1 && random_number() % 2 == 0);
  const Copy copy = {to, static_cast<const char *>(global), fibre.groups, there, now};
  race_copy_issued(copy, here);
  if (now) land(copy);
  fibre.copies.push_back(copy);
}

void cp_async_commit() { static_cast<Fibre *>(current)->groups++; }

void cp_async_wait(unsigned newest, Place here) {
  ENTER(fibre);
  trace(here);
  size_t kept = 0;
  for (const Copy &copy : fibre.copies) {
    if (copy.group + newest >= fibre.groups) {
      fibre.copies[kept++] = copy;
      continue;
    }
    if (!copy.landed) land(copy);
    race_copy_landed(copy, here);
  }
  fibre.copies.resize(kept);
}

// ---- shared memory -----------------------------------------------------------------------------------------------------

static std::vector<Slot> slots;
static size_t shared_used, static_used;
static void *dynamic_start;

static void *carve(size_t bytes, size_t align, Place here) {
  const size_t start = (shared_used + align - 1) / align * align;
  if (start + bytes > SHARED_BYTES) fail(here, "a block needs more than %zu bytes of shared memory", SHARED_BYTES);
  shared_used = start + bytes + (ASAN ? 64 : 0);
  __asan_unpoison_memory_region(range + start, bytes);
  memset(range + start, POISON, bytes);
  return range + start;
}

void *shared(const void *key, size_t bytes, size_t align, Place here) {
  for (const Slot &slot : slots)
    if (slot.key == key) return slot.storage;
  static_used += bytes;
  if (static_used > STATIC_SHARED_BYTES) fail(here, "SHARED arrays take %zu bytes, and a block may have %zu: use DYNAMIC_SHARED", static_used, STATIC_SHARED_BYTES);
  slots.push_back({key, carve(bytes, align, here)});
  return slots.back().storage;
}

void *dynamic_shared(Place here) {
  if (dynamic_start == nullptr) fail(here, "the launch asked for no dynamic shared memory");
  return dynamic_start;
}

void atomic(const void *p, size_t bytes) { race_atomic(p, bytes, __builtin_return_address(0)); }

// ---- blocks ------------------------------------------------------------------------------------------------------------

static void begin_block() {
  done = at_barrier = ready_first = ready_count = 0;
  slots.clear();
  shared_used = static_used = 0;
  dynamic_start = nullptr;
  __asan_poison_memory_region(range, SHARED_BYTES);
  race_block();
  if (launched->shared_bytes > 0) dynamic_start = carve(launched->shared_bytes, 128, {"launch", 0});
  for (Warp &warp : warps) {
    warp.alive = 0;
    warp.open.clear();
  }
  for (unsigned i = 0; i < threads; i++) {
    Fibre &fibre = fibres[i];
    fibre.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    fibre.linear = i;
    fibre.lane = i % LANES;
    fibre.warp = i / LANES;
    fibre.stack = nullptr;
    fibre.copies.clear();
    fibre.groups = 0;
    fibre.pc = nullptr;
    warps[fibre.warp].alive |= 1u << fibre.lane;
  }
  make_all_ready();
}

static void run_block() {
  begin_block();
  while (failure.empty() && done < threads) {
    Fibre *next = next_ready();
    if (next == nullptr) {
      if (at_barrier > 0 && at_barrier + done == threads) release_barrier();
      else report_deadlock();
      continue;
    }
    if (next->stack == nullptr) give_stack(*next);
    current = next;
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, next->stack, STACK);
    cuvee_emulator_switch(&scheduler_pointer, next->stack_pointer);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
    current = nullptr;
  }
  for (unsigned i = 0; i < threads; i++) {
    if (fibres[i].stack) __asan_unpoison_memory_region(fibres[i].stack, STACK);
    take_stack(fibres[i]);
  }
}

static Entry const *entries[4096];
static size_t entry_count;

Entry::Entry(const char *name, void *(*copy)(void **), void (*run)(void *), void (*drop)(void *)) : name(name), copy(copy), run(run), drop(drop) { entries[entry_count++] = this; }

const Entry *find_entry(const char *name) {
  for (size_t i = 0; i < entry_count; i++)
    if (strcmp(entries[i]->name, name) == 0) return entries[i];
  return nullptr;
}

static void find_scheduler_stack() {
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &scheduler_bottom, &scheduler_size);
  pthread_attr_destroy(&attributes);
}

std::string run(const Launch &launch) {
  static const bool ready_for_signals = (catch_signals(), random_state = seed() * 0x9E3779B97F4A7C15ull + 1, true);
  (void)ready_for_signals;
  if (ASAN) find_scheduler_stack();
  launched = &launch;
  grid_size = launch.grid;
  block_size = launch.block;
  threads = block_size.x * block_size.y * block_size.z;
  failure.clear();
  failure_pc = nullptr;
  failure_has_place = true;
  race_launch();
  const uint64_t blocks = uint64_t(grid_size.x) * grid_size.y * grid_size.z;
  for (uint64_t i = 0; i < blocks && failure.empty(); i++) {
    const uint64_t block = seed() == 1 ? blocks - 1 - i : i;
    block_index = {unsigned(block % grid_size.x), unsigned(block / grid_size.x % grid_size.y), unsigned(block / grid_size.x / grid_size.y)};
    run_block();
  }
  if (failure.empty()) return failure;
  if (failure_pc != nullptr) {
    const std::string lines = lines_of(failure_pc);
    const bool says_more = lines.find('<') != std::string::npos;
    if (!failure_has_place) failure = lines + ": " + failure;
    else if (says_more) failure += " (" + lines + ")";
  }
  return failure + " in " + launch.entry->name;
}

}  // namespace emulator
