"""Which implementation of an operator runs, and the reasons the others do not.

Every public operator validates its inputs into the schema's argument tuple and calls `run`.
`impl="auto"` takes the first measured implementation that can run and otherwise the reference;
a named one that cannot run raises with each reason. `explain` returns the reasons for all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deit.kernels.engine import native, ops

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

# Device -> operator -> implementations, the fastest measured one first. A device is "cpu" or a
# CUDA architecture ("sm_90"). An architecture is entered here with its evidence, a row under
# bench/results/ from that GPU: until then "auto" uses the reference there and says so.
MEASURED: dict[str, dict[str, tuple[str, ...]]] = {
    # Speed over PyTorch 2.15 (F.layer_norm; F.scaled_dot_product_attention and its copy of the
    # heads), CPU time of one thread, interleaved, median of 40 to 60, Zen 5 with AVX-512, B = 8,
    # N = 197, D = 192 / 384 / 768. attention: fp32 2.3 / 2.1 / 2.1, bf16 2.5 / 2.4 / 2.3, fp16
    # 5.1 / 4.8 / 4.7. layer_norm: fp32 2.2 / 2.2 / 1.9, bf16 1.6 / 1.8 / 2.0, fp16 2.0 / 1.7 / 2.1.
    # add_layer_norm: fp32 2.1 / 1.9 / 1.6, bf16 1.8 / 2.0 / 2.2, fp16 1.9 / 2.0 / 2.3. At B = 64
    # and D = 768 fp32 LayerNorm is bound by memory: 1.0. linear and gelu_mlp: docs/performance.md;
    # bf16, over PyTorch, N = 197 to 788: qkv 1.0 to 1.2, proj 1.1 to 1.5, MLP 1.06 to 1.13.
    "cpu": {
        "layer_norm": ("cpu",),
        "add_layer_norm": ("cpu",),
        "attention": ("cpu",),
        "linear": ("cpu",),
        "gelu_mlp": ("cpu",),
        "patch_embed": ("cpu",),
        # Forward and backward against autograd of the same: docs/performance.md, CPU training.
        "add_layer_norm_bwd": ("cpu",),
        "attention_bwd": ("cpu",),
        "gelu_mlp_bwd": ("cpu",),
        "layer_norm_bwd": ("cpu",),
        "linear_bwd": ("cpu",),
        "vit_block": ("cpu",),
        "int8_linear": ("cpu",),
        "int8_gelu_mlp": ("cpu",),
        "int8_vit_block": ("cpu",),
    },
    # An H100, torch 2.11, bf16, 256 images of 197 tokens, D = 192 / 384 / 768, inputs rotated past
    # L2, CUDA graphs. The products were held to fp64 at up to 50,432 rows and repeated bit for bit,
    # the norms held to it at up to 1,154 rows and not repeated; gelu_mlp at D = 384 was timed with
    # an earlier epilogue, 302 to PyTorch's 351. Microseconds, PyTorch's and these kernels':
    # layer_norm 66 / 77 / 105, 21 / 37 / 61; add_layer_norm 87 / 117
    # / 182, 33 / 62 / 112; gelu_mlp's products, D = 768, fc1 566, 476, fc2 with its residual 376,
    # 340; D = 192 100, 69 and 59, 49. Not here: attention (cuDNN's is faster, 163 to our 174), and
    # linear (without an epilogue cuBLAS's is, 272 to 314).
    "sm_90": {
        "layer_norm": ("cuda",),
        "add_layer_norm": ("cuda",),
        "gelu_mlp": ("cuda",),
    },
}


@dataclass(frozen=True)
class Scope:
    """The calls that an architecture's measurements speak for: x of these dtypes and widths, and
    of at least so many rows. Others get the reference."""

    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...]
    rows: int

    def excludes(self, x: Tensor) -> str:
        """Why x is not among them; "" where it is."""
        width = x.shape[-1]
        if x.dtype not in self.dtypes:
            return f"dtype {x.dtype} was not measured here"
        if width not in self.widths:
            return f"a width of {width} was not measured here"
        if x.numel() < self.rows * width:
            return f"fewer than {self.rows} rows were not measured here"
        return ""


# Architecture -> the scope of what MEASURED says of it; without one, any call. 32,768 rows are the
# least of the power of two that 50,432 are in.
SCOPES = {"sm_90": Scope((torch.bfloat16,), (192, 384, 768), 32768)}

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Operator:
    """What dispatch knows of one public operator.

    plain: the reference, in plain PyTorch, by the schema's arguments.
    prepare: the public arguments -> the schema's arguments, validated and cast for autocast.
    limits:  (implementation, *schema arguments) -> why that implementation cannot take them. The
        first argument's dtype is among those that kernels serve; so are the others' where
        `prepare` has them in that dtype or fp32, and where it does not `limits` asks `unserved`.
    train:   (implementation, *schema arguments) -> the output, differentiable by that
        implementation's own `_fwd` and `_bwd` kernels.
    constants: the schema arguments for which those kernels compute no gradient, by position.
    """

    name: str
    plain: Callable[..., Any]
    prepare: Callable[..., Arguments]
    limits: Callable[..., list[str]]
    train: Callable[..., Any] | None = None
    constants: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPERATORS[self.name] = self


OPERATORS: dict[str, Operator] = {}


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cached, and evaluated once by torch.compile instead of traced into.

    What `torch.compiler.assume_constant_result` does, without its import of torch._dynamo
    (which imports triton, and takes a second).
    """
    cached = functools.cache(function)

    def constant(*arguments: Any) -> Any:
        return cached(*arguments)

    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return functools.update_wrapper(constant, function)


def unserved(*arguments: Any) -> list[str]:
    """Why kernels cannot take these tensors' dtypes."""
    dtypes = (a.dtype for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
    return [f"dtype {d} (fp32, fp16 and bf16 are served)" for d in dtypes if d not in KERNEL_DTYPES]


def no_limits(implementation: str, *arguments: Any) -> list[str]:
    """For operators whose kernels take whatever the schema takes."""
    return []


def interpreter_limits(implementation: str, x: Tensor, *_: Any) -> list[str]:
    """For operators with a matrix product: Triton's interpreter gets bf16 `tl.dot` wrong."""
    if implementation == "triton" and x.dtype == torch.bfloat16 and not x.is_cuda:
        return ["Triton's interpreter computes bf16 matrix products wrongly (triton#11584)"]
    return []


def product_limits(implementation: str, x: Tensor, *weights: Tensor) -> list[str]:
    """For operators that are matrix products of x [..., K] and weights [M, K]."""
    if implementation != "cpu":
        return interpreter_limits(implementation, x)
    isa, dtype, found = _cpu_isa(), x.dtype, []
    if isa == "portable":
        found.append("no AVX2 here, and PyTorch's products are faster than the portable ones")
    if dtype == torch.float16:
        found.append("dtype torch.float16 (its products are for fp32 and bf16)")
    if dtype == torch.bfloat16 and isa != "avx512_bf16":
        found.append(f"bf16 products need AVX512-BF16, this processor has {isa}")
    if dtype == torch.bfloat16 and any(w.shape[-1] % 2 for w in weights):
        found.append("an odd depth, where bf16 products take pairs")
    for tensor in (x, *weights):  # a generator's set-up alone would double this
        if tensor.numel() == 0:
            found.append("an empty axis")
            break
    return found


@constant_when_traced
def _cpu_isa() -> str:
    return native.cpu_isa()


def run(operator: Operator, arguments: Arguments, impl: str) -> Any:
    """Execute `operator` on prepared `arguments` by the implementation that `impl` names."""
    return run_chosen(operator, arguments, choose(operator, arguments, impl))


def run_chosen(operator: Operator, arguments: Arguments, name: str) -> Any:
    """Execute `operator` on prepared `arguments` by `name`, which `choose` gave for them."""
    if name != "reference":
        if needs_gradient(arguments):
            assert operator.train is not None  # `reasons` has said so otherwise
            return operator.train(name, *arguments)
        return ops.COMPILED[name][operator.name](*arguments)
    if autocast_dtype(arguments[0]) is not None:
        # `prepare` has cast already; autocast inside would cast again, and LN to fp32 on CUDA.
        with torch.autocast(arguments[0].device.type, enabled=False):
            return operator.plain(*arguments)
    return operator.plain(*arguments)


def choose(operator: Operator, arguments: Arguments, impl: str) -> str:
    """The implementation that `impl` stands for on these arguments.

    Raises ValueError for an unknown name, and NotImplementedError with every reason where a
    named implementation cannot run.
    """
    if impl == "auto":
        training = needs_gradient(arguments)
        if left_to_pytorch(operator, arguments, training):
            return "reference"
        for candidate in _ready(operator.name, arguments[0].device, training):
            if not _refusals(operator, arguments, candidate, training):
                return candidate
        return "reference"
    if impl == "reference":
        return impl
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"impl: expected 'auto' or one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}"
        )
    why_not = reasons(operator, arguments, impl)
    if why_not:
        raise NotImplementedError(
            f"{operator.name}: impl={impl!r} cannot run here: " + "; ".join(why_not)
        )
    return impl


def reasons(operator: Operator, arguments: Arguments, implementation: str) -> list[str]:
    """Why `implementation` cannot run `operator` on `arguments`; empty where it can."""
    if implementation == "reference":
        return []
    device = arguments[0].device
    absent = environment(implementation, device.type, device.index)
    if operator.name not in ops.KERNELS[implementation]:
        absent = (*absent, f"it has no {operator.name} kernel")
    if absent:
        return list(absent)
    return _refusals(operator, arguments, implementation, needs_gradient(arguments))


def _refusals(
    operator: Operator, arguments: Arguments, implementation: str, training: bool
) -> list[str]:
    """Why kernels that are there cannot take these arguments."""
    found = []
    if torch._C._are_functorch_transforms_active():
        found.append("a torch.func transform is active and the kernel has no rule for it")
    if forward_ad._current_level >= 0 and has_tangent(arguments):  # asked first: 80 ns less
        found.append("an input has a forward-mode tangent and the kernel has no rule for it")
    if arguments[0].dtype not in KERNEL_DTYPES:
        found += unserved(arguments[0])
    if training:
        found += _training_reasons(operator, arguments, implementation)
    return found + operator.limits(implementation, *arguments)


def gradients(ctx: Any, backward: Callable[..., Any], places: Sequence[int]) -> list[Any]:
    """One gradient an input of an autograd.Function: those that autograd wants, None for others.

    backward: called with `wanted`, one bool for each of `places`, the inputs by position that it
        returns gradients of; not called where it would compute none of them.
    """
    found: list[Any] = [None] * len(ctx.needs_input_grad)
    wanted = [ctx.needs_input_grad[place] for place in places]
    if any(wanted):
        for place, gradient, is_wanted in zip(places, backward(wanted), wanted, strict=True):
            found[place] = gradient if is_wanted else None
    return found


def needs_gradient(arguments: Arguments) -> bool:
    """Whether autograd will want this call's gradients."""
    if torch.is_grad_enabled():
        for argument in arguments:  # a generator's set-up alone would double this
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def has_tangent(arguments: Arguments) -> bool:
    """Whether a forward-mode derivative (torch.autograd.forward_ad) is taken through this call."""
    if forward_ad._current_level < 0:
        return False
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


# Products whose gradients have fp32 kernels alone.
_TRAINS_IN_FP32 = frozenset({("cpu", "linear"), ("cpu", "gelu_mlp")})


def _training_reasons(operator: Operator, arguments: Arguments, implementation: str) -> list[str]:
    kernels = ops.KERNELS[implementation]
    if operator.train is None or f"{operator.name}_bwd" not in kernels:
        return ["an input requires grad and the kernel is forward-only"]
    if (implementation, operator.name) in _TRAINS_IN_FP32 and arguments[0].dtype != torch.float32:
        return [f"an input requires grad and the gradients are for fp32, not {arguments[0].dtype}"]
    return [
        f"{name} requires grad and the kernel has no gradient for it"
        for position, name in operator.constants.items()
        if isinstance(arguments[position], Tensor) and arguments[position].requires_grad
    ]


@constant_when_traced
def _ready(operator: str, device: torch.device, training: bool) -> tuple[str, ...]:
    """The implementations "auto" tries that have the kernel and can run on the device at all."""
    place = device.type, device.index
    return tuple(
        name
        for name in measured(f"{operator}_bwd" if training else operator, *place)
        if operator in ops.KERNELS[name] and not environment(name, *place)
    )


@constant_when_traced
def environment(implementation: str, device_type: str, index: int | None) -> tuple[str, ...]:
    """Why `implementation` cannot run at all on this device of this process."""
    if implementation == "cpu":
        if device_type != "cpu":
            return (f"it runs on CPU tensors, these are on {device_type}",)
        return native.why_not("cpu")
    if implementation == "cuda":
        if device_type != "cuda":
            return (f"it runs on CUDA tensors, these are on {device_type}",)
        return native.why_not("cuda")
    if importlib.util.find_spec("triton") is None:
        return ("the package triton is not installed",)
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device_type == "cpu" and not interpreted:
        return ("Triton runs CPU tensors only in its interpreter (TRITON_INTERPRET=1)",)
    if device_type not in ("cpu", "cuda"):
        return (f"it runs on CUDA tensors, these are on {device_type}",)
    if device_type == "cuda" and not interpreted:
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return (f"its kernels need compute capability 8.0, this GPU has {major}.{minor}",)
    return ()


@constant_when_traced
def measured(operator: str, device_type: str, index: int | None) -> tuple[str, ...]:
    """The implementations "auto" tries on a device, the fastest first; warns on an unproven GPU."""
    if device_type != "cuda":
        return MEASURED.get(device_type, {}).get(operator, ())
    major, minor = torch.cuda.get_device_capability(index)
    architecture = f"sm_{major}{minor}"
    if architecture not in MEASURED:
        _warn_unproven(architecture)
        return ()
    return MEASURED[architecture].get(operator, ())


# Calls in inference whose C++ kernels are slower than PyTorch's where AVX2 is all there is: on a
# Zen 3, fp32, two threads, x @ weight.T alone 0.92 (95 % interval 0.87 to 0.99) and 0.90 (0.86 to
# 0.96) of its speed at D = 192 and 768, the MLP at D = 768 0.94 (0.90 to 0.98).
_SLOWER_BY_AVX2: dict[str, Callable[..., bool]] = {
    "linear": lambda x, weight, bias, activation, residual, *_: (
        x.dtype == torch.float32 and activation is None and residual is None
    ),
    "gelu_mlp": lambda x, *_: x.dtype == torch.float32 and x.shape[-1] >= 768,
}


def left_to_pytorch(operator: Operator, arguments: Arguments, training: bool) -> str:
    """Why "auto" asks no kernel to serve this call; "" where it asks those that are measured."""
    x = arguments[0]
    if x.is_cuda:
        scope = _scope(x.device.index)
        return scope.excludes(x) if scope is not None else ""
    slower = None if training else _SLOWER_BY_AVX2.get(operator.name)
    if slower is not None and _cpu_isa() == "avx2" and slower(*arguments):
        return "its C++ kernel by AVX2 is slower"
    return ""


@constant_when_traced
def _scope(index: int | None) -> Scope | None:
    major, minor = torch.cuda.get_device_capability(index)
    return SCOPES.get(f"sm_{major}{minor}")


@functools.cache
def _warn_unproven(architecture: str) -> None:
    warnings.warn(
        f"deit.kernels: no kernel has been run and checked on {architecture} yet, so impl='auto' "
        "uses PyTorch there; impl='triton' runs the unproven kernels",
        stacklevel=2,
    )


def expected(operator: str, impl: str, device: torch.device) -> str:
    """What `impl` comes to on `device` for inference on inputs within every kernel's limits."""
    candidates = measured(operator, device.type, device.index) if impl == "auto" else (impl,)
    for name in candidates:
        if name == "reference" or (
            operator in ops.KERNELS[name] and not environment(name, device.type, device.index)
        ):
            return name
    return "reference" if impl == "auto" else f"{impl} (cannot run on {device.type})"


@dataclass(frozen=True)
class Explanation:
    """For one call: the implementation "auto" takes, and why each other one would not run.

    reasons: implementation -> why it cannot run; empty where it can.
    configurations: where Triton can run, what it would launch in inference, a line a kernel:
        the tile sizes, and on what evidence they were chosen.
    left: why "auto" leaves the call to the reference whatever could run; "" where it does not.
    """

    operator: str
    chosen: str
    reasons: dict[str, list[str]]
    configurations: tuple[str, ...] = ()
    left: str = ""

    def __str__(self) -> str:
        why = f" ({self.left})" if self.left else ""
        lines = [f"{self.operator}: auto runs {self.chosen}{why}"]
        for name, why_not in self.reasons.items():
            lines.append(f"  {name:<10} " + ("; ".join(why_not) or "can run"))
            if name == "triton":
                lines += [f"    {line}" for line in self.configurations]
        return "\n".join(lines)


def explain(operator: str, *inputs: Any, **options: Any) -> Explanation:
    """Say for every implementation of `operator` why it would or would not run on these inputs.

    Args:
        operator: its name.
        inputs, options: the public function's own: `explain("attention", qkv, 12)`.

    Returns:
        An Explanation; print it.

    Raises:
        ValueError: an unknown operator. Else what the operator itself raises for bad input.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}; got {operator!r}")
    options.pop("impl", None)
    known = OPERATORS[operator]
    arguments = known.prepare(*inputs, **options)
    why_not = {name: reasons(known, arguments, name) for name in IMPLEMENTATIONS}
    configurations: tuple[str, ...] = ()
    if not why_not["triton"]:
        choices = importlib.import_module("deit.kernels.device.choices")
        configurations = choices.explain(operator, arguments)
    chosen = choose(known, arguments, "auto")
    left = left_to_pytorch(known, arguments, needs_gradient(arguments))
    return Explanation(operator, chosen, why_not, configurations, left)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of matrix products on x's device; None where it is off."""
    if not torch._C._is_any_autocast_enabled():  # before the device's name, which takes 0.3 us
        return None
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has no autocast
        return torch.get_autocast_dtype(device_type)
    return None


def autocast(x: Tensor, *others: Tensor | None) -> Any:
    """The tensors as a matrix product under autocast would see them, in the same order."""
    tensors = (x, *others)
    dtype = autocast_dtype(x)
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in KERNEL_DTYPES else t for t in tensors
    )


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one: launches go to the current device's stream."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
