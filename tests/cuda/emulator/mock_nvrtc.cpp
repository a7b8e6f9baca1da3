// mock_nvrtc.cpp - libnvrtc for programs that were built without an nvcc: the emulated driver has the kernels by name, so
// what stands for a cubin is of no matter.
#include <stddef.h>
#include <string.h>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {
const char CUBIN[] = "compiled by nobody";
int program;
}  // namespace

API nvrtcVersion(int *major, int *minor) {
  *major = 13;
  *minor = 0;
  return 0;
}
API nvrtcCreateProgram(void **made, const char *, const char *, int, const char *const *, const char *const *) {
  *made = &program;
  return 0;
}
API nvrtcCompileProgram(void *, int, const char *const *) { return 0; }
API nvrtcDestroyProgram(void **) { return 0; }
API nvrtcGetCUBINSize(void *, size_t *bytes) {
  *bytes = sizeof CUBIN;
  return 0;
}
API nvrtcGetCUBIN(void *, char *cubin) {
  memcpy(cubin, CUBIN, sizeof CUBIN);
  return 0;
}
