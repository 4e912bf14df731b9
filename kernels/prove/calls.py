"""A call of a public operator, and how one is made: each operator's calls.py says of what.

    build("linear", Draw("outlier", torch.bfloat16), Size(2, 197, 192), "training")

Tests, accuracy, host cost, speed and qualification take their calls from there, so an operator
states its tensors once. A form is how much of an operator a call uses:

    "least"      the arguments that it must have
    "inference"  as a DeiT's inference calls it: with the residual where a block adds one
    "training"   as DeiT's training does: with LayerScale and stochastic depth too
    "every"      every optional argument, none at its default
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import deit.kernels
from deit.kernels.engine import registry
from deit.kernels.engine.operator import OPERATORS, operator_names
from deit.kernels.prove import oracle

FAMILIES = (*oracle.FAMILIES, "one_hot")
FORMS = ("least", "inference", "training", "every")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Call:
    """One call of a public operator.

    inputs: its tensors by name, floating-point ones in the call's dtype.
    options: its other arguments by name.
    gradients: the inputs that training differentiates by.
    flops: floating-point operations of the forward and of the backward, two a multiply-add: of the
        products where there are any, else of the elements.
    """

    operator: str
    inputs: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    flops: tuple[float, float] = (0.0, 0.0)

    def to(self, device: torch.device) -> Call:
        """The same call with its tensors there."""
        return replace(self, inputs={name: t.to(device) for name, t in self.inputs.items()})

    def function(self, impl: str) -> Callable[[Mapping[str, Any]], Any]:
        """The public operator by one implementation, on tensors by name."""
        operator = getattr(deit.kernels, self.operator)
        return lambda inputs: operator(**inputs, **self.options, impl=impl)

    def written(self, inputs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """As a user writes it, on these tensors: by place as far as may be, the rest by name."""
        given, places = {**inputs, **self.options}, []
        for name, one in inspect.signature(getattr(deit.kernels, self.operator)).parameters.items():
            if name not in given or one.kind is one.KEYWORD_ONLY:
                break
            places.append(given.pop(name))
        return places, given

    def results(
        self,
        impl: str,
        inputs: Mapping[str, Any],
        cotangent: Callable[[int, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """By name: its outputs ("out", "out 1") on these tensors, and its gradients ("d x") where
        `cotangent` is given, which makes each output's cotangent from its number and the output."""
        wanted = self.gradients if cotangent is not None else ()
        leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
        found = self.function(impl)({**inputs, **leaves})
        outputs = [found] if isinstance(found, Tensor) else list(found)
        named = {f"out {i}" if i else "out": t.detach() for i, t in enumerate(outputs)}
        if cotangent is not None:
            given = [cotangent(i, t) for i, t in enumerate(outputs)]
            made = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)
            named |= {f"d {n}": t for n, t in zip(leaves, made, strict=True) if t is not None}
        return named

    def leaves(self) -> dict[str, Tensor]:
        """The inputs, with a gradient wanted of each that training differentiates by."""
        return self.inputs | {n: self.inputs[n].clone().requires_grad_() for n in self.gradients}

    def reasons(self, impl: str, *, training: bool = False) -> list[str]:
        """Why an implementation cannot run it; empty where it can."""
        inputs = self.leaves() if training else self.inputs
        return deit.kernels.explain(self.operator, **inputs, **self.options).reasons[impl]

    def differentiable(self, impl: str) -> bool:
        """Whether an implementation has kernels for its gradients."""
        return bool(self.gradients) and not self.reasons(impl, training=True)

    def traffic(self, outputs: list[Tensor], backward: bool) -> float:
        """Bytes that must move: every input and output once, in the backward their gradients."""
        size = lambda tensors: float(sum(t.numel() * t.element_size() for t in tensors))
        read, written = size(self.inputs.values()), size(outputs)
        if not backward:
            return read + written
        return read + written + size(self.inputs[n] for n in self.gradients)


@dataclass(frozen=True)
class Size:
    """B images of N tokens and D channels, and what follows from these where it is not told.

    width: of a linear layer's output. side: patches along an image's side. prefix: tokens before
    the patches, two where it is 0 and stochastic depth is there, else one.
    """

    batch: int
    tokens: int
    dim: int
    heads: int = 0
    hidden: int = 0
    width: int = 0
    side: int = 0
    prefix: int = 0
    patch: int = 16
    channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        for name, value in (
            ("heads", max(1, self.dim // 64)),
            ("hidden", 4 * self.dim),
            ("width", self.dim),
            ("side", max(1, math.isqrt(self.tokens))),
        ):
            object.__setattr__(self, name, getattr(self, name) or value)

    @classmethod
    def of(cls, network: Any, batch: int) -> Size:
        """The sizes of a network, by its `deit.Config`."""
        return cls(
            batch,
            network.tokens,
            network.embed_dim,
            heads=network.num_heads,
            side=network.img_size // network.patch_size,
            prefix=2 if network.distilled else 1,
            patch=network.patch_size,
        )


@dataclass(frozen=True)
class Draw:
    """Tensors of one call: activations of a family of `oracle`, weights of unit gain.

    "one_hot": a softmax of which one entry takes nearly everything. number: which of the
    independent draws this is.
    """

    family: str = "random"
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    number: int = 0

    def make(self, family: str, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        """A tensor of a family; normal numbers on the device, where a billion take milliseconds."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        seed += 100 * self.number
        if self.device.type == "cpu" or family != "random":
            drawn = oracle.make(family, shape, self.dtype, seed=seed, scale=scale)
            return drawn.to(self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        return x.normal_(0.0, scale, generator=generator)

    def random(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        """Normal numbers, whatever the family."""
        return self.make("random", *shape, seed=seed, scale=scale)

    def weight(self, *shape: int, seed: int) -> Tensor:
        """A matrix of unit gain: the first axis is that of the output."""
        return self.random(*shape, seed=seed, scale=math.prod(shape[1:]) ** -0.5)

    def around_one(self, *shape: int, seed: int) -> Tensor:
        """A LayerNorm's weight."""
        return 1 + self.random(*shape, seed=seed, scale=0.1)

    def activation(self, *shape: int, seed: int = 0) -> Tensor:
        """Activations of the family; random where the family is one of softmaxes."""
        return self.make("random" if self.family == "one_hot" else self.family, *shape, seed=seed)

    def epilogue(self, form: str, *shape: int) -> dict[str, Tensor]:
        """What is added to a product [B, N, D]: the residual in inference, and in training
        LayerScale and stochastic depth before it, every second sample dropped."""
        if form == "least":
            return {}
        found = {"residual": self.random(*shape, seed=21)}
        if form != "inference":
            keep = torch.full(shape[:1], 1.25, dtype=self.dtype, device=self.device)
            keep[1::2] = 0.0
            found |= {"gamma": self.random(shape[-1], seed=22), "keep": keep}
        return found


@dataclass(frozen=True)
class Part:
    """A call that a network makes: how often in a forward of so many blocks, and what of it.

    columns: of a linear layer's output, in multiples of D.
    """

    name: str
    times: Callable[[int], int] = lambda depth: 0
    form: str = "inference"
    columns: int = 1
    operator: str = ""

    def build(self, draw: Draw, size: Size) -> Call:
        """The call at a network's sizes."""
        return build(self.operator, draw, replace(size, width=self.columns * size.dim), self.form)


@dataclass(frozen=True)
class Stated:
    """What an operator's calls.py says of it.

    build: how its calls are made. parts: which of them a network makes; without any, one call
    stands beside the others and counts nothing. softmax: it has one, of which one entry may take
    nearly all. loss: it is of logits, and has neither tokens nor channels.
    """

    build: Callable[[Draw, Size, str], Call]
    parts: tuple[Part, ...] = ()
    softmax: bool = False
    loss: bool = False


def _folder(operator: str) -> str:
    return OPERATORS[operator].public.__module__


@functools.cache
def _all() -> dict[str, Stated]:
    names = [f"{folder}.calls" for folder in dict.fromkeys(map(_folder, OPERATORS))]
    modules = [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]
    return {name: one for module in modules for name, one in module.CALLS.items()}


@functools.cache
def stated() -> dict[str, Stated]:
    """By operator; those that take most of a network's time come first."""
    order = dict.fromkeys([part.operator for part in parts()] + list(_all()))
    return {name: _all()[name] for name in order}


@functools.cache
def parts() -> tuple[Part, ...]:
    """The calls that a network makes; those that take most of its time come first."""
    found = [
        replace(part, operator=name)
        for name, one in _all().items()
        for part in one.parts or (Part(name),) * (not OPERATORS[name].eight_bits)
    ]
    work = lambda part: part.build(Draw(), Size(1, 197, 192)).flops[0] * part.times(12)
    return tuple(sorted(found, key=work, reverse=True))


def folders() -> list[str]:
    """The modules of the operators that state their calls, in the same order."""
    return list(dict.fromkeys(map(_folder, stated())))


def operators(*, softmax: bool = False, implementation: str = "") -> list[str]:
    """All operators but those in 8 bits, to which the rule against fp64 does not apply.

    softmax: only those that have one. implementation: only those that it has a kernel of.
    """
    exact = set(operator_names(eight_bits=False))
    if implementation:
        exact &= registry.KERNELS[implementation]
    return [n for n, one in stated().items() if n in exact and one.softmax >= softmax]


def build(operator: str, draw: Draw, size: Size, form: str = "training") -> Call:
    """One call of a public operator."""
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}; got {form!r}")
    return _all()[operator].build(draw, size, form)
