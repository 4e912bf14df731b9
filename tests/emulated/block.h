// A block of a launch: its threads as fibres, its shared memory, and where they wait for one another.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#include "sanitizers.h"

namespace deit::emulated {

constexpr size_t kStack = 192 * 1024;  // of a fibre

// What a run is made with, and the barriers that it met. Tests put faults in here.
struct Settings {
  uint64_t seed = 0;  // of the order of threads; 0: as they are numbered
  int processors = 4;
  std::string dropped;      // a barrier, "file:line" or "all", that nobody waits at
  bool transposed = false;  // load_matrices exchanges its second matrix and its third
  bool withheld = false;    // shared memory has 16 bytes less than was asked for
  bool unmasked = false;    // copies bring 16 bytes whatever they were asked for
  std::map<std::string, int64_t> barriers;  // and by how many blocks
};
inline Settings settings;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

enum class State { ready, in_warp, at_barrier, left };

struct Thread {
  ucontext_t context;
  State state = State::ready;
  int index = 0;
  void* fibre = nullptr;        // ThreadSanitizer's
  void* fake_stack = nullptr;   // AddressSanitizer's
  const char* met = nullptr;    // the instruction at which it waits for its warp
  void* operands = nullptr;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

class Block;
inline Block* running = nullptr;

class Block {
 public:
  Block(int64_t number, int threads, int shared, const std::function<void()>& kernel, void* ended)
      : number_(number),
        threads_(static_cast<size_t>(threads)),
        order_(threads_.size()),
        place_(threads_.size()),
        stacks_(threads_.size() * kStack),
        shared_(shared),
        kernel_(kernel),
        ended_(ended) {
    // Whole warps change places, and so do the lanes of each.
    std::mt19937_64 random(settings.seed * 1000003 + static_cast<uint64_t>(number));
    std::vector<size_t> warps((threads_.size() + 31) / 32), lanes(32);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    if (settings.seed != 0) {
      std::shuffle(warps.begin(), warps.end(), random);
      std::shuffle(lanes.begin(), lanes.end(), random);
    }
    size_t place = 0;
    for (const size_t warp : warps) {
      for (const size_t lane : lanes) {
        const size_t index = warp * 32 + lane;
        if (index >= threads_.size()) continue;
        order_[place] = index;
        place_[index] = place++;
      }
    }
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].index = static_cast<int>(i);
      prepare(threads_[i], stacks_.data() + i * kStack);
    }
    left_ = threads_.size();
  }

  void run() {
    running = this;
#if defined(__SANITIZE_THREAD__)
    main_.fibre = __tsan_get_current_fiber();
#endif
    current_ = &threads_[order_[0]];
    to(*current_, main_, current_->fibre);
    running = nullptr;
#if defined(__SANITIZE_THREAD__)
    for (Thread& thread : threads_) __tsan_destroy_fiber(thread.fibre);
#endif
  }

  Thread& current() { return *current_; }
  int64_t number() const { return number_; }
  char* shared() { return shared_.data(); }

  // All lanes of the warp meet here: the last to come works on the operands of all.
  void meet(const char* name, void* operands, void (*work)(void* const*)) {
    Unwatched unwatched;
    Thread& self = *current_;
    const size_t first = static_cast<size_t>(self.index) / 32 * 32;
    if (threads_.size() < first + 32) fail(std::string(name) + ": the warp has not 32 lanes");
    self.met = name;
    self.operands = operands;
    self.state = State::in_warp;
    void* all[32];
    for (size_t i = 0; i < 32; ++i) {
      Thread& lane = threads_[first + i];
      if (lane.state == State::left) fail(std::string(name) + ": a lane of the warp has left");
      if (lane.state != State::in_warp) return yield();
      if (std::strcmp(lane.met, name) != 0) {
        fail(std::string("lanes of a warp meet at ") + name + " and at " + lane.met);
      }
      all[i] = lane.operands;
    }
    work(all);
    for (size_t i = 0; i < 32; ++i) threads_[first + i].state = State::ready;
  }

  void barrier(const std::source_location& place) {
    std::string name;
    {
      Unwatched unwatched;
      name = place.file_name();
      name = name.substr(name.rfind('/') + 1) + ":" + std::to_string(place.line());
      if (++arrivals_[name] == 1) ++settings.barriers[name];
      if (name == settings.dropped || settings.dropped == "all") return;
    }
    char* sign = &signs_[phase_ % 2];
    happens_before(sign);
    {
      Unwatched unwatched;
      current_->state = State::at_barrier;
      if (++waiting_ < left_) {
        yield();
      } else {
        release();
      }
    }
    happens_after(sign);
  }

 private:
  // A block's shared memory, all bits set at first: NaN in every type.
  struct Shared {
    explicit Shared(int asked)
        : bytes(static_cast<size_t>(asked - (settings.withheld && asked >= 16 ? 16 : 0))) {
#if defined(__SANITIZE_ADDRESS__)
      const size_t whole = (bytes + 127) / 128 * 128 + 128;
      memory = static_cast<char*>(std::aligned_alloc(128, whole));
      __asan_poison_memory_region(memory + bytes, whole - bytes);
#else
      pages = std::make_unique<Pages>(bytes + 1);
      memory = pages->data();
#endif
      std::memset(memory, 0xff, bytes);
    }
    ~Shared() {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(memory, (bytes + 127) / 128 * 128 + 128);
      std::free(memory);
#endif
    }
    char* data() { return memory; }

    size_t bytes;
    char* memory;
    std::unique_ptr<Pages> pages;
  };

  static void prepare(Thread& thread, char* stack) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Block::enter, 0);
#if defined(__SANITIZE_THREAD__)
    thread.fibre = __tsan_create_fiber(0);
#endif
  }

  static void enter() {
#if defined(__SANITIZE_ADDRESS__)
    const bool first = running->bottom_ == nullptr;  // it comes from the launch
    __sanitizer_finish_switch_fiber(nullptr, first ? &running->bottom_ : nullptr,
                                    first ? &running->size_ : nullptr);
#endif
    running->kernel_();
    running->leave();
  }

  void leave() {
    happens_before(ended_);
    Thread *self, *next;
    void* fibre;
    {
      Unwatched unwatched;
      self = current_;
      bool outstanding = !self->open.empty();
      for (const auto& group : self->groups) outstanding |= !group.empty();
      if (outstanding) fail("a thread leaves with copies that it has not waited for");
      self->state = State::left;
      --left_;
      if (left_ > 0 && waiting_ == left_) release();  // those at a barrier wait for who is there
      next = pick();
      fibre = next->fibre;
    }
    to(*next, *self, fibre);
  }

  void release() {
    waiting_ = 0;
    ++phase_;
    for (Thread& thread : threads_) {
      if (thread.state == State::at_barrier) thread.state = State::ready;
    }
  }

  void yield() {
    Thread& self = *current_;
    Thread* next = pick();
    if (next != &self) to(*next, self, next->fibre);
  }

  // The next thread that can run, current from now on; the launch where all have left.
  Thread* pick() {
    const size_t own = place_[static_cast<size_t>(current_->index)], count = order_.size();
    for (size_t i = 1; i <= count; ++i) {
      Thread& next = threads_[order_[(own + i) % count]];
      if (next.state == State::ready) return current_ = &next;
    }
    if (left_ > 0) fail("threads wait for one another for ever");
    return &main_;
  }

  void to(Thread& next, Thread& self, [[maybe_unused]] void* fibre) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fibre, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    const bool home = &next == &main_;
    __sanitizer_start_switch_fiber(self.state == State::left ? nullptr : &self.fake_stack,
                                   home ? bottom_ : next.context.uc_stack.ss_sp,
                                   home ? size_ : kStack);
    swapcontext(&self.context, &next.context);
    __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#else
    swapcontext(&self.context, &next.context);
#endif
  }

  int64_t number_;
  std::vector<Thread> threads_;
  std::vector<size_t> order_, place_;
  Pages stacks_;
  Shared shared_;
  const std::function<void()>& kernel_;
  void* ended_;
  Thread main_;
  Thread* current_ = nullptr;
  size_t left_ = 0, waiting_ = 0;
  int64_t phase_ = 0;
  char signs_[2] = {};
  std::map<std::string, int64_t> arrivals_;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace deit::emulated
