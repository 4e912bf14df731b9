// Cross-entropy and the distillation losses (arXiv 2012.12877, eq. (2) and (3)), a row at a time.
// Included by kernels.cpp.
//
// All is measured from the row's largest logit m. With t' the smoothed target,
//
//     CE = log(sum exp(x - m)) sum(t') - sum(t' (x - m))
//
// so logits around 1000 lose nothing. A row of 1000 classes stays in the first-level cache between
// its passes. Sums over it are fp32 for four vectors and fp64 over these, and what comes of them is
// fp64: a loss is one number, which is rounded once.

constexpr float kInfinity = __builtin_inff();

// The largest of a row, or 0 where that is -inf: -inf - 0 gives exp's 0, -inf - -inf would give
// NaN. A NaN is passed over; the sum of exponentials has it.
DEIT_INLINE float pivot_of(const float* x, int64_t n) {
  Vec most = broadcast(-kInfinity);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) most = max(load(x + i), most);
  float found = largest(most);
  for (; i < n; ++i) {
    if (x[i] > found) found = x[i];
  }
  return found == -kInfinity ? 0.0f : found;
}

// As torch.argmax: the first of the largest, and a NaN before all numbers.
DEIT_INLINE int64_t argmax_of(const float* x, int64_t n) {
  const Vec zero = broadcast(0.0f), one = broadcast(1.0f);
  Vec most = broadcast(-kInfinity), nans = zero;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec v = load(x + i);
    most = max(v, most);
    nans = nans + (v == v ? zero : one);
  }
  float found = largest(most);
  bool has_nan = sum(nans) > 0.0f;
  for (; i < n; ++i) {
    if (x[i] > found) found = x[i];
    has_nan = has_nan || x[i] != x[i];
  }
  for (i = 0; i < n; ++i) {
    if (has_nan ? x[i] != x[i] : x[i] == found) return i;
  }
  return 0;
}

// (x - pivot) / temperature; 0 in lanes that are not there.
DEIT_INLINE Vec from_pivot(const float* x, Vec pivot, Vec inverse_temperature, int lanes) {
  const Vec distance = (load_lanes(x, lanes) - pivot) * inverse_temperature;
  return lanes == kWidth ? distance : first(distance, lanes);
}

// totals[k] += the sum over the row of what `terms(i, lanes, term)` puts into term[k].
template <int N, class Terms>
DEIT_INLINE void add_over_row(int64_t n, double (&totals)[N], const Terms& terms) {
  constexpr int64_t kBlock = 4 * kWidth;  // with 16, d logits of 5000 classes missed the rule
  double lanes_of[N][kWidth] = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Vec part[N] = {};
    each_vector(n - begin < kBlock ? n - begin : kBlock, [&](int64_t i, int lanes)
                __attribute__((always_inline)) {
      Vec term[N];
      terms(begin + i, lanes, term);
      for (int k = 0; k < N; ++k) {
        part[k] = part[k] + (lanes == kWidth ? term[k] : first(term[k], lanes));
      }
    });
    for (int k = 0; k < N; ++k) {
      float lanes[kWidth];
      store(lanes, part[k]);
      for (int lane = 0; lane < kWidth; ++lane) {
        lanes_of[k][lane] += static_cast<double>(lanes[lane]);
      }
    }
  }
  for (int k = 0; k < N; ++k) {
    for (int lane = 0; lane < kWidth; ++lane) totals[k] += lanes_of[k][lane];
  }
}

// One row of logits in fp32: in place where it is fp32 already, else widened into `scratch`.
DEIT_INLINE const float* row_of(const Logits& logits, int64_t row, int64_t n, float* scratch) {
  if (logits.rows.data == nullptr) return nullptr;
  const int64_t at = row_offset(logits.rows, row);
  if (logits.type == Scalar::f16) {
    return widen_row(static_cast<const F16*>(logits.rows.data) + at, n, scratch);
  }
  if (logits.type == Scalar::bf16) {
    return widen_row(static_cast<const BF16*>(logits.rows.data) + at, n, scratch);
  }
  return static_cast<const float*>(logits.rows.data) + at;
}

DEIT_INLINE int64_t padded_classes(int64_t classes) { return (classes + 15) / 16 * 16; }

constexpr int kReadRows = 4, kGradientRows = 2;  // of a range's workspace

size_t loss_workspace(int64_t classes) {
  return static_cast<size_t>((kReadRows + kGradientRows) * padded_classes(classes));
}

// What a row reads.
struct LossRow {
  const float *logits, *teacher, *student, *probabilities;
  int64_t label;  // -1 with probabilities
};

DEIT_INLINE LossRow loss_row(const LossInputs& in, int64_t row, float* workspace) {
  const int64_t n = in.classes, step = padded_classes(n);
  LossRow found{row_of(in.logits, row, n, workspace),
                row_of(in.teacher, row, n, workspace + step),
                row_of(in.student, row, n, workspace + 2 * step),
                row_of(in.probabilities, row, n, workspace + 3 * step),
                in.labels ? in.labels[row * in.label_stride] : -1};
  if (found.student == nullptr) found.student = found.logits;
  return found;
}

struct Truth {
  float pivot;
  double total, mass, loss;  // sums of exp(x - pivot) and of t'; the cross-entropy
};

DEIT_INLINE Truth truth_of(const LossInputs& in, const LossRow& row) {
  const float* x = row.logits;
  const float pivot = pivot_of(x, in.classes);
  const Vec center = broadcast(pivot), one = broadcast(1.0f);
  const double kept = 1.0 - in.smoothing, spread = in.smoothing / static_cast<double>(in.classes);
  if (row.probabilities) {
    const Vec share = broadcast(static_cast<float>(kept));
    const Vec least = broadcast(static_cast<float>(spread));
    double sums[3] = {};
    add_over_row(in.classes, sums, [&](int64_t i, int lanes, Vec (&term)[3])
                 __attribute__((always_inline)) {
      const Vec distance = from_pivot(x + i, center, one, lanes);
      const Vec t = fma(load_lanes(row.probabilities + i, lanes), share, least);
      term[0] = exp_nonpositive(distance), term[1] = t, term[2] = t * distance;
    });
    return {pivot, sums[0], sums[1], __builtin_log(sums[0]) * sums[1] - sums[2]};
  }
  double sums[2] = {};
  add_over_row(in.classes, sums, [&](int64_t i, int lanes, Vec (&term)[2])
               __attribute__((always_inline)) {
    const Vec distance = from_pivot(x + i, center, one, lanes);
    term[0] = exp_nonpositive(distance), term[1] = distance;
  });
  double dot = kept * (static_cast<double>(x[row.label]) - static_cast<double>(pivot));
  if (in.smoothing > 0.0) dot += spread * sums[1];  // else a masked class, -inf, counts nothing
  return {pivot, sums[0], 1.0, __builtin_log(sums[0]) - dot};
}

struct Imitated {
  float pivot;
  double total;
  float teacher;  // its label for `hard`, else its pivot
  double teacher_total, loss;
};

DEIT_INLINE Imitated hard_imitation(const LossInputs& in, const LossRow& row, const Truth& truth) {
  float pivot = truth.pivot;
  double totals[1] = {truth.total};
  if (row.student != row.logits) {
    pivot = pivot_of(row.student, in.classes);
    totals[0] = 0.0;
    const Vec center = broadcast(pivot), one = broadcast(1.0f);
    add_over_row(in.classes, totals, [&](int64_t i, int lanes, Vec (&term)[1])
                 __attribute__((always_inline)) {
      term[0] = exp_nonpositive(from_pivot(row.student + i, center, one, lanes));
    });
  }
  const int64_t label = argmax_of(row.teacher, in.classes);
  const double distance = static_cast<double>(row.student[label]) - static_cast<double>(pivot);
  return {pivot, totals[0], static_cast<float>(label), 1.0, __builtin_log(totals[0]) - distance};
}

// sum(pt (log pt - log ps)) of the tempered softmaxes pt of the teacher and ps of the student.
DEIT_INLINE Imitated soft_imitation(const LossInputs& in, const LossRow& row) {
  const float pivot = pivot_of(row.student, in.classes);
  const float teacher_pivot = pivot_of(row.teacher, in.classes);
  const Vec center = broadcast(pivot), teacher_center = broadcast(teacher_pivot);
  const Vec inverse = broadcast(in.inverse_temperature);
  double sums[3] = {};
  add_over_row(in.classes, sums, [&](int64_t i, int lanes, Vec (&term)[3])
               __attribute__((always_inline)) {
    const Vec s = from_pivot(row.student + i, center, inverse, lanes);
    const Vec t = from_pivot(row.teacher + i, teacher_center, inverse, lanes);
    const Vec e = exp_nonpositive(t);
    term[0] = exp_nonpositive(s), term[1] = e, term[2] = e * (t - s);
  });
  const double loss = sums[2] / sums[1] - __builtin_log(sums[1]) + __builtin_log(sums[0]);
  return {pivot, sums[0], teacher_pivot, sums[1], loss};
}

void losses(const LossArgs& args, float* workspace, int64_t begin, int64_t end) {
  const LossInputs& in = args.in;
  for (int64_t i = begin; i < end; ++i) {
    const LossRow row = loss_row(in, i, workspace);
    const Truth truth = truth_of(in, row);
    Imitated imitated{};
    double loss = in.truth * truth.loss;
    if (in.kind != Imitation::none) {
      imitated = in.kind == Imitation::hard ? hard_imitation(in, row, truth)
                                            : soft_imitation(in, row);
      loss += in.imitation * imitated.loss;
    }
    args.losses[i] = loss;
    if (args.statistics == nullptr) continue;
    float* at = args.statistics + i;
    at[0] = truth.pivot;
    at[in.batch] = static_cast<float>(truth.total);
    at[2 * in.batch] = static_cast<float>(truth.mass / truth.total);
    if (in.kind == Imitation::none) continue;
    at[3 * in.batch] = imitated.pivot;
    at[4 * in.batch] = static_cast<float>(1.0 / imitated.total);
    at[5 * in.batch] = imitated.teacher;
    at[6 * in.batch] = static_cast<float>(1.0 / imitated.teacher_total);
  }
}

// out = sum(t') softmax(x) - t'
DEIT_INLINE void truth_gradient(const LossInputs& in, const LossRow& row, const float* saved,
                                float* out) {
  const Vec pivot = broadcast(saved[0]), one = broadcast(1.0f);
  const Vec share = broadcast(saved[2 * in.batch]);
  const float kept = static_cast<float>(1.0 - in.smoothing);
  const Vec least = broadcast(static_cast<float>(in.smoothing / static_cast<double>(in.classes)));
  each_vector(in.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vec t = least;
    if (row.probabilities) t = fma(load_lanes(row.probabilities + i, lanes), broadcast(kept), t);
    const Vec e = exp_nonpositive(from_pivot(row.logits + i, pivot, one, lanes));
    store_lanes(out + i, e * share - t, lanes);
  });
  if (!row.probabilities) out[row.label] -= kept;
}

// out = ps - pt, with pt one-hot for `hard`
DEIT_INLINE void imitation_gradient(const LossInputs& in, const LossRow& row, const float* saved,
                                    float* out) {
  const float teacher = saved[5 * in.batch];
  const Vec inverse = broadcast(in.inverse_temperature);
  const Vec pivot = broadcast(saved[3 * in.batch]), teacher_pivot = broadcast(teacher);
  const Vec share = broadcast(saved[4 * in.batch]);
  const Vec teacher_share = broadcast(saved[6 * in.batch]);
  each_vector(in.classes, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vec p = exp_nonpositive(from_pivot(row.student + i, pivot, inverse, lanes)) * share;
    if (in.kind == Imitation::soft) {
      const Vec t = from_pivot(row.teacher + i, teacher_pivot, inverse, lanes);
      p = p - exp_nonpositive(t) * teacher_share;
    }
    store_lanes(out + i, p, lanes);
  });
  // A label that is none of the classes is of statistics that no forward wrote.
  const bool known = teacher >= 0.0f && teacher < static_cast<float>(in.classes);
  if (in.kind == Imitation::hard && known) out[static_cast<int64_t>(teacher)] -= 1.0f;
}

// Row `row` of `data` = scale * of, and more_scale * more where there is more.
template <class T>
DEIT_INLINE void store_sum(void* data, int64_t row, int64_t n, const float* of, float scale,
                           const float* more, float more_scale) {
  T* out = static_cast<T*>(data) + row * n;
  each_vector(n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vec g = load_lanes(of + i, lanes) * broadcast(scale);
    if (more) g = fma(load_lanes(more + i, lanes), broadcast(more_scale), g);
    store_lanes(out + i, g, lanes);
  });
}

void store_sum_as(Scalar type, void* data, int64_t row, int64_t n, const float* of, float scale,
                  const float* more, float more_scale) {
  switch (type) {
    case Scalar::f32: return store_sum<float>(data, row, n, of, scale, more, more_scale);
    case Scalar::f16: return store_sum<F16>(data, row, n, of, scale, more, more_scale);
    case Scalar::bf16: return store_sum<BF16>(data, row, n, of, scale, more, more_scale);
  }
}

void loss_gradients(const LossGradientArgs& args, float* workspace, int64_t begin, int64_t end) {
  const LossInputs& in = args.in;
  const int64_t n = in.classes, step = padded_classes(n);
  float* of_truth = workspace + kReadRows * step;
  float* of_teacher = of_truth + step;
  const bool one_head = in.student.rows.data == nullptr;  // which then learns from both
  const bool imitates = in.kind != Imitation::none && (one_head ? args.dlogits : args.dstudent);
  const double weight = in.imitation * static_cast<double>(in.inverse_temperature);
  const float truth_scale = static_cast<float>(args.scale * in.truth);
  const float teacher_scale = static_cast<float>(args.scale * weight);
  for (int64_t i = begin; i < end; ++i) {
    const LossRow row = loss_row(in, i, workspace);
    const float* saved = args.statistics + i;
    if (imitates) imitation_gradient(in, row, saved, of_teacher);
    if (args.dlogits) {
      truth_gradient(in, row, saved, of_truth);
      store_sum_as(in.logits.type, args.dlogits, i, n, of_truth, truth_scale,
                   imitates && one_head ? of_teacher : nullptr, teacher_scale);
    }
    if (args.dstudent) {
      store_sum_as(in.student.type, args.dstudent, i, n, of_teacher, teacher_scale, nullptr, 0.0f);
    }
  }
}

constexpr LossKernels loss_kernels = {loss_workspace, losses, loss_gradients};
