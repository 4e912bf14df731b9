// Images to tokens: product.h's kernel on rows that are patches, gathered where they lie, and a small
// kernel for the tokens before them.
#include "patch_embed.h"

#include "product.h"

namespace deit {
namespace {

// The patches of images as the rows of a matrix: a patch's channels one after another, each row by
// row, as the weight has them.
template <class T>
struct Patches {
  const T* data;
  int64_t strides[4];
  int high, wide, across, per_image;
  int rows, columns;
  bool aligned;  // every chunk lies in one row of a patch, at a multiple of 16 bytes

  __device__ __forceinline__ const T* at(int column) const {
    const int channel = column / (high * wide), within = column % (high * wide);
    return data + channel * strides[1] + within / wide * strides[2] + within % wide * strides[3];
  }

  __device__ __forceinline__ void bring(char* to, int row, int column) const {
    const bool inside = row < rows && column < columns;
    const int patch = row % per_image;
    const int64_t corner = row / per_image * strides[0] + patch / across * high * strides[2] +
                           patch % across * wide * strides[3];
    if (aligned) {
      gpu::copy_async(to, inside ? at(column) + corner : data, inside ? 16 : 0);
      return;
    }
    Pack<T, kChunk<T>> pack;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      pack.lanes[i] =
          inside && column + i < columns ? at(column + i)[corner] : gpu::narrow<T>(0.0f);
    }
    *reinterpret_cast<Pack<T, kChunk<T>>*>(to) = pack;
  }
};

constexpr int kThreads = 128;

// The tokens before each image's patches: prefix + pos_embed.
template <class T>
struct Prefix {
  const T *prefix, *pos_embed;
  T* out;
  int64_t per_image, numbers, count;  // of the output; of the prefix; of all prefixes
};

template <class T>
__global__ void __launch_bounds__(kThreads) prefix_kernel(const __grid_constant__ Prefix<T> args) {
  const int64_t i = static_cast<int64_t>(gpu::block()) * kThreads + gpu::thread();
  if (i >= args.count) return;
  const int64_t image = i / args.numbers, at = i % args.numbers;
  const float sum = gpu::widen(args.prefix[at]) + gpu::widen(args.pos_embed[at]);
  args.out[image * args.per_image + at] = gpu::narrow<T>(sum);
}

template <class T>
const char* launch(const PatchEmbedArgs& args, void* stream) {
  const int64_t patches = args.down * args.across, tokens = args.before + patches;
  const int64_t depth = args.channels * args.high * args.wide;
  if (args.before > 0) {
    const int64_t numbers = args.before * args.width;
    const Prefix<T> prefix{static_cast<const T*>(args.prefix),
                           static_cast<const T*>(args.pos_embed),
                           static_cast<T*>(args.out),
                           tokens * args.width,
                           numbers,
                           args.batch * numbers};
    const int64_t blocks = (prefix.count + kThreads - 1) / kThreads;
    const char* error = gpu::launch(prefix_kernel<T>, blocks, kThreads, 0, stream, prefix);
    if (error != nullptr || patches == 0) return error;
  }
  if (patches == 0) return nullptr;
  bool aligned = args.strides[3] == 1 && chunks_fit<T>(args.images, 0, args.wide);
  for (int i = 0; i < 3; ++i) aligned = aligned && args.strides[i] % kChunk<T> == 0;
  const Patches<T> x{static_cast<const T*>(args.images),
                     {args.strides[0], args.strides[1], args.strides[2], args.strides[3]},
                     static_cast<int>(args.high),
                     static_cast<int>(args.wide),
                     static_cast<int>(args.across),
                     static_cast<int>(patches),
                     static_cast<int>(args.batch * patches),
                     static_cast<int>(depth),
                     aligned};
  const Matrix<T> weight{static_cast<const T*>(args.weight), depth, static_cast<int>(args.width),
                         static_cast<int>(depth), chunks_fit<T>(args.weight, depth, depth)};
  Epilogue epilogue{};
  epilogue.bias = args.bias;
  epilogue.residual = {args.pos_embed, false};
  epilogue.residual_stride = args.width;
  epilogue.out = args.out;
  epilogue.period = static_cast<int>(patches);
  epilogue.before = static_cast<int>(args.before);
  epilogue.aligned = epilogue_fits<T>(epilogue, args.width);
  return launch_tiles<T, SmallTile>(x, weight, epilogue, stream);
}

}  // namespace

const char* launch_patch_embed(const PatchEmbedArgs& args, Scalar type, void* stream) {
  if (type == Scalar::f16) return launch<f16>(args, stream);
  if (type == Scalar::bf16) return launch<bf16>(args, stream);
  return launch<float>(args, stream);
}

}  // namespace deit
