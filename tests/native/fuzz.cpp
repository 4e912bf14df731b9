// Every C++ kernel of csrc/cpu on random shapes, strides and types, by every instruction set that
// runs here, against a plain double loop. Built with sanitizers by sanitize.py (`make sanitize`).
//
//   fuzz CASES SEED SET...    CASES cases of each kernel from SEED on, by each instruction set
//   fuzz --trip address|undefined|thread    does what that sanitizer must report
//   fuzz --best    prints the set that this processor runs, and that for products in 8 bits
//
// Exit status 0: all as expected.
//
// To add a kernel: a file case_NAME.cpp with its `fuzz_NAME` (draw the arguments, inputs in Elements,
// so that they are fenced; call `run` with the number of tasks and the floats of workspace; compare
// each output with a loop in double by `near`), its line in cases.h and in kCases, and the new size
// in the static_assert below it.
#include <sanitizer/common_interface_defs.h>

#include "cases.h"
#include "fence.h"

extern "C" {
const char* deit_cpu_isa();
const char* deit_cpu_int8_isa();
int deit_cpu_select_isa(const char* name);
}

namespace fuzz {
namespace {

struct Case {
  const char* name;
  void (*fuzz)(Random&, const deit::Kernels&);
};
constexpr Case kCases[] = {
    {"shares", fuzz_shares},
    {"team", fuzz_team},
    {"lanes", fuzz_lanes},
    {"layer_norm", fuzz_layer_norm},
    {"attention", fuzz_attention},
    {"cross_attention", fuzz_cross_attention},
    {"product", fuzz_product},
    {"block", fuzz_block},
    {"int8", fuzz_int8},
    {"attention_gradient", fuzz_attention_gradient},
    {"weight_gradient", fuzz_weight_gradient},
    {"training_product", fuzz_training_product},
    {"output_gradient", fuzz_output_gradient},
    {"layer_norm_gradient", fuzz_layer_norm_gradient},
    {"losses", fuzz_losses},
};
static_assert(sizeof(deit::Kernels) == 31 * sizeof(void*),
              "Kernels has a new entry: give it a case above, then its new size here");

// A sanitizer that does not ring is no sanitizer: sanitize.py sets each off first.
int trip(const std::string& which) {
  volatile int one = 1;
  if (which == "address") {
    std::unique_ptr<float[]> memory(new float[static_cast<size_t>(one)]);
    const volatile float* past = memory.get() + one;
    return *past > 0.0f;
  }
  if (which == "undefined") {
    const volatile int past = one + 0x7fffffff;
    return past;
  }
  int shared = 0;
  std::thread other([&] { shared += 1; });
  shared += 1;
  other.join();
  return shared != 2;
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--trip") return fuzz::trip(argv[2]);
  if (argc == 2 && std::string(argv[1]) == "--best") {
    std::printf("%s %s\n", deit_cpu_isa(), deit_cpu_int8_isa());
    return 0;
  }
  if (argc < 4) {
    std::fprintf(stderr, "usage: fuzz CASES SEED SET..., fuzz --best, or fuzz --trip WHICH\n");
    return 2;
  }
  const uint64_t cases = std::strtoull(argv[1], nullptr, 10);
  const uint64_t first = std::strtoull(argv[2], nullptr, 10);
  __sanitizer_set_death_callback(
      [] { std::fprintf(stderr, "while running %s\n", fuzz::where.c_str()); });
  for (int i = 3; i < argc; ++i) {
    const char* isa = argv[i];
    const int refused = deit_cpu_select_isa(isa);
    if (refused == 1) fuzz::fail(std::string("no instruction set ") + isa);
    if (refused) {
      std::printf("%s: this processor does not run it\n", isa);
      continue;
    }
    for (const fuzz::Case& each : fuzz::kCases) {
      for (uint64_t seed = first; seed < first + cases; ++seed) {
        fuzz::where = std::string(each.name) + ", " + isa + ", seed " + std::to_string(seed);
        fuzz::Random random(seed);
        each.fuzz(random, deit::kernels());
      }
      std::printf("%s: %s: %llu cases\n", isa, each.name, static_cast<unsigned long long>(cases));
    }
  }
  return 0;
}
