// Marks of a weight, by which a later call sees that it was written to.
//
// A weight's memory is dealt into classes of 64-byte lines, every `classes`-th line to one. A
// class's mark is a hash of its lines in order: a write to any of them changes it, except one time
// in 2^32. All classes have a mark, and a call looks at some of them. What a look costs is the
// fetching of lines, so a line is read whole.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kLine = 64;
constexpr int kWords = kLine / sizeof(uint64_t);
constexpr uint64_t kFactor = 0x9E3779B97F4A7C15u;  // odd: a word's difference is never lost in it

struct Hash {
  uint64_t words[kWords];
};

// Lines on the way at once. They lie in a page each, so nothing but this fetches them ahead.
constexpr int64_t kAhead = 32;

inline void add(Hash& hash, const char* bytes, int64_t left) {
  uint64_t line[kWords] = {};
  if (left >= kLine) {
    std::memcpy(line, bytes, kLine);
  } else {
    std::memcpy(line, bytes, static_cast<size_t>(left));
  }
  for (int w = 0; w < kWords; ++w) hash.words[w] = (hash.words[w] ^ line[w]) * kFactor;
}

inline uint32_t mark_of(const Hash& hash) {
  uint64_t all = 0;
  for (const uint64_t word : hash.words) all = (all ^ (word >> 29) ^ word) * kFactor;
  return static_cast<uint32_t>(all >> 32);
}

}  // namespace

#define DEIT_EXPORT __attribute__((visibility("default")))

extern "C" {

// `Record` of deit.kernels' marks.
struct DeitCpuMarks {
  const char* bytes;
  int64_t count;    // of bytes
  int64_t classes;  // groups * columns
  int64_t columns;  // classes c, c + columns, c + 2 * columns, ... make a sample of every row
  int64_t work;     // multiply-adds of an output channel that pay for a group
  int64_t least;    // groups that a call looks at, whatever it works
  int64_t turn;     // groups looked at so far
  uint32_t* marks;  // [classes]
};

DEIT_EXPORT void deit_cpu_make_marks(const DeitCpuMarks* of) {
  std::vector<Hash> hashes(static_cast<size_t>(of->classes), Hash{});
  size_t at = 0;
  for (int64_t i = 0; i < of->count; i += kLine) {
    add(hashes[at], of->bytes + i, of->count - i);
    if (++at == hashes.size()) at = 0;
  }
  std::transform(hashes.begin(), hashes.end(), of->marks, mark_of);
}

static inline void fetch(const DeitCpuMarks* of, int64_t at) {
  if (at < of->count) __builtin_prefetch(of->bytes + at);
}

// Whether the next classes still have their marks: 1 or 0. As many are looked at as `work`
// multiply-adds of an output channel pay for. Threads that ask at once may look at the same ones.
DEIT_EXPORT int deit_cpu_has_marks(DeitCpuMarks* of, int64_t work) {
  const std::atomic_ref<int64_t> turns(of->turn);
  const int64_t groups = of->classes / of->columns;
  int64_t looked = std::clamp<int64_t>(work / of->work, of->least, groups);
  for (int64_t turn = turns.fetch_add(looked, std::memory_order_relaxed); looked > 0; --looked) {
    const int64_t at = turn % groups * of->columns + turn / groups % of->columns;
    ++turn;
    const int64_t step = of->classes * kLine;
    Hash hash{};
    for (int64_t i = at * kLine; i < at * kLine + kAhead * step; i += step) fetch(of, i);
    for (int64_t i = at * kLine; i < of->count; i += step) {
      fetch(of, i + kAhead * step);
      add(hash, of->bytes + i, of->count - i);
    }
    if (mark_of(hash) != of->marks[at]) return 0;
  }
  return 1;
}

}  // extern "C"
