// out = residual + keep * gamma * act(x @ weight.T + bias) by product.h's kernel: any GPU of compute
// capability 8.0 or later, any type, any strides of whole rows.
#include "linear.h"

#include "product.h"

namespace deit {
namespace {

template <class T>
const char* launch(const LinearArgs& args, void* stream) {
  const auto matrix = [](const void* data, int64_t stride, int64_t rows, int64_t columns) {
    return Matrix<T>{static_cast<const T*>(data), stride, static_cast<int>(rows),
                     static_cast<int>(columns), chunks_fit<T>(data, stride, columns)};
  };
  const Matrix<T> x = matrix(args.x, args.x_stride, args.rows, args.depth);
  const Matrix<T> weight = matrix(args.weight, args.weight_stride, args.width, args.depth);
  Epilogue epilogue{args.bias, args.gamma, args.keep, args.residual, args.out,
                    args.residual_stride, args.rows_per_sample, 0, 0, args.activation, false};
  epilogue.aligned = epilogue_fits<T>(epilogue, args.width);
  if constexpr (sizeof(T) == 2) {
    // The large tile reads each number half as often, where there are enough of them for all
    // multiprocessors, twice over.
    const int64_t tiles = (args.rows + LargeTile::rows - 1) / LargeTile::rows *
                          ((args.width + LargeTile::width - 1) / LargeTile::width);
    if (tiles >= 2 * gpu::processors()) {
      return launch_tiles<T, LargeTile>(x, weight, epilogue, stream);
    }
  }
  return launch_tiles<T, SmallTile>(x, weight, epilogue, stream);
}

}  // namespace

const char* launch_linear(const LinearArgs& args, Scalar type, void* stream) {
  if (type == Scalar::f16) return launch<f16>(args, stream);
  if (type == Scalar::bf16) return launch<bf16>(args, stream);
  return launch<float>(args, stream);
}

}  // namespace deit
