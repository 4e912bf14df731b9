"""The Triton kernels that each stage launches, listed without a GPU by making its calls.

Tensors are on the meta device, and nothing runs (`deit.kernels.prove.recorded`). What a stage calls
is read from that stage, so that it is listed once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deit
import deit.kernels
import numerics
from deit.fused_vit import fuse
from deit.kernels.fp8 import CAPABILITY
from deit.kernels.prove import calls
from deit.kernels.prove import tune as tuner
from deit.kernels.prove.recorded import Noted, recording
from qualification import correctness, fp8, models, robustness, speed, tuning
from qualification.context import Context

META = torch.device("meta")
TRIED = "tried: "  # begins what is said of a configuration that is no default


def of_stages(
    stages: tuple[str, ...], arch: int, multiprocessors: int, *, forms: bool = False
) -> Noted:
    """What these stages launch on such a GPU, of those that launch anything.

    forms: and what else a user's calls may launch (`_forms`).
    """
    with recording(arch, multiprocessors) as noted:
        for stage in stages:
            LISTS.get(stage, lambda _: None)(noted)
        if forms:
            _forms(noted)
    return noted


class _Meta(Context):
    """A stage's context on tensors without memory."""

    @property
    def device(self) -> Any:
        return META


def _context(stage: str) -> Context:
    return _Meta(stage, Path(), "", False, time.monotonic() + 1e9)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def _evaluate(call: calls.Call, inputs: dict[str, Tensor], backward: bool) -> None:
    call.results("triton", inputs, (lambda _, t: torch.empty_like(t)) if backward else None)


def _correctness(noted: Noted) -> None:
    for dtype in correctness.DTYPES:
        for operator in calls.operators(implementation="triton"):
            for shape, family in correctness.plan(operator, correctness.SHAPES, False):
                if family != "random":  # which numbers are drawn makes no other kernel
                    continue
                draw = calls.Draw(family, numerics.DTYPES[dtype], META)
                call = calls.build(operator, draw, calls.Size(*shape))
                noted.operator, noted.variant = operator, f"{dtype} {shape}"
                if not call.reasons("triton"):
                    _evaluate(call, call.inputs, call.differentiable("triton"))


def _fp8(noted: Noted) -> None:
    if noted.arch < 10 * CAPABILITY[0] + CAPABILITY[1]:
        return
    with torch.inference_mode():  # of which no copy of a weight is kept
        for dtype in fp8.DTYPES:
            for operator in fp8.ALLOWED:
                for shape in fp8.SHAPES:
                    draw = calls.Draw(dtype=numerics.DTYPES[dtype], device=META)
                    call = calls.build(operator, draw, calls.Size(*shape), "inference")
                    noted.operator, noted.variant = f"fp8_{operator}", f"{dtype} {shape}"
                    getattr(deit.kernels, f"fp8_{operator}")(**call.inputs, impl="triton")


def _robustness(noted: Noted) -> None:
    """Its layouts, a graph's call, which is an inference, and its largest tensors."""
    context = _context("robustness")
    for operator in calls.operators(implementation="triton"):
        call = robustness._call(context, operator)
        backward = call.differentiable("triton")
        layouts: dict[str, Callable[[Any], Any]] = {"plain": lambda t: t, **robustness._views()}
        for name, view in layouts.items():
            inputs = {n: view(t) if t.is_floating_point() else t for n, t in call.inputs.items()}
            noted.operator, noted.variant = operator, f"bf16, {name}"
            row = lambda _, t: t.new_empty(t.shape[-1:]).expand_as(t)
            call.results("triton", inputs, row if backward else None)
        noted.variant = "bf16, inference"
        _evaluate(call, call.inputs, False)
    for operator, (tokens, dim) in robustness.LARGE.items():
        noted.operator, noted.variant = operator, "bf16, past 2**31 elements"
        batch = robustness.large_batch(operator)
        for count in (batch, 2):
            call = calls.build(operator, calls.Draw(dtype=torch.bfloat16, device=META),
                               calls.Size(count, tokens, dim), "inference")  # fmt: skip
            _evaluate(call, call.inputs, False)


def _sanitizer(noted: Noted) -> None:
    context = _context("sanitizer")
    for operator in calls.operators(implementation="triton"):
        call = robustness._call(context, operator)
        noted.operator, noted.variant = operator, "bf16, sanitizer"
        _evaluate(call, call.inputs, call.differentiable("triton"))


def _tune(noted: Noted) -> None:
    from deit import tune

    context = _context("tune")
    with torch.inference_mode():
        for problem in tune.problems_of(tuning._options(context), META):
            tensors = problem.make()
            for number, config in enumerate(tuner.candidates_of(problem, tuning.CANDIDATES)):
                noted.operator, noted.variant = problem.name, TRIED * bool(number) + str(config)
                problem.run(config, tensors)


def _speed(noted: Noted) -> None:
    for dim in speed.WIDTHS:
        for operator in calls.operators(implementation="triton"):
            if calls.stated()[operator].loss and dim != speed.WIDTHS[0]:
                continue
            draw = calls.Draw(dtype=torch.bfloat16, device=META)
            call = calls.build(operator, draw, calls.Size(**speed.ROWS, dim=dim), "inference")
            noted.operator, noted.variant = operator, f"bf16, D {dim}"
            for backward in dict.fromkeys((False, call.differentiable("triton"))):
                _evaluate(call, call.inputs, backward)


def _throughput(noted: Noted) -> None:
    """Raises RuntimeError where a network does not run fused without memory."""
    for name in models.ARCHITECTURES:
        with META:
            model = deit.create(name).to(torch.bfloat16).eval()
        fuse(model, "triton")
        size, before = model.config.img_size, noted.launches
        noted.operator, noted.variant = name, "bf16"
        with torch.inference_mode():
            model(_empty(speed.ROWS["batch"], 3, size, size))
        if noted.launches == before:
            raise RuntimeError(f"{name}: expected its operators to run on the meta device")


# Rows that fill no tile; then heads of 32, 80, 96 and 128 channels.
RAGGED = (calls.Size(2, 61, 192), calls.Size(2, 198, 768))
HEADS = (calls.Size(2, 197, 192, heads=6), calls.Size(2, 61, 160, heads=2),
         calls.Size(2, 61, 192, heads=2), calls.Size(2, 197, 256, heads=2))  # fmt: skip


def _forms(noted: Noted) -> None:
    """Every form of each operator in each dtype, and on rows that no descriptor takes."""
    unaligned = robustness._views()["rows off 16 bytes"]
    for dtype in correctness.DTYPES:
        for operator in calls.operators(implementation="triton"):
            for size in RAGGED + (HEADS if "attention" in operator else ()):
                for form in calls.FORMS:
                    draw = calls.Draw(dtype=numerics.DTYPES[dtype], device=META)
                    call = calls.build(operator, draw, size, form)
                    noted.operator = operator
                    noted.variant = f"{form}, {dtype} {size.batch}x{size.tokens}x{size.dim}"
                    _of_form(noted, call, unaligned)


def _of_form(noted: Noted, call: calls.Call, unaligned: Callable[[Any], Any]) -> None:
    if call.reasons("triton"):
        return
    backward = call.differentiable("triton")
    off = {n: unaligned(t) if t.is_floating_point() else t for n, t in call.inputs.items()}
    for inputs in (call.inputs, off):
        for each in dict.fromkeys((False, backward)):
            _evaluate(call, inputs, each)
        noted.variant += ", unaligned"


LISTS: dict[str, Callable[[Noted], None]] = {
    "correctness": _correctness,
    "fp8": _fp8,
    "robustness": _robustness,
    "sanitizer": _sanitizer,
    "tune": _tune,
    "speed": _speed,
    "throughput": _throughput,
}
