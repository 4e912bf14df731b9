// The second body of csrc/cuda/device.h: a GPU's blocks on one CPU thread, one after another, their
// threads as fibres. A thread runs until it meets the others of its warp or block, and the next one
// then runs, in an order drawn from a seed. So a result that depends on the order shows.
//
// What a kernel must not do ends the process with a message and the place:
//   - a warp's lanes meet at different instructions, or some have left;
//   - threads wait for one another for ever;
//   - an address that is not aligned as its instruction asks;
//   - a thread leaves with copies that it has not waited for.
// Shared memory is NaN until it is written, and what an asynchronous copy brings is NaN until the
// thread has waited: the copy is made then, not before. Built with AddressSanitizer, shared memory
// has exactly the bytes that were asked for. Built with ThreadSanitizer, a fibre is a thread of its
// own to it, and a barrier is all that orders one thread's accesses and another's: neither do a
// warp's shuffles and products, nor the order of blocks. So it sees a barrier left out whatever the
// order was.
#pragma once

#include <utility>

#include "block.h"
#include "numbers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace deit {

namespace emulated {

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
