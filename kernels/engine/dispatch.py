"""Which implementation of an operator runs, and the reasons the others do not.

Every public operator validates its inputs into the schema's argument tuple and calls `run`.
`impl="auto"` takes the first implementation that was measured to be faster than PyTorch's and can
run, and otherwise the reference; a named one that cannot run raises with each reason. `explain`
returns the reasons for all.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deit.kernels.engine import autocast, limits, native, problems, registry, verdicts
from deit.kernels.engine.derivatives import has_tangent, needs_gradient
from deit.kernels.engine.operator import OPERATORS, PREPARE, Arguments, Operator
from deit.kernels.engine.problems import Problem, Sizes
from deit.kernels.engine.tracing import constant_when_traced
from deit.kernels.engine.verdicts import Basis, Refused, Timed

IMPLEMENTATIONS = ("reference", *registry.NAMESPACES)


def run(operator: Operator, arguments: Arguments, impl: str) -> Any:
    """Execute `operator` on prepared `arguments` by the implementation that `impl` names."""
    if impl is PREPARE:
        return operator, arguments
    # A kept call had no reason not to run, nor has one like it; asking for them takes 1.4 us.
    if impl == "triton" and _recorded is None and forward_ad._current_level < 0:
        outputs = None if needs_gradient(arguments) else _again(operator, arguments)
        if outputs is not None:
            return outputs
    return run_chosen(operator, arguments, choose(operator, arguments, impl))


def run_chosen(operator: Operator, arguments: Arguments, name: str) -> Any:
    """Execute `operator` on prepared `arguments` by `name`, which `choose` gave for them."""
    if name != "reference":
        if needs_gradient(arguments):
            assert operator.train is not None  # `reasons` has said so otherwise
            return operator.train(name, *arguments)
        outputs = None if name != "triton" else _again(operator, arguments)
        if outputs is not None:
            return outputs
        return registry.COMPILED[name][operator.name](*arguments)
    if autocast.dtype_of(arguments[0]) is not None:
        # `prepare` has cast already; autocast inside would cast again, and LN to fp32 on CUDA.
        with torch.autocast(arguments[0].device.type, enabled=False):
            return operator.reference(*arguments)
    return operator.reference(*arguments)


def _again(operator: Operator, arguments: Arguments) -> Any:
    """What a kept launch returns for a call of Triton's without gradients; None where none does.

    It is not traced: a graph must name the operator.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    again = registry.AGAIN.get(operator.name)
    return None if again is None else again(arguments)


def choose(operator: Operator, arguments: Arguments, impl: str) -> str:
    """The implementation that `impl` stands for on these arguments.

    Raises ValueError for an unknown name, and NotImplementedError with every reason where a
    named implementation cannot run.
    """
    if _recorded is not None:
        _recorded[Problem.of(operator, arguments)] = None
    if impl == "auto":
        training = needs_gradient(arguments)
        for candidate in _candidates(operator, arguments, training):
            if not _refusals(operator, arguments, candidate, training, served=True):
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


_recorded: dict[Problem, None] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Problem]]:
    """Note every call of an operator within, by any implementation; the list is filled at its end.

    Each call once, in the order of the first. The tensors may be on any device, meta too.
    """
    global _recorded
    outer, _recorded = _recorded, {}
    found: list[Problem] = []
    try:
        yield found
    finally:
        found += _recorded
        _recorded = outer


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
    operator: Operator,
    arguments: Arguments,
    implementation: str,
    training: bool,
    *,
    served: bool = False,
) -> list[str]:
    """Why kernels that are there cannot take these arguments.

    served: the first one's dtype is known to be one that kernels serve; asking takes 0.1 us.
    """
    found = []
    if torch._C._are_functorch_transforms_active():
        found.append("a torch.func transform is active and the kernel has no rule for it")
    if forward_ad._current_level >= 0 and has_tangent(arguments):  # asked first: 80 ns less
        found.append("an input has a forward-mode tangent and the kernel has no rule for it")
    if not served and arguments[0].dtype not in limits.KERNEL_DTYPES:
        found += limits.unserved(arguments[0])
    if training:
        found += _training_reasons(operator, arguments, implementation)
    return found + operator.limits(implementation, *arguments)


def _training_reasons(operator: Operator, arguments: Arguments, implementation: str) -> list[str]:
    kernels = registry.KERNELS[implementation]
    if operator.train is None or f"{operator.name}_bwd" not in kernels:
        return ["an input requires grad and the kernel is forward-only"]
    return [
        f"{name} requires grad and the kernel has no gradient for it"
        for position, name in operator.constants.items()
        if isinstance(arguments[position], Tensor) and arguments[position].requires_grad
    ]


def _candidates(operator: Operator, arguments: Arguments, training: bool) -> tuple[str, ...]:
    """The implementations "auto" tries, the fastest first."""
    x, name = arguments[0], operator.name
    device, dtype = x.device, x.dtype
    found = _of_any(name, device, dtype, training)
    if found is not None:
        return found
    sizes = operator.sizes(*arguments)
    found = _of_sizes(name, device, dtype, training, sizes)
    if found is not None:
        return found
    return _of_rows(name, device, dtype, training, sizes, *_buckets(operator, x))


@verdicts.known
def _of_any(
    operator: str, device: torch.device, dtype: torch.dtype, training: bool
) -> tuple[str, ...] | None:
    """Those for calls of any size; None where the sizes decide. Kernels serve their dtype."""
    if dtype not in limits.KERNEL_DTYPES:
        return ()
    found = verdicts.of_any(operator, device, dtype, training)
    return None if found is None else _there(operator, device, found)


@verdicts.known
def _of_sizes(
    operator: str, device: torch.device, dtype: torch.dtype, training: bool, sizes: Sizes
) -> tuple[str, ...] | None:
    """Those for calls of these sizes; None where rows or tokens decide."""
    found = verdicts.of_sizes(operator, device, dtype, training, sizes)
    return None if found is None else _there(operator, device, found)


@verdicts.known
def _of_rows(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    sizes: Sizes,
    rows: int | None,
    tokens: int | None,
) -> tuple[str, ...]:
    """Those for calls of so many rows and tokens, in powers of two; None where these are open."""
    found = verdicts.of_rows(operator, device, dtype, training, sizes, rows, tokens)
    return _there(operator, device, found)


def _there(operator: str, device: torch.device, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the implementations that have the kernel and can run on the device at all."""
    return tuple(
        name
        for name in names
        if operator in registry.KERNELS[name] and not environment(name, device.type, device.index)
    )


def ahead(operator: Operator, x: Tensor, sizes: Callable[[], Sizes]) -> tuple[str, ...]:
    """The implementations "auto" tries in inference that are faster than the operator's rival, too.

    x: the first argument; sizes: `Operator.sizes` of the call, asked for where they decide.
    """
    name, device, dtype = operator.name, x.device, x.dtype
    found = _ahead_of_any(name, device, dtype)
    if found is not None:
        return found
    return _ahead_of_rows(name, device, dtype, sizes(), *_buckets(operator, x))


@verdicts.known
def _ahead_of_any(
    operator: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, ...] | None:
    found = verdicts.of_any(operator, device, dtype, False, verdicts.ahead)
    return None if found is None else _there(operator, device, found)


@verdicts.known
def _ahead_of_rows(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    rows: int | None,
    tokens: int | None,
) -> tuple[str, ...]:
    asked = operator, device, dtype, False, sizes, rows, tokens
    return _there(operator, device, verdicts.of_rows(*asked, verdicts.ahead))


def _buckets(operator: Operator, x: Tensor) -> tuple[int | None, int | None]:
    """Of rows and tokens; None where a trace leaves them open, and comparing would close them."""
    if torch.compiler.is_dynamo_compiling() or type(x.numel()) is not int:
        return None, None
    return problems.buckets(operator, x)


@constant_when_traced
def environment(implementation: str, device_type: str, index: int | None) -> tuple[str, ...]:
    """Why `implementation` cannot run at all on this device of this process."""
    if implementation == "cpu":
        if device_type != "cpu":
            return (f"it runs on CPU tensors, these are on {device_type}",)
        return native.why_not("cpu")
    if implementation in ("cuda", "cublaslt"):
        if device_type != "cuda":
            return (f"it runs on CUDA tensors, these are on {device_type}",)
        return native.why_not(implementation)
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


def expected(operator: str, impl: str, device: torch.device) -> str:
    """What `impl` comes to on `device` for inference on inputs within every kernel's limits.

    Where measurements at some sizes say one thing and at others another, a kernel.
    """
    candidates: tuple[str, ...] = (impl,)
    if impl == "auto":
        candidates = verdicts.any_of(operator, device)
    for name in candidates:
        if name == "reference" or (
            operator in registry.KERNELS[name] and not environment(name, device.type, device.index)
        ):
            return name
    return "reference" if impl == "auto" else f"{impl} (cannot run on {device.type})"


def basis_of(problem: Problem, device: torch.device) -> Basis:
    """What "auto" tries for such a call on a device, and on what evidence."""
    return verdicts.lookup(verdicts.table_of(device), problem.shape_class)


@dataclass(frozen=True)
class Explanation:
    """For one call: the implementation "auto" takes, and why each other one would not run.

    reasons: implementation -> why it cannot run; empty where it can.
    configurations: where Triton can run, what it would launch in inference, a line a kernel:
        the tile sizes, and on what evidence they were chosen.
    basis: on what evidence "auto" chose.
    """

    operator: str
    chosen: str
    reasons: dict[str, list[str]]
    configurations: tuple[str, ...] = ()
    basis: Basis | None = None

    def __str__(self) -> str:
        lines = [f"{self.operator}: auto runs {self.chosen} ({self.basis})"]
        if self.basis is not None and self.basis.verdict is None:
            lines[0] = lines[0][:-1] + f"; {verdicts.COMMAND} measures)"
        for name, why_not in self.reasons.items():
            lines.append(f"  {name:<10} " + ("; ".join(why_not) or "can run") + self._figures(name))
            if name == "triton":
                lines += [f"    {line}" for line in self.configurations]
        verdict = None if self.basis is None else self.basis.verdict
        if verdict is not None and verdict.rival is not None:
            rival = verdict.rival
            times = f"{rival.ratio:.2f} times that speed ({rival.low:.2f} to {rival.high:.2f})"
            lines.append(
                f"  {rival.name}: {rival.microseconds:.0f} us; {verdict.winner} has {times}"
            )
        return "\n".join(lines)

    def _figures(self, name: str) -> str:
        verdict = None if self.basis is None else self.basis.verdict
        found = None if verdict is None else verdict.candidates.get(name)
        if isinstance(found, Refused):
            return f", refused: {found.refused}"
        if not isinstance(found, Timed):
            return ""
        spread = f", {found.ratio:.2f} times PyTorch's speed ({found.low:.2f} to {found.high:.2f})"
        return f": {found.microseconds:.0f} us" + (spread if name != "reference" else "")


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
    chosen, problem = choose(known, arguments, "auto"), Problem.of(known, arguments)
    basis = basis_of(problem, arguments[0].device)
    return Explanation(known.name, chosen, why_not, configurations, basis)
