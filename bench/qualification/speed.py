"""Every operator beside PyTorch's best and beside what the device could do at most.

Device time: each contender's calls are captured in a CUDA graph over several sets of inputs, more
than L2 holds, so that neither Python nor a warm cache is measured; where capturing fails the
plain calls are timed, and the row says so. Contenders are interleaved in rounds.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qualification.context import Context

SAMPLE_SECONDS = 2e-3  # of device time a sample: 2000 times the resolution of CUDA events
ROUNDS = 15
# In this order while time lasts. The losses take logits, whatever D.
WIDTHS = (768, 192, 384)
COMPILED = (768,)  # compiling the reference takes seconds each


@dataclass
class Ceilings:
    """What this device did at best: bytes copied a second (read and written), bf16 FLOP/s."""

    bytes_per_s: float
    flops_per_s: float

    def roofline(self, traffic: float, flops: float) -> float:
        """Seconds that the bytes and the products take at least."""
        return max(traffic / self.bytes_per_s, flops / self.flops_per_s)


def speed(context: Context) -> None:
    """Rows an operator, direction, width and contender; the most telling first."""
    from qualification.calls import INFERENCE, OPERATORS

    if not context.dry:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # the compiled backward runs more than once
    ceilings = measure_ceilings(context)
    for dim in WIDTHS[: 1 if context.dry else None]:
        for backward in (False, True):
            for operator in OPERATORS:
                loss = "loss" in operator or operator == "cross_entropy"
                if backward and operator in INFERENCE:
                    continue
                if (loss and dim != WIDTHS[0]) or (context.dry and operator not in _DRY):
                    continue
                direction = "backward" if backward else "forward"
                if context.left() < 3:
                    context.note(f"no time for {operator} {direction}, D {dim}")
                    continue
                work = functools.partial(_operator, context, operator, dim, backward, ceilings)
                context.attempt(f"{operator} {direction}, D {dim}", work)


_DRY = ("layer_norm", "attention")


def measure_ceilings(context: Context) -> Ceilings:
    """A copy of 1 GiB and a bf16 product of 8192 a side, the best of 20; tiny in a dry run."""
    import torch
    from timing import Clock

    clock, count, side = Clock(context.device), *((2**16, 64) if context.dry else (2**29, 8192))
    source = torch.randn(count, device=context.device).bfloat16()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=context.device).bfloat16() for _ in range(2))
    for _ in range(3):
        target.copy_(source)
        a @ b
    copy = min(clock.time(lambda: target.copy_(source), 3) for _ in range(20))
    product = min(clock.time(lambda: a @ b, 3) for _ in range(20))
    found = Ceilings(2 * source.numel() * source.element_size() / copy, 2 * side**3 / product)
    context.row(ceilings={"copy_bytes_per_s": found.bytes_per_s, "copy_bytes": 2 * count,
                          "bf16_flops_per_s": found.flops_per_s, "product_side": side})  # fmt: skip
    context.note(f"copy {found.bytes_per_s / 1e12:.2f} TB/s, bf16 product "
                 f"{found.flops_per_s / 1e12:.0f} TFLOP/s")  # fmt: skip
    return found


def _operator(
    context: Context, operator: str, dim: int, backward: bool, ceilings: Ceilings
) -> None:
    import torch
    from timing import interleave, paired_ratio, spread

    from qualification import calls

    sizes = {"batch": 256, "tokens": 197, "dim": dim}
    if context.dry:
        sizes = {"batch": 2, "tokens": 5, "dim": 64}
    dtype = torch.float32 if context.dry else torch.bfloat16
    build = functools.partial(calls.build, operator, dtype, context.device, epilogue=False, **sizes)
    sets = [build(seed=1)]
    size = calls.traffic(sets[0], [], backward)
    sets += [build(seed=2 + i) for i in range(_copies(context, size) - 1)]
    steps, seconds, how = {}, {}, {}
    for name, function in contenders(context, sets[0], backward).items():
        prepare = functools.partial(_prepare, context, function, sets, backward)
        try:
            steps[name], seconds[name], how[name] = prepare()
        except Exception as error:  # a backend that cannot take this shape, say
            text = f"{operator} D {dim}: {name} did not run: {type(error).__name__}: {error}"
            ours = name in ("triton", "cuda", "cpu")
            (context.fail if ours else context.note)(" ".join(text.split())[:300])
    outputs = _outputs(calls.function(sets[0], "reference")(sets[0].inputs))
    traffic, flops = (
        calls.traffic(sets[0], outputs, backward),
        calls.flops(sets[0], backward),
    )
    rounds = 3 if context.dry else ROUNDS
    timed = [lambda _, step=step: step() for step in steps.values()]
    enough = lambda done: done >= 5 and context.left() < 0
    samples = dict(zip(steps, interleave(timed, rounds, enough=enough), strict=True))
    best = min((n for n in samples if n not in ("triton", "cuda", "cpu")),
               key=lambda n: spread(samples[n]).median)  # fmt: skip
    floor = ceilings.roofline(traffic, flops)
    for name, found in samples.items():
        middle, ratio = spread(found), paired_ratio(samples[best], found)
        context.row(
            operator=operator,
            direction="backward" if backward else "forward",
            dtype="fp32" if context.dry else "bf16",
            **sizes,
            contender=name,
            timed=how[name],
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
            roofline_share=floor / middle.median if not context.dry else None,
        )


def _copies(context: Context, size: float) -> int:
    """Sets of inputs whose sum is three times L2, eight at most."""
    import torch

    if context.dry:
        return 2
    l2 = torch.cuda.get_device_properties(context.device).L2_cache_size
    return int(min(8, max(1, -(-3 * l2 // size))))


def contenders(context: Context, call: Any, backward: bool) -> dict[str, Callable[..., Any]]:
    """Name -> the operator on tensors by name: our implementations that run, and PyTorch's."""
    import numerics
    import torch

    import deit.kernels
    from qualification import calls

    reasons = deit.kernels.explain(call.operator, **call.inputs, **call.options).reasons
    ours = [n for n in ("triton", "cuda", "cpu") if not reasons[n]]
    if backward:
        ours = [n for n in ours if numerics.differentiable(call, n)]
    if context.dry:  # the interpreter's time means nothing
        ours = [n for n in ours if n != "triton"]
    found = {name: calls.function(call, name) for name in ours}
    if call.operator == "vit_block":
        found |= {f"{name}, by parts": calls.by_parts(call, name) for name in ours}
    reference = calls.function(call, "reference")
    found["eager"] = reference
    if not context.dry and _width(call) in COMPILED:
        found["compiled"] = torch.compile(reference, dynamic=False)
    if call.operator == "attention" and not context.dry:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def backend(which: Any, inputs: dict[str, Any]) -> Any:
            with sdpa_kernel(which):
                return reference(inputs)

        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            label = "sdpa " + name.split("_")[0].lower()
            found[label] = functools.partial(backend, getattr(SDPBackend, name))
    return found


def _width(call: Any) -> int:
    """D; for the losses, which have none, the first that is measured."""
    if call.operator == "attention":
        return int(call.inputs["qkv"].shape[-1]) // 3
    for name in ("x", "pos_embed"):
        if name in call.inputs:
            return int(call.inputs[name].shape[-1])
    return COMPILED[0]


def _outputs(found: Any) -> list[Any]:
    import torch

    return [found] if isinstance(found, torch.Tensor) else list(found)


def _prepare(
    context: Context, function: Callable[..., Any], sets: list[Any], backward: bool
) -> tuple[Callable[[], float], float, str]:
    """(a timed sample in seconds a call, the first estimate of it, "graph" or "calls")."""
    import torch
    from timing import Clock

    stream = None if context.dry else torch.cuda.Stream()
    with torch.cuda.stream(stream):  # None: no change
        steps = [_step(function, call, backward) for call in sets]
        for step in steps:
            step()
            step()
    if stream is not None:
        stream.synchronize()
    run: Callable[[], object] = lambda: [step() for step in steps]
    how = "calls"
    if stream is not None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                kept = run()
            # The graph's memory is the tensors' that were captured: they stay.
            run, how = functools.partial(lambda graph, kept: graph.replay(), graph, kept), "graph"
        except Exception as error:
            warnings.warn(f"not captured: {error}", stacklevel=1)
            torch.cuda.synchronize()
    clock = Clock(context.device)
    run()
    once = min(clock.time(run) for _ in range(2))
    passes = 1 if context.dry else max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))
    return lambda: clock.time(run, passes) / len(sets), once / len(sets), how


def _step(function: Callable[..., Any], call: Any, backward: bool) -> Callable[[], object]:
    """One call; in the backward, the gradients of one forward that was done before."""
    import torch

    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(call.inputs)

        return forward
    leaves = {n: call.inputs[n].detach().requires_grad_() for n in call.gradients}
    outputs = _outputs(function(call.inputs | leaves))
    seeds = [torch.randn_like(t) for t in outputs]
    wanted = list(leaves.values())
    return lambda: torch.autograd.grad(outputs, wanted, seeds, retain_graph=True, allow_unused=True)
