// What the launchers of training share beside launch.h.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.h"

namespace deit {

// The gradients that a backward is asked for, in the order in which it returns them; all of them
// where nothing is said. It returns an empty tensor in place of one that is not wanted.
class Wanted {
 public:
  Wanted(const std::optional<std::vector<bool>>& given, size_t count)
      : given_(given.value_or(std::vector<bool>(count, true))) {
    STD_TORCH_CHECK(given_.size() == count, "wanted: expected ", count, " values; got ",
                    given_.size());
  }
  bool operator[](size_t i) const { return given_[i]; }

 private:
  std::vector<bool> given_;
};

// A tensor that a backward reads for one of its gradients; an error where it is missing.
inline const Tensor& required(const char* name, const Optional& tensor) {
  STD_TORCH_CHECK(tensor.has_value(), name, ": expected a Tensor for the gradients that are wanted");
  return *tensor;
}

inline Tensor none(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// total[i] = the sum of parts[chunk, i] + parts[chunk, low + i] over chunks in order, in fp64, in
// `like`'s dtype; a chunk has 2 * low floats.
inline Tensor sum_of_chunks(const float* parts, int64_t chunks, int64_t low, int64_t channels,
                            const Tensor& like) {
  Tensor total = torch::stable::new_empty(like, {channels}, ScalarType::Float);
  float* out = static_cast<float*>(total.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(64, kGrain / std::max<int64_t>(1, chunks));
  over_threads(channels, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(static_cast<size_t>(end - begin));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* high = parts + chunk * 2 * low + begin;
      for (size_t i = 0; i < sums.size(); ++i) {
        sums[i] += static_cast<double>(high[i]) + static_cast<double>(high[low + i]);
      }
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      out[begin + static_cast<int64_t>(i)] = static_cast<float>(sums[i]);
    }
  });
  const ScalarType type = like.scalar_type();
  return type == ScalarType::Float ? total : torch::stable::to(total, type);
}

}  // namespace deit
