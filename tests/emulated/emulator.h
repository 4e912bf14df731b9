// The second body of csrc/cuda/device.h: a GPU's blocks on one CPU thread, one after another, their
// threads as fibres. A thread runs until it meets the others of its warp or block, and the next one
// then runs, in an order drawn from a seed. So a result that depends on the order shows.
//
// What a kernel must not do ends the process with a message and the place:
//   - a warp's lanes meet at different instructions, or some have left;
//   - threads wait at a barrier for one that has left;
//   - an address that is not aligned as its instruction asks;
//   - a thread leaves with copies that it has not waited for.
// Shared memory is NaN until it is written, and what an asynchronous copy brings is NaN until the
// thread has waited: the copy is made then, not before. Built with AddressSanitizer, shared memory
// has exactly the bytes that were asked for. Built with ThreadSanitizer, a fibre is a thread of its
// own to it, and a barrier is all that orders one thread's accesses and another's: neither do a
// warp's shuffles and products, nor the order of blocks. So it sees a barrier left out whatever the
// order was.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

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

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace deit {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

namespace gpu {

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float size = std::bit_cast<float>(rest << 13) * 0x1p112f;  // denormal numbers, too
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(size));
}

template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline f16 narrow<f16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), rest = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (x != x) return {0x7fff};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and on
  uint32_t half;
  if (rest < 0x38800000u) {  // below 2^-14; the units of 0.5 are 2^-24
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

template <class T>
inline uint32_t pack(float first, float second) {
  return narrow<T>(first).bits | static_cast<uint32_t>(narrow<T>(second).bits) << 16;
}

inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float positive(float x) { return x < 0.0f ? 0.0f : x; }

}  // namespace gpu

namespace emulated {

// What a run is made with, and what it counted. Tests put faults in here.
struct Settings {
  uint64_t seed = 0;
  int processors = 4;
  std::string dropped;      // a barrier, "file:line" or "all", that nobody waits at
  bool transposed = false;  // load_matrices exchanges its second matrix and its third
  bool withheld = false;    // shared memory has 16 bytes less than was asked for
  bool unmasked = false;    // copies bring 16 bytes whatever they were asked for
  std::map<std::string, int64_t> barriers;  // those met, and by how many blocks
  int64_t products = 0, copies = 0, blocks = 0;
};
inline Settings settings;

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

constexpr size_t kStack = 192 * 1024;

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
      Thread& thread = threads_[i];
      thread.index = static_cast<int>(i);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = stacks_.data() + i * kStack;
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::enter, 0);
#if defined(__SANITIZE_THREAD__)
      thread.fibre = __tsan_create_fiber(0);
#endif
    }
    left_ = threads_.size();
  }

  void run() {
    running = this;
    ++settings.blocks;
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

// A warp's instruction on one struct of operands a lane.
template <class Operands, void (*kWork)(Operands* (&)[32])>
inline void meet(const char* name, Operands& operands) {
  running->meet(name, &operands, [](void* const* all) {
    Operands* lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Operands*>(all[i]);
    kWork(lanes);
  });
}

inline void aligned(const char* name, const void* pointer, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail(std::string(name) + ": an address that is not a multiple of " + std::to_string(bytes));
  }
}

}  // namespace emulated

namespace gpu {

inline int thread() { return emulated::running->current().index; }
inline int block() { return static_cast<int>(emulated::running->number()); }
inline char* shared_memory() { return emulated::running->shared(); }

inline void block_barrier(const std::source_location place = std::source_location::current()) {
  emulated::running->barrier(place);
}

struct Shuffled {
  float x, found;
  int from;
};
inline void exchange(Shuffled* (&lanes)[32]) {
  for (Shuffled* lane : lanes) lane->found = lanes[lane->from]->x;
}
inline float shuffle(float x, int lane) {
  Shuffled operands{x, 0.0f, lane};
  if (lane < 0 || lane > 31) emulated::fail("shuffle: expected a lane from 0 to 31");
  emulated::meet<Shuffled, exchange>("shuffle", operands);
  return operands.found;
}
inline float shuffle_xor(float x, int bits) {
  Shuffled operands{x, 0.0f, (thread() % 32) ^ bits};
  emulated::meet<Shuffled, exchange>("shuffle_xor", operands);
  return operands.found;
}

struct Loaded {
  uint16_t row[8];
  uint32_t words[4];
};
inline void distribute(Loaded* (&lanes)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int from = emulated::settings.transposed && (i == 1 || i == 2) ? 3 - i : i;
      const uint16_t* row = lanes[8 * from + lane / 4]->row + 2 * (lane % 4);
      lanes[lane]->words[i] = row[0] | static_cast<uint32_t>(row[1]) << 16;
    }
  }
}
inline void distribute_transposed(Loaded* (&lanes)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int first = 8 * i + 2 * (lane % 4), column = lane / 4;
      lanes[lane]->words[i] =
          lanes[first]->row[column] | static_cast<uint32_t>(lanes[first + 1]->row[column]) << 16;
    }
  }
}
inline Loaded loaded(const char* name, const void* row) {
  emulated::aligned(name, row, 16);
  Loaded operands{};
  // Each lane reads the row that it names, so that the sanitizers see who reads what.
  const uint16_t* from = static_cast<const uint16_t*>(row);
  for (int i = 0; i < 8; ++i) operands.row[i] = from[i];
  return operands;
}
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  Loaded operands = loaded("load_matrices", row);
  emulated::meet<Loaded, distribute>("load_matrices", operands);
  std::copy(operands.words, operands.words + 4, words);
}
inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  Loaded operands = loaded("load_matrices_transposed", row);
  emulated::meet<Loaded, distribute_transposed>("load_matrices_transposed", operands);
  std::copy(operands.words, operands.words + 4, words);
}

struct Product {
  uint32_t a[4], b[2];
  float sums[4];
};
template <class T>
inline float number(uint32_t word, int which) {
  return widen(T{static_cast<uint16_t>(word >> 16 * which)});
}
// The fragments of mma.m16n8k16 with floating-point types, as the PTX ISA tells them number by
// number: groupID = lane / 4, threadID_in_group = lane % 4.
template <class T>
inline void product(Product* (&lanes)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {  // a0 .. a7, two in a register
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = number<T>(lanes[lane]->a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {  // b0 .. b3
      const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
      b[row][group] = number<T>(lanes[lane]->b[i / 2], i % 2);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {  // c0 .. c3
      const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
      float sum = lanes[lane]->sums[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->sums[i] = sum;
    }
  }
  ++emulated::settings.products;
}
template <class T>
inline void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product operands{{a[0], a[1], a[2], a[3]}, {b0, b1}, {sums[0], sums[1], sums[2], sums[3]}};
  emulated::meet<Product, product<T>>("multiply_add", operands);
  std::copy(operands.sums, operands.sums + 4, sums);
}

inline void copy_async(void* to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) emulated::fail("copy_async: expected 0 to 16 bytes");
  emulated::aligned("copy_async", to, 16);
  emulated::aligned("copy_async", from, 16);
  unsigned char* whole = static_cast<unsigned char*>(to);
  for (int i = 0; i < 16; ++i) whole[i] = 0xff;  // written from now on; read by nobody yet
  emulated::Unwatched unwatched;
  emulated::running->current().open.push_back({to, from, bytes});
  ++emulated::settings.copies;
}
inline void copies_commit() {
  emulated::Unwatched unwatched;
  emulated::Thread& self = emulated::running->current();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}
template <int kNewest>
inline void copies_wait() {
  emulated::Thread& self = emulated::running->current();
  while (self.groups.size() > kNewest) {
    std::vector<emulated::Copy> group;
    {
      emulated::Unwatched unwatched;
      group = std::move(self.groups.front());
      self.groups.pop_front();
    }
    for (const emulated::Copy& copy : group) {
      const unsigned char* from = static_cast<const unsigned char*>(copy.from);
      unsigned char* to = static_cast<unsigned char*>(copy.to);
      const int bytes = emulated::settings.unmasked ? 16 : copy.bytes;
      for (int i = 0; i < 16; ++i) to[i] = i < bytes ? from[i] : 0;
    }
  }
}

template <class... Formal, class... Actual>
const char* launch(void (*kernel)(Formal...), int64_t blocks, int threads, int shared, void*,
                   const Actual&... actual) {
  if (blocks < 1 || threads < 1 || threads > 1024) return "invalid configuration argument";
  if (shared > 99 * 1024) return "more shared memory than a block has on compute capability 8.6";
  const std::function<void()> body = [&] { kernel(actual...); };
  char ended = 0;
  {
    emulated::Unwatched unwatched;
    for (int64_t number = 0; number < blocks; ++number) {
      emulated::Block block(number, threads, shared, body, &ended);
      block.run();
    }
  }
  emulated::happens_after(&ended);
  return nullptr;
}

inline int processors() { return emulated::settings.processors; }

}  // namespace gpu
}  // namespace deit
