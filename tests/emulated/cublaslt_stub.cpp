// As much of cuBLASLt as csrc/cuda calls, on the CPU: it refuses what the real one would, multiplies
// in fp64, and notes what it was asked for. Enumerators are written as numbers, from NVIDIA's
// header and not from csrc/cuda/cublaslt.h, of which it is to find mistakes.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "numbers.h"

namespace {

enum Status { success = 0, not_initialized = 1, invalid_value = 7, not_supported = 15 };

struct Desc {
  std::map<int, std::vector<unsigned char>> attributes;
  template <class T>
  T get(int attribute, T otherwise) const {
    const auto found = attributes.find(attribute);
    if (found == attributes.end()) return otherwise;
    T value;
    std::memcpy(&value, found->second.data(), sizeof value);
    return value;
  }
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading;
};
struct Algo {
  uint64_t data[8];
};
struct Heuristic {
  Algo algo;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

std::string calls, fault;
size_t workspace_wanted = 0;
int alive = 0;  // descriptors that were made and not destroyed

// The bytes of each attribute that is taken; the real library compares them, too.
const std::map<int, size_t> kDescBytes = {{3, 4}, {7, 4}, {8, 8}};
const std::map<int, size_t> kPreferenceBytes = {{1, 8}, {3, 4}, {5, 4}, {6, 4}, {7, 4}, {8, 4}};

Status set(Desc* desc, const std::map<int, size_t>& known, int attribute, const void* value,
           size_t bytes) {
  const auto found = known.find(attribute);
  if (found == known.end() || found->second != bytes || value == nullptr) return invalid_value;
  const unsigned char* from = static_cast<const unsigned char*>(value);
  desc->attributes[attribute].assign(from, from + bytes);
  return success;
}


double number(const void* data, int type, int64_t at) {
  if (type == 0) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  return type == 2 ? deit::gpu::widen(deit::f16{bits}) : deit::gpu::widen(deit::bf16{bits});
}

void write(void* data, int type, int64_t at, double value) {
  const float y = static_cast<float>(value);
  if (type == 0) static_cast<float*>(data)[at] = y;
  if (type == 2) static_cast<uint16_t*>(data)[at] = deit::gpu::narrow<deit::f16>(y).bits;
  if (type == 14) static_cast<uint16_t*>(data)[at] = deit::gpu::narrow<deit::bf16>(y).bits;
}

double gelu_tanh(double x) {
  return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

// Whether the layouts are of one product: A transposed, [k, m]; B [k, n]; C and D [m, n].
bool fits(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  const auto sound = [](const Layout& l) { return l.leading >= static_cast<int64_t>(l.rows); };
  const bool types = a.type == b.type && c.type == d.type && (d.type == a.type || d.type == 0);
  return desc.get<int32_t>(3, 0) == 1 && sound(a) && sound(b) && sound(c) && sound(d) && types &&
         a.rows == b.rows && a.columns == d.rows && b.columns == d.columns && c.rows == d.rows &&
         c.columns == d.columns;
}

bool at_multiple(const void* pointer, uint32_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class T>
Status make(T** made, T value) {
  *made = new T(std::move(value));
  ++alive;
  return success;
}
template <class T>
Status destroy(T* made) {
  delete made;
  --alive;
  return success;
}

bool fails(const char* call) { return fault == call; }

}  // namespace

extern "C" {

// Of the tests: what was asked for since the last call, a line a call; the call that is to fail
// ("heuristic:none" finds no algorithm); bytes of workspace that an algorithm asks for.
const char* stub_log() {
  static std::string last;
  last.swap(calls);
  calls.clear();
  return last.c_str();
}
void stub_fault(const char* call) { fault = call; }
void stub_workspace(size_t bytes) { workspace_wanted = bytes; }
int stub_alive() { return alive; }

const char* cublasLtGetStatusName(int status) {
  return status == not_initialized ? "CUBLAS_STATUS_NOT_INITIALIZED"
         : status == not_supported ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                   : "CUBLAS_STATUS_INVALID_VALUE";
}
Status cublasLtCreate(int** context) {
  if (fails("create")) return not_initialized;
  calls += "create\n";
  *context = new int(1);
  return success;
}
Status cublasLtMatmulDescCreate(Desc** desc, int compute, int scale) {
  if (compute != 68 || scale != 0) return invalid_value;  // CUBLAS_COMPUTE_32F, CUDA_R_32F
  return make(desc, Desc{});
}
Status cublasLtMatmulDescDestroy(Desc* desc) { return destroy(desc); }
Status cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t bytes) {
  return fails("attribute") ? invalid_value : set(desc, kDescBytes, attribute, value, bytes);
}
Status cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns,
                                  int64_t leading) {
  if (rows == 0 || columns == 0) return invalid_value;
  return make(layout, Layout{type, rows, columns, leading});
}
Status cublasLtMatrixLayoutDestroy(Layout* layout) { return destroy(layout); }
Status cublasLtMatmulPreferenceCreate(Desc** preference) { return make(preference, Desc{}); }
Status cublasLtMatmulPreferenceDestroy(Desc* preference) { return destroy(preference); }
Status cublasLtMatmulPreferenceSetAttribute(Desc* preference, int attribute, const void* value,
                                            size_t bytes) {
  return set(preference, kPreferenceBytes, attribute, value, bytes);
}

Status cublasLtMatmulAlgoGetHeuristic(int*, Desc* desc, Layout* a, Layout* b, Layout* c, Layout* d,
                                      Desc* preference, int wanted, Heuristic* found, int* count) {
  if (fails("heuristic") || wanted < 1) return not_supported;
  *count = fails("heuristic:none") ? 0 : 1;
  if (*count == 0) return success;
  if (!fits(*desc, *a, *b, *c, *d)) return invalid_value;
  if (preference->get<uint64_t>(1, 0) < workspace_wanted) return not_supported;
  Heuristic made{};
  // The alignments promised, and what was laid out: what is multiplied must keep both.
  for (int i = 0; i < 4; ++i) made.algo.data[i] = preference->get<uint32_t>(5 + i, 256);
  made.algo.data[4] = d->rows << 32 | d->columns;
  made.algo.data[5] = static_cast<uint64_t>(a->leading) << 32 | static_cast<uint64_t>(b->leading);
  made.algo.data[6] = desc->get<uint32_t>(7, 1);
  made.algo.data[7] = static_cast<uint64_t>(c->leading) << 32 | a->rows;
  made.workspace = workspace_wanted;
  *found = made;
  calls += "heuristic reductions=" + std::to_string(preference->get<uint32_t>(3, 7)) + "\n";
  return success;
}

Status cublasLtMatmul(int* context, Desc* desc, const float* alpha, const void* a, Layout* la,
                      const void* b, Layout* lb, const float* beta, const void* c, Layout* lc,
                      void* d, Layout* ld, const Algo* algo, void* workspace, size_t bytes, void*) {
  if (fails("matmul")) return not_supported;
  const uint32_t epilogue = desc->get<uint32_t>(7, 1);
  const void* const bias = desc->get<const void*>(8, nullptr);
  if (context == nullptr || *context != 1 || !fits(*desc, *la, *lb, *lc, *ld)) return invalid_value;
  const void* const all[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    if (!at_multiple(all[i], static_cast<uint32_t>(algo->data[i]))) return invalid_value;
  }
  if (algo->data[4] != (ld->rows << 32 | ld->columns) || algo->data[6] != epilogue ||
      algo->data[5] != (static_cast<uint64_t>(la->leading) << 32 | static_cast<uint64_t>(lb->leading)) ||
      algo->data[7] != (static_cast<uint64_t>(lc->leading) << 32 | la->rows)) {
    return not_supported;  // an algorithm of another problem
  }
  if (bytes < workspace_wanted || (bytes > 0 && !at_multiple(workspace, 16))) return invalid_value;
  if (bytes > 0) std::memset(workspace, 0xff, bytes);
  if (epilogue != 1 && (epilogue & ~36u) != 0) return not_supported;  // DEFAULT, BIAS 4, GELU 32
  const bool biased = epilogue != 1 && (epilogue & 4) != 0, gelu = epilogue & 32;
  if (biased && bias == nullptr) return invalid_value;
  const int out = ld->type, in = la->type;
  calls += "matmul epilogue=" + std::to_string(epilogue) + " beta=" + std::to_string(int(*beta)) +
         " types=" + std::to_string(in) + "," + std::to_string(out) +
         " in_place=" + std::to_string(c == d) + " workspace=" + std::to_string(bytes) + "\n";
  for (uint64_t n = 0; n < ld->columns; ++n) {
    for (uint64_t m = 0; m < ld->rows; ++m) {
      const auto at = [](uint64_t row, const Layout& l, uint64_t column) {
        return static_cast<int64_t>(row) + static_cast<int64_t>(column) * l.leading;
      };
      double sum = 0.0;
      for (uint64_t k = 0; k < la->rows; ++k) {
        sum += number(a, in, at(k, *la, m)) * number(b, in, at(k, *lb, n));
      }
      sum *= *alpha;
      if (*beta != 0.0f) sum += *beta * number(c, out, at(m, *lc, n));
      if (biased) sum += number(bias, out, static_cast<int64_t>(m));
      write(d, out, at(m, *ld, n), gelu ? gelu_tanh(sum) : sum);
    }
  }
  return success;
}

}  // extern "C"
