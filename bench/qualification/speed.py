"""Every operator beside PyTorch's best and beside what the device could do at most.

operators/measure.py times them; here are the shapes, and what is kept of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from deit.kernels.engine.operator import OPERATORS
from deit.kernels.prove import calls
from deit.kernels.prove.calls import Call
from evidence.timing import paired_ratio, spread
from operators import measure
from operators.measure import Ceilings, Prepared
from qualification import fp8
from qualification.context import Context

ROUNDS = 15
# In this order while time lasts. The losses take logits, whatever D.
WIDTHS = (768, 192, 384)
ROWS = {"batch": 256, "tokens": 197}
COMPILED = (768,)  # compiling the reference takes seconds each


def speed(context: Context) -> None:
    """Rows an operator, direction, width and contender; the most telling first."""
    ceilings = measure_ceilings(context)
    for dim in WIDTHS[: 1 if context.dry else None]:
        for backward in (False, True):
            for operator in calls.operators(implementation="triton"):
                loss = calls.stated()[operator].loss
                if backward and OPERATORS[operator].train is None:
                    continue
                if (loss and dim != WIDTHS[0]) or (context.dry and operator not in _DRY):
                    continue
                direction = "backward" if backward else "forward"
                if context.left() < 3:
                    context.skip(f"{operator} {direction}, D {dim}: no time")
                    continue
                work = functools.partial(_operator, context, operator, dim, backward, ceilings)
                context.attempt(f"{operator} {direction}, D {dim}", work)


_DRY = ("layer_norm", "attention")


def measure_ceilings(context: Context) -> Ceilings:
    """What the device does at best, kept as a row."""
    found = measure.measure_ceilings(context.device, torch.bfloat16, small=context.dry)
    context.row(
        ceilings={
            "copy_bytes_per_s": found.bytes_per_s,
            "copy_bytes": found.copy_bytes,
            "bf16_flops_per_s": found.flops_per_s,
            "product": found.product,
        }
    )
    context.note(f"copy {found.bytes_per_s / 1e12:.2f} TB/s, bf16 product "
                 f"{found.flops_per_s / 1e12:.0f} TFLOP/s")  # fmt: skip
    return found


def _operator(
    context: Context, operator: str, dim: int, backward: bool, ceilings: Ceilings
) -> None:
    sizes = {**ROWS, "dim": dim}
    if context.dry:
        sizes = {"batch": 2, "tokens": 5, "dim": 64}
    dtype = torch.float32 if context.dry else torch.bfloat16

    def build(number: int) -> Call:
        draw = calls.Draw(dtype=dtype, device=context.device, number=number)
        return calls.build(operator, draw, calls.Size(**sizes), "inference")

    sets = [build(1)]
    size = sets[0].traffic([], backward)
    many = 2 if context.dry else measure.copies(size, measure.cache_bytes(context.device))
    sets += [build(2 + i) for i in range(many - 1)]
    prepared = _prepared(context, sets, dim, backward)
    outputs = measure.outputs(sets[0].function("reference")(sets[0].inputs))
    traffic, flops = sets[0].traffic(outputs, backward), sets[0].flops[backward]
    enough = lambda done: done >= 5 and context.left() < 0
    samples = measure.rounds(prepared, 3 if context.dry else ROUNDS, enough)
    best = min((n for n in samples if not measure.is_ours(n)),
               key=lambda n: spread(samples[n]).median)  # fmt: skip
    floor = ceilings.seconds(traffic, flops)
    for name, found in samples.items():
        middle, ratio = spread(found), paired_ratio(samples[best], found)
        context.row(
            operator=operator,
            direction="backward" if backward else "forward",
            dtype="fp32" if context.dry else "bf16",
            **sizes,
            contender=name,
            timed=prepared[name].how,
            input_sets=len(sets),
            n=middle.n,
            microseconds=middle.median * 1e6,
            low=middle.low * 1e6,
            high=middle.high * 1e6,
            speedup_over=best,
            speedup=ratio.median,
            speedup_low=ratio.low,
            speedup_high=ratio.high,
            bytes=traffic,
            flops=flops,
            roofline_microseconds=floor * 1e6,
            # The ceiling is bf16's.
            roofline_share=None if context.dry or "fp8" in name else floor / middle.median,
        )


def _prepared(context: Context, sets: list[Any], dim: int, backward: bool) -> dict[str, Prepared]:
    """The contenders that run; what fails is a failure if it is ours, else a note."""
    # In a dry run the interpreter's time means nothing, and compiling takes too long.
    ours = ("cpu",) if context.dry else measure.OURS
    compiled = dim in COMPILED and not context.dry
    found = {}
    functions = measure.contenders(sets[0], backward, ours, compiled=compiled)
    functions |= fp8.contenders(sets[0], backward)
    for name, function in functions.items():
        try:
            found[name] = measure.prepare(function, sets, backward)
        except Exception as error:  # a backend that cannot take this shape, say
            text = (
                f"{sets[0].operator} D {dim}: {name} did not run: {type(error).__name__}: {error}"
            )
            report = context.fail if measure.is_ours(name) else context.note
            report(" ".join(text.split())[:300])
    return found
