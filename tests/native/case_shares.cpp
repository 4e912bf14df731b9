// The split of tasks over threads: every task is run once, whoever is late.
#include <atomic>
#include <thread>

#include "cases.h"
#include "fence.h"

namespace fuzz {

void fuzz_shares(Random& random, const deit::Kernels&) {
  const int64_t tasks = random.between(1, 300), members = random.between(1, 9);
  const int64_t together = random.between(1, 12), late = random.between(0, members);
  deit::Shares shares(tasks, members, together);
  std::atomic<int64_t> waited_for{late < members ? members - 1 : members};  // all begin together
  std::vector<int> runs(static_cast<size_t>(tasks));  // no atomics: two runs of one are a race
  const auto work = [&](int64_t member) {
    shares.work(member, [&](int64_t begin, int64_t end) {
      if (begin < 0 || begin >= end || end > tasks) fail("a range of no tasks, or of too many");
      for (int64_t task = begin; task < end; ++task) ++runs[static_cast<size_t>(task)];
      std::this_thread::yield();  // or one thread would run all before the next begins
    });
  };
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < members; ++t) {
    if (t == late) continue;
    pool.emplace_back([&, t] {
      waited_for.fetch_sub(1);
      while (waited_for.load() > 0) std::this_thread::yield();
      work(t);
    });
  }
  for (std::thread& thread : pool) thread.join();
  if (late < members) {  // a member that begins when all others have left finds nothing to do
    const bool alone = members == 1;
    const std::vector<int> before = runs;
    work(late);
    if (!alone && before != runs) fail("tasks were left to a member that was late");
  }
  for (const int count : runs) {
    if (count != 1) fail("a task was run " + std::to_string(count) + " times");
  }
}

}  // namespace fuzz
