// `linear` and `gelu_mlp` on CUDA: on Hopper its own kernel (linear_hopper.cu) for what that takes,
// else linear.cu.
#include "linear_call.h"

namespace deit {
namespace {

using Optional = std::optional<Tensor>;

Tensor run_linear(const Tensor& x, const Tensor& weight, const Optional& bias,
                  Activation activation, const Optional& residual, const Optional& gamma,
                  const Optional& keep) {
  LinearCall linear(x, weight, bias, activation, residual, gamma, keep);
  if (linear.empty()) return linear.out;
  const Call call(x);
  if (!queued_on_hopper(linear, call)) {
    linear.place(Wants::any);
    queued("linear", launch_linear(linear.args, linear.type, call.stream));
  }
  return linear.out;
}

Tensor linear(Tensor x, Tensor weight, Optional bias, std::optional<std::string> activation,
              Optional residual, Optional gamma, Optional keep) {
  return run_linear(x, weight, bias, activation_of(activation), residual, gamma, keep);
}

Tensor gelu_mlp(Tensor x, Tensor w1, Optional b1, Tensor w2, Optional b2, Optional residual,
                Optional gamma, Optional keep, std::optional<std::string> activation) {
  const Activation kind = activation.has_value() ? activation_of(activation) : Activation::gelu;
  const Tensor hidden = run_linear(x, w1, b1, kind, {}, {}, {});
  return run_linear(hidden, w2, b2, Activation::none, residual, gamma, keep);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cuda, DEIT_DEVICE, m) {
  m.impl("linear", TORCH_BOX(&deit::linear));
  m.impl("gelu_mlp", TORCH_BOX(&deit::gelu_mlp));
}
