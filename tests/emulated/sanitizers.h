// What the emulator tells the sanitizers that it is built with.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace deit::emulated {

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "EMULATOR: %s\n", what.c_str());
  std::fflush(stderr);
  std::abort();
}

// The emulator's own reads and writes, which ThreadSanitizer must not take for the kernel's.
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
};

// `happens_before(x)` in one fibre orders it before `happens_after(x)` in another.
inline void happens_before([[maybe_unused]] void* x) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(x);
#endif
}
inline void happens_after([[maybe_unused]] void* x) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(x);
#endif
}

// Fresh pages, which no sanitizer remembers anything of.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) fail("mmap");
  }
  Pages(const Pages&) = delete;
  ~Pages() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(data_, bytes_);
#endif
    munmap(data_, bytes_);
  }
  char* data() { return static_cast<char*>(data_); }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace deit::emulated
