// Cross-entropy and the distillation losses on the CPU: checks, outputs, and the split over threads.
#include <string>
#include <tuple>
#include <vector>

#include "launch_training.h"

namespace deit {
namespace {

// The arguments as the kernels take them, and what keeps what they point to alive.
struct Losses {
  LossInputs in{};
  Tensor logits, target;
  Optional teacher, student;
};

Logits described(const char* name, Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(same_shape(tensor, like), name, ": expected the logits' shape");
  const Scalar type = scalar_of(name, tensor);
  return {rows_of(tensor), type};
}

void describe_target(Losses& losses) {
  LossInputs& in = losses.in;
  Tensor& target = losses.target;
  if (target.scalar_type() != ScalarType::Long) {
    in.probabilities = described("target", target, losses.logits);
    return;
  }
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == in.batch,
                  "target: expected ", in.batch, " class indices");
  in.labels = static_cast<const int64_t*>(target.const_data_ptr());
  in.label_stride = target.stride(0);
  for (int64_t row = 0; row < in.batch; ++row) {
    const int64_t label = in.labels[row * in.label_stride];
    STD_TORCH_CHECK(label >= 0 && label < in.classes, "target: expected classes in [0, ",
                    in.classes, "); got ", label, " in row ", row);
  }
}

Losses cross_entropy_of(Tensor logits, Tensor target, double label_smoothing) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0,
                  "logits: expected [B, C] with at least one class");
  Losses losses{{}, logits, target, std::nullopt, std::nullopt};
  LossInputs& in = losses.in;
  in.batch = logits.size(0);
  in.classes = logits.size(1);
  in.logits = described("logits", losses.logits, logits);
  in.smoothing = label_smoothing;
  in.truth = 1.0;
  in.inverse_temperature = 1.0f;
  describe_target(losses);
  return losses;
}

Losses distillation_of(Tensor logits, Tensor target, Tensor teacher, Optional student,
                       const std::string& kind, double alpha, double temperature,
                       double label_smoothing, const std::string& kl_reduction) {
  Losses losses = cross_entropy_of(logits, target, label_smoothing);
  LossInputs& in = losses.in;
  STD_TORCH_CHECK(kind == "hard" || kind == "soft", "kind: expected 'hard' or 'soft'; got ",
                  kind.c_str());
  const bool hard = kind == "hard";
  STD_TORCH_CHECK(!hard || in.classes <= 1 << 24,
                  "logits: expected at most 2**24 classes, whose numbers fp32 holds");
  losses.teacher = teacher;
  losses.student = student;
  in.teacher = described("teacher_logits", *losses.teacher, logits);
  if (student.has_value()) {
    in.student = described("distillation_logits", *losses.student, logits);
  }
  in.kind = hard ? Imitation::hard : Imitation::soft;
  in.truth = 1.0 - alpha;
  in.imitation = alpha;
  if (!hard) {
    in.inverse_temperature = static_cast<float>(1.0 / temperature);
    in.imitation *= temperature * temperature;
    if (kl_reduction == "numel") in.imitation /= static_cast<double>(in.classes);
  }
  return losses;
}

int64_t rows_a_thread(const LossInputs& in) {
  return std::max<int64_t>(1, kGrain / in.classes);
}

// (loss, statistics), of which there are `saved` numbers a row.
std::tuple<Tensor, Tensor> run(const Losses& losses, int64_t saved) {
  const LossInputs& in = losses.in;
  const Tensor& logits = losses.logits;
  Tensor loss = torch::stable::new_empty(logits, logits.sizes().slice(0, 0), ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(logits, {saved, in.batch}, ScalarType::Float);
  std::vector<double> rows(static_cast<size_t>(in.batch));
  LossArgs args{in, rows.data(), nullptr};
  if (saved > 0) args.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  const LossKernels& set = kernels().loss;
  over_threads(in.batch, rows_a_thread(in), set.workspace(in.classes),
               [&](float* workspace, int64_t begin, int64_t end) {
                 set.forward(args, workspace, begin, end);
               });
  double total = 0.0;
  for (const double row : rows) total += row;
  *static_cast<float*>(loss.mutable_data_ptr()) =
      static_cast<float>(total / static_cast<double>(in.batch));  // NaN for no rows
  return {loss, statistics};
}

// (dlogits, dstudent); empty where it is not wanted, and where there is no student.
std::tuple<Tensor, Tensor> run_gradient(const Losses& losses, const Tensor& dloss,
                                        const Tensor& statistics, int64_t saved, bool of_logits,
                                        bool of_student) {
  const LossInputs& in = losses.in;
  const Tensor& logits = losses.logits;
  of_student = of_student && losses.student.has_value();
  Tensor dlogits = of_logits ? torch::stable::new_empty(logits, logits.sizes()) : none(logits);
  const Tensor& student = losses.student.has_value() ? *losses.student : logits;
  Tensor dstudent = of_student ? torch::stable::new_empty(student, student.sizes()) : none(student);
  Held held[2];
  LossGradientArgs args{};
  args.in = in;
  args.scale = static_cast<double>(*parameter("dloss", dloss, 1, logits, held[0])) /
               static_cast<double>(in.batch);
  args.statistics = parameter("statistics", statistics, saved * in.batch, logits, held[1]);
  args.dlogits = of_logits ? dlogits.mutable_data_ptr() : nullptr;
  args.dstudent = of_student ? dstudent.mutable_data_ptr() : nullptr;
  if (!of_logits && !of_student) return {dlogits, dstudent};
  const LossKernels& set = kernels().loss;
  over_threads(in.batch, rows_a_thread(in), set.workspace(in.classes),
               [&](float* workspace, int64_t begin, int64_t end) {
                 set.gradient(args, workspace, begin, end);
               });
  return {dlogits, dstudent};
}

Tensor cross_entropy(Tensor logits, Tensor target, double label_smoothing) {
  return std::get<0>(run(cross_entropy_of(logits, target, label_smoothing), 0));
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(Tensor logits, Tensor target,
                                             double label_smoothing) {
  return run(cross_entropy_of(logits, target, label_smoothing), kCrossEntropyStatistics);
}

Tensor cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor statistics,
                         double label_smoothing) {
  const Losses losses = cross_entropy_of(logits, target, label_smoothing);
  return std::get<0>(
      run_gradient(losses, dloss, statistics, kCrossEntropyStatistics, true, false));
}

Tensor distillation_loss(Tensor logits, Tensor target, Tensor teacher, Optional student,
                         std::string kind, double alpha, double temperature,
                         double label_smoothing, std::string kl_reduction) {
  const Losses losses = distillation_of(logits, target, teacher, student, kind, alpha, temperature,
                                        label_smoothing, kl_reduction);
  return std::get<0>(run(losses, 0));
}

std::tuple<Tensor, Tensor> distillation_loss_fwd(Tensor logits, Tensor target, Tensor teacher,
                                                 Optional student, std::string kind, double alpha,
                                                 double temperature, double label_smoothing,
                                                 std::string kl_reduction) {
  const Losses losses = distillation_of(logits, target, teacher, student, kind, alpha, temperature,
                                        label_smoothing, kl_reduction);
  return run(losses, kDistillationStatistics);
}

std::tuple<Tensor, Tensor> distillation_loss_bwd(
    Tensor dloss, Tensor logits, Tensor target, Tensor teacher, Optional student,
    Tensor statistics, std::string kind, double alpha, double temperature, double label_smoothing,
    std::string kl_reduction, std::optional<std::vector<bool>> wanted) {
  const Wanted wants(wanted, 2);
  const Losses losses = distillation_of(logits, target, teacher, student, kind, alpha, temperature,
                                        label_smoothing, kl_reduction);
  return run_gradient(losses, dloss, statistics, kDistillationStatistics, wants[0], wants[1]);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cpu, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&deit::cross_entropy));
  m.impl("cross_entropy_fwd", TORCH_BOX(&deit::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&deit::cross_entropy_bwd));
  m.impl("distillation_loss", TORCH_BOX(&deit::distillation_loss));
  m.impl("distillation_loss_fwd", TORCH_BOX(&deit::distillation_loss_fwd));
  m.impl("distillation_loss_bwd", TORCH_BOX(&deit::distillation_loss_bwd));
}
