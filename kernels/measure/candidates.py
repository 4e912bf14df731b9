"""The ways to run one call on fresh data at its shapes, and whether each is right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deit.kernels.engine import dispatch, registry
from deit.kernels.engine.operator import OPERATORS, Arguments, Operator
from deit.kernels.engine.problems import Problem, TensorSpec
from deit.kernels.prove import oracle
from deit.kernels.prove.calls import Draw

REFERENCE, RIVAL = "reference", "rival"
DRAWS = 8  # over which errors are pooled, where the first draw misses the rule
SDPA = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")

Outputs = list[Tensor]
Way = Callable[[Arguments], Any]


def drawn(problem: Problem, device: torch.device, number: int) -> Arguments:
    """Arguments of a problem's shapes: activations normal, weights of unit gain.

    number: which of the independent draws this is.
    """
    known = registry.COMPILED["cpu"].get(problem.operator) or next(
        each[problem.operator] for each in registry.COMPILED.values() if problem.operator in each
    )
    names = [formal.name for formal in known._schema.arguments]
    found: list[Any] = []
    for seed, (name, given) in enumerate(zip(names, problem.arguments, strict=True)):
        if isinstance(given, TensorSpec):
            draw = Draw(dtype=given.dtype, device=device, number=number)
            tensor = _tensor(problem.operator, name, given, draw, seed, found)
            found.append(tensor.requires_grad_(given.gradient))
        else:
            found.append(given)
    return tuple(found)


def _tensor(
    operator: str, name: str, spec: TensorSpec, draw: Draw, seed: int, before: Sequence[Any]
) -> Tensor:
    shape = spec.shape
    if not spec.dtype.is_floating_point:  # labels
        generator = torch.Generator().manual_seed(seed + 100 * draw.number)
        classes = max(1, before[0].shape[-1])
        return torch.randint(classes, shape, generator=generator).to(draw.device, spec.dtype)
    if name == "target":
        return draw.random(*shape, seed=seed).float().softmax(-1).to(spec.dtype)
    if name == "row_stats":
        from deit.kernels.vit_block.reference import row_stats

        return row_stats(before[0])
    if name == "keep":  # every second sample dropped
        keep = torch.full(shape, 1.25, dtype=spec.dtype, device=draw.device)
        keep[1::2] = 0.0
        return keep
    if "weight" in name or name in ("w1", "w2"):
        make = draw.weight if len(shape) > 1 else draw.around_one
        return make(*shape, seed=seed)
    return draw.random(*shape, seed=seed)


class Ways:
    """The candidates for one problem on a device."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self.operator: Operator = OPERATORS[problem.operator]
        self._cotangents: dict[int, Tensor] = {}

    def names(self, arguments: Arguments) -> list[str]:
        """Those that can run it, PyTorch's operators first; the rival last."""
        with torch.set_grad_enabled(self.problem.training):
            able = [
                name
                for name in dispatch.IMPLEMENTATIONS
                if not (name == "triton" and self.device.type != "cuda")  # interpreted
                and not dispatch.reasons(self.operator, arguments, name)
            ]
        if self.operator.name == "attention" and self.device.type == "cuda":
            able += [f"sdpa {name.partition('_')[0].lower()}" for name in SDPA]
        return able + [RIVAL] * (self.operator.rival is not None)

    def chosen(self, name: str) -> bool:
        """Whether "auto" may come to run it: it is no other way, shown for comparison."""
        return name in dispatch.IMPLEMENTATIONS

    def run(self, name: str) -> Way:
        """(arguments) -> what the operator returns, by one candidate."""
        operator = self.operator
        if name == RIVAL:
            assert operator.rival is not None  # `names` says so
            rival = operator.rival
            return lambda arguments: rival(*arguments)
        if name.startswith("sdpa "):
            return functools.partial(_by_backend, operator, name.removeprefix("sdpa ").upper())
        return lambda arguments: dispatch.run_chosen(operator, arguments, name)

    def step(self, name: str) -> Way:
        """(arguments) -> the forward and, in training, every gradient that is wanted."""
        way = self.run(name)
        if not self.problem.training:
            return torch.no_grad()(way)

        def step(arguments: Arguments) -> Outputs:
            leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
            outputs = _listed(way(arguments))
            wanted = [t for t in outputs if t.requires_grad]
            cotangents = [self._cotangent(i, t) for i, t in enumerate(wanted)]
            made = torch.autograd.grad(wanted, leaves, cotangents, allow_unused=True)
            return [t.detach() for t in outputs] + [t for t in made if t is not None]

        return step

    def _cotangent(self, index: int, output: Tensor) -> Tensor:
        """The same numbers for every candidate, rounded as the first one's output is."""
        kept = self._cotangents.get(index)
        if kept is None or kept.shape != output.shape:
            generator = torch.Generator().manual_seed(index)
            made = torch.randn(output.shape, generator=generator)
            made = torch.ones(output.shape) if output.numel() == 1 else made
            kept = self._cotangents[index] = made.to(output.device, output.dtype)
        if kept.dtype == output.dtype:
            return kept
        return kept.to(output.dtype)

    def used(self, name: str, draws: Callable[[int], Arguments]) -> float:
        """The share of the error rule that a candidate uses: above 1 it is wrong.

        Against fp64 at the actual shapes; in 8 bits, against fp64 without the rounding to 8 bits,
        PyTorch's error being that of the arithmetic as the reference states it. Where one draw
        misses the rule, which luck may do, `DRAWS` of them are pooled.

        Raises AssertionError for another number, shape or dtype of results, or what is not finite.
        """
        found = [self._measured(name, draws(0))]
        if max(m.used for m in found[0]) > 1:
            found += [self._measured(name, draws(number)) for number in range(1, DRAWS)]
        return max(oracle.pooled(output).used for output in zip(*found, strict=True))

    def _measured(self, name: str, arguments: Arguments) -> list[oracle.Measured]:
        exact, operator = self.step(REFERENCE), self.operator
        if operator.eight_bits:
            assert operator.rival is not None
            exact = self.step(RIVAL)
        plain = self.step(REFERENCE)

        def reference(*given: Any) -> Outputs:
            with torch.enable_grad():
                return _listed((exact if given[0].dtype == torch.float64 else plain)(given))

        def wide(given: Arguments) -> Arguments:
            return tuple(
                (a.double() if a.is_floating_point() else a)
                .detach()
                .requires_grad_(a.requires_grad)
                if isinstance(a, Tensor)
                else a
                for a in given
            )

        with torch.enable_grad():
            got = _listed(self.step(name)(arguments))
        return oracle.compare(got, reference(*arguments), reference(*wide(arguments)), name)


def _by_backend(operator: Operator, backend: str, arguments: Arguments) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    full = next(name for name in SDPA if name.startswith(backend))
    with sdpa_kernel(getattr(SDPBackend, full)):
        return operator.reference(*arguments)


def _listed(found: Any) -> Outputs:
    return [found] if isinstance(found, Tensor) else list(found)
