// The caller's and the workers' sides of a region.
#include "team.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "cores.h"
#include "dispatch.h"

namespace deit {
namespace {

// A worker sleeps after this. The gaps between a forward's regions are 10 to 30 us.
constexpr auto kSpin = std::chrono::microseconds(100);
// The caller's wait for who is inside: in a loop of 20 to 80 us, then offering its core to a thread
// that waits for it. Then a worker that does not run is brought here, where it finishes its step
// while the caller sleeps. Regions of 240 us on two cores, one of them taken: 270 us so, 500 where
// the caller waits until the system gives the worker its core back, some 3 ms.
constexpr int kLoops = 2000;
constexpr auto kYield = std::chrono::microseconds(100);

std::atomic<uint64_t> forks{0};

uint64_t forks_so_far() {
#if defined(__unix__) || defined(__APPLE__)
  static const int watched = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  static_cast<void>(watched);
#endif
  return forks.load(std::memory_order_relaxed);
}

thread_local bool inside = false;  // a region, as its caller or as a worker

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

std::atomic<Threads> selected_threads{Threads::automatic};

Team& Team::mine() {
  static thread_local Team team;
  return team;
}

Patience& Patience::mine() {
  static thread_local Patience patience;
  return patience;
}

Team::~Team() {
  if (forks_ != forks_so_far()) {
    for (auto& worker : workers_) static_cast<void>(worker.release());  // the parent's
    return;
  }
  ended_.store(true);
  state_.fetch_add(kRegion);
  for (auto& worker : workers_) {
    if (worker->asleep.exchange(0) == 1) worker->asleep.notify_one();
    worker->thread.join();
  }
}

bool Team::has_cores(int64_t members) { return Cores::mine().count() >= members; }

void Team::region(Work work, const void* of, int64_t members) {
  if (inside) return work(of, 0);
  grow(members - 1);
  work_ = work;
  of_ = of;
  members_ = std::min(members, static_cast<int64_t>(workers_.size()) + 1);
  core_ = this_core();
  state_.fetch_add(kRegion | kOpen);
  wake_children(0);
  inside = true;
  work_as(0);
  inside = false;
  state_.fetch_and(~kOpen);
  wait_for_inside();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Team::work_as(int64_t member) {
  try {
    work_(of_, member);
  } catch (...) {
    const std::lock_guard lock(failing_);
    if (!failure_) failure_ = std::current_exception();
  }
}

void Team::grow(int64_t workers) {
  const uint64_t now = forks_so_far();
  if (forks_ != now) {  // this process is a child of the one that started them
    for (auto& worker : workers_) static_cast<void>(worker.release());
    workers_.clear();
    state_.store(0);
    forks_ = now;
  }
  while (static_cast<int64_t>(workers_.size()) < workers) {
    Worker& worker = *workers_.emplace_back(std::make_unique<Worker>());
    const int64_t member = static_cast<int64_t>(workers_.size());
    try {
      worker.thread = std::thread(
          [this, &worker, member, seen = state_.load() / kRegion] { live(worker, member, seen); });
      worker.watch = Watch(worker.thread);
    } catch (const std::system_error&) {  // the system has no thread left: with those there are
      workers_.pop_back();
      return;
    }
  }
}

// Wakes two of [1, members) who wake two each, so that 64 threads are up after six steps.
void Team::wake_children(int64_t member) {
  for (int64_t child = 2 * member + 1; child <= 2 * member + 2 && child < members_; ++child) {
    Worker& worker = *workers_[static_cast<size_t>(child - 1)];
    if (worker.asleep.load() == 1 && worker.asleep.exchange(0) == 1) worker.asleep.notify_one();
  }
}

void Team::wait_for_inside() {
  const auto left = [this] { return (state_.load() & kInside) == 0; };
  for (int i = 0; i < kLoops; ++i) {
    if (left()) return;
    pause();
  }
  for (auto& worker : workers_) worker->watch.look();
  const auto end = std::chrono::steady_clock::now() + kYield;
  while (std::chrono::steady_clock::now() < end) {
    if (left()) return;
    std::this_thread::yield();
  }
  for (auto& worker : workers_) {
    if (!worker->inside.load() || worker->watch.has_run()) continue;
    worker->watch.bring_to(core_);
    worker->brought.store(true);  // last, so that it goes back whenever this came to it
  }
  for (;;) {
    caller_asleep_.store(1);
    if (left()) break;
    caller_asleep_.wait(1);
  }
  caller_asleep_.store(0);
}

// The state of a region that this worker has not seen.
uint64_t Team::next_region(Worker& worker, uint64_t seen) const {
  for (;;) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        const uint64_t state = state_.load();
        if (state / kRegion != seen) return state;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    worker.asleep.store(1);
    if (state_.load() / kRegion == seen) worker.asleep.wait(1);
    worker.asleep.store(0);
  }
}

void Team::live(Worker& worker, int64_t member, uint64_t seen) {
  const Cores cores = Cores::mine();
  inside = true;
  for (;;) {
    uint64_t state = next_region(worker, seen);
    if (ended_.load()) return;
    seen = state / kRegion;
    while ((state & kOpen) != 0 && state / kRegion == seen) {
      if (!state_.compare_exchange_weak(state, state + 1)) continue;
      const int callers = core_;
      if (member < members_) {
        worker.inside.store(true);
        if (worker.brought.exchange(false) || this_core() == callers) cores.leave(callers);
        wake_children(member);
        work_as(member);
        worker.inside.store(false);
      }
      const bool last = (state_.fetch_sub(1) & kInside) == 1;
      if (last && caller_asleep_.exchange(0) == 1) caller_asleep_.notify_one();
      if (worker.brought.exchange(false)) cores.leave(callers);
      break;
    }
  }
}

}  // namespace deit

extern "C" {

// Whose threads work from now on: "own", "torch", or "auto", PyTorch's while they come in time.
// 0: done; 1: no such name.
DEIT_EXPORT int deit_cpu_select_threads(const char* name) {
  const std::pair<const char*, deit::Threads> known[] = {{"auto", deit::Threads::automatic},
                                                         {"own", deit::Threads::own},
                                                         {"torch", deit::Threads::torch}};
  for (const auto& [each, threads] : known) {
    if (std::strcmp(each, name) == 0) return deit::selected_threads.store(threads), 0;
  }
  return 1;
}

}  // extern "C"
