// Where cuBLASLt's functions are.
#include "cublaslt.h"

#include <dlfcn.h>

#include <mutex>
#include <type_traits>

namespace deit::cublaslt {
namespace {

// By name and major version. Of later ones nobody has compared the numbers in cublaslt.h.
#ifdef DEIT_EMULATED
constexpr const char* kNames[] = {"libdeit_cublaslt_stub.so"};
constexpr const char* kAbsent = "no stub of cuBLASLt is loaded";
#else
constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
constexpr const char* kAbsent =
    "torch has loaded neither libcublasLt.so.13 nor libcublasLt.so.12 here";
#endif

// The name of the first function that is missing, or null.
const char* missing(void* library, Api& api) {
  const char* absent = nullptr;
  const auto find = [&](const char* name, auto& function) {
    using Function = std::remove_reference_t<decltype(function)>;
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr && absent == nullptr) absent = name;
  };
  find("cublasLtGetStatusName", api.GetStatusName);
  find("cublasLtCreate", api.Create);
  find("cublasLtMatmulDescCreate", api.MatmulDescCreate);
  find("cublasLtMatmulDescDestroy", api.MatmulDescDestroy);
  find("cublasLtMatmulDescSetAttribute", api.MatmulDescSetAttribute);
  find("cublasLtMatrixLayoutCreate", api.MatrixLayoutCreate);
  find("cublasLtMatrixLayoutDestroy", api.MatrixLayoutDestroy);
  find("cublasLtMatmulPreferenceCreate", api.MatmulPreferenceCreate);
  find("cublasLtMatmulPreferenceDestroy", api.MatmulPreferenceDestroy);
  find("cublasLtMatmulPreferenceSetAttribute", api.MatmulPreferenceSetAttribute);
  find("cublasLtMatmulAlgoGetHeuristic", api.MatmulAlgoGetHeuristic);
  find("cublasLtMatmul", api.Matmul);
  return absent;
}

}  // namespace

const Api* find(const char** why_not) {
  static std::mutex mutex;
  static Api api;
  static bool found = false;
  const std::lock_guard lock(mutex);
  if (found) return &api;
  *why_not = kAbsent;
  for (const char* name : kNames) {
    // NOLOAD: the very copy that torch uses, and none that happens to lie on the search path.
    void* const library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) continue;
    *why_not = missing(library, api);
    found = *why_not == nullptr;
    return found ? &api : nullptr;
  }
  return nullptr;
}

}  // namespace deit::cublaslt

// Why cuBLASLt cannot be called; null where it can.
extern "C" __attribute__((visibility("default"))) const char* deit_cuda_why_no_cublaslt() {
  const char* why_not = nullptr;
  deit::cublaslt::find(&why_not);
  return why_not;
}
