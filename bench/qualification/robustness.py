"""The same bits every time, whatever the layout, stream or size; and the memory checker."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

import deit.kernels
from deit.kernels.prove import calls, oracle
from operators import measure
from qualification.context import Context
from qualification.environment import find_tool

REPEATS = 30
IMPLEMENTATIONS = ("triton", "cuda", "cublaslt")


def robustness(context: Context) -> None:
    """As a stage: one job an operator. As a job: every check on it."""
    if not context.job and not context.dry:
        context.fan_out(calls.operators(implementation="triton"))
        context.jobs = 2  # each takes up to 30 GB
        context.fan_out([f"{operator}:large" for operator in LARGE])
        context.note(f"{len(context.rows)} checks passed")
        return
    operator, _, large = context.job.partition(":")
    if large:
        each(context, (operator,), {"offsets past 2**31": _large})
        return
    checks: dict[str, Callable[..., None]] = {"repeats": _repeats, "layouts": _layouts}
    if not context.dry:
        checks |= {"stream": _stream, "graph": _graph}
    each(context, ("layer_norm", "linear") if context.dry else (operator,), checks)


def each(
    context: Context, operators: tuple[str, ...], checks: dict[str, Callable[..., None]]
) -> None:
    """Run the checks; what passes becomes a row, what does not a failure."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for operator in operators:
        for name, check in checks.items():
            for impl in IMPLEMENTATIONS:
                if context.left() < 0:
                    context.skip(f"{operator}: no time for {name}")
                elif not _call(context, operator).reasons(impl):
                    label = f"{impl} {operator}, {name}"
                    if context.attempt(label, functools.partial(check, context, operator, impl)):
                        context.row(check=name, impl=impl, operator=operator, passed=True)


def _call(context: Context, operator: str, number: int = 0) -> Any:
    """bf16 at DeiT-S's width and 198 tokens on a GPU; something tiny in fp32 in a dry run."""
    size = calls.Size(2, 6, 64) if context.dry else calls.Size(4, 198, 384)
    dtype = torch.float32 if context.dry else torch.bfloat16
    draw = calls.Draw(dtype=dtype, device=context.device, number=number)
    return calls.build(operator, draw, size)


def evaluate(call: Any, impl: str, inputs: dict[str, Any], backward: bool) -> list[Any]:
    """Outputs, and gradients for cotangents that do not depend on the implementation.

    The cotangent is one row expanded over the others, as a sum's gradient is: strides of zero.
    """
    generator = torch.Generator().manual_seed(17)
    row = lambda _, t: torch.randn(t.shape[-1:], generator=generator).to(t).expand_as(t)
    return list(call.results(impl, inputs, row if backward else None).values())


def _same(context: Context, first: list[Any], other: list[Any], what: str) -> None:
    for index, (a, b) in enumerate(zip(first, other, strict=True)):
        if not torch.equal(a, b):
            count = int((a != b).sum())
            raise AssertionError(f"{what}: result {index} differs in {count} of {a.numel()} values")


def _repeats(context: Context, operator: str, impl: str) -> None:
    """REPEATS runs give the same bits."""
    call = _call(context, operator)
    run = lambda: evaluate(call, impl, call.inputs, call.differentiable(impl))
    first = run()
    for number in range(1, 3 if context.dry else REPEATS):
        _same(context, first, run(), f"run {number}")


def _views() -> dict[str, Callable[[Any], Any]]:
    """Layouts with a tensor's own values: what a model's slices and permutes look like."""

    def spare(x: Any, axis: int, before: int, after: int) -> Any:
        """x as a slice of a tensor that is longer on one axis, NaN in the rest."""
        shape = list(x.shape)
        shape[axis] += before + after
        wide = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
        view = wide.narrow(axis, before, x.shape[axis])
        return view.copy_(x)

    return {
        "16-byte rows apart": lambda x: spare(x, -1, 0, 8),
        "rows off 16 bytes": lambda x: spare(x, -1, 0, 1),
        "first element off 16 bytes": lambda x: spare(x, -1, 1, 0),
        "token slice": lambda x: spare(x, min(1, x.dim() - 1), 1, 0),
        "first two axes swapped": lambda x: (
            x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x
        ),
        "last axis strided": lambda x: torch.stack([x, x.new_full(x.shape, float("nan"))], -1)[
            ..., 0
        ],
    }  # fmt: skip


def _layouts(context: Context, operator: str, impl: str) -> None:
    """Every floating-point input in each layout: forward and backward under the error rule."""
    call = _call(context, operator)
    backward = call.differentiable(impl)
    double = {n: t.double() if t.is_floating_point() else t for n, t in call.inputs.items()}
    exact = evaluate(call, "reference", double, backward)
    plain = evaluate(call, "reference", call.inputs, backward)
    for name, view in _views().items():
        inputs = {n: view(t) if t.is_floating_point() else t for n, t in call.inputs.items()}
        found = evaluate(call, impl, inputs, backward)
        for index, (ours, theirs, best) in enumerate(zip(found, plain, exact, strict=True)):
            error = oracle.compared(ours, theirs, best)
            if error.used > 1:
                raise AssertionError(
                    f"{name}: result {index}, errors {error.ours} (PyTorch's {error.theirs}), "
                    f"{error.used:.2f} of what the rule allows"
                )
        del found
    if context.device.type == "cuda":
        torch.cuda.synchronize()


def _stream(context: Context, operator: str, impl: str) -> None:
    """A side stream, behind work that makes the inputs there, gives the default stream's bits."""
    call = _call(context, operator)
    backward = call.differentiable(impl)
    expected = evaluate(call, impl, call.inputs, backward)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms: a launch on another stream would run first
        inputs = {n: t.clone() for n, t in call.inputs.items()}
        found = evaluate(call, impl, inputs, backward)
    side.synchronize()
    _same(context, expected, found, "on a side stream")


def _graph(context: Context, operator: str, impl: str) -> None:
    """Captured after `warmup`, replayed on other inputs: the bits of a plain call."""
    call, other = _call(context, operator), _call(context, operator, number=5)
    run = call.function(impl)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        deit.kernels.warmup(run, call.inputs)
        with torch.cuda.graph(graph):
            captured = run(call.inputs)
    for name, tensor in call.inputs.items():
        tensor.copy_(other.inputs[name])
    graph.replay()
    with torch.no_grad():
        expected = run(other.inputs)
    torch.cuda.synchronize()
    _same(context, measure.outputs(expected), measure.outputs(captured), "a replayed graph")


# Operator -> (tokens, D), at the batch that puts its largest tensor past 2**31 elements.
LARGE = {"layer_norm": (197, 768), "add_layer_norm": (197, 768), "attention": (197, 192),
         "linear": (197, 768), "gelu_mlp": (197, 192), "patch_embed": (196, 192)}  # fmt: skip


def large_batch(operator: str) -> int:
    """Images whose largest tensor is past 2**31 elements."""
    tokens, dim = LARGE[operator]
    largest = {"attention": 3 * tokens * dim, "patch_embed": 3 * 224 * 224}
    return 2**31 // largest.get(operator, tokens * dim) + 4


def _large(context: Context, operator: str, impl: str) -> None:
    """The first and last samples of a batch past 2**31 elements are those of a batch of two."""
    (tokens, dim), batch = LARGE[operator], large_batch(operator)
    if torch.cuda.mem_get_info()[0] < 14 * 2**31:  # about six tensors of that size
        context.skip(f"{operator}: not enough free memory for tensors past 2**31 elements")
        return
    draw = calls.Draw(dtype=torch.bfloat16, device=context.device)
    with torch.no_grad():
        call = calls.build(operator, draw, calls.Size(batch, tokens, dim), "inference")
        for part in (slice(0, 2), slice(batch - 2, batch)):
            inputs = {n: t[part] if t.shape[0] == batch else t for n, t in call.inputs.items()}
            small = {n: t.clone() for n, t in inputs.items()}
            run = call.function(impl)
            whole, alone = (measure.outputs(run(given)) for given in (call.inputs, small))
            for index, (a, b) in enumerate(zip(whole, alone, strict=True)):
                # Another batch may take other tiles: equal but for the last bit's rounding.
                torch.testing.assert_close(a[part], b, rtol=2e-2, atol=2e-2, msg=f"result {index}")
            del whole, alone


MEMCHECK = ("--tool", "memcheck", "--error-exitcode", "99",
            "--target-processes", "application-only")  # fmt: skip


def sanitizer(context: Context) -> None:
    """compute-sanitizer's memcheck over one small call an operator, forward and backward."""
    if context.job:
        each(context, (context.job,), {"memcheck": _once})
        return
    tool = find_tool("compute-sanitizer")
    if context.dry:
        context.note("compute-sanitizer was not run: a dry run")
        return
    if tool is None:
        context.skip("compute-sanitizer: absent")
        return
    # Each tensor is an allocation of its own, so that a step past its end is seen.
    context.fan_out(
        calls.operators(implementation="triton"),
        [tool, *MEMCHECK],
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    unable = [text for text in context.failures if "Device not supported" in text]
    if unable:
        context.failures = [text for text in context.failures if text not in unable]
        context.skip("compute-sanitizer: it does not support this device")
    # The whole report, for whoever has to find the access.
    for log in context.partial.parent.glob("sanitizer.*.log"):
        if "Invalid" in log.read_text(encoding="utf-8", errors="replace"):
            shutil.copy(log, context.out / log.name)


def _once(context: Context, operator: str, impl: str) -> None:
    call = _call(context, operator)
    evaluate(call, impl, call.inputs, call.differentiable(impl))
    torch.cuda.synchronize()
    assert os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1"
