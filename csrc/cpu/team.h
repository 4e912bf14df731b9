// Threads of this library's own, which work for one caller. PyTorch's (OpenMP's) are faster where
// they have the cores to themselves: they spin for milliseconds, and PyTorch's operators use them
// too. Beside a busy process they are ruinous: a region of theirs ends when every thread has come,
// also one that the system keeps off its core. A region here ends when those have left who have
// entered, and who comes late does not enter.
//
// Knows no torch, so that the sanitizers run it (tests/native/case_team.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cores.h"

namespace deit {

// The workers of one thread that calls. They sleep between its regions, after a short spin.
class Team {
 public:
  // This thread's. Its workers end with it; a forked child's are its own.
  static Team& mine();

  Team() = default;
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Whether `members` threads would have as many cores. OMP_PROC_BIND binds the caller to one, and
  // threads take after who starts them.
  static bool has_cores(int64_t members);

  // run(0) by this thread, and run(member) for each of [1, members) by a worker, if that comes while
  // run(0) still runs: so run(0) alone must do all that is to be done, as Shares::work does.
  // Rethrows the first exception of any. A region within a region is run(0).
  template <class Run>
  void run(int64_t members, const Run& run) {
    region([](const void* of, int64_t member) { (*static_cast<const Run*>(of))(member); }, &run,
           members);
  }

 private:
  using Work = void (*)(const void* of, int64_t member);
  // state_: how many workers are in the region, whether one may enter, and the region's number.
  static constexpr uint64_t kInside = (uint64_t{1} << 32) - 1;
  static constexpr uint64_t kOpen = uint64_t{1} << 32, kRegion = uint64_t{1} << 33;

  struct alignas(64) Worker {
    std::atomic<uint32_t> asleep{0};
    std::atomic<bool> inside{false}, brought{false};
    std::thread thread;
    Watch watch;  // the caller's
  };

  void region(Work work, const void* of, int64_t members);
  void work_as(int64_t member);
  void live(Worker& worker, int64_t member, uint64_t seen);
  uint64_t next_region(Worker& worker, uint64_t seen) const;
  void wake_children(int64_t member);
  void wait_for_inside();
  void grow(int64_t workers);

  std::vector<std::unique_ptr<Worker>> workers_;
  uint64_t forks_ = 0;  // of this process before workers_ were started
  alignas(64) std::atomic<uint64_t> state_{0};
  std::atomic<uint32_t> caller_asleep_{0};
  std::atomic<bool> ended_{false};
  alignas(64) Work work_ = nullptr;  // from here on written while no worker is inside
  const void* of_ = nullptr;
  int64_t members_ = 0;
  int core_ = -1;  // the caller's
  std::mutex failing_;
  std::exception_ptr failure_;
};

// Whether PyTorch's threads come in time, by what their caller loses: it waits for them, or its own
// core is taken.
class Patience {
 public:
  using Clock = std::chrono::steady_clock;
  using Time = Clock::time_point;
  using Span = Clock::duration;

  // This thread's, whatever operators it calls.
  static Patience& mine();

  bool over(Time now) const { return now < until_; }

  // A region that ended `now`: the caller was done with its own part after `worked`, and it lost
  // `lost`. 0.3 ms or a quarter of its work is nobody's fault. What is more is owed, and time pays
  // a sixteenth of itself back. 8 ms owed lose the patience, for 2 seconds, then for twice as long
  // as before while the next try fails within as long. Beside a busy process a forward of 16 ms owes
  // 5 and more; on a quiet machine something of 3 ms comes once in a while.
  void ended(Time now, Span worked, Span lost) {
    owed_ = std::max(Span{0}, owed_ - (now - last_) / 16);
    owed_ += std::max(Span{0}, lost - std::max<Span>(kShort, worked / 4));
    last_ = now;
    if (owed_ <= kLimit) return;
    turn_ = now - until_ < turn_ ? std::min(2 * turn_, kMost) : kLeast;
    until_ = now + turn_;
    owed_ = Span{0};
  }

 private:
  static constexpr Span kShort = std::chrono::microseconds(300);
  static constexpr Span kLimit = std::chrono::milliseconds(8);
  static constexpr Span kLeast = std::chrono::seconds(2), kMost = std::chrono::seconds(32);

  Span owed_{0}, turn_{0};
  Time last_{}, until_{};
};

enum class Threads : int { automatic, own, torch };
extern std::atomic<Threads> selected_threads;

}  // namespace deit
