// What follows a product that another library has written: out = residual + keep * gamma * act(out),
// read and written once. A thread has eight columns of a row, which product.h's `finish` makes.
#include "linear.h"
#include "product.h"

namespace deit {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Epilogue epilogue, int rows, int width) {
  const int across = (width + 7) / 8;  // threads of a row
  // Of all threads the block's first is counted in 64 bits, and the others from its row on in 32.
  const int64_t first = static_cast<int64_t>(gpu::block()) * kThreads;
  const int at = static_cast<int>(first % across) + gpu::thread();
  const int64_t row = first / across + at / across;
  const int column = at % across * 8;
  if (row >= rows) return;
  float y[8];
  load_values<T>({epilogue.out, epilogue.residual.fp32}, row * width + column, epilogue.aligned,
                 width - column, y);
  finish<T>(epilogue, static_cast<int>(row), column, width, y);
}

template <class T>
const char* launch(const LinearArgs& args, void* stream) {
  Epilogue epilogue{nullptr, args.gamma, args.keep, args.residual, args.out,
                    args.residual_stride, args.rows_per_sample, 0, 0, args.activation, false};
  epilogue.aligned = epilogue_fits<T>(epilogue, args.width);
  const int64_t threads = args.rows * ((args.width + 7) / 8);
  return gpu::launch(finish_kernel<T>, (threads + kThreads - 1) / kThreads, kThreads, 0, stream,
                     epilogue, static_cast<int>(args.rows), static_cast<int>(args.width));
}

}  // namespace

const char* launch_finish(const LinearArgs& args, Scalar type, void* stream) {
  if (type == Scalar::f16) return launch<f16>(args, stream);
  if (type == Scalar::bf16) return launch<bf16>(args, stream);
  return launch<float>(args, stream);
}

}  // namespace deit
