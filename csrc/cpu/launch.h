// What the launchers of all operators share.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../common/tensors.h"
#include "isa.h"
#include "shares.h"
#include "team.h"

namespace deit {

using Optional = std::optional<Tensor>;

// Elements below which another thread costs more than it saves; PyTorch's own figure.
constexpr int64_t kGrain = 32768;

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], FreeAligned>;

inline Buffer allocate(size_t floats) {
  void* memory = ::operator new[](floats * sizeof(float), std::align_val_t{64});
  return Buffer(static_cast<float*>(memory));
}

inline int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

// The grain in tasks of `work` multiply-adds each. kGrain is in elements of elementwise operations.
inline int64_t grain_of(int64_t work) {
  return std::max<int64_t>(1, 4 * kGrain / std::max<int64_t>(1, work));
}

// run(member) for every one of [0, members), each by a thread of its own where one comes in time:
// PyTorch's, or this library's own while PyTorch's do not.
template <class Run>
void on_threads(int64_t members, const Run& run) {
  using Clock = Patience::Clock;
  Patience& patience = Patience::mine();
  const Threads selected = selected_threads.load(std::memory_order_relaxed);
  const bool own =
      selected == Threads::own ||
      (selected == Threads::automatic && patience.over(Clock::now()) && Team::has_cores(members));
  if (own) return Team::mine().run(members, run);
  const Clock::time_point begun = Clock::now();
  const int64_t had = cpu_nanoseconds();
  Clock::time_point done = begun;
  torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    for (int64_t member = begin; member < end; ++member) run(member);
    if (begin == 0) done = Clock::now();
  });
  const Clock::time_point now = Clock::now();
  const Clock::duration lost = now - begun - std::chrono::nanoseconds(cpu_nanoseconds() - had);
  patience.ended(now, done - begun, std::max(now - done, lost));
}

// [0, tasks) over threads, whoever is free taking the next, each with a workspace of its own:
// run(workspace, begin, end), several times a thread. There are as many threads as have `grain`
// tasks each. together: as in Shares.
template <class Run>
void over_threads(int64_t tasks, int64_t grain, size_t floats, const Run& run,
                  int64_t together = 1) {
  if (tasks <= 0) return;
  const int64_t most = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t members = std::min(most, blocks(tasks, std::max<int64_t>(1, grain)));
  if (members == 1) {
    const Buffer workspace = allocate(floats);
    return run(workspace.get(), int64_t{0}, tasks);
  }
  Shares shares(tasks, members, together);
  on_threads(members, [&](int64_t member) {
    const Buffer workspace = allocate(floats);
    shares.work(member, [&](int64_t from, int64_t to) { run(workspace.get(), from, to); });
  });
}

// The same without a workspace: run(begin, end).
template <class Run>
void over_threads(int64_t tasks, int64_t grain, const Run& run) {
  over_threads(tasks, grain, size_t{0},
               [&](float*, int64_t begin, int64_t end) { run(begin, end); });
}

inline int64_t last(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// What keeps a parameter alive that a kernel reads: itself, or its values in fp32.
struct Held {
  Tensor tensor;
  Buffer floats;
};

template <class Half>
void widen(const void* from, float* to, int64_t count) {
  const Half* halves = static_cast<const Half*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = halves[i];
}

// A parameter as contiguous fp32, which `held` keeps alive: D or B * N elements at most, so one
// conversion a call replaces a kernel for every mixture of dtypes. It is made here: through PyTorch
// it takes 1.8 us.
inline const float* parameter(const char* name, const Optional& value, int64_t numel,
                              const Tensor& like, Held& held) {
  if (!value.has_value()) return nullptr;
  check_parameter(name, *value, numel, like);
  const Scalar type = scalar_of(name, *value);
  held.tensor = value->is_contiguous() ? *value : torch::stable::contiguous(*value);
  const void* data = held.tensor.const_data_ptr();
  if (type == Scalar::f32) return static_cast<const float*>(data);
  held.floats = allocate(static_cast<size_t>(numel));
  if (type == Scalar::f16) {
    widen<torch::headeronly::Half>(data, held.floats.get(), numel);
  } else {
    widen<torch::headeronly::BFloat16>(data, held.floats.get(), numel);
  }
  return held.floats.get();
}

inline Activation activation_of(const std::optional<std::string>& name) {
  if (!name.has_value()) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "quick_gelu") return Activation::quick_gelu;
  STD_TORCH_CHECK(*name == "silu",
                  "activation: expected None, 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'; got ",
                  name->c_str());
  return Activation::silu;
}

// An MLP's: none is the exact GELU, which costs a call no string.
inline Activation activation_of_mlp(const std::optional<std::string>& name) {
  return name.has_value() ? activation_of(name) : Activation::gelu;
}

// What vit_block.cpp and int8_vit_block.cpp call of the operators. A LayerNorm's forward in
// training saves fp32 statistics of every row, attention's lse: [B, H, N] in fp32. Both are null in
// inference.
struct Statistics {
  Tensor mean, rstd;
};

Tensor layer_norm_of(Tensor x, Tensor weight, Optional bias, double eps, Statistics* saved);

// Rotary positions as the schemas give them, which keep what `rope_of` points to alive.
struct Positions {
  Tensor sin, cos;
  int64_t prefix;
  bool interleaved;
};

// Replaces the tables by fp32 ones of equal strides where they are not.
Rope rope_of(Positions& positions, const Tensor& x, int64_t heads, int64_t head_dim);
Tensor attention_of(Tensor qkv, int64_t num_heads, double scale, Optional key_bias, Tensor* lse,
                    Positions* positions = nullptr);
void run_attention(AttentionArgs args);  // plans it

}  // namespace deit
