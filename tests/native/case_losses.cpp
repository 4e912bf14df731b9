// cross_entropy and distillation_loss, values and gradients: rows of any number of classes, of any
// strides, each tensor in a type of its own.
#include "cases.h"
#include "fence.h"

namespace fuzz {
namespace {

using deit::Imitation;

struct Head {
  Head(int64_t rows, int64_t classes, bool present, Random& random)
      : type(random.type()),
        values({present ? rows : 1}, present ? classes : 1, type, random),
        logits{present ? values.rows : deit::Rows{}, type} {}

  deit::Scalar type;
  Strided values;
  deit::Logits logits;
};

struct Softmax {
  std::vector<double> log;
  double of(int64_t i) const { return std::exp(log[static_cast<size_t>(i)]); }
};

Softmax log_softmax(Head& head, int64_t row, int64_t classes, double inverse) {
  Softmax found{std::vector<double>(static_cast<size_t>(classes))};
  double total = 0.0;  // of numbers within 4 of 0: no maximum needed
  for (int64_t i = 0; i < classes; ++i) {
    found.log[static_cast<size_t>(i)] = head.values.at(row, i) * inverse;
    total += std::exp(found.log[static_cast<size_t>(i)]);
  }
  for (double& value : found.log) value -= std::log(total);
  return found;
}

int64_t first_largest(Head& head, int64_t row, int64_t classes) {
  int64_t best = 0;
  for (int64_t i = 1; i < classes; ++i) {
    if (head.values.at(row, i) > head.values.at(row, best)) best = i;
  }
  return best;
}

}  // namespace

void fuzz_losses(Random& random, const deit::Kernels& set) {
  const int64_t rows = random.between(1, 9);
  const int64_t classes = random.chance(0.1) ? random.size(2100) : random.size(140);
  deit::LossInputs in{};
  in.kind = static_cast<Imitation>(random.between(0, 2));
  const bool teaches = in.kind != Imitation::none, soft_target = random.chance(0.5);
  const bool own_head = teaches && random.chance(0.5);
  Head logits(rows, classes, true, random), teacher(rows, classes, teaches, random);
  Head student(rows, classes, own_head, random), target(rows, classes, soft_target, random);
  in.logits = logits.logits, in.teacher = teacher.logits, in.student = student.logits;
  in.probabilities = target.logits;
  in.label_stride = random.between(1, 3);
  Fenced labels(static_cast<size_t>((rows - 1) * in.label_stride + 1) * sizeof(int64_t), random, 8);
  for (int64_t row = 0; row < rows; ++row) {
    static_cast<int64_t*>(labels.data())[row * in.label_stride] = random.between(0, classes - 1);
  }
  if (!soft_target) in.labels = static_cast<const int64_t*>(labels.data());
  in.batch = rows, in.classes = classes;
  in.smoothing = random.chance(0.5) ? 0.0 : 0.125;
  in.truth = 0.75, in.imitation = 0.5;
  in.inverse_temperature = in.kind == Imitation::soft ? 0.5f : 1.0f;
  const int64_t saved =
      teaches ? deit::kDistillationStatistics : deit::kCrossEntropyStatistics;
  Elements losses(2 * rows, deit::Scalar::f32, random);  // the bytes of as many doubles
  Elements statistics(saved * rows, deit::Scalar::f32, random);
  std::vector<double> found(static_cast<size_t>(rows));
  deit::LossArgs args{in, found.data(), statistics.memory.floats()};
  const size_t workspace = set.loss.workspace(classes);
  run(rows, workspace, {&losses, &statistics}, random, [&](float* own, int64_t begin, int64_t end) {
    set.loss.forward(args, own, begin, end);
    std::memcpy(losses.memory.floats() + 2 * begin, found.data() + begin,
                static_cast<size_t>(end - begin) * sizeof(double));
  });

  Elements dlogits(random.chance(0.8) ? rows * classes : 0, logits.type, random);
  Elements dstudent(own_head && random.chance(0.8) ? rows * classes : 0, student.type, random);
  deit::LossGradientArgs gradient{in, statistics.memory.floats(), 0.5, nullptr, nullptr};
  if (dlogits.memory.bytes()) gradient.dlogits = dlogits.memory.data();
  if (dstudent.memory.bytes()) gradient.dstudent = dstudent.memory.data();
  run(rows, workspace, {&dlogits, &dstudent}, random, [&](float* own, int64_t begin, int64_t end) {
    set.loss.gradient(gradient, own, begin, end);
  });

  for (int64_t row = 0; row < rows; ++row) {
    Head& imitator = own_head ? student : logits;
    const Softmax p = log_softmax(logits, row, classes, 1.0);
    const double inverse = static_cast<double>(in.inverse_temperature);
    const Softmax ps = log_softmax(imitator, row, classes, inverse);
    Softmax pt;
    if (teaches) pt = log_softmax(teacher, row, classes, inverse);
    const int64_t taught = teaches ? first_largest(teacher, row, classes) : 0;
    double loss = 0.0, mass = 0.0;
    std::vector<double> goal(static_cast<size_t>(classes));
    for (int64_t i = 0; i < classes; ++i) {
      const bool is_label = in.labels && in.labels[row * in.label_stride] == i;
      const double given = in.labels ? static_cast<double>(is_label) : target.values.at(row, i);
      double& t = goal[static_cast<size_t>(i)];
      t = given * (1.0 - in.smoothing) + in.smoothing / static_cast<double>(classes);
      mass += t;
      loss -= in.truth * t * p.log[static_cast<size_t>(i)];
      const double pt_i = in.kind == Imitation::soft ? pt.of(i) : static_cast<double>(i == taught);
      if (!teaches || pt_i == 0.0) continue;
      const double log_pt = in.kind == Imitation::soft ? pt.log[static_cast<size_t>(i)] : 0.0;
      loss += in.imitation * pt_i * (log_pt - ps.log[static_cast<size_t>(i)]);
    }
    // Targets here are any numbers, of either sign: terms are large where the loss is not.
    const double scale = static_cast<double>(classes);
    near("loss", row, found[static_cast<size_t>(row)] / scale, loss / scale, deit::Scalar::f32);
    for (int64_t i = 0; i < classes; ++i) {
      const double pt_i = !teaches                         ? 0.0
                          : in.kind == Imitation::soft     ? pt.of(i)
                                                           : static_cast<double>(i == taught);
      const double ds = teaches ? in.imitation * inverse * (ps.of(i) - pt_i) : 0.0;
      double dx = in.truth * (p.of(i) * mass - goal[static_cast<size_t>(i)]);
      if (!own_head) dx += ds;
      const int64_t at = row * classes + i;
      if (gradient.dlogits) near("dlogits", at, dlogits.at(at), 0.5 * dx, dlogits.type);
      if (gradient.dstudent) near("dstudent", at, dstudent.at(at), 0.5 * ds, dstudent.type);
    }
  }
}

}  // namespace fuzz
