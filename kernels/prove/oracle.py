"""The error rule that every kernel must meet, and the inputs it is tried on.

    err(kernel) <= 1.25 * err(PyTorch at the same dtype) + floor

Both errors are taken against the operator's reference run in fp64 on the same (already rounded)
inputs, once as a norm ratio and once as a maximum. So a kernel may be as wrong as PyTorch is, and
a quarter more, but no tolerance is invented for it: a dtype, shape or input on which PyTorch is
accurate demands an accurate kernel.

The floor is for references whose own error is about zero (an exact copy, a single product, a
sum that happens to round well): there 1.25 * err is nothing, while any correctly rounded result
may be half an ulp off and one with another order of summation a little more. It is an
epsilon of the *output's* dtype: half of one for the norm ratio (rounding alone costs 0.2 to 0.3),
one of max|oracle| for the maximum. If a
kernel fails while PyTorch's error is far below the floor, the kernel is at fault: do not raise
the floor, find the step that rounds too early.

Use:

    oracle.check(kernel_output, reference.layer_norm, (x, weight, bias, 1e-6))
    oracle.check_draws(kernel, reference.attention, [(make_qkv(seed), 3, 0.125, None) ...])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR = 1.25  # how much worse than PyTorch a kernel may be
FAMILIES = ("random", "large_mean", "outlier")


def make(
    family: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    scale: float = 1.0,
    mean: float = 1000.0,
) -> Tensor:
    """A tensor of one input family, drawn in fp32 and rounded to `dtype`.

    "random": normal, standard deviation `scale`. "large_mean": the same around `mean`, which
    shows E[x^2] - E[x]^2 cancelling. "outlier": about 1 channel of the last axis in 64 is 100
    times larger, as in trained vision transformers.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator) * scale
    if family == "large_mean":
        x = x + mean * scale
    elif family == "outlier":
        x[..., 5 % shape[-1] :: 64] *= 100.0
    elif family != "random":
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}; got {family!r}")
    return x.to(dtype)


def packed(
    family: str,
    batch: int,
    tokens: int,
    heads: int = 3,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    *,
    seed: int = 1,
) -> Tensor:
    """qkv [B, N, 3 * H * d] of one input family, from `seed` and the two after it.

    A mean of 1000 is for v alone. In q and k it would make every softmax an argmax, so there the
    mean is 4. "outlier": k has none, since outlier channels times each other would be scores of
    10^4. "one_hot": scores of standard deviation 25, where one key takes nearly everything.
    """
    shape = (batch, tokens, heads * head_dim)
    seeds = (seed, seed + 1, seed + 2)
    if family == "one_hot":
        return torch.cat([make("random", shape, dtype, seed=s, scale=5.0) for s in seeds], -1)
    q, k = (make(family, shape, dtype, seed=s, scale=0.5, mean=8.0) for s in seeds[:2])
    if family == "outlier":
        k = make("random", shape, dtype, seed=seeds[1], scale=0.05)
    return torch.cat([q, k, make(family, shape, dtype, seed=seeds[2])], dim=-1)


@dataclass(frozen=True)
class Errors:
    """Distance of one output from the oracle: ||out - oracle|| / ||oracle||, max|out - oracle|."""

    norm: float
    maximum: float


def errors(out: Tensor, oracle: Tensor) -> Errors:
    """Errors of `out` against the fp64 `oracle`; non-finite values must sit in the same places.

    Raises AssertionError where NaN or an infinity is in one of the two and not in the other,
    except that a value beyond `out`'s range may be infinite in it.
    """
    out, oracle = out.detach().cpu(), oracle.detach().cpu()
    if out.shape != oracle.shape:
        raise AssertionError(f"shape {tuple(out.shape)}, expected {tuple(oracle.shape)}")
    expected = oracle.to(out.dtype).double()  # what overflows in out's dtype is infinite there
    finite = expected.isfinite()
    if not torch.equal(
        out.double()[~finite].nan_to_num(nan=1.0), expected[~finite].nan_to_num(nan=1.0)
    ):
        raise AssertionError("NaN or infinity expected, and something else found")
    difference = out.double()[finite] - oracle[finite]
    if not difference.isfinite().all():
        count = int((~difference.isfinite()).sum())
        raise AssertionError(f"{count} NaN or infinite values where the oracle is finite")
    if difference.numel() == 0:
        return Errors(0.0, 0.0)
    size = float(oracle[finite].norm()) or 1.0
    return Errors(float(difference.norm()) / size, float(difference.abs().max()))


def floor(out_dtype: torch.dtype, oracle: Tensor) -> Errors:
    """What is granted on top of FACTOR times PyTorch's error: an ulp of the output's dtype."""
    epsilon = torch.finfo(out_dtype).eps
    finite = oracle[oracle.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return Errors(epsilon / 2, epsilon * largest)


def in_fp64(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments with every floating-point tensor in fp64."""
    return tuple(
        a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    )


@dataclass(frozen=True)
class Measured:
    """One output's errors, PyTorch's at the same dtype, and the floor granted on top."""

    ours: Errors
    theirs: Errors
    floor: Errors

    @property
    def used(self) -> float:
        """The larger share, of norm and maximum, of what the rule allows: 1 at its limit."""
        allowed = (
            (self.ours.norm, FACTOR * self.theirs.norm + self.floor.norm),
            (self.ours.maximum, FACTOR * self.theirs.maximum + self.floor.maximum),
        )
        return max(got / limit if limit else float(got > 0) * 2 for got, limit in allowed)


def compared(out: Tensor, plain: Tensor, exact: Tensor) -> Measured:
    """One output beside PyTorch's at the same dtype, both against the fp64 one."""
    return Measured(errors(out, exact), errors(plain, exact), floor(out.dtype, exact.cpu()))


def measure(
    kernel_out: Tensor | Sequence[Tensor],
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    name: str = "",
) -> list[Measured]:
    """Every output's errors on one draw; AssertionError for a wrong count, shape or dtype."""
    with torch.no_grad():
        plain, exact = reference(*arguments), reference(*in_fp64(arguments))
    outputs, plains, exacts = (
        [t] if isinstance(t, Tensor) else list(t) for t in (kernel_out, plain, exact)
    )
    assert len(outputs) == len(plains), f"{name}: {len(outputs)} outputs, expected {len(plains)}"
    found = []
    for index, (out, torch_out, oracle) in enumerate(zip(outputs, plains, exacts, strict=True)):
        assert out.dtype == torch_out.dtype, (
            f"{name}[{index}]: {out.dtype}, expected {torch_out.dtype}"
        )
        found.append(compared(out, torch_out, oracle))
    return found


def pooled(draws: Sequence[Measured]) -> Measured:
    """One output's errors over several draws: norms by root mean square, maxima by mean.

    So the norms are what they would be for all draws laid end to end.
    """

    def over(pick: Callable[[Measured], Errors]) -> Errors:
        found = [pick(m) for m in draws]
        square = sum(e.norm**2 for e in found) / len(found)
        return Errors(square**0.5, sum(e.maximum for e in found) / len(found))

    return Measured(over(lambda m: m.ours), over(lambda m: m.theirs), over(lambda m: m.floor))


def check(
    kernel_out: Tensor | Sequence[Tensor],
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    name: str = "",
) -> list[tuple[Errors, Errors]]:
    """Assert that a kernel's outputs meet the error rule on one draw.

    Args:
        kernel_out: what the kernel returned for `arguments`, one tensor or several.
        reference: the operator in PyTorch (`deit.kernels.prove.reference.*`); it is called on
            `arguments` as they are, for PyTorch's own error, and in fp64, for the oracle.
        arguments: the schema's arguments, in order.
        name: put in front of the failure message.

    Returns:
        For every output, (errors of the kernel, errors of PyTorch).

    Raises:
        AssertionError: a wrong shape, dtype or non-finite value, or an error above the rule.
    """
    name = name or getattr(reference, "__name__", "kernel")
    return _checked(measure(kernel_out, reference, arguments, name), name)


def check_draws(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    draws: Iterable[Sequence[Any]],
    *,
    name: str = "",
) -> list[tuple[Errors, Errors]]:
    """Assert the error rule over several draws of the arguments, errors `pooled`; else as `check`.

    For results of few elements, or in which few elements hold all of the error (a softmax of large
    scores, a difference of nearly equal sums). One draw then compares two roundings, and luck
    decides: PyTorch's attention on one head of 12 to 20 tokens, beside itself with the channels of
    q and k in another order, misses the rule on 7 % of random draws, by up to 3 times, and at
    scores of standard deviation 75 on a third of them. Pooled over 60 draws its ratio to itself is
    0.9 to 1.0, so a kernel that is worse shows. The factor and the floor are those of `check`.
    """
    name = name or getattr(reference, "__name__", "kernel")
    found = [measure(kernel(*arguments), reference, arguments, name) for arguments in draws]
    return _checked([pooled(output) for output in zip(*found, strict=True)], name)


def _checked(found: Sequence[Measured], name: str) -> list[tuple[Errors, Errors]]:
    for index, m in enumerate(found):
        for kind in ("norm", "maximum"):
            got, base, extra = (getattr(e, kind) for e in (m.ours, m.theirs, m.floor))
            assert got <= FACTOR * base + extra, (
                f"{name}[{index}]: {kind} error {got:.3g} > {FACTOR} * {base:.3g} (PyTorch's) "
                f"+ {extra:.3g} (floor)"
            )
    return [(m.ours, m.theirs) for m in found]
