// This library's own threads: a region is whole when its caller goes on, whoever came, and whatever
// was thrown. And when PyTorch's threads are given up, by made-up clocks.
#include <chrono>
#include <stdexcept>
#include <thread>

#include "../../csrc/cpu/team.h"
#include "cases.h"
#include "fence.h"

namespace fuzz {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// One region: every task once, in memory that ends with it, and what a member throws comes here.
void region(deit::Team& team, Random& random) {
  const int64_t tasks = random.between(1, 60), members = random.between(1, 9);
  const int64_t throws = random.chance(0.2) ? random.between(0, members - 1) : -1;
  const bool slow = random.chance(0.1);
  deit::Shares shares(tasks, members, random.between(1, 3));
  std::vector<int> runs(static_cast<size_t>(tasks));  // no atomics: two runs of one are a race
  bool thrown = false, came = false;
  const auto work = [&](int64_t member) {
    shares.work(member, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) ++runs[static_cast<size_t>(task)];
      if (slow) std::this_thread::sleep_for(std::chrono::microseconds(300));
      if (member == 0) std::this_thread::yield();  // or nobody else would find a task
    });
    if (member != throws) return;
    came = true;
    throw std::runtime_error("member " + std::to_string(member));
  };
  try {
    team.run(members, work);
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  if (thrown != came) fail("an exception was lost, or another's came");
  for (const int count : runs) {
    if (count != 1) fail("a task was run " + std::to_string(count) + " times");
  }
}

void within(deit::Team& team) {  // a region within a region: by its caller alone
  std::atomic<int> runs{0};
  const auto inner = [&](int64_t) {
    runs.fetch_add(1);
    std::this_thread::sleep_for(milliseconds(1));  // so that another would come
  };
  team.run(1, [&](int64_t) { team.run(4, inner); });
  if (runs != 1) fail("a region within a region ran " + std::to_string(runs) + " times");
}

void patience() {
  deit::Patience patience;
  deit::Patience::Time now = deit::Patience::Time{} + seconds(100);
  const auto after = [&](auto apart, auto worked, auto waited) {
    now += apart;
    patience.ended(now, worked, waited);
    return patience.over(now);
  };
  for (int i = 0; i < 1000; ++i) {
    if (after(milliseconds(2), milliseconds(1), std::chrono::microseconds(250))) {
      fail("short waits are no loss");
    }
    if (after(milliseconds(900), milliseconds(800), milliseconds(100))) fail("nor long work's");
  }
  if (after(milliseconds(10), milliseconds(1), milliseconds(5))) fail("a single late thread");
  for (int i = 0; i < 100; ++i) {
    if (after(milliseconds(100), milliseconds(1), milliseconds(5))) fail("what is paid is owed");
  }
  for (const int turn : {2, 4, 8, 16, 32, 32, 2}) {  // the last after a try that went well
    if (turn == 2) now += seconds(70);
    if (!after(milliseconds(50), milliseconds(1), milliseconds(40))) fail("patience without end");
    if (!patience.over(now + milliseconds(1000 * turn - 1))) fail("tried again too early");
    if (patience.over(now + seconds(turn))) fail("never tried again");
    now += seconds(turn);
  }
}

}  // namespace

void fuzz_team(Random& random, const deit::Kernels&) {
  patience();
  deit::Team team;
  within(team);
  for (int64_t i = random.between(0, 20); i >= 0; --i) {
    region(team, random);
    if (random.chance(0.05)) std::this_thread::sleep_for(milliseconds(1));  // the workers sleep
  }
}

}  // namespace fuzz
