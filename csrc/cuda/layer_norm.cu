// LayerNorm (arXiv 1607.06450) of rows, alone or after a residual addition.
//
// One warp owns a row and keeps it in registers as fp32: one read, one write, and a two-pass
// variance that no large mean can spoil (csrc/cpu/layer_norm.inl says why deviations are summed
// again). Vectors are 16 bytes of x. Rows too long for the largest instance, of a length that is
// no whole number of vectors, or not aligned to 16 bytes go to `long_row_kernel`.
#include "layer_norm.h"

#include "device.h"

namespace deit {
namespace {

constexpr int kWarpsPerBlock = 4;  // rows of one block
constexpr int kThreads = kWarp * kWarpsPerBlock;

template <class X, int kCount>
__device__ __forceinline__ void load_parameter(const Values& from, int64_t at, float (&to)[kCount]) {
  if (from.fp32) {
    load(static_cast<const float*>(from.data) + at, to);
  } else {
    load(static_cast<const X*>(from.data) + at, to);
  }
}

// Xor shuffles: every lane ends with the same sum, added in the same order each time.
__device__ __forceinline__ float warp_sum(float a) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) a += gpu::shuffle_xor(a, lane);
  return a;
}

__device__ __forceinline__ int64_t row_offset(const Rows& rows, int64_t row) {
  if (rows.dims == 1) return row * rows.strides[0];
  int64_t offset = 0;
#pragma unroll
  for (int d = kMaxLeadingDims - 1; d > 0; --d) {
    if (d >= rows.dims) continue;
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return rows.dims ? offset + row * rows.strides[0] : 0;
}

// A row's pointers, and its elements as the norm sees them.
template <class X, class R>
struct Row {
  const X* x;
  const R* residual;  // null for a plain LayerNorm
  X* out;
  R* sum;
  float keep;

  __device__ __forceinline__ Row(const LayerNormArgs& args, int64_t row)
      : x(static_cast<const X*>(args.x.data) + row_offset(args.x, row)),
        residual(nullptr),
        out(static_cast<X*>(args.out) + row * args.channels),
        sum(nullptr),
        keep(1.0f) {
    if (args.residual.data == nullptr) return;
    residual = static_cast<const R*>(args.residual.data) + row_offset(args.residual, row);
    sum = static_cast<R*>(args.sum) + row * args.channels;
    if (args.keep.data == nullptr) return;
    float value[1];
    load_parameter<X>(args.keep, row / args.rows_per_sample, value);
    keep = value[0];
  }

  // Elements at .. at + kCount of residual + keep * gamma * x in fp32.
  template <int kCount>
  __device__ __forceinline__ void read(const LayerNormArgs& args, int64_t at,
                                       float (&values)[kCount]) const {
    load(x + at, values);
    if (residual == nullptr) return;
    float factor[kCount], base[kCount];
    load(residual + at, base);
    if (args.gamma.data) load_parameter<X>(args.gamma, at, factor);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float y = values[i] * keep;
      if (args.gamma.data) y *= factor[i];
      values[i] = base[i] + y;
    }
  }

  template <int kCount>
  __device__ __forceinline__ void write(const LayerNormArgs& args, int64_t at, float shift,
                                        float rstd, const float (&deviations)[kCount]) const {
    float y[kCount], factor[kCount];
    load_parameter<X>(args.weight, at, factor);
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = (deviations[i] - shift) * rstd * factor[i];
    if (args.bias.data) {
      load_parameter<X>(args.bias, at, factor);
#pragma unroll
      for (int i = 0; i < kCount; ++i) y[i] += factor[i];
    }
    store(y, out + at);
  }
};

__device__ __forceinline__ float rstd_of(float mean_square, float shift, float eps) {
  const float variance = mean_square - shift * shift;
  return 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps);  // NaN stays NaN
}

// A lane holds kVectors vectors of kCount elements, a warp's stride apart.
template <class X, class R, int kCount, int kVectors>
__global__ void __launch_bounds__(kThreads)
    layer_norm_kernel(const __grid_constant__ LayerNormArgs args) {
  const int lane = gpu::thread() % kWarp;
  const int64_t index = static_cast<int64_t>(gpu::block()) * kWarpsPerBlock + gpu::thread() / kWarp;
  if (index >= args.rows) return;  // a whole warp leaves together: the shuffles stay full
  const Row<X, R> row(args, index);
  const int channels = static_cast<int>(args.channels);
  float values[kVectors][kCount];
  float total = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = (v * kWarp + lane) * kCount;
    if (at >= channels) continue;
    row.read(args, at, values[v]);
    if (row.residual) store(values[v], row.sum + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) total += values[v][i];
  }
  const float count = static_cast<float>(channels);
  const float mean = warp_sum(total) / count;
  float shift = 0.0f, square = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if ((v * kWarp + lane) * kCount >= channels) continue;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[v][i] -= mean;
      shift += values[v][i];
      square += values[v][i] * values[v][i];
    }
  }
  shift = warp_sum(shift) / count;
  const float rstd = rstd_of(warp_sum(square) / count, shift, args.eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = (v * kWarp + lane) * kCount;
    if (at < channels) row.write(args, at, shift, rstd, values[v]);
  }
}

// Any length, any alignment: one element a lane and step, three passes over memory.
template <class X, class R>
__global__ void __launch_bounds__(kThreads)
    long_row_kernel(const __grid_constant__ LayerNormArgs args) {
  const int lane = gpu::thread() % kWarp;
  const int64_t index = static_cast<int64_t>(gpu::block()) * kWarpsPerBlock + gpu::thread() / kWarp;
  if (index >= args.rows) return;
  const Row<X, R> row(args, index);
  float value[1];
  float total = 0.0f;
  for (int64_t at = lane; at < args.channels; at += kWarp) {
    row.read(args, at, value);
    if (row.residual) store(value, row.sum + at);
    total += value[0];
  }
  const float count = static_cast<float>(args.channels);
  const float mean = warp_sum(total) / count;
  float shift = 0.0f, square = 0.0f;
  for (int64_t at = lane; at < args.channels; at += kWarp) {
    row.read(args, at, value);
    const float deviation = value[0] - mean;
    shift += deviation;
    square += deviation * deviation;
  }
  shift = warp_sum(shift) / count;
  const float rstd = rstd_of(warp_sum(square) / count, shift, args.eps);
  for (int64_t at = lane; at < args.channels; at += kWarp) {
    row.read(args, at, value);
    value[0] -= mean;
    row.write(args, at, shift, rstd, value);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool aligned(const Rows& rows, int64_t bytes) {
  for (int d = 0; d < rows.dims; ++d) {
    if (rows.strides[d] * bytes % 16 != 0) return false;
  }
  return aligned(rows.data);
}

template <class X, class R>
bool vectors_fit(const LayerNormArgs& args) {
  constexpr int64_t kCount = 16 / sizeof(X);
  return args.channels % kCount == 0 && aligned(args.x, sizeof(X)) && aligned(args.out) &&
         aligned(args.residual, sizeof(R)) && aligned(args.sum) && aligned(args.weight.data) &&
         aligned(args.bias.data) && aligned(args.gamma.data);
}

template <class X, class R>
const char* launch(const LayerNormArgs& args, void* stream) {
  constexpr int kCount = 16 / sizeof(X);
  const int64_t blocks = (args.rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const int64_t vectors = (args.channels / kCount + kWarp - 1) / kWarp;
  if (vectors > 8 || !vectors_fit<X, R>(args)) {
    return gpu::launch(long_row_kernel<X, R>, blocks, kThreads, 0, stream, args);
  }
  // DeiT's widths fill 1, 2, 3 vectors in half precision (192, 384, 768) and 2, 3, 6 in fp32.
  auto kernel = vectors == 1   ? layer_norm_kernel<X, R, kCount, 1>
                : vectors == 2 ? layer_norm_kernel<X, R, kCount, 2>
                : vectors == 3 ? layer_norm_kernel<X, R, kCount, 3>
                : vectors == 4 ? layer_norm_kernel<X, R, kCount, 4>
                : vectors <= 6 ? layer_norm_kernel<X, R, kCount, 6>
                               : layer_norm_kernel<X, R, kCount, 8>;
  return gpu::launch(kernel, blocks, kThreads, 0, stream, args);
}

template <class X>
const char* launch_residual(const LayerNormArgs& args, bool fp32_residual, void* stream) {
  return fp32_residual ? launch<X, float>(args, stream) : launch<X, X>(args, stream);
}

}  // namespace

const char* launch_layer_norm(const LayerNormArgs& args, Scalar x_type, Scalar residual_type,
                              void* stream) {
  const bool fp32_residual = residual_type == Scalar::f32;
  if (x_type == Scalar::f16) return launch_residual<f16>(args, fp32_residual, stream);
  if (x_type == Scalar::bf16) return launch_residual<bf16>(args, fp32_residual, stream);
  return launch<float, float>(args, stream);
}

}  // namespace deit
