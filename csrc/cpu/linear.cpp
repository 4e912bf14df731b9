// Linear layers on the CPU, in inference and in training: checks, outputs, and the split over
// threads. The forward and an input's gradient are split over rows and panels of outputs, a
// weight's gradient over blocks of the weight.
#include "launch_linear.h"

#include <string>

namespace deit {

void run_product(ProductArgs args) {
  if (args.rows == 0 || args.width == 0) return;
  const ProductKernels& set = kernels().product;
  set.plan(args, torch::stable::get_num_threads());
  const int64_t work = args.row_block * args.depth * args.width / args.panels;
  over_threads(args.tasks, grain_of(work), set.workspace(args),
               [&](float* workspace, int64_t begin, int64_t end) {
                 set.run(args, workspace, begin, end);
               });
}

Buffer pack(ProductArgs& args) {
  const ProductKernels& set = kernels().product;
  Buffer packed = allocate(static_cast<size_t>(args.panels * set.panel * args.depth));
  over_threads(args.panels, 1, [&](int64_t begin, int64_t end) {
    set.pack(args, packed.get(), begin, end);
  });
  args.packed = packed.get();
  return packed;
}

Tensor linear_of(const Tensor& x, const Tensor& weight, const Optional& bias,
                 Activation activation, const Optional& residual, const Optional& gamma,
                 const Optional& keep) {
  Product product(x, weight, bias);
  product.add_epilogue(x, residual, gamma, keep);
  product.args.activation = activation;
  product.allocate_out(x);
  run_product(product.args);
  return product.out;
}

Tensor linear_of_thirds(const Tensor& x, const Tensor& weight, const std::vector<Tensor>& others,
                        const Optional& bias) {
  Product product(x, weight, bias, others);
  product.allocate_out(x);
  run_product(product.args);
  return product.out;
}

void check_linear(const Tensor& x, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == last(x), name,
                  ": expected [M, K] with K the last axis of its input");
  STD_TORCH_CHECK(last(x) > 0, name, ": expected K > 0");
}

// `dout` is shaped as the output of the layer `weight` on x, where that is given.
void check_gradient(const Tensor& dout, const Optional& x, const Tensor& weight, const char* name,
                    const char* message) {
  STD_TORCH_CHECK(dout.dim() >= 1 && weight.dim() == 2 && last(dout) == weight.size(0), message);
  if (!x.has_value()) return;
  check_linear(*x, weight, name);
  STD_TORCH_CHECK(dout.dim() == x->dim() &&
                      std::equal(x->sizes().begin(), x->sizes().end() - 1, dout.sizes().begin()),
                  message);
}

Buffer pack_operand(TrainingProductArgs& args, const Tensor& b, bool transposed) {
  const TrainingProductKernels& set = kernels().training_product;
  const int64_t panels = blocks(args.width, set.panel);
  Buffer packed = allocate(static_cast<size_t>(panels * set.panel * args.depth));
  const int64_t depth = b.size(transposed ? 1 : 0);
  const PackArgs pack{b.const_data_ptr(), b.size(1), transposed, depth,
                      args.width,         packed.get(), scalar_of("weight", b)};
  over_threads(
      panels, std::max<int64_t>(1, kGrain / (set.panel * args.depth + 1)),
      [&](int64_t begin, int64_t end) { set.pack(pack, begin, end); });
  args.panels = packed.get();
  return packed;
}

void run_product(const TrainingProductArgs& args) {
  if (args.rows == 0 || args.width == 0) return;
  const TrainingProductKernels& set = kernels().training_product;
  const int64_t work = set.row_tile * args.depth * args.width;
  over_threads(blocks(args.rows, set.row_tile), grain_of(work), set.workspace(args),
               [&](float* workspace, int64_t begin, int64_t end) {
                 set.run(args, workspace, begin, end);
               });
}

TrainingProductArgs product_of(const Tensor& a, int64_t width, const Tensor& out) {
  const int64_t words = in_word(a.scalar_type());
  STD_TORCH_CHECK(last(a) % words == 0, "x: expected an even depth in bf16");
  TrainingProductArgs args{};
  args.type = scalar_of("x", a);
  args.out_type = scalar_of("out", out);
  args.a = static_cast<const float*>(a.const_data_ptr());
  args.lda = args.depth = last(a) / words;
  args.rows = args.depth == 0 ? 0 : a.numel() / last(a);
  args.width = width;
  args.out = out.mutable_data_ptr();
  return args;
}

Tensor in_whole_words(const Tensor& g) {
  const int64_t width = last(g);
  if (width % in_word(g.scalar_type()) == 0) return g;
  const int64_t rows = width == 0 ? 0 : g.numel() / width;
  Tensor wide = torch::stable::new_empty(g, with_last(g, width + 1));
  const uint16_t* from = static_cast<const uint16_t*>(g.const_data_ptr());
  uint16_t* to = static_cast<uint16_t*>(wide.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row, from += width) {
    to = std::copy(from, from + width, to);
    *to++ = 0;
  }
  return wide;
}

Tensor input_gradient(const Tensor& g, const Tensor& weight) {
  const Tensor a = in_whole_words(g);
  Tensor dx = torch::stable::new_empty(g, with_last(g, weight.size(1)));
  TrainingProductArgs args = product_of(a, weight.size(1), dx);
  const Buffer packed = pack_operand(args, weight, false);
  run_product(args);
  return dx;
}

namespace {

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

}  // namespace

void run_weight_gradient(WeightGradientArgs& args) {
  share_out(args);
  const LinearGradientKernels& set = kernels().linear_gradient;
  const int64_t rows = args.samples * args.rows;
  const int64_t work = rows * args.output_block * std::min(args.input_block, args.inputs + 1);
  over_threads(tasks_of(args), grain_of(work), set.weight_workspace(args),
               [&](float* workspace, int64_t begin, int64_t end) {
                 set.weight(args, workspace, begin, end);
               });
}

std::tuple<Tensor, Tensor> weight_gradient(const Tensor& g, const Optional& x,
                                               bool wants_weight, bool wants_bias) {
  if (!wants_weight && !wants_bias) return {none(g), none(g)};
  WeightGradientArgs args{};
  args.outputs = args.ldg = last(g);
  const Tensor inputs = wants_weight ? contiguous("x", required("x", x), g.scalar_type()) : none(g);
  args.inputs = args.ldx = last(inputs);
  args.samples = 1;
  args.rows = args.outputs == 0 ? 0 : g.numel() / args.outputs;
  Tensor dweight = wants_weight ? torch::stable::new_empty(g, {args.outputs, args.inputs}) : none(g);
  Tensor dbias = wants_bias ? torch::stable::new_empty(g, {args.outputs}) : none(g);
  if (args.rows == 0) return {torch::stable::zero_(dweight), torch::stable::zero_(dbias)};
  args.g = g.const_data_ptr();
  args.x = inputs.const_data_ptr();
  args.type = scalar_of("dout", g);
  args.dweight = wants_weight ? dweight.mutable_data_ptr() : nullptr;
  args.dbias = wants_bias ? dbias.mutable_data_ptr() : nullptr;
  run_weight_gradient(args);
  return {dweight, dbias};
}

std::tuple<Tensor, Tensor> output_gradient(const Tensor& dout, const Optional& affine,
                                           Activation activation, const Optional& gamma,
                                           const Optional& keep, ScalarType type, bool wants_g,
                                           bool wants_gamma) {
  wants_gamma = wants_gamma && gamma.has_value();
  if (!wants_g && !wants_gamma) return {none(dout), none(dout)};
  const Tensor rows = contiguous_stream("dout", dout, type);
  const bool as_it_is = activation == Activation::none && !gamma.has_value() && !keep.has_value();
  if (as_it_is && rows.scalar_type() == type) return {rows, none(dout)};
  OutputGradientArgs args{};
  args.channels = args.ldd = last(dout);
  args.rows = args.channels == 0 ? 0 : dout.numel() / args.channels;
  Held gamma_held, keep_held;
  args.gamma = parameter("gamma", gamma, args.channels, dout, gamma_held);
  args.keep = parameter("keep", keep, dout.size(0), dout, keep_held);
  args.rows_per_sample = std::max<int64_t>(1, args.rows / std::max<int64_t>(1, dout.size(0)));
  args.activation = activation;
  const bool reads_affine = activation != Activation::none || wants_gamma;
  const Tensor affine_held =
      reads_affine ? contiguous("affine", required("affine", affine), type) : rows;
  STD_TORCH_CHECK(same_shape(affine_held, dout), "affine: expected dout's shape");
  args.affine = reads_affine ? affine_held.const_data_ptr() : nullptr;
  args.dout = rows.const_data_ptr();
  args.dout_type = scalar_of("dout", rows);
  Tensor g = wants_g ? torch::stable::new_empty(rows, rows.sizes(), type) : none(rows);
  args.type = type == ScalarType::Float ? Scalar::f32 : Scalar::bf16;
  args.g = wants_g ? g.mutable_data_ptr() : nullptr;
  const int64_t chunks = blocks(args.rows, kRowChunk);
  const int64_t sums_size = wants_gamma ? chunks * 2 * args.channels : 0;
  const Buffer sums = allocate(static_cast<size_t>(sums_size));
  args.dgamma = wants_gamma ? sums.get() : nullptr;
  const LinearGradientKernels& set = kernels().linear_gradient;
  over_threads(
      chunks, std::max<int64_t>(1, kGrain / (kRowChunk * args.channels + 1)),
      [&](int64_t begin, int64_t end) { set.output(args, begin, end); });
  if (!wants_gamma) return {g, none(dout)};
  return {g, sum_of_chunks(sums.get(), chunks, args.channels, args.channels, *gamma)};
}

namespace {

Tensor linear(Tensor x, Tensor weight, Optional bias, std::optional<std::string> activation,
              Optional residual, Optional gamma, Optional keep) {
  return linear_of(x, weight, bias, activation_of(activation), residual, gamma, keep);
}

Tensor linear_thirds(Tensor x, Tensor first, Tensor second, Tensor third, Optional bias) {
  return linear_of_thirds(x, first, {second, third}, bias);
}

std::tuple<Tensor, Tensor> linear_fwd(Tensor x, Tensor weight, Optional bias,
                                      std::optional<std::string> activation, Optional residual,
                                      Optional gamma, Optional keep) {
  check_linear(x, weight, "weight");
  const ScalarType type = x.scalar_type();
  x = contiguous("x", x, type);
  weight = contiguous("weight", weight, type);
  const int64_t width = weight.size(0);
  const Activation kind = activation_of(activation);
  const bool saves = kind != Activation::none || gamma.has_value();
  if (type == ScalarType::BFloat16 && !saves) {  // inference's chains serve bf16, 11 % faster
    return {linear_of(x, weight, bias, kind, residual, gamma, keep), none(x)};
  }
  Tensor out = torch::stable::new_empty(residual.value_or(x), with_last(x, width));
  Tensor affine = saves ? torch::stable::new_empty(x, with_last(x, width)) : none(x);
  TrainingProductArgs args = product_of(x, width, out);
  Epilogue epilogue;
  epilogue.describe(x, width, bias, residual, gamma, keep, args);
  args.activation = kind;
  args.affine = saves ? affine.mutable_data_ptr() : nullptr;
  const Buffer packed = pack_operand(args, weight, true);
  run_product(args);
  return {out, affine};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_bwd(Tensor dout, Optional x, Tensor weight,
                                                      Optional affine,
                                                      std::optional<std::string> activation,
                                                      Optional gamma, Optional keep,
                                                      std::optional<std::vector<bool>> wanted) {
  const Wanted wants(wanted, 4);
  check_gradient(dout, x, weight, "weight");
  const ScalarType type = weight.scalar_type();
  const auto [g, dgamma] = output_gradient(dout, affine, activation_of(activation), gamma, keep, type,
                                           wants[0] || wants[1] || wants[2], wants[3]);
  const auto [dweight, dbias] = weight_gradient(g, x, wants[1], wants[2]);
  Tensor dx = wants[0] ? input_gradient(g, contiguous("weight", weight, type)) : none(weight);
  return {dx, dweight, dbias, dgamma};
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&deit::linear));
  m.impl("linear_thirds", TORCH_BOX(&deit::linear_thirds));
  m.impl("linear_fwd", TORCH_BOX(&deit::linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&deit::linear_bwd));
}
