// On which cores threads are. Where the system does not say, nothing here does anything.
#pragma once

#include <chrono>
#include <cstdint>
#include <ctime>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace deit {

// The core of this thread; -1: unknown.
inline int this_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// CPU time of this thread; the clock's where the system does not say.
inline int64_t cpu_nanoseconds() {
#if defined(__unix__) || defined(__APPLE__)
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
#else
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

// Cores that a thread may run on.
class Cores {
 public:
  static Cores mine() {
    Cores cores;
#if defined(__linux__)
    cores.known_ = sched_getaffinity(0, sizeof cores.set_, &cores.set_) == 0;
#endif
    return cores;
  }

  int64_t count() const {
#if defined(__linux__)
    return known_ ? CPU_COUNT(&set_) : 0;
#else
    return static_cast<int64_t>(std::thread::hardware_concurrency());
#endif
  }

  // This thread goes to another of them, and does not come back by itself.
  void leave(int core) const {
#if defined(__linux__)
    if (core < 0 || !known_) return;
    cpu_set_t others = set_;
    CPU_CLR(core, &others);
    if (CPU_COUNT(&others) > 0) sched_setaffinity(0, sizeof others, &others);
#else
    static_cast<void>(core);
#endif
  }

 private:
#if defined(__linux__)
  cpu_set_t set_;
#endif
  bool known_ = false;
};

// Whether another thread runs, by its CPU time.
class Watch {
 public:
  Watch() = default;
  explicit Watch(std::thread& thread) {
#if defined(__linux__)
    thread_ = thread.native_handle();
    known_ = pthread_getcpuclockid(thread_, &clock_) == 0;
#else
    static_cast<void>(thread);
#endif
  }

  void look() { seen_ = nanoseconds(); }

  // Since look(), for more than 10 us; true where nobody knows.
  bool has_run() const { return !known_ || nanoseconds() - seen_ > 10'000; }

  // Makes it run on `core` alone.
  void bring_to(int core) const {
#if defined(__linux__)
    if (core < 0) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    pthread_setaffinity_np(thread_, sizeof one, &one);
#else
    static_cast<void>(core);
#endif
  }

 private:
  int64_t nanoseconds() const {
#if defined(__linux__)
    timespec time{};
    if (known_) clock_gettime(clock_, &time);
    return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
#else
    return 0;
#endif
  }

#if defined(__linux__)
  pthread_t thread_{};
  clockid_t clock_{};
#endif
  bool known_ = false;
  int64_t seen_ = 0;
};

}  // namespace deit
