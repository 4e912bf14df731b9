// The products of inference in fp32 and bf16 with everything that may follow them.
#include "cases.h"
#include "fence.h"
#include "linear.h"

namespace fuzz {

void fuzz_product(Random& random, const deit::Kernels& set) {
  deit::ProductArgs args{};
  args.type = random.chance(0.5) ? deit::Scalar::bf16 : deit::Scalar::f32;
  args.out_type = random.chance(0.5) ? args.type : deit::Scalar::f32;
  args.activation = any_activation(random);
  const int64_t samples = random.between(1, 4), each = random.size(random.chance(0.1) ? 400 : 40);
  args.rows = samples * each;
  args.depth = random.chance(0.1) ? random.size(600) : random.size(100);
  args.part = random.chance(0.3) ? 16 * random.between(1, 3) : 0;  // a weight in thirds
  args.width = args.part ? 3 * args.part : random.size(120);
  args.rows_per_sample = each;
  const int64_t inputs = args.depth * (args.type == deit::Scalar::bf16 ? 2 : 1);
  const int64_t first = (args.part ? args.part : args.width) * inputs;
  Elements x(args.rows * inputs, args.type, random), w(first, args.type, random);
  Elements second(args.part * inputs, args.type, random), third(args.part * inputs, args.type, random);
  Elements residual(args.rows * args.width, args.out_type, random);
  for (int64_t i = 0; i < args.rows * inputs; ++i) {
    x.set(i, static_cast<float>(random.between(-64, 64)) / 64.0f);
  }
  const auto fill = [&](Elements& weight, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      weight.set(i, static_cast<float>(random.between(-8, 8)) / 64.0f);
    }
  };
  fill(w, first);
  fill(second, args.part * inputs);
  fill(third, args.part * inputs);
  for (int64_t i = 0; i < args.rows * args.width; ++i) residual.randomise(i, random);
  Parameter bias(args.width, 0.7, random), gamma(args.width, 0.5, random);
  Parameter keep(samples, 0.5, random);
  const bool add = random.chance(0.5) || args.out_type != args.type;
  Elements out(args.rows * args.width, args.out_type, random);
  args.x = x.memory.data(), args.weight = w.memory.data();
  if (args.part) args.others[0] = second.memory.data(), args.others[1] = third.memory.data();
  args.bias = bias.data, args.gamma = gamma.data, args.keep = keep.data;
  if (add) args.residual = residual.memory.data();
  args.out = out.memory.data();
  std::vector<uint8_t> bits;
  for (const int64_t threads : {1, 2, 8}) {  // the plan may depend on them, the bits may not
    set.product.plan(args, threads);
    run(args.tasks, set.product.workspace(args), {&out}, random,
        [&](float* workspace, int64_t begin, int64_t end) {
          set.product.run(args, workspace, begin, end);
        });
    if (threads == 1) bits = out.memory.copy();
    if (out.memory.copy() != bits) fail("out depends on the number of threads planned for");
  }

  const std::vector<double> a = x.values();
  std::vector<double> b = w.values();
  for (const std::vector<double>& more : {second.values(), third.values()}) {
    b.insert(b.end(), more.begin(), more.end());
  }
  for (int64_t i = 0; i < args.rows * args.width; ++i) {
    const int64_t row = i / args.width, n = i % args.width;
    double y = bias.at(n, 0.0);
    for (int64_t k = 0; k < inputs; ++k) {
      y += a[static_cast<size_t>(row * inputs + k)] * b[static_cast<size_t>(n * inputs + k)];
    }
    y = activated(y, args.activation).value;
    y *= gamma.at(n, 1.0) * keep.at(row / each, 1.0);
    near("out", i, out.at(i), y + (add ? residual.at(i) : 0.0), args.out_type);
  }
}

}  // namespace fuzz
