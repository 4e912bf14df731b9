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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def check(
    kernel_out: Tensor | Sequence[Tensor],
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    name: str = "",
    floors: float = 1.0,
) -> list[tuple[Errors, Errors]]:
    """Assert that a kernel's outputs meet the error rule.

    Args:
        kernel_out: what the kernel returned for `arguments`, one tensor or several.
        reference: the operator in PyTorch (`deit.kernels.reference.*`); it is called on
            `arguments` as they are, for PyTorch's own error, and in fp64, for the oracle.
        arguments: the schema's arguments, in order.
        name: put in front of the failure message.
        floors: how many floors are granted: 2 for gradients that sum over rows, where another
            order of summation alone was seen to cost 1.7e-7 in fp32.

    Returns:
        For every output, (errors of the kernel, errors of PyTorch).

    Raises:
        AssertionError: a wrong shape, dtype or non-finite value, or an error above the rule.
    """
    with torch.no_grad():
        plain, exact = reference(*arguments), reference(*in_fp64(arguments))
    outputs, plains, exacts = (
        [t] if isinstance(t, Tensor) else list(t) for t in (kernel_out, plain, exact)
    )
    assert len(outputs) == len(plains), f"{name}: {len(outputs)} outputs, expected {len(plains)}"
    report = []
    for index, (out, torch_out, oracle) in enumerate(zip(outputs, plains, exacts, strict=True)):
        label = f"{name or getattr(reference, '__name__', 'kernel')}[{index}]"
        assert out.dtype == torch_out.dtype, f"{label}: {out.dtype}, expected {torch_out.dtype}"
        ours, theirs, spare = (
            errors(out, oracle),
            errors(torch_out, oracle),
            floor(out.dtype, oracle),
        )
        for kind in ("norm", "maximum"):
            got, base, extra = (getattr(e, kind) for e in (ours, theirs, spare))
            extra *= floors
            assert got <= FACTOR * base + extra, (
                f"{label}: {kind} error {got:.3g} > {FACTOR} * {base:.3g} (PyTorch's) "
                f"+ {extra:.3g} (floor)"
            )
        report.append((ours, theirs))
    return report
