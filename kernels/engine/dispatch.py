"""Which implementation of an operator runs, and the reasons the others do not.

Every public operator validates its inputs into the schema's argument tuple and calls `run`.
`impl="auto"` takes the first measured implementation that can run and otherwise the reference;
a named one that cannot run raises with each reason. `explain` returns the reasons for all.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deit.kernels.engine import autocast, limits, measured, native, registry
from deit.kernels.engine.derivatives import has_tangent, needs_gradient
from deit.kernels.engine.operator import OPERATORS, PREPARE, Arguments, Operator
from deit.kernels.engine.tracing import constant_when_traced

IMPLEMENTATIONS = ("reference", *registry.NAMESPACES)


def run(operator: Operator, arguments: Arguments, impl: str) -> Any:
    """Execute `operator` on prepared `arguments` by the implementation that `impl` names."""
    if impl is PREPARE:
        return operator, arguments
    return run_chosen(operator, arguments, choose(operator, arguments, impl))


def run_chosen(operator: Operator, arguments: Arguments, name: str) -> Any:
    """Execute `operator` on prepared `arguments` by `name`, which `choose` gave for them."""
    if name != "reference":
        if needs_gradient(arguments):
            assert operator.train is not None  # `reasons` has said so otherwise
            return operator.train(name, *arguments)
        return registry.COMPILED[name][operator.name](*arguments)
    if autocast.dtype_of(arguments[0]) is not None:
        # `prepare` has cast already; autocast inside would cast again, and LN to fp32 on CUDA.
        with torch.autocast(arguments[0].device.type, enabled=False):
            return operator.reference(*arguments)
    return operator.reference(*arguments)


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
    if operator.name not in registry.KERNELS[implementation]:
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
    if arguments[0].dtype not in limits.KERNEL_DTYPES:
        found += limits.unserved(arguments[0])
    if training:
        found += _training_reasons(operator, arguments, implementation)
    return found + operator.limits(implementation, *arguments)


def _training_reasons(operator: Operator, arguments: Arguments, implementation: str) -> list[str]:
    kernels = registry.KERNELS[implementation]
    if operator.train is None or f"{operator.name}_bwd" not in kernels:
        return ["an input requires grad and the kernel is forward-only"]
    if implementation in operator.trains_in_fp32 and arguments[0].dtype != torch.float32:
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
        for name in measured.implementations(f"{operator}_bwd" if training else operator, *place)
        if operator in registry.KERNELS[name] and not environment(name, *place)
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


def left_to_pytorch(operator: Operator, arguments: Arguments, training: bool) -> str:
    """Why "auto" asks no kernel to serve this call; "" where it asks those that are measured."""
    x = arguments[0]
    if x.is_cuda:
        scope = measured.scope(x.device.index)
        return scope.excludes(x) if scope is not None else ""
    slower = None if training else operator.slower_by_avx2
    if slower is not None and limits.cpu_isa() == "avx2" and slower(*arguments):
        return "its C++ kernel by AVX2 is slower"
    return ""


def expected(operator: str, impl: str, device: torch.device) -> str:
    """What `impl` comes to on `device` for inference on inputs within every kernel's limits."""
    candidates: tuple[str, ...] = (impl,)
    if impl == "auto":
        candidates = measured.implementations(operator, device.type, device.index)
    for name in candidates:
        if name == "reference" or (
            operator in registry.KERNELS[name] and not environment(name, device.type, device.index)
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
    known, arguments = OPERATORS[operator].served_by(*inputs, **options)
    why_not = {name: reasons(known, arguments, name) for name in IMPLEMENTATIONS}
    configurations: tuple[str, ...] = ()
    if not why_not["triton"]:
        tiles = importlib.import_module(f"{known.public.__module__}.tiles")  # in its folder
        choices = tiles.CHOICES[known.name](*arguments)
        configurations = tuple(f"{config}: {evidence}" for config, evidence in choices)
    chosen = choose(known, arguments, "auto")
    left = left_to_pytorch(known, arguments, needs_gradient(arguments))
    return Explanation(known.name, chosen, why_not, configurations, left)
