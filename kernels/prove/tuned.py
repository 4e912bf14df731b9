"""What `deit tune` times: a kernel on the tensors of a DeiT, and the same in PyTorch.

An operator's launches.py says which of its kernels: `tuned` of the forward, `tuned_bwd` of the
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deit.kernels.device import common, tuning
from deit.kernels.device.few_rows import rows_class
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.prove import calls, launches


@dataclass(frozen=True)
class Tuned:
    """One entry of the table to be.

    arguments: those of the factory, by name. make: draws the tensors. run: the kernel on them
    with a configuration. plain: what must come out, from the same tensors in any dtype.
    """

    factory: str
    arguments: dict[str, Any]
    make: Callable[[], list[Tensor]]
    run: Callable[[Any, Sequence[Tensor]], list[Tensor]]
    plain: Callable[[Sequence[Tensor]], list[Tensor]]

    @property
    def name(self) -> str:
        """The entry's name in the table."""
        return tuning.entry_name(self.factory, self.arguments)


@dataclass(frozen=True)
class Terms:
    """What a network's kernels are timed at: its sizes, in `dtype` on `device`."""

    size: calls.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def arch(self) -> int:
        """The architecture whose configurations serve the device."""
        return common.architecture(torch.empty(0, device=self.device))

    @property
    def multiprocessors(self) -> int:
        """How many the device has."""
        return common.multiprocessors(torch.empty(0, device=self.device))

    @property
    def rows(self) -> int:
        """The class of the rows that its products have."""
        return rows_class(self.size.batch * self.size.tokens)

    def of_call(
        self,
        factory: str,
        sizes: dict[str, Any],
        run: Callable[..., Tensor],
        build: Callable[[calls.Draw, calls.Size], calls.Call] | None = None,
    ) -> Tuned:
        """A kernel that takes the arguments of the schema of the operator of its name.

        build: its call; that of a DeiT's inference if left out.
        """
        operator = OPERATORS[factory]
        build = build or (lambda draw, size: calls.build(factory, draw, size, "inference"))
        form = build(calls.Draw(device=torch.device("meta")), self.size)

        def make() -> list[Tensor]:
            draw = calls.Draw(dtype=self.dtype, device=self.device)
            return list(build(draw, self.size).inputs.values())

        def given(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
            named = dict(zip(form.inputs, tensors, strict=True))
            return operator.prepare(**named, **form.options)

        arguments = tuning.TUNABLE[factory].arguments(self.arch, self.dtype, **sizes)
        return Tuned(
            factory,
            arguments,
            make,
            lambda config, tensors: [run(*given(tensors), config=config)],
            lambda tensors: [operator.reference(*given(tensors))],
        )

    def of_shapes(
        self,
        factory: str,
        sizes: dict[str, Any],
        shapes: Sequence[tuple[int, ...]],
        run: Callable[[Any, Sequence[Tensor]], list[Tensor]],
        plain: Callable[[Sequence[Tensor]], list[Tensor]],
    ) -> Tuned:
        """Normal numbers of these shapes; matrices of weights (rank 2) have unit gain."""

        def make() -> list[Tensor]:
            draw = calls.Draw(dtype=self.dtype, device=self.device)
            return [
                (draw.weight if len(shape) == 2 else draw.random)(*shape, seed=seed)
                for seed, shape in enumerate(shapes)
            ]

        arguments = tuning.TUNABLE[factory].arguments(self.arch, self.dtype, **sizes)
        return Tuned(factory, arguments, make, run, plain)


def tuned(at: Terms, training: bool) -> Iterator[Tuned]:
    """The kernels of one network, those of the operators that take most of its time first."""
    for name in ("tuned", "tuned_bwd") if training else ("tuned",):
        for module in launches.modules():
            if hasattr(module, name):
                yield from getattr(module, name)(at)


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor
) -> list[Tensor]:
    """The gradients of a function's inputs for its output's, by autograd."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        return list(torch.autograd.grad(function(*leaves), leaves, dout))
