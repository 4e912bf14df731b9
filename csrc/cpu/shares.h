// Tasks of one parallel region, for the threads that work on it. Every thread has a share, of tasks
// in order as long as nobody is late: so an operator finds in a thread's caches what the operator
// before it left there. Shares are taken step by step. Who has finished its own goes on with steps
// of the others', so that a thread which the system has taken off its core holds one step at most.
//
// Knows neither torch nor threads, so that the sanitizers run it (tests/native/fence.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace deit {

class Shares {
 public:
  // together: tasks of which a kernel shares work where one call has several, as the tiles of one
  // head do. Steps end where they do; 1: anywhere.
  Shares(int64_t tasks, int64_t members, int64_t together)
      : tasks_(tasks), members_(members), step_(step_of(tasks, members, together)),
        taken_(new Taken[static_cast<size_t>(members)]) {}

  // Runs run(begin, end) on what is left of `member`'s share, then of the others'.
  template <class Run>
  void work(int64_t member, const Run& run) {
    for (int64_t i = 0; i < members_; ++i) {
      const int64_t share = member + i < members_ ? member + i : member + i - members_;
      const int64_t first = share * tasks_ / members_, last = (share + 1) * tasks_ / members_;
      for (;;) {
        // Step 0 ends at the first multiple of step_ past `first`.
        const int64_t step = first / step_ + taken_[share].steps.fetch_add(1, kRelaxed);
        const int64_t begin = step * step_ > first ? step * step_ : first;
        if (begin >= last) break;
        run(begin, (step + 1) * step_ < last ? (step + 1) * step_ : last);
      }
    }
  }

 private:
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;  // steps share no data
  static constexpr int64_t kSteps = 8;  // of one share, at most one more

  static int64_t step_of(int64_t tasks, int64_t members, int64_t together) {
    const int64_t most = tasks / (kSteps * members);
    const int64_t step = most > together ? most / together * together : together;
    return step > 1 ? step : 1;
  }

  struct alignas(64) Taken {  // a cache line of its own
    std::atomic<int64_t> steps{0};
  };

  int64_t tasks_, members_, step_;
  std::unique_ptr<Taken[]> taken_;
};

}  // namespace deit
