// The MLP of a block on the CPU, in inference and in training: two products, by rows whose
// activated hidden layer stays in a cache.
#include <string>

#include "launch_linear.h"

namespace deit {
namespace {

// Rows of the MLP that go through both products before the next ones: their hidden layer, 9.4 MB
// in fp32 at 3072 channels, stays in the last-level cache, and no more is ever allocated.
constexpr int64_t kMlpRows = 800;

// `first` into its out, a buffer of `block` rows, and `second` from there, block by block.
void run_mlp(ProductArgs first, ProductArgs second, int64_t block, int64_t rows) {
  const char* x = static_cast<const char*>(first.x);
  const char* residual = static_cast<const char*>(second.residual);
  char* out = static_cast<char*>(second.out);
  const int64_t in_row = first.depth * static_cast<int64_t>(sizeof(float));
  const int64_t out_row = second.width * (second.out_type == Scalar::f32 ? 4 : 2);
  second.x = first.out;
  for (int64_t row = 0; row < rows; row += block) {
    first.rows = second.rows = std::min(block, rows - row);
    first.x = x + row * in_row;
    if (residual) second.residual = residual + row * out_row;
    second.out = out + row * out_row;
    second.first_row = row;
    run_product(first);
    run_product(second);
  }
}

}  // namespace

Tensor gelu_mlp_of(const Tensor& x, const Tensor& w1, const Optional& b1, const Tensor& w2,
                   const Optional& b2, const Optional& residual, const Optional& gamma,
                   const Optional& keep, Activation activation) {
  Product first(x, w1, b1);
  const int64_t rows = first.args.rows, block = std::min(rows, kMlpRows);
  Tensor hidden = torch::stable::new_empty(x, {block, first.args.width});
  Product second(hidden, w2, b2);
  first.args.activation = activation;
  first.args.out = hidden.mutable_data_ptr();
  second.args.rows = rows;
  second.add_epilogue(x, residual, gamma, keep);
  second.allocate_out(x);
  run_mlp(first.args, second.args, block, rows);
  return second.out;
}

namespace {

Tensor gelu_mlp(Tensor x, Tensor w1, Optional b1, Tensor w2, Optional b2, Optional residual,
                Optional gamma, Optional keep, std::optional<std::string> activation) {
  return gelu_mlp_of(x, w1, b1, w2, b2, residual, gamma, keep, activation_of_mlp(activation));
}

// Both products on a tile of rows at a time: the activated hidden layer never leaves the cache.
std::tuple<Tensor, Tensor, Tensor> gelu_mlp_fwd(Tensor x, Tensor w1, Optional b1, Tensor w2,
                                                Optional b2, Optional residual, Optional gamma,
                                                Optional keep,
                                                std::optional<std::string> activation) {
  check_linear(x, w1, "w1");
  STD_TORCH_CHECK(w2.dim() == 2 && w2.size(1) == w1.size(0) && w2.size(1) > 0,
                  "w2: expected [D', M] with M > 0 the rows of w1");
  const ScalarType type = x.scalar_type();
  x = contiguous("x", x, type);
  const int64_t hidden_width = w1.size(0), width = w2.size(0);
  Tensor hidden = torch::stable::new_empty(x, with_last(x, hidden_width));
  Tensor out = torch::stable::new_empty(residual.value_or(x), with_last(x, width));
  Tensor affine = gamma.has_value() ? torch::stable::new_empty(x, with_last(x, width)) : none(x);
  Epilogue epilogues[2];
  TrainingProductArgs first = product_of(x, hidden_width, hidden);
  epilogues[0].describe(x, hidden_width, b1, std::nullopt, std::nullopt, std::nullopt, first);
  first.activation = activation_of_mlp(activation);
  first.affine = first.out;
  first.out = nullptr;
  TrainingProductArgs second = product_of(hidden, width, out);
  epilogues[1].describe(x, width, b2, residual, gamma, keep, second);
  second.affine = gamma.has_value() ? affine.mutable_data_ptr() : nullptr;
  second.a = nullptr;
  second.before = &first;
  const Buffer packed[2] = {pack_operand(first, contiguous("w1", w1, type), true),
                            pack_operand(second, contiguous("w2", w2, type), true)};
  run_product(second);
  return {out, hidden, affine};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gelu_mlp_bwd(
    Tensor dout, Optional x, Tensor w1, Tensor w2, Tensor hidden, Optional affine, Optional gamma,
    Optional keep, std::optional<std::vector<bool>> wanted,
    std::optional<std::string> activation) {
  const Wanted wants(wanted, 6);
  check_gradient(hidden, x, w1, "w1", "hidden: expected [.., M] with M the rows of w1");
  check_gradient(dout, hidden, w2, "w2");
  const ScalarType type = w2.scalar_type();
  hidden = contiguous("hidden", hidden, type);
  const bool first = wants[0] || wants[1] || wants[2];  // what lies before the hidden layer
  const auto [g, dgamma] = output_gradient(dout, affine, Activation::none, gamma, keep, type,
                                           first || wants[3] || wants[4], wants[5]);
  Tensor dhidden = none(hidden), activated = none(hidden);
  if (wants[3]) activated = torch::stable::new_empty(hidden, hidden.sizes());
  if (first || wants[3]) {
    dhidden = torch::stable::new_empty(hidden, hidden.sizes());
    const Tensor a = in_whole_words(g);
    TrainingProductArgs args = product_of(a, w2.size(1), dhidden);
    args.hidden = hidden.const_data_ptr();
    args.activated = wants[3] ? activated.mutable_data_ptr() : nullptr;
    args.activation = activation_of_mlp(activation);
    const Buffer packed = pack_operand(args, contiguous("w2", w2, type), false);
    run_product(args);
  }
  const auto [dw2, db2] = weight_gradient(g, activated, wants[3], wants[4]);
  const auto [dw1, db1] = weight_gradient(dhidden, x, wants[1], wants[2]);
  Tensor dx = wants[0] ? input_gradient(dhidden, contiguous("w1", w1, type)) : none(w1);
  return {dx, dw1, db1, dw2, db2, dgamma};
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("gelu_mlp", TORCH_BOX(&deit::gelu_mlp));
  m.impl("gelu_mlp_fwd", TORCH_BOX(&deit::gelu_mlp_fwd));
  m.impl("gelu_mlp_bwd", TORCH_BOX(&deit::gelu_mlp_bwd));
}
