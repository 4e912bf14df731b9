// The fp32 linear layers of training on the CPU (kernels/ops.py): checks, outputs, and the split
// over threads: over tiles of rows in the forward and for an input's gradient, over blocks of the
// weight for its gradient.
#include <string>
#include <tuple>

#include "launch_training.h"

namespace deit {
namespace {

using torch::stable::parallel_for;

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}
float* mutable_floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

Tensor fp32(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected fp32");
  return torch::stable::contiguous(tensor);
}

std::vector<int64_t> with_last(const Tensor& tensor, int64_t size) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = size;
  return sizes;
}

// Packs `b` as the right operand of `args`: [width, depth] where transposed, else [depth, width].
Buffer pack_operand(TrainingProductArgs& args, const Tensor& b, bool transposed) {
  const TrainingKernels& set = kernels().training;
  const int64_t panels = blocks(args.width, set.panel);
  Buffer packed = allocate(static_cast<size_t>(panels * set.panel * args.depth));
  const PackArgs pack{floats(b), b.size(1), transposed, args.depth, args.width, packed.get()};
  parallel_for(0, panels, std::max<int64_t>(1, kGrain / (set.panel * args.depth + 1)),
               [&](int64_t begin, int64_t end) { set.pack(pack, begin, end); });
  args.panels = packed.get();
  return packed;
}

void run_product(const TrainingProductArgs& args) {
  if (args.rows == 0 || args.width == 0) return;
  const TrainingKernels& set = kernels().training;
  const int64_t work = set.row_tile * args.depth * args.width;
  parallel_for(0, blocks(args.rows, set.row_tile), grain_of(work), [&](int64_t begin, int64_t end) {
    const Buffer workspace = allocate(set.product_workspace(args));
    set.product(args, workspace.get(), begin, end);
  });
}

int64_t tasks_of(const WeightGradientArgs& args) {
  const int64_t across = std::max<int64_t>(1, blocks(args.inputs, args.input_block));
  return blocks(args.outputs, args.output_block) * across;
}

// Large blocks pack less for each multiply-add; as large as leaves every thread its share. No sum's
// order depends on it.
void share_out(WeightGradientArgs& args) {
  constexpr int64_t sizes[][2] = {{192, 192}, {96, 192}, {96, 96}, {48, 64}};
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  for (const auto& [outputs, inputs] : sizes) {
    args.output_block = outputs;
    args.input_block = inputs;
    const int64_t tasks = tasks_of(args);
    if (tasks >= 4 * threads || tasks % threads == 0) return;
  }
}

// dweight [M, K] and dbias [M] of a layer whose output's gradient is g [T, M] and input x [T, K],
// which is read for dweight alone.
std::tuple<Tensor, Tensor> run_weight_gradient(const Tensor& g, const Optional& x,
                                               bool wants_weight, bool wants_bias) {
  if (!wants_weight && !wants_bias) return {none(g), none(g)};
  WeightGradientArgs args{};
  args.outputs = args.ldg = last(g);
  const Tensor inputs = wants_weight ? fp32("x", required("x", x)) : none(g);
  args.inputs = args.ldx = last(inputs);
  args.rows = args.outputs == 0 ? 0 : g.numel() / args.outputs;
  Tensor dweight = wants_weight ? torch::stable::new_empty(g, {args.outputs, args.inputs}) : none(g);
  Tensor dbias = wants_bias ? torch::stable::new_empty(g, {args.outputs}) : none(g);
  if (args.rows == 0) return {torch::stable::zero_(dweight), torch::stable::zero_(dbias)};
  args.g = floats(g);
  args.x = floats(inputs);
  args.dweight = wants_weight ? mutable_floats(dweight) : nullptr;
  args.dbias = wants_bias ? mutable_floats(dbias) : nullptr;
  share_out(args);
  const TrainingKernels& set = kernels().training;
  const int64_t work = args.rows * args.output_block * std::min(args.input_block, args.inputs + 1);
  parallel_for(0, tasks_of(args), grain_of(work), [&](int64_t begin, int64_t end) {
    const Buffer workspace = allocate(set.weight_gradient_workspace(args));
    set.weight_gradient(args, workspace.get(), begin, end);
  });
  return {dweight, dbias};
}

// What linear and gelu_mlp have behind their last product.
struct Epilogue {
  Tensor bias_held, gamma_held, keep_held, residual_held;
  void describe(const Tensor& x, int64_t width, const Optional& bias, const Optional& residual,
                const Optional& gamma, const Optional& keep, TrainingProductArgs& args) {
    args.bias = parameter("bias", bias, width, x, bias_held);
    args.gamma = parameter("gamma", gamma, width, x, gamma_held);
    if (keep.has_value()) {
      args.keep = parameter("keep", keep, x.size(0), x, keep_held);
      args.rows_per_sample = std::max<int64_t>(1, args.rows / std::max<int64_t>(1, x.size(0)));
    }
    if (residual.has_value()) {
      STD_TORCH_CHECK(residual->numel() == args.rows * width && last(*residual) == width,
                      "residual: expected the output's shape");
      residual_held = fp32("residual", *residual);
      args.residual = floats(residual_held);
    }
  }
};

TrainingProductArgs product_of(const Tensor& a, int64_t width, const Tensor& out) {
  TrainingProductArgs args{};
  args.a = floats(a);
  args.lda = args.depth = last(a);
  args.rows = args.depth == 0 ? 0 : a.numel() / args.depth;
  args.width = width;
  args.out = mutable_floats(out);
  return args;
}

void check_linear(const Tensor& x, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == last(x), name,
                  ": expected [M, K] with K the last axis of its input");
  STD_TORCH_CHECK(last(x) > 0, name, ": expected K > 0");
}

std::tuple<Tensor, Tensor> linear_fwd(Tensor x, Tensor weight, Optional bias,
                                      std::optional<std::string> activation, Optional residual,
                                      Optional gamma, Optional keep) {
  check_linear(x, weight, "weight");
  x = fp32("x", x);
  weight = fp32("weight", weight);
  const int64_t width = weight.size(0);
  const Activation kind = activation_of(activation);
  const bool saves = kind != Activation::none || gamma.has_value();
  Tensor out = torch::stable::new_empty(x, with_last(x, width));
  Tensor affine = saves ? torch::stable::new_empty(x, with_last(x, width)) : none(x);
  TrainingProductArgs args = product_of(x, width, out);
  Epilogue epilogue;
  epilogue.describe(x, width, bias, residual, gamma, keep, args);
  args.activation = kind;
  args.affine = saves ? mutable_floats(affine) : nullptr;
  const Buffer packed = pack_operand(args, weight, true);
  run_product(args);
  return {out, affine};
}

// g = keep * gamma * dout * activation'(affine), dout itself where it may be, and dgamma.
std::tuple<Tensor, Tensor> output_gradient(const Tensor& dout, const Optional& affine,
                                           Activation activation, const Optional& gamma,
                                           const Optional& keep, bool wants_g, bool wants_gamma) {
  wants_gamma = wants_gamma && gamma.has_value();
  if (!wants_g && !wants_gamma) return {none(dout), none(dout)};
  const Tensor rows = fp32("dout", dout);
  if (activation == Activation::none && !gamma.has_value() && !keep.has_value()) {
    return {rows, none(dout)};
  }
  OutputGradientArgs args{};
  args.channels = args.ldd = last(dout);
  args.rows = args.channels == 0 ? 0 : dout.numel() / args.channels;
  Tensor gamma_held, keep_held;
  args.gamma = parameter("gamma", gamma, args.channels, dout, gamma_held);
  args.keep = parameter("keep", keep, dout.size(0), dout, keep_held);
  args.rows_per_sample = std::max<int64_t>(1, args.rows / std::max<int64_t>(1, dout.size(0)));
  args.activation = activation;
  const bool reads_affine = activation != Activation::none || wants_gamma;
  const Tensor affine_held = reads_affine ? fp32("affine", required("affine", affine)) : rows;
  STD_TORCH_CHECK(same_shape(affine_held, dout), "affine: expected dout's shape");
  args.affine = reads_affine ? floats(affine_held) : nullptr;
  args.dout = floats(rows);
  Tensor g = wants_g ? torch::stable::new_empty(rows, rows.sizes()) : none(rows);
  args.g = wants_g ? mutable_floats(g) : nullptr;
  const int64_t chunks = blocks(args.rows, kRowChunk);
  const int64_t sums_size = wants_gamma ? chunks * 2 * args.channels : 0;
  const Buffer sums = allocate(static_cast<size_t>(sums_size));
  args.dgamma = wants_gamma ? sums.get() : nullptr;
  const TrainingKernels& set = kernels().training;
  parallel_for(0, chunks, std::max<int64_t>(1, kGrain / (kRowChunk * args.channels + 1)),
               [&](int64_t begin, int64_t end) { set.output_gradient(args, begin, end); });
  if (!wants_gamma) return {g, none(dout)};
  return {g, sum_of_chunks(sums.get(), chunks, args.channels, args.channels, *gamma)};
}

// g weight, [.., K], shaped as the layer's input.
Tensor input_gradient(const Tensor& g, const Tensor& weight) {
  Tensor dx = torch::stable::new_empty(g, with_last(g, weight.size(1)));
  TrainingProductArgs args = product_of(g, weight.size(1), dx);
  const Buffer packed = pack_operand(args, weight, false);
  run_product(args);
  return dx;
}

// `dout` is shaped as the output of the layer `weight` on x, where that is given.
void check_gradient(const Tensor& dout, const Optional& x, const Tensor& weight, const char* name,
                    const char* message = "dout: expected the output's shape") {
  STD_TORCH_CHECK(dout.dim() >= 1 && weight.dim() == 2 && last(dout) == weight.size(0), message);
  if (!x.has_value()) return;
  check_linear(*x, weight, name);
  STD_TORCH_CHECK(dout.dim() == x->dim() &&
                      std::equal(x->sizes().begin(), x->sizes().end() - 1, dout.sizes().begin()),
                  message);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_bwd(Tensor dout, Optional x, Tensor weight,
                                                      Optional affine,
                                                      std::optional<std::string> activation,
                                                      Optional gamma, Optional keep,
                                                      std::optional<std::vector<bool>> wanted) {
  const Wanted wants(wanted, 4);
  check_gradient(dout, x, weight, "weight");
  const auto [g, dgamma] = output_gradient(dout, affine, activation_of(activation), gamma, keep,
                                           wants[0] || wants[1] || wants[2], wants[3]);
  const auto [dweight, dbias] = run_weight_gradient(g, x, wants[1], wants[2]);
  Tensor dx = wants[0] ? input_gradient(g, fp32("weight", weight)) : none(dout);
  return {dx, dweight, dbias, dgamma};
}

// Both products on a tile of rows at a time: the activated hidden layer never leaves the cache.
std::tuple<Tensor, Tensor, Tensor> gelu_mlp_fwd(Tensor x, Tensor w1, Optional b1, Tensor w2,
                                                Optional b2, Optional residual, Optional gamma,
                                                Optional keep) {
  check_linear(x, w1, "w1");
  STD_TORCH_CHECK(w2.dim() == 2 && w2.size(1) == w1.size(0) && w2.size(1) > 0,
                  "w2: expected [D', M] with M > 0 the rows of w1");
  x = fp32("x", x);
  const int64_t hidden_width = w1.size(0), width = w2.size(0);
  Tensor hidden = torch::stable::new_empty(x, with_last(x, hidden_width));
  Tensor out = torch::stable::new_empty(x, with_last(x, width));
  Tensor affine = gamma.has_value() ? torch::stable::new_empty(x, with_last(x, width)) : none(x);
  Epilogue epilogues[2];
  TrainingProductArgs first = product_of(x, hidden_width, hidden);
  epilogues[0].describe(x, hidden_width, b1, std::nullopt, std::nullopt, std::nullopt, first);
  first.activation = Activation::gelu;
  first.affine = first.out;
  first.out = nullptr;
  TrainingProductArgs second = product_of(hidden, width, out);
  epilogues[1].describe(x, width, b2, residual, gamma, keep, second);
  second.affine = gamma.has_value() ? mutable_floats(affine) : nullptr;
  second.a = nullptr;
  second.before = &first;
  const Buffer packed[2] = {pack_operand(first, fp32("w1", w1), true),
                            pack_operand(second, fp32("w2", w2), true)};
  run_product(second);
  return {out, hidden, affine};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gelu_mlp_bwd(
    Tensor dout, Optional x, Tensor w1, Tensor w2, Tensor hidden, Optional affine, Optional gamma,
    Optional keep, std::optional<std::vector<bool>> wanted) {
  const Wanted wants(wanted, 6);
  check_gradient(hidden, x, w1, "w1", "hidden: expected [.., M] with M the rows of w1");
  check_gradient(dout, hidden, w2, "w2");
  hidden = fp32("hidden", hidden);
  const bool first = wants[0] || wants[1] || wants[2];  // what lies before the hidden layer
  const auto [g, dgamma] = output_gradient(dout, affine, Activation::none, gamma, keep,
                                           first || wants[3] || wants[4], wants[5]);
  Tensor dhidden = none(hidden), activated = none(hidden);
  if (wants[3]) activated = torch::stable::new_empty(hidden, hidden.sizes());
  if (first || wants[3]) {
    dhidden = torch::stable::new_empty(hidden, hidden.sizes());
    TrainingProductArgs args = product_of(g, w2.size(1), dhidden);
    args.hidden = floats(hidden);
    args.activated = wants[3] ? mutable_floats(activated) : nullptr;
    args.activation = Activation::gelu;
    const Buffer packed = pack_operand(args, fp32("w2", w2), false);
    run_product(args);
  }
  const auto [dw2, db2] = run_weight_gradient(g, activated, wants[3], wants[4]);
  const auto [dw1, db1] = run_weight_gradient(dhidden, x, wants[1], wants[2]);
  Tensor dx = wants[0] ? input_gradient(dhidden, fp32("w1", w1)) : none(dout);
  return {dx, dw1, db1, dw2, db2, dgamma};
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&deit::linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&deit::linear_bwd));
  m.impl("gelu_mlp_fwd", TORCH_BOX(&deit::gelu_mlp_fwd));
  m.impl("gelu_mlp_bwd", TORCH_BOX(&deit::gelu_mlp_bwd));
}
