"""What an operator's folder declares of it: all that the engine knows of any operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Arguments = tuple[Any, ...]

# Given in the place of `impl`, it makes a public function run nothing and return the operator that
# would, and its schema's arguments.
PREPARE: Any = object()


def no_limits(implementation: str, *arguments: Any) -> list[str]:
    """For operators whose kernels take whatever the schema takes."""
    return []


def no_sizes(*arguments: Any) -> tuple[Any, ...]:
    """For operators whose speed against PyTorch's depends on rows and dtype alone."""
    return ()


@dataclass(frozen=True)
class Operator:
    """One public operator. Its schemas and kernels are in `registry`, under its name.

    public: the function that users call. It validates its arguments, casts them for autocast, and
        ends with `return dispatch.run(<this>, <the schema's arguments>, impl)`.
    reference: the same in plain PyTorch, by the schema's arguments.
    limits: (implementation, *schema arguments) -> why that implementation cannot take them. The
        first argument's dtype is then one that kernels serve. So are the others' dtypes where
        `public` requires that one or fp32; elsewhere `limits` asks `limits.unserved`.
    train: (implementation, *schema arguments) -> the output, differentiable by that
        implementation's own `_fwd` and `_bwd` kernels.
    constants: the schema arguments for which those kernels compute no gradient, by position.
    sizes: (*schema arguments) -> what of them a measurement's figures depend on beside the first
        argument's dtype, rows and tokens: widths, heads, options that are set. It reads shapes and
        dtypes alone, and those of weights where it may: a captured graph leaves others open.
    by_tokens: whether they depend on the tokens, the first argument's second axis.
    rival: (*schema arguments) -> the same by other operators, by "auto", where there is such a
        way: a block by its parts, 8 bits in the arguments' own dtype.
    eight_bits: whether it rounds to 8 bits. Its reference is then the arithmetic itself, and
        neither gradients nor the rule against fp64 are its own.
    """

    public: Callable[..., Any]
    reference: Callable[..., Any]
    limits: Callable[..., list[str]] = no_limits
    train: Callable[..., Any] | None = None
    constants: dict[int, str] = field(default_factory=dict)
    sizes: Callable[..., tuple[Any, ...]] = no_sizes
    by_tokens: bool = False
    rival: Callable[..., Any] | None = None
    eight_bits: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.public.__name__)

    def prepare(self, *inputs: Any, **options: Any) -> Arguments:
        """The public arguments -> the schema's, validated; raises what `public` raises."""
        return self.served_by(*inputs, **options)[1]

    def served_by(self, *inputs: Any, **options: Any) -> tuple[Operator, Arguments]:
        """What a call comes to, and its arguments: this operator, or another where an option asks
        for that (attention with rotary positions). Raises what `public` raises."""
        return self.public(*inputs, **options, impl=PREPARE)


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Make it known under its name, to `explain` and to whoever asks for all of them."""
    OPERATORS[operator.name] = operator
    return operator


def operator_names(*, eight_bits: bool) -> tuple[str, ...]:
    """The names of the operators that round to 8 bits, or of all the others."""
    return tuple(name for name, known in OPERATORS.items() if known.eight_bits is eight_bits)
