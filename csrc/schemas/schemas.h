// The operators' schemas for a program without Python. In Python each operator's schema.py defines
// them, with or without a library; a schema may be defined once in a process, so a library defines
// none when it is loaded. A program in C++ asks it to.
//
// The texts in cpu.inl and cuda.inl are Python's own: `python -m deit.kernels.prove.schemas` writes
// them, and a test compares.
#pragma once

#include <torch/csrc/stable/library.h>

#include <exception>
#include <initializer_list>

#define DEIT_EXPORT __attribute__((visibility("default")))

namespace deit {

// Defined for as long as the object lives.
class Schemas {
 public:
  Schemas(const char* space, std::initializer_list<const char*> schemas)
      : library_(torch::stable::detail::StableLibrary::Kind::FRAGMENT, space, nullptr, __FILE__,
                 __LINE__) {
    try {
      for (const char* schema : schemas) library_.def(schema);
    } catch (const std::exception&) {  // torch has said on stderr which schema, and why
      refused_ = true;
    }
  }
  int refused() const { return refused_; }

 private:
  torch::stable::detail::StableLibrary library_;
  bool refused_ = false;
};

}  // namespace deit
