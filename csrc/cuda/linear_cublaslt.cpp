// `linear` and `gelu_mlp` by cuBLASLt: bias and residual within its product, which PyTorch has no
// operator for, and for the rest of the epilogue one kernel more (linear_finish.cu). That kernel
// reads and writes the whole product, which in DeiT-B's fc1 takes longer than what Hopper's own
// kernel is behind, so on Hopper that one makes an MLP's first product.
#include <algorithm>
#include <compare>
#include <map>
#include <mutex>

#include "cublaslt.h"
#include "linear_call.h"

namespace deit {
namespace {

namespace lt = cublaslt;

// As much as NVIDIA recommends for Hopper. What an algorithm asks of it comes from torch's
// allocator, for the call alone, so that streams never share it.
constexpr uint64_t kWorkspace = 32 << 20;
// Each is 200 bytes. Beyond that many shapes, which only a program of changing batches has, all
// are asked for anew.
constexpr size_t kShapes = 4096;

// All that the choice of an algorithm depends on, and nothing that differs from call to call.
struct Shape {
  int device, type, type_out;
  int64_t rows, width, depth, x_stride, weight_stride, residual_stride;
  uint32_t epilogue, alignments[4];  // of weight, x, residual and out, which are A, B, C and D
  auto operator<=>(const Shape&) const = default;
};

struct Choice {
  lt::Algo algo;
  size_t workspace;
};

const lt::Api& api() {
  const char* why_not = nullptr;
  const lt::Api* const found = lt::find(&why_not);
  STD_TORCH_CHECK(found != nullptr, "cuBLASLt: ", why_not ? why_not : "");
  return *found;
}

void succeeded(const char* call, lt::Status status, const Shape& shape) {
  STD_TORCH_CHECK(status == lt::kSuccess, "cublasLt", call, ": ", api().GetStatusName(status), " (",
                  status, ") for ", shape.rows, " x ", shape.depth, " by ", shape.width, " x ",
                  shape.depth);
}

// What the library makes and takes back.
template <class T>
struct Owned {
  explicit Owned(lt::Status (*destroy)(T*)) : destroy(destroy) {}
  ~Owned() {
    if (of != nullptr) destroy(of);
  }
  Owned(const Owned&) = delete;
  T* of = nullptr;
  lt::Status (*destroy)(T*);
};

// The library's default says 256 bytes. torch's allocator keeps that on a GPU, and 64 on a CPU.
#ifdef DEIT_EMULATED
constexpr uintptr_t kAlignment = 64;
#else
constexpr uintptr_t kAlignment = 256;
#endif

uint32_t alignment(const void* pointer) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(pointer) | kAlignment;
  return static_cast<uint32_t>(bits & ~(bits - 1));
}

int type_of(Scalar type) {
  if (type == Scalar::f16) return lt::kReal16F;
  return type == Scalar::bf16 ? lt::kReal16BF : lt::kReal32F;
}

// Row-major [rows, columns] is the library's column-major [columns, rows]. So out = x weightT + C
// is to it outT = weight xT + CT, with weight, stored as its own transpose, to be transposed back.
struct Product {
  const Shape& shape;
  const lt::Api& call = api();
  Owned<lt::MatmulDesc> desc{call.MatmulDescDestroy};
  Owned<lt::MatrixLayout> a{call.MatrixLayoutDestroy}, b{call.MatrixLayoutDestroy},
      c{call.MatrixLayoutDestroy}, d{call.MatrixLayoutDestroy};

  Product(const Shape& of, const void* bias) : shape(of) {
    succeeded("MatmulDescCreate", call.MatmulDescCreate(&desc.of, lt::kCompute32F, lt::kReal32F),
              shape);
    const int32_t transposed = lt::kOpT;
    set(lt::kDescTransA, transposed);
    set(lt::kDescEpilogue, shape.epilogue);
    if (bias != nullptr) set(lt::kDescBiasPointer, bias);
    lay_out(a, shape.type, shape.depth, shape.width, shape.weight_stride);
    lay_out(b, shape.type, shape.depth, shape.rows, shape.x_stride);
    lay_out(c, shape.type_out, shape.width, shape.rows, shape.residual_stride);
    lay_out(d, shape.type_out, shape.width, shape.rows, shape.width);
  }

  template <class T>
  void set(int attribute, const T& value) {
    succeeded("MatmulDescSetAttribute",
              call.MatmulDescSetAttribute(desc.of, attribute, &value, sizeof value), shape);
  }

  void lay_out(Owned<lt::MatrixLayout>& layout, int type, int64_t rows, int64_t columns,
               int64_t leading) {
    const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
    succeeded("MatrixLayoutCreate",
              call.MatrixLayoutCreate(&layout.of, type, size(rows), size(columns), leading), shape);
  }

  // The library's first choice.
  Choice choose(lt::Context* context) {
    Owned<lt::Preference> wants(call.MatmulPreferenceDestroy);
    succeeded("MatmulPreferenceCreate", call.MatmulPreferenceCreate(&wants.of), shape);
    const auto prefer = [&](int attribute, const auto& value) {
      succeeded("MatmulPreferenceSetAttribute",
                call.MatmulPreferenceSetAttribute(wants.of, attribute, &value, sizeof value), shape);
    };
    prefer(lt::kPrefMaxWorkspaceBytes, kWorkspace);
    // Parts of a sum are added in fp32 and in one order: not in the output's type, which would
    // round each, nor in place.
    prefer(lt::kPrefReductionSchemeMask, lt::kReductionComputeType);
    for (int i = 0; i < 4; ++i) prefer(lt::kPrefMinAlignmentBytes + i, shape.alignments[i]);
    lt::Heuristic found{};
    int count = 0;
    const lt::Status status = call.MatmulAlgoGetHeuristic(context, desc.of, a.of, b.of, c.of, d.of,
                                                          wants.of, 1, &found, &count);
    succeeded("MatmulAlgoGetHeuristic", status, shape);
    const uint32_t least = *std::min_element(shape.alignments, shape.alignments + 4);
    STD_TORCH_CHECK(count > 0, "cublasLtMatmulAlgoGetHeuristic: no algorithm for ", shape.rows,
                    " x ", shape.depth, " by ", shape.width, " x ", shape.depth,
                    ", addresses at multiples of ", least, " bytes");
    succeeded("MatmulAlgoGetHeuristic", found.state, shape);
    return {found.algo, found.workspace_size};
  }
};

// A device's context, which lives as long as the process, and what was chosen for its shapes.
struct Chosen {
  std::mutex mutex;
  std::map<int, lt::Context*> contexts;
  std::map<Shape, Choice> choices;
};

Chosen& chosen() {
  static Chosen* const all = new Chosen;  // no destructor runs when torch's libraries are gone
  return *all;
}

std::pair<lt::Context*, Choice> choice_for(Product& product) {
  Chosen& all = chosen();
  const Shape& shape = product.shape;
  const std::lock_guard lock(all.mutex);
  lt::Context*& context = all.contexts[shape.device];
  if (context == nullptr) succeeded("Create", product.call.Create(&context), shape);
  const auto known = all.choices.find(shape);
  if (known != all.choices.end()) return {context, known->second};
  const Choice choice = product.choose(context);
  if (all.choices.size() >= kShapes) all.choices.clear();
  all.choices.emplace(shape, choice);
  return {context, choice};
}

// out = x weightT + bias, activated where the library's own activation is to be used, or with the
// residual added.
void multiply(const LinearCall& linear, const Call& on, bool gelu_tanh, bool adds) {
  const LinearArgs& args = linear.args;
  const Scalar type_out = args.residual.fp32 ? Scalar::f32 : linear.type;
  const void* const added = adds ? args.residual.data : args.out;
  uint32_t epilogue = (args.bias != nullptr ? lt::kEpilogueBias : 0) |
                      (gelu_tanh ? lt::kEpilogueGelu : 0);
  if (epilogue == 0) epilogue = lt::kEpilogueDefault;
  const Shape shape{on.device, type_of(linear.type), type_of(type_out), args.rows, args.width,
                    args.depth, args.x_stride, args.weight_stride,
                    adds ? args.residual_stride : args.width, epilogue,
                    {alignment(args.weight), alignment(args.x), alignment(added),
                     alignment(args.out)}};
  Product product(shape, args.bias);
  const auto [context, choice] = choice_for(product);
  Tensor workspace;
  void* memory = nullptr;
  if (choice.workspace > 0) {
    workspace = torch::stable::new_empty(linear.x, {static_cast<int64_t>(choice.workspace)},
                                         ScalarType::Byte);
    memory = workspace.mutable_data_ptr();
  }
  const float alpha = 1.0f, beta = adds ? 1.0f : 0.0f;
  const lt::Status status = product.call.Matmul(
      context, product.desc.of, &alpha, args.weight, product.a.of, args.x, product.b.of, &beta,
      added, product.c.of, args.out, product.d.of, &choice.algo, memory, choice.workspace,
      on.stream);
  succeeded("Matmul", status, shape);
}

Tensor run_cublaslt(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    Activation activation, const std::optional<Tensor>& residual,
                    const std::optional<Tensor>& gamma, const std::optional<Tensor>& keep,
                    bool ours_on_hopper = false) {
  LinearCall linear(x, weight, bias, activation, residual, gamma, keep);
  if (linear.empty()) return linear.out;
  LinearArgs& args = linear.args;
  STD_TORCH_CHECK(args.depth > 0, "x: expected channels to sum over; got none");
  const Call on(x);
  if (ours_on_hopper && queued_on_hopper(linear, on)) return linear.out;
  linear.place(Wants::rows_apart);
  if (args.bias != nullptr) {
    if (args.residual.fp32 && linear.type != Scalar::f32) {  // it is read in the output's type
      Tensor wide = torch::stable::new_empty(linear.bias, {args.width}, ScalarType::Float);
      torch::stable::copy_(wide, linear.bias);
      linear.bias = wide;
    }
    args.bias = aligned(linear.bias, 16);
  }
  const bool plain = args.gamma.data == nullptr && args.keep.data == nullptr;
  const bool adds = plain && activation == Activation::none && args.residual.data != nullptr;
  // The library's GELU is by tanh, and how exact that is nobody says. bf16's rounding hides 2^-11,
  // the error of the instruction for it; fp16's would not.
  const bool own = plain && activation == Activation::gelu_tanh && args.residual.data == nullptr &&
                   linear.type == Scalar::bf16;
  multiply(linear, on, own, adds);
  const bool done = adds || own || (plain && activation == Activation::none &&
                                    args.residual.data == nullptr);
  if (!done) queued("linear", launch_finish(args, linear.type, on.stream));
  return linear.out;
}

Tensor linear_cublaslt(Tensor x, Tensor weight, std::optional<Tensor> bias,
                       std::optional<std::string> activation, std::optional<Tensor> residual,
                       std::optional<Tensor> gamma, std::optional<Tensor> keep) {
  return run_cublaslt(x, weight, bias, activation_of(activation), residual, gamma, keep);
}

Tensor gelu_mlp_cublaslt(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2,
                         std::optional<Tensor> b2, std::optional<Tensor> residual,
                         std::optional<Tensor> gamma, std::optional<Tensor> keep,
                         std::optional<std::string> activation) {
  const Activation kind = activation.has_value() ? activation_of(activation) : Activation::gelu;
  const Tensor hidden = run_cublaslt(x, w1, b1, kind, {}, {}, {}, true);
  return run_cublaslt(hidden, w2, b2, Activation::none, residual, gamma, keep);
}

}  // namespace
}  // namespace deit

STABLE_TORCH_LIBRARY_IMPL(deit_cublaslt, DEIT_DEVICE, m) {
  m.impl("linear", TORCH_BOX(&deit::linear_cublaslt));
  m.impl("gelu_mlp", TORCH_BOX(&deit::gelu_mlp_cublaslt));
}
