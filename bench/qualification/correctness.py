"""Every operator and implementation against fp64, under the rule of kernels/prove/oracle.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

import numerics
from deit.kernels.prove import calls
from qualification.context import Context

IMPLEMENTATIONS = ("triton", "cuda", "cublaslt", "cpu")
DTYPES = ("bf16", "fp16", "fp32")
# What is above the rule on one draw can be luck, and is held to it over so many. A loss is one
# number: distillation's was off by an ulp where PyTorch's was exact, 1.19 of what is allowed.
MORE = 8
DRY = ["layer_norm", "linear", "attention", "cross_entropy"]
# (batch, tokens, D): one token; DeiT's 197 and, distilled, 198; the first count past one block of
# keys; 384 pixels; the largest that is promised. Then the widths of DeiT-S and -B.
SHAPES = (
    (3, 197, 192), (2, 577, 192), (3, 198, 768), (2, 257, 384), (3, 1, 192), (1, 1025, 192),
    (2, 197, 384), (2, 577, 768), (0, 197, 192),
)  # fmt: skip


def correctness(context: Context) -> None:
    """As a stage: one job an operator and dtype. As a job: that operator's rows."""
    if context.dry:
        check(context, DRY, "fp32", ((1, 5, 64),))
    elif context.job:
        operator, dtype = context.job.split(":")
        check(context, [operator], dtype, SHAPES)
    else:
        context.fan_out(
            [
                f"{operator}:{dtype}"
                for dtype in DTYPES
                for operator in calls.operators(implementation="triton")
            ]
        )
    if not context.job:
        above = sum(row["used"] > 1 for row in context.rows)
        context.note(f"{len(context.rows)} figures, {above} above the rule")


def check(
    context: Context, operators: Sequence[str], dtype: str, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """Rows of these operators: the random family at every shape, the others at the first."""
    # PyTorch's own error is the yardstick: in fp32 it must be fp32's, also of the convolution.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for operator in operators:
        for shape, family in plan(operator, shapes, context.dry):
            if context.left() < 0:
                context.skip(f"{operator} {dtype}: no time from {shape}, {family} on")
                break
            for impl in IMPLEMENTATIONS:
                case = (impl, operator, dtype, shape, family)
                context.attempt(f"{case}", functools.partial(compare, context, *case))


def plan(
    operator: str, shapes: tuple[tuple[int, ...], ...], dry: bool
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Shapes and input families, the most telling first."""
    stated = calls.stated()[operator]
    families = [f for f in calls.FAMILIES if stated.softmax or f != "one_hot"]
    yield from ((shapes[0], family) for family in families[: 1 if dry else None])
    # A loss has neither tokens nor D: only its batch differs, from one row to 257.
    rest = shapes[1:]
    if stated.loss:
        rest = ((1, 0, 0), (257, 0, 0)) if rest else ()
    yield from ((shape, "random") for shape in rest)


def compare(
    context: Context, impl: str, operator: str, dtype: str, shape: tuple[int, ...], family: str
) -> None:
    """One call forward and, where there are kernels for it, backward."""

    def drawn(number: int) -> calls.Call:
        draw = calls.Draw(family, numerics.DTYPES[dtype], context.device, number)
        return calls.build(operator, draw, calls.Size(*shape))

    call, draws = drawn(0), 1
    if reasons := call.reasons(impl):
        context.note(f"{impl} {operator}: not run, {'; '.join(reasons)}")
        return
    backward = call.differentiable(impl)
    rows = numerics.compare([call], impl, dtype, family, backward)
    if any(row.used > 1 for row in rows):
        draws = MORE
        rows = numerics.compare([*map(drawn, range(draws))], impl, dtype, family, backward)
    for row in rows:
        context.row(shape=list(shape), draws=draws, **asdict(row))
        if row.used > 1:
            context.fail(
                f"{impl} {operator} {dtype} {list(shape)} {family}, {row.quantity}: error "
                f"{row.norm:.3g} (PyTorch's {row.torch_norm:.3g}), largest {row.max:.3g} "
                f"({row.torch_max:.3g}), {row.used:.2f} of what the rule allows"
            )
