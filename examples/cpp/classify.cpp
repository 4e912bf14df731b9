// Names what photographs show, without Python: a DeiT on the fused operators, through libtorch.
//
//   deit export WEIGHTS --format aoti --out deit.pt2    # and it names LIBRARY: .../_cpu.abi3.so
//   make -C examples/cpp
//   magick photo.jpg -auto-orient photo.ppm             # or djpeg, which turns none upright
//   examples/cpp/classify deit.pt2 LIBRARY photo.ppm ...
//
// A package of `deit export --device cuda` goes with the library _cuda.abi3.so. The program is the
// same.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_upsample_bicubic2d_aa.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Metadata = std::unordered_map<std::string, std::string>;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// The kernels register themselves as the library is loaded. The operators' schemas, which Python
// would define, it defines when asked.
void load_operators(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw std::runtime_error(std::string("LIBRARY: ") + dlerror());
  for (const char* name : {"deit_cpu_define_schemas", "deit_cuda_define_schemas"}) {
    if (void* found = dlsym(library, name)) {
      require(reinterpret_cast<int (*)()>(found)() == 0, path + ": its schemas are refused");
      return;
    }
  }
  require(false, path + ": expected deit/kernels/_cpu.abi3.so or _cuda.abi3.so");
}

const std::string& said(const Metadata& metadata, const char* name) {
  const auto found = metadata.find(name);
  require(found != metadata.end(), std::string("the package does not say ") + name +
                                       ": expected one of `deit export --format aoti`");
  return found->second;
}

// One number a channel.
at::Tensor by_channel(const std::string& text) {
  std::istringstream stream(text);
  std::vector<double> numbers;
  for (double number; stream >> number;) numbers.push_back(number);
  return at::tensor(numbers, at::kFloat).view({1, -1, 1, 1});
}

// Binary PPM of 8 bits -> [1, 3, height, width], uint8.
at::Tensor read_photograph(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  require(file.good(), path + ": cannot be opened");
  std::string kind;
  int64_t width = 0, height = 0, most = 0;
  const auto next = [&file](auto& value) {
    while ((file >> std::ws).peek() == '#') {  // a comment, to the end of its line
      file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    }
    file >> value;
  };
  next(kind), next(width), next(height), next(most);
  file.get();  // the one blank before the pixels
  require(file && kind == "P6" && most == 255, path + ": expected a binary PPM (P6) of 8 bits");
  constexpr int64_t kSide = 1 << 16;
  require(0 < width && width <= kSide && 0 < height && height <= kSide,
          path + ": expected 1 to 65536 pixels a side");
  at::Tensor pixels = at::empty({1, height, width, 3}, at::kByte);
  file.read(static_cast<char*>(pixels.mutable_data_ptr()), pixels.numel());
  require(file.gcount() == pixels.numel(), path + ": ends before its last pixel");
  return pixels.permute({0, 3, 1, 2});
}

// As deit.data.images does, with fast=True: a bicubic resize of the short side, a centre crop, and
// the channels' mean and std.
at::Tensor prepare(const at::Tensor& pixels, const Metadata& metadata) {
  const int64_t size = std::stoll(said(metadata, "image_size"));
  const int64_t side = std::stoll(said(metadata, "short_side"));
  const int64_t height = pixels.size(2), width = pixels.size(3);
  const int64_t least = std::min(height, width), longer = side * std::max(height, width) / least;
  require(longer * side <= 1 << 28, "too elongated a photograph");
  const bool upright = height > width;
  const int64_t tall = upright ? longer : side, wide = upright ? side : longer;
  const at::Tensor resized = at::_upsample_bicubic2d_aa(pixels, {tall, wide}, false);
  const auto middle = [size](int64_t all) {
    return static_cast<int64_t>(std::nearbyint(static_cast<double>(all - size) / 2));
  };
  const at::Tensor crop = resized.narrow(2, middle(tall), size).narrow(3, middle(wide), size);
  const at::Tensor scaled = crop.to(at::kFloat) * (1.0 / 255);
  return (scaled - by_channel(said(metadata, "mean"))) / by_channel(said(metadata, "std"));
}

void print(const char* photograph, const at::Tensor& logits,
           const std::vector<std::string>& names) {
  require(logits.numel() == static_cast<int64_t>(names.size()), "the package names other classes");
  require(at::isfinite(logits).all().item<bool>(), "the network's output is not finite");
  const at::Tensor probabilities = logits.softmax(0);
  const auto [best, classes] = probabilities.topk(std::min<int64_t>(5, logits.numel()));
  std::printf("%s\n", photograph);
  for (int64_t rank = 0; rank < best.numel(); ++rank) {
    const int64_t index = classes[rank].item<int64_t>();
    std::printf("  %d  %6.2f %%  logit %9.6f  %s\n", static_cast<int>(rank + 1),
                100 * best[rank].item<double>(), logits[index].item<double>(),
                names[static_cast<size_t>(index)].c_str());
  }
}

void classify(const std::string& package, const std::vector<const char*>& photographs) {
  const c10::InferenceMode no_gradients;
  require(std::ifstream(package).good(), package + ": cannot be opened");
  torch::inductor::AOTIModelPackageLoader network(package);
  const Metadata metadata = network.get_metadata();
  std::vector<std::string> names;
  std::istringstream lines(said(metadata, "classes"));
  for (std::string name; std::getline(lines, name);) names.push_back(name);
  std::vector<at::Tensor> images;
  for (const char* path : photographs) images.push_back(prepare(read_photograph(path), metadata));
  const at::Tensor batch = at::cat(images).to(at::Device(said(metadata, "AOTI_DEVICE_KEY")));
  const at::Tensor logits = network.run({batch.contiguous()})[0].to(at::kCPU, at::kFloat);
  for (size_t i = 0; i < photographs.size(); ++i) {
    print(photographs[i], logits[static_cast<int64_t>(i)], names);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: %s PACKAGE LIBRARY PHOTOGRAPH.ppm ...\n", arguments[0]);
    return 2;
  }
  try {
    load_operators(arguments[2]);
    classify(arguments[1], {arguments + 3, arguments + count});
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "classify: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "classify: %s\n", error.what());
    return 1;
  }
  return 0;
}
