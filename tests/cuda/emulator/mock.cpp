// mock.cpp - libcuda for machines without a GPU: what cuvee calls of the driver API, with the emulator for kernels.
//
// Work is queued, and done when the host waits for it and no earlier (with CUVEE_EMULATOR_SEED=1: at once): a host that
// reads or overwrites pinned memory too soon is seen. Copies out of pageable memory take its contents when they are asked
// for, as the driver does. The null stream waits for no other, since cuvee's does not block. Errors of kernels stay.
#include <string.h>

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>

#include "runtime.h"

namespace {

using emulator::Entry;
using emulator::Launch;

enum Result {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  CONTEXT_IS_DESTROYED = 709,
  LAUNCH_FAILED = 719,
};

struct Stream {
  std::deque<std::function<Result()>> work;
  uint64_t queued = 0, done = 0;
};
struct Event {
  Stream *stream = nullptr;
  uint64_t after = 0;
  std::chrono::steady_clock::time_point when;
};
struct Function {
  const Entry *entry;
  size_t shared_bytes = emulator::STATIC_SHARED_BYTES;
};

std::recursive_mutex driver;
using Guard = std::lock_guard<std::recursive_mutex>;
std::map<char *, size_t> pinned;
std::map<std::string, Function> functions;
std::map<Result, std::string> reasons;
Result sticky = SUCCESS;
bool initialized;
int the_context;
// Without anyone, the primary context is destroyed.
int retained;
thread_local void *current_context;
Stream null_stream;
std::map<Stream *, bool> streams = {{&null_stream, true}};

Result because(Result result, const std::string &reason) {
  reasons[result] = reason;
  return result;
}

Stream *stream_of(void *handle) { return handle ? static_cast<Stream *>(handle) : &null_stream; }

Result run_until(Stream *stream, uint64_t count) {
  while (stream->done < count && !stream->work.empty() && sticky == SUCCESS) {
    const auto work = std::move(stream->work.front());
    stream->work.pop_front();
    const Result result = work();
    stream->done++;
    if (result != SUCCESS) sticky = result;
  }
  return sticky;
}

Result run_all() {
  for (auto &entry : streams) run_until(entry.first, entry.first->queued);
  return sticky;
}

Result enqueue(void *handle, std::function<Result()> work) {
  Stream *stream = stream_of(handle);
  if (!streams.count(stream)) return because(INVALID_HANDLE, "not a stream");
  stream->work.push_back(std::move(work));
  stream->queued++;
  static const char *blocking = getenv("CUDA_LAUNCH_BLOCKING");
  const bool now = stream == &null_stream || emulator::seed() == 1 || (blocking && *blocking == '1');
  return now ? run_until(stream, stream->queued) : sticky;
}

bool is_pinned(const void *p, size_t bytes) {
  char *start = static_cast<char *>(const_cast<void *>(p));
  auto after = pinned.upper_bound(start);
  if (after == pinned.begin()) return false;
  --after;
  return start + bytes <= after->first + after->second;
}

Result outside(const char *what, unsigned long long address, size_t bytes) {
  char text[200];
  snprintf(text, sizeof text, "%s: %zu bytes at 0x%llx are not inside one allocation", what, bytes, address);
  return because(INVALID_VALUE, text);
}

void *memory(unsigned long long address) { return reinterpret_cast<void *>(address); }

int attribute(int which) {
  switch (which) {
    case 1: return 1024;                                           // threads of a block
    case 8: return static_cast<int>(emulator::STATIC_SHARED_BYTES);
    case 10: return 32;                                            // lanes of a warp
    case 12: return 65536;                                         // registers of a block
    case 16: return 16;                                            // multiprocessors
    case 38: return 50 << 20;                                      // bytes of second-level cache
    case 75: return 9;                                             // compute capability
    case 76: return 0;
    case 81: return 228 << 10;                                     // shared memory of a multiprocessor
    case 97: return static_cast<int>(emulator::SHARED_BYTES);
    default: return 0;
  }
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) Result
// Every call that does something: in a context, and not after a kernel failed.
#define WORKS                                                                                     \
  Guard guard(driver);                                                                            \
  if (current_context == nullptr) return because(INVALID_CONTEXT, "no context is current on this thread"); \
  if (retained == 0) return because(CONTEXT_IS_DESTROYED, "the primary context was released by all who retained it"); \
  if (sticky != SUCCESS) return sticky

// ---- the device --------------------------------------------------------------------------------------------------------

API cuInit(unsigned) {
  initialized = true;
  return SUCCESS;
}
API cuDriverGetVersion(int *version) {
  *version = 13000;
  return SUCCESS;
}
API cuDeviceGetCount(int *count) {
  *count = 1;
  return initialized ? SUCCESS : NOT_INITIALIZED;
}
API cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}
API cuDeviceGetName(char *name, int bytes, int) {
  snprintf(name, static_cast<size_t>(bytes), "cuvee emulator");
  return SUCCESS;
}
API cuDeviceTotalMem_v2(size_t *bytes, int) {
  *bytes = emulator::DEVICE_BYTES;
  return SUCCESS;
}
API cuDeviceGetUuid_v2(void *uuid, int) {
  memset(uuid, 0, 16);
  return SUCCESS;
}
API cuDeviceGetAttribute(int *value, int which, int) {
  *value = attribute(which);
  return SUCCESS;
}
API cuDevicePrimaryCtxRetain(void **context, int) {
  Guard guard(driver);
  retained++;
  *context = &the_context;
  return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) {
  Guard guard(driver);
  if (retained == 0) return because(INVALID_CONTEXT, "the primary context is released more often than it was retained");
  retained--;
  return SUCCESS;
}
API cuCtxSetCurrent(void *context) {
  current_context = context;
  return SUCCESS;
}
API cuCtxGetCurrent(void **context) {
  *context = current_context;
  return SUCCESS;
}
API cuCtxSynchronize() {
  WORKS;
  return run_all();
}
API cuProfilerStart() { return SUCCESS; }
API cuProfilerStop() { return SUCCESS; }

// ---- memory ------------------------------------------------------------------------------------------------------------

API cuMemGetInfo_v2(size_t *free, size_t *total) {
  *total = emulator::DEVICE_BYTES;
  *free = emulator::DEVICE_BYTES - emulator::device_used();
  return SUCCESS;
}
API cuMemAlloc_v2(unsigned long long *address, size_t bytes) {
  WORKS;
  if (bytes == 0) return because(INVALID_VALUE, "an allocation of no bytes");
  *address = reinterpret_cast<unsigned long long>(emulator::device_alloc(bytes));
  return *address ? SUCCESS : because(OUT_OF_MEMORY, "out of memory");
}
API cuMemFree_v2(unsigned long long address) {
  WORKS;
  const Result result = run_all();
  if (address != 0 && !emulator::device_free(memory(address))) return outside("cuMemFree", address, 0);
  return result;
}
API cuMemHostAlloc(void **p, size_t bytes, unsigned) {
  WORKS;
  if (posix_memalign(p, 4096, bytes ? bytes : 1) != 0) return OUT_OF_MEMORY;
  memset(*p, 0xff, bytes);
  pinned[static_cast<char *>(*p)] = bytes;
  return SUCCESS;
}
API cuMemFreeHost(void *p) {
  Guard guard(driver);
  run_all();
  if (pinned.erase(static_cast<char *>(p)) == 0) return because(INVALID_VALUE, "cuMemFreeHost: not pinned memory");
  free(p);
  return sticky;
}
API cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *stream) {
  WORKS;
  if (!emulator::device_has(memory(to), bytes)) return outside("cuMemcpyHtoD", to, bytes);
  if (is_pinned(from, bytes)) {
    return enqueue(stream, [=] { return memcpy(memory(to), from, bytes), SUCCESS; });
  }
  const std::string contents(static_cast<const char *>(from), bytes);
  return enqueue(stream, [=] { return memcpy(memory(to), contents.data(), bytes), SUCCESS; });
}
API cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, void *stream) {
  WORKS;
  if (!emulator::device_has(memory(from), bytes)) return outside("cuMemcpyDtoH", from, bytes);
  const Result result = enqueue(stream, [=] { return memcpy(to, memory(from), bytes), SUCCESS; });
  return is_pinned(to, bytes) ? result : run_until(stream_of(stream), stream_of(stream)->queued);
}
API cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void *stream) {
  WORKS;
  if (!emulator::device_has(memory(from), bytes)) return outside("cuMemcpyDtoD, source", from, bytes);
  if (!emulator::device_has(memory(to), bytes)) return outside("cuMemcpyDtoD, destination", to, bytes);
  if (to < from + bytes && from < to + bytes && bytes > 0) return because(INVALID_VALUE, "cuMemcpyDtoD: source and destination overlap");
  return enqueue(stream, [=] { return memcpy(memory(to), memory(from), bytes), SUCCESS; });
}
API cuMemsetD8Async(unsigned long long to, unsigned char value, size_t bytes, void *stream) {
  WORKS;
  if (!emulator::device_has(memory(to), bytes)) return outside("cuMemsetD8", to, bytes);
  return enqueue(stream, [=] { return memset(memory(to), value, bytes), SUCCESS; });
}
API cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t bytes) { return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t bytes) { return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoD_v2(unsigned long long to, unsigned long long from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemsetD8_v2(unsigned long long to, unsigned char value, size_t bytes) { return cuMemsetD8Async(to, value, bytes, nullptr); }

// ---- streams and events ------------------------------------------------------------------------------------------------

API cuStreamCreate(void **stream, unsigned) {
  WORKS;
  Stream *made = new Stream;
  streams[made] = true;
  *stream = made;
  return SUCCESS;
}
API cuStreamDestroy_v2(void *stream) {
  Guard guard(driver);
  Stream *old = stream_of(stream);
  if (old == &null_stream || !streams.count(old)) return because(INVALID_HANDLE, "not a stream");
  run_until(old, old->queued);
  streams.erase(old);
  delete old;
  return sticky;
}
API cuStreamSynchronize(void *stream) {
  WORKS;
  return run_until(stream_of(stream), stream_of(stream)->queued);
}
API cuStreamQuery(void *stream) {
  WORKS;
  return stream_of(stream)->work.empty() ? SUCCESS : NOT_READY;
}
API cuStreamWaitEvent(void *stream, void *event, unsigned) {
  WORKS;
  const Event awaited = *static_cast<Event *>(event);
  return enqueue(stream, [=] { return awaited.stream ? run_until(awaited.stream, awaited.after) : SUCCESS; });
}
API cuEventCreate(void **event, unsigned) {
  WORKS;
  *event = new Event;
  return SUCCESS;
}
API cuEventDestroy_v2(void *event) {
  Guard guard(driver);
  run_all();
  delete static_cast<Event *>(event);
  return sticky;
}
API cuEventRecord(void *event, void *stream) {
  WORKS;
  Event *recorded = static_cast<Event *>(event);
  recorded->stream = stream_of(stream);
  recorded->after = recorded->stream->queued + 1;
  return enqueue(stream, [=] { return recorded->when = std::chrono::steady_clock::now(), SUCCESS; });
}
API cuEventSynchronize(void *event) {
  WORKS;
  const Event *awaited = static_cast<Event *>(event);
  return awaited->stream ? run_until(awaited->stream, awaited->after) : SUCCESS;
}
API cuEventQuery(void *event) {
  WORKS;
  const Event *asked = static_cast<Event *>(event);
  return asked->stream == nullptr || asked->stream->done >= asked->after ? SUCCESS : NOT_READY;
}
API cuEventElapsedTime_v2(float *milliseconds, void *start, void *end) {
  WORKS;
  const Event *first = static_cast<Event *>(start), *second = static_cast<Event *>(end);
  if (cuEventQuery(start) != SUCCESS || cuEventQuery(end) != SUCCESS) return NOT_READY;
  *milliseconds = std::chrono::duration<float, std::milli>(second->when - first->when).count();
  return SUCCESS;
}

// ---- kernels -----------------------------------------------------------------------------------------------------------

API cuModuleLoadData(void **module, const void *) {
  WORKS;
  static int any;
  *module = &any;
  return SUCCESS;
}
API cuModuleUnload(void *) { return SUCCESS; }
API cuModuleGetFunction(void **function, void *, const char *name) {
  WORKS;
  const Entry *entry = emulator::find_entry(name);
  if (entry == nullptr) return because(NOT_FOUND, std::string("no kernel is called ") + name);
  *function = &functions.emplace(name, Function{entry}).first->second;
  return SUCCESS;
}
API cuFuncSetAttribute(void *function, int which, int value) {
  WORKS;
  if (which != 8) return SUCCESS;  // 8: the most dynamic shared memory
  if (value < 0 || static_cast<size_t>(value) > emulator::SHARED_BYTES) {
    return because(INVALID_VALUE, "a block can have " + std::to_string(emulator::SHARED_BYTES) + " bytes of shared memory, not " + std::to_string(value));
  }
  static_cast<Function *>(function)->shared_bytes = static_cast<size_t>(value);
  return SUCCESS;
}
API cuFuncGetAttribute(int *value, int which, void *function) {
  *value = which == 8 ? static_cast<int>(static_cast<Function *>(function)->shared_bytes) : which == 0 ? 1024 : 0;
  return SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *, int, size_t) {
  *blocks = 1;
  return SUCCESS;
}
API cuLaunchKernel(void *handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream, void **arguments, void **extra) {
  WORKS;
  const Function &function = *static_cast<Function *>(handle);
  const Entry *entry = function.entry;
  const std::string name = entry->name;
  if (gx == 0 || gy == 0 || gz == 0 || gx > 0x7fffffffu || gy > 65535 || gz > 65535) {
    return because(INVALID_VALUE, name + ": a grid has 1 to 2147483647 blocks in x and 1 to 65535 in y and z");
  }
  if (bx == 0 || by == 0 || bz == 0 || uint64_t(bx) * by * bz > 1024) return because(INVALID_VALUE, name + ": a block has 1 to 1024 threads");
  if (shared > function.shared_bytes) {
    return because(INVALID_VALUE, name + ": " + std::to_string(shared) + " bytes of shared memory, and cuFuncSetAttribute allowed " + std::to_string(function.shared_bytes));
  }
  if (extra != nullptr) return because(INVALID_VALUE, name + ": arguments in one buffer are not emulated");
  void *copied = entry->copy(arguments);
  return enqueue(stream, [=] {
    const std::string failure = emulator::run({entry, copied, {gx, gy, gz}, {bx, by, bz}, shared});
    entry->drop(copied);
    return failure.empty() ? SUCCESS : because(LAUNCH_FAILED, failure);
  });
}

// ---- errors ------------------------------------------------------------------------------------------------------------

API cuGetErrorName(Result result, const char **name) {
  static const std::map<Result, const char *> names = {
      {SUCCESS, "CUDA_SUCCESS"},
      {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
      {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
      {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
      {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
      {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
      {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
      {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
      {NOT_READY, "CUDA_ERROR_NOT_READY"},
      {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
  };
  const auto found = names.find(result);
  *name = found == names.end() ? "CUDA_ERROR_UNKNOWN" : found->second;
  return SUCCESS;
}
API cuGetErrorString(Result result, const char **text) {
  Guard guard(driver);
  const auto found = reasons.find(result);
  if (found == reasons.end()) return cuGetErrorName(result, text);
  *text = found->second.c_str();
  return SUCCESS;
}
