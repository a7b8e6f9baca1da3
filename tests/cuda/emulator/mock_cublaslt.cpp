// mock_cublaslt.cpp - libcublasLt for machines without a GPU: the products that cuvee asks for, computed as their
// descriptions say, in double. It refuses what the library documents as unsupported, holds the caller to the alignment that
// the choice of a kernel was given, and spoils the workspace.
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, INTERNAL_ERROR = 14, NOT_SUPPORTED = 15 };
enum Type { R_32F = 0, R_16BF = 14 };
constexpr int COMPUTE_32F = 68, EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4, REDUCTION_COMPUTE_TYPE = 2;
// As kernels for tensor cores have them: pointers and columns (leading dimensions) at multiples of four bytes.
constexpr uint32_t NEEDED_ALIGNMENT = 4, BIAS_ALIGNMENT = 16, WORKSPACE_ALIGNMENT = 256;
constexpr uint64_t MAGIC = 0x637576656520616c;  // of an algorithm that was chosen here

// Column-major: element (row, col) at [col * ld + row].
struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
};
struct Desc {
  int compute, scale;
  int32_t transposed[2] = {0, 0};
  int32_t epilogue = EPILOGUE_DEFAULT;
  const void *bias = nullptr;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t reduction = ~0u, alignment[4] = {256, 256, 256, 256};  // of A, B, C, D
};
struct Algo {
  uint64_t magic, shape[3], workspace;
  uint32_t alignment[4];
  uint64_t unused;
};
static_assert(sizeof(Algo) == 64, "cublasLtMatmulAlgo_t");
struct Heuristic {
  Algo algo;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

size_t width(int type) { return type == R_16BF ? 2 : 4; }

double load(const void *p, int type, size_t i) {
  if (type == R_32F) return static_cast<const float *>(p)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t *>(p)[i]) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

void store(void *p, int type, size_t i, double value) {
  const float x = static_cast<float>(value);
  if (type == R_32F) {
    static_cast<float *>(p)[i] = x;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  static_cast<uint16_t *>(p)[i] = nan ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// [m, n, k], or nothing where the matrices do not fit each other.
bool shape_of(const Desc &desc, const Layout &a, const Layout &b, const Layout &d, uint64_t (&shape)[3]) {
  const bool ta = desc.transposed[0], tb = desc.transposed[1];
  const uint64_t m = ta ? a.cols : a.rows, k = ta ? a.rows : a.cols, kb = tb ? b.cols : b.rows, n = tb ? b.rows : b.cols;
  shape[0] = m, shape[1] = n, shape[2] = k;
  return k == kb && d.rows == m && d.cols == n && m > 0 && n > 0 && k > 0;
}

bool valid(const Layout &x) { return (x.type == R_32F || x.type == R_16BF) && x.ld >= static_cast<int64_t>(x.rows); }

Status supported(const Desc &desc, const Layout &a, const Layout &b, const Layout &c, const Layout &d) {
  uint64_t shape[3];
  if (!valid(a) || !valid(b) || !valid(c) || !valid(d) || !shape_of(desc, a, b, d, shape)) return INVALID_VALUE;
  if (c.rows != d.rows || c.cols != d.cols) return INVALID_VALUE;
  const bool types = a.type == b.type && c.type == d.type && (a.type == R_16BF || d.type == R_32F);
  const bool epilogue = desc.epilogue == EPILOGUE_DEFAULT || desc.epilogue == EPILOGUE_BIAS;
  return types && epilogue && desc.compute == COMPUTE_32F && desc.scale == R_32F ? SUCCESS : NOT_SUPPORTED;
}

struct Product {
  Desc desc;
  Layout a, b, c, d;
  const void *pa, *pb, *pc;
  void *pd, *workspace;
  float alpha, beta;
  Algo algo;
};

void compute(const Product &p) {
  if (p.algo.workspace) memset(p.workspace, 0xff, p.algo.workspace);
  const auto at = [](const Layout &x, bool transposed, uint64_t i, uint64_t j) { return transposed ? i * x.ld + j : j * x.ld + i; };
  const uint64_t m = p.algo.shape[0], n = p.algo.shape[1], k = p.algo.shape[2];
  for (uint64_t j = 0; j < n; j++)
    for (uint64_t i = 0; i < m; i++) {
      double sum = 0;
      for (uint64_t l = 0; l < k; l++)
        sum += load(p.pa, p.a.type, at(p.a, p.desc.transposed[0], i, l)) * load(p.pb, p.b.type, at(p.b, p.desc.transposed[1], l, j));
      sum *= p.alpha;
      if (p.beta != 0) sum += p.beta * load(p.pc, p.c.type, at(p.c, false, i, j));
      if (p.desc.epilogue == EPILOGUE_BIAS) sum += load(p.desc.bias, p.d.type, i);
      store(p.pd, p.d.type, at(p.d, false, i, j), sum);
    }
}

template <class V> Status put(V &to, const void *from, size_t bytes) {
  if (bytes != sizeof(V)) return INVALID_VALUE;
  memcpy(&to, from, bytes);
  return SUCCESS;
}

bool aligned(const void *p, uint64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) Status

extern "C" __attribute__((visibility("default"))) size_t cublasLtGetVersion() { return 130002; }

API cublasLtCreate(void **handle) {
  *handle = new int;
  return SUCCESS;
}
API cublasLtDestroy(void *handle) {
  delete static_cast<int *>(handle);
  return SUCCESS;
}

API cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  *layout = new Layout{type, rows, cols, ld};
  return SUCCESS;
}
API cublasLtMatrixLayoutDestroy(Layout *layout) {
  delete layout;
  return SUCCESS;
}

API cublasLtMatmulDescCreate(Desc **desc, int compute, int scale) {
  *desc = new Desc;
  (*desc)->compute = compute, (*desc)->scale = scale;
  return SUCCESS;
}
API cublasLtMatmulDescDestroy(Desc *desc) {
  delete desc;
  return SUCCESS;
}
API cublasLtMatmulDescSetAttribute(Desc *desc, int which, const void *value, size_t bytes) {
  switch (which) {
    case 3: case 4: return put(desc->transposed[which - 3], value, bytes);
    case 7: return put(desc->epilogue, value, bytes);
    case 8: return put(desc->bias, value, bytes);
    default: return INVALID_VALUE;
  }
}

API cublasLtMatmulPreferenceCreate(Preference **preference) {
  *preference = new Preference;
  return SUCCESS;
}
API cublasLtMatmulPreferenceDestroy(Preference *preference) {
  delete preference;
  return SUCCESS;
}
API cublasLtMatmulPreferenceSetAttribute(Preference *preference, int which, const void *value, size_t bytes) {
  switch (which) {
    case 1: return put(preference->workspace, value, bytes);
    case 3: return put(preference->reduction, value, bytes);
    case 5: case 6: case 7: case 8: return put(preference->alignment[which - 5], value, bytes);
    default: return INVALID_VALUE;
  }
}

API cublasLtMatmulAlgoGetHeuristic(void *handle, const Desc *desc, const Layout *a, const Layout *b, const Layout *c, const Layout *d,
                                   const Preference *preference, int asked, Heuristic *found, int *count) {
  *count = 0;
  if (!handle || !desc || !a || !b || !c || !d || !preference || asked < 1) return INVALID_VALUE;
  const Status status = supported(*desc, *a, *b, *c, *d);
  if (status != SUCCESS) return status;
  // Sums in the type of the output, or in no order, are not what cuvee promises.
  if (preference->reduction != REDUCTION_COMPUTE_TYPE) return NOT_SUPPORTED;
  const Layout *all[4] = {a, b, c, d};
  Algo algo = {MAGIC, {}, preference->workspace / 256 * 256, {}, 0};
  shape_of(*desc, *a, *b, *d, algo.shape);
  for (int i = 0; i < 4; i++) {
    algo.alignment[i] = preference->alignment[i];
    if (preference->alignment[i] < NEEDED_ALIGNMENT || all[i]->ld * width(all[i]->type) % NEEDED_ALIGNMENT != 0) return NOT_SUPPORTED;
  }
  *found = {algo, algo.workspace, SUCCESS, 1.0f, {}};
  *count = 1;
  return SUCCESS;
}

API cublasLtMatmul(void *handle, const Desc *desc, const void *alpha, const void *pa, const Layout *a, const void *pb, const Layout *b,
                   const void *beta, const void *pc, const Layout *c, void *pd, const Layout *d, const Algo *algo, void *workspace,
                   size_t workspace_bytes, void *stream) {
  if (!handle || !desc || !a || !b || !c || !d || !alpha || !beta || !pa || !pb || !pc || !pd || !algo) return INVALID_VALUE;
  const Status status = supported(*desc, *a, *b, *c, *d);
  if (status != SUCCESS) return status;
  uint64_t shape[3];
  shape_of(*desc, *a, *b, *d, shape);
  if (algo->magic != MAGIC || memcmp(shape, algo->shape, sizeof shape) != 0) return INVALID_VALUE;
  const void *pointers[4] = {pa, pb, pc, pd};
  for (int i = 0; i < 4; i++)
    if (!aligned(pointers[i], algo->alignment[i])) return INVALID_VALUE;
  if (workspace_bytes < algo->workspace || !aligned(workspace, WORKSPACE_ALIGNMENT)) return INVALID_VALUE;
  if (desc->epilogue == EPILOGUE_BIAS && (!desc->bias || !aligned(desc->bias, BIAS_ALIGNMENT))) return INVALID_VALUE;
  // In place only where both have one layout.
  if (pc == pd && memcmp(c, d, sizeof *c) != 0) return INVALID_VALUE;
  // What is in the stream before comes before: the product itself is done at once.
  static const auto wait = reinterpret_cast<int (*)(void *)>(dlsym(RTLD_DEFAULT, "cuStreamSynchronize"));
  if (!wait) return INTERNAL_ERROR;
  if (wait(stream) != 0) return EXECUTION_FAILED;
  const float scales[2] = {*static_cast<const float *>(alpha), *static_cast<const float *>(beta)};
  compute({*desc, *a, *b, *c, *d, pa, pb, pc, pd, workspace, scales[0], scales[1], *algo});
  return SUCCESS;
}
