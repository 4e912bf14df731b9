// What the launchers of inference (ops.cpp) and training share.
#pragma once

#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>

#include "../common/tensors.h"
#include "isa.h"

namespace deit {

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

// A parameter as contiguous fp32, which `holder` keeps alive: D or B * N elements at most, so
// one conversion a call replaces a kernel for every mixture of dtypes.
inline const float* parameter(const char* name, const std::optional<Tensor>& value, int64_t numel,
                              const Tensor& like, Tensor& holder) {
  if (!value.has_value()) return nullptr;
  check_parameter(name, *value, numel, like);
  scalar_of(name, *value);
  holder = *value;
  if (holder.scalar_type() != ScalarType::Float) {
    holder = torch::stable::to(holder, ScalarType::Float);
  }
  if (!holder.is_contiguous()) holder = torch::stable::contiguous(holder);
  return static_cast<const float*>(holder.const_data_ptr());
}

inline Activation activation_of(const std::optional<std::string>& name) {
  if (!name.has_value()) return Activation::none;
  STD_TORCH_CHECK(*name == "gelu" || *name == "gelu_tanh",
                  "activation: expected None, 'gelu' or 'gelu_tanh'; got ", name->c_str());
  return *name == "gelu" ? Activation::gelu : Activation::gelu_tanh;
}

// The kernels, split over threads.
void run_layer_norm(const LayerNormArgs& args, int64_t rows);
void run_attention(AttentionArgs args);  // plans it

// What a LayerNorm's forward saves, or nothing in inference: fp32 statistics of every row.
struct Statistics {
  Tensor mean, rstd;
};

Tensor layer_norm_of(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps,
                     Statistics* saved);
std::tuple<Tensor, Tensor> add_layer_norm_of(Tensor x, Tensor residual, Tensor weight,
                                             std::optional<Tensor> bias, double eps,
                                             std::optional<Tensor> gamma,
                                             std::optional<Tensor> keep, Statistics* saved);
// lse: [B, H, N] in fp32, or null in inference.
Tensor attention_of(Tensor qkv, int64_t num_heads, double scale, std::optional<Tensor> key_bias,
                    Tensor* lse);

}  // namespace deit
