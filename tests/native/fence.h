// What the fuzzed cases are made of: a repeatable source of shapes, memory with fences around it,
// elements of any type at any strides, and the split of a kernel's tasks over threads.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/common/rows.h"
#include "../../csrc/cpu/shares.h"

namespace fuzz {

// Where the run stands: printed by fail(), and by the sanitizer's death callback.
inline std::string where;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAIL %s: %s\n", where.c_str(), what.c_str());
  std::_Exit(1);
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }

  // A size up to `most`, often at or beside a multiple of some vector's width.
  int64_t size(int64_t most) {
    if (chance(0.5)) return between(1, most);
    const int64_t lanes = int64_t{1} << between(2, 6);
    const int64_t near = between(1, std::max<int64_t>(1, most / lanes)) * lanes + between(-1, 1);
    return std::min(std::max<int64_t>(near, 1), most);
  }
  deit::Scalar type() { return static_cast<deit::Scalar>(between(0, 2)); }

 private:
  std::mt19937_64 engine_;
};

inline size_t bytes_of(deit::Scalar type) { return type == deit::Scalar::f32 ? 4 : 2; }

// Exactly `bytes` of memory, all bits set at first: NaN at every floating type, so that reading
// what was never written shows. Either on the heap, where AddressSanitizer watches both ends, or
// against the first or the last byte of pages whose neighbours cannot be touched: a sanitizer sees
// only the accesses its compiler wrote, the processor sees masked loads and assembly, too.
class Fenced {
 public:
  Fenced(size_t bytes, Random& random, size_t align = 1) : bytes_(bytes), align_(align) {
    const int64_t place = random.between(0, 2);
    if (place == 0 || bytes == 0) {
      heap_ = true;
      data_ = static_cast<uint8_t*>(::operator new[](bytes, std::align_val_t{heap_align()}));
    } else {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      const size_t inside = (bytes + page - 1) / page * page;
      mapped_ = inside + 2 * page;
      void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) fail("mmap");
      start_ = static_cast<uint8_t*>(memory);
      if (mprotect(start_ + page, inside, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
      data_ = start_ + page + (place == 1 ? 0 : (inside - bytes) / align * align);
    }
    clear();
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() {
    if (heap_) {
      ::operator delete[](data_, std::align_val_t{heap_align()});
    } else {
      munmap(start_, mapped_);
    }
  }

  void clear() { std::memset(data_, 0xff, bytes_); }
  void* data() { return data_; }
  size_t bytes() const { return bytes_; }
  float* floats() { return reinterpret_cast<float*>(data_); }
  std::vector<uint8_t> copy() const { return {data_, data_ + bytes_}; }

 private:
  size_t heap_align() const { return std::max<size_t>(align_, 16); }

  uint8_t* data_;
  uint8_t* start_ = nullptr;
  size_t bytes_, align_, mapped_ = 0;
  bool heap_ = false;
};

// Elements of a floating type in fenced memory.
class Elements {
 public:
  Elements(int64_t count, deit::Scalar type, Random& random)
      : memory(static_cast<size_t>(count) * bytes_of(type), random, bytes_of(type)), type(type) {}

  double at(int64_t i) {
    if (type == deit::Scalar::f32) return memory.floats()[i];
    const uint16_t bits = static_cast<uint16_t*>(memory.data())[i];
    if (type == deit::Scalar::bf16) return widened(static_cast<uint32_t>(bits) << 16);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == 31) return fraction ? std::nan("") : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, -24);
    return sign * std::ldexp(1024 + fraction, exponent - 25);
  }

  std::vector<double> values() {
    std::vector<double> all(memory.bytes() / bytes_of(type));
    for (size_t i = 0; i < all.size(); ++i) all[i] = at(static_cast<int64_t>(i));
    return all;
  }

  // `value` must be k / 64 with |k| <= 256, which all three types hold exactly.
  void set(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == deit::Scalar::f32) {
      memory.floats()[i] = value;
      return;
    }
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (type == deit::Scalar::f16) {
      const uint32_t rest = bits & 0x7fffffffu;
      half = static_cast<uint16_t>(bits >> 16 & 0x8000u);
      if (rest) half = static_cast<uint16_t>(half | (rest - 0x38000000u) >> 13);
    }
    static_cast<uint16_t*>(memory.data())[i] = half;
  }
  void randomise(int64_t i, Random& random) {
    set(i, static_cast<float>(random.between(-256, 256)) / 64.0f);
  }

  Fenced memory;
  const deit::Scalar type;

 private:
  static double widened(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

// An optional fp32 parameter of `count` elements; `data` is null where it is left out.
struct Parameter {
  Parameter(int64_t count, double present, Random& random)
      : elements(random.chance(present) ? count : 0, deit::Scalar::f32, random),
        data(elements.memory.bytes() ? elements.memory.floats() : nullptr) {
    for (int64_t i = 0; data && i < count; ++i) elements.randomise(i, random);
  }
  double at(int64_t i, double otherwise) { return data ? elements.at(i) : otherwise; }

  Elements elements;
  float* data;
};

// [rows..., width] at random strides, in no more memory than they reach. Some axes overlap
// (stride 0, as after `expand`), some leave gaps of NaN.
struct Strided {
  Strided(const std::vector<int64_t>& sizes, int64_t width, deit::Scalar type, Random& random)
      : rows(lay_out(sizes, width, random)), width(width), elements(span, type, random) {
    rows.data = elements.memory.data();
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t i = 0; i < width; ++i) elements.randomise(offset(row) + i, random);
    }
  }

  deit::Rows lay_out(const std::vector<int64_t>& sizes, int64_t width, Random& random) {
    deit::Rows rows{};
    rows.dims = static_cast<int>(sizes.size());
    std::vector<int> order(sizes.size());
    for (size_t d = 0; d < sizes.size(); ++d) order[d] = static_cast<int>(d);
    for (size_t d = 1; d < order.size(); ++d) {
      std::swap(order[d], order[static_cast<size_t>(random.between(0, static_cast<int64_t>(d)))]);
    }
    int64_t reach = width;
    for (const int d : order) {
      const int64_t size = sizes[static_cast<size_t>(d)];
      rows.sizes[d] = size;
      rows.strides[d] = random.chance(0.1) ? 0 : reach + (random.chance(0.5) ? random.size(9) : 0);
      reach += (size - 1) * rows.strides[d];
      count *= size;
    }
    span = reach;
    return rows;
  }

  int64_t offset(int64_t row) const {
    int64_t total = 0;
    for (int d = rows.dims - 1; d >= 0; --d) {
      total += row % rows.sizes[d] * rows.strides[d];
      row /= rows.sizes[d];
    }
    return total;
  }
  double at(int64_t row, int64_t i) { return elements.at(offset(row) + i); }

  int64_t count = 1, span = 0;
  deit::Rows rows;
  int64_t width;
  Elements elements;
};

// Whether `found` is `exact` within `tolerance`, relative above 1. Coarse on purpose: the tests in
// Python hold the kernels to their precision, this one looks for what was read or written in the
// wrong place.
inline void near(const char* name, int64_t i, double found, double exact, double tolerance) {
  if (std::abs(found - exact) <= tolerance * (1.0 + std::abs(exact))) return;
  fail(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(found) +
       ", expected " + std::to_string(exact));
}
inline void near(const char* name, int64_t i, double found, double exact, deit::Scalar type) {
  const double rounding = type == deit::Scalar::f32   ? 2e-4
                          : type == deit::Scalar::f16 ? 2e-3
                                                      : 1.6e-2;
  near(name, i, found, exact, rounding);
}

// Runs `work(workspace, begin, end)` over all tasks by 1, 2 and 8 threads, each with a workspace of
// its own, whoever is free taking the next as the launcher has it, and once more split anywhere.
// All must write the same bits.
inline void run(int64_t tasks, size_t workspace_floats, const std::vector<Elements*>& outputs,
                Random& random, const std::function<void(float*, int64_t, int64_t)>& work) {
  std::vector<std::vector<uint8_t>> expected;
  for (const int64_t threads : {int64_t{1}, int64_t{2}, int64_t{8}, tasks}) {
    const bool anywhere = threads == tasks;
    const std::vector<int64_t> cuts = {0, random.between(0, tasks), tasks};
    const int64_t members = anywhere ? 2 : std::min(threads, tasks);
    deit::Shares shares(tasks, members, random.between(1, 4));
    for (Elements* output : outputs) output->memory.clear();
    std::vector<std::unique_ptr<Fenced>> workspaces;
    std::vector<std::thread> pool;
    for (int64_t t = 0; t < members; ++t) {
      workspaces.push_back(std::make_unique<Fenced>(workspace_floats * sizeof(float), random, 64));
      float* workspace = workspaces.back()->floats();
      const auto own = [&work, workspace](int64_t begin, int64_t end) {
        if (begin < end) work(workspace, begin, end);
      };
      pool.emplace_back([&shares, &cuts, anywhere, own, t] {
        if (anywhere) return own(cuts[static_cast<size_t>(t)], cuts[static_cast<size_t>(t) + 1]);
        shares.work(t, own);
      });
    }
    for (std::thread& thread : pool) thread.join();
    for (size_t i = 0; i < outputs.size(); ++i) {
      const std::vector<uint8_t> bytes = outputs[i]->memory.copy();
      if (threads == 1) {
        expected.push_back(bytes);
      } else if (bytes != expected[i]) {
        fail("output " + std::to_string(i) + " depends on the split over " +
             std::to_string(members) + " threads");
      }
    }
  }
}

}  // namespace fuzz
