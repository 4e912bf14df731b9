"""One operator by several implementations, timed against each other as a device's kernel deserves.

Inputs rotate: a pass calls the operator on several sets of them, more than the cache holds, so
that no set is still there when it comes again. On a GPU the pass is captured in a CUDA graph, so
that Python is not measured; where capturing fails the plain calls are, and the answer says so. On
a CPU a pass is timed as it runs. Contenders are interleaved in rounds.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from deit.kernels.prove.calls import Call
from deit.kernels.prove.timing import cache_bytes as cache_bytes
from evidence import devices
from evidence.timing import Clock, interleave

Function = Callable[[dict[str, Any]], Any]  # an operator on its tensors by name

SAMPLE_SECONDS = 2e-3  # a sample at least: 2000 times the resolution of CUDA events
TIMES_THE_CACHE = 3  # that the sets of inputs take together
MOST_SETS = 256  # of the losses' small inputs
OURS = ("triton", "cuda", "cublaslt", "cpu")
SDPA = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


@dataclass(frozen=True)
class Ceilings:
    """What a device did at best: bytes copied a second (read and written), FLOP/s of a product."""

    bytes_per_s: float
    flops_per_s: float
    copy_bytes: int  # of one copy, read and written
    product: str  # its size and dtype, and what computed it

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, ceiling by ceiling."""
        faster = max(self, other, key=lambda each: each.flops_per_s)
        return replace(faster, bytes_per_s=max(self.bytes_per_s, other.bytes_per_s))

    def seconds(self, traffic: float, flops: float) -> float:
        """Seconds that the bytes and the arithmetic take at least."""
        return max(traffic / self.bytes_per_s, flops / self.flops_per_s)


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, *, small: bool = False, seconds: float = 2.0
) -> Ceilings:
    """A copy of 1 GiB (a CPU: 256 MiB), the best of 20, and devices.Peak; tiny ones if `small`."""
    clock = Clock(device)
    count = 2**16 if small else 2**28 if device.type == "cuda" else 2**26
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    calls = 3 if device.type == "cuda" else 1
    copy = min(clock.time(lambda: target.copy_(source), calls) for _ in range(20))
    peak = devices.Peak(device, dtype)
    if small:
        peak.size, seconds = 64, 0.0
    flops = peak.measure(seconds)
    moved = 2 * source.nbytes
    product = f"{peak.size}³, {str(dtype).removeprefix('torch.')}, by {peak.by}"
    return Ceilings(moved / copy, flops, moved, product)


def copies(size: float, cache: int) -> int:
    """Sets of inputs of `size` bytes whose sum exceeds the cache, MOST_SETS at most; at least 2."""
    return int(min(MOST_SETS, max(2, -(-TIMES_THE_CACHE * cache // max(size, 1)))))


def contenders(call: Call, backward: bool, ours: Sequence[str], *, compiled: bool) -> dict:
    """Name -> Function: those of `ours` that can run the call, and PyTorch's ways of it.

    A vit_block is also run by parts; attention on a GPU by every backend of PyTorch's.
    """

    from deit.kernels.vit_block.calls import by_parts

    able = [name for name in ours if not call.reasons(name)]
    if backward:
        able = [name for name in able if call.differentiable(name)]
    found: dict[str, Function] = {name: call.function(name) for name in able}
    if call.operator == "vit_block":
        found |= {f"{name}, by parts": by_parts(call, name) for name in able}
    found["eager"] = reference = call.function("reference")
    if compiled:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # its backward runs more than once
        found["compiled"] = torch.compile(reference, dynamic=False)
    if call.operator == "attention" and call.inputs["qkv"].is_cuda:
        from torch.nn.attention import SDPBackend

        for name in SDPA:
            label = "sdpa " + name.split("_")[0].lower()
            found[label] = functools.partial(_sdpa, reference, getattr(SDPBackend, name))
    return found


def _sdpa(reference: Function, backend: Any, inputs: dict[str, Any]) -> Any:
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return reference(inputs)


def is_ours(name: str) -> bool:
    """Is a contender one of this package's, whole or by parts?"""
    return name.partition(",")[0] in OURS


def outputs(found: Any) -> list[torch.Tensor]:
    """An operator's outputs as a list."""
    return [found] if isinstance(found, torch.Tensor) else list(found)


@dataclass(frozen=True)
class Prepared:
    """A contender ready to be timed.

    sample: seconds a call, over at least SAMPLE_SECONDS; how: "graph" or "calls"; results: of the
    first set, the outputs or in the backward the gradients, to be checked before anything is timed.
    """

    sample: Callable[[], float]
    how: str
    results: list[torch.Tensor]


def prepare(function: Function, sets: Sequence[Call], backward: bool) -> Prepared:
    """Warm up, capture where there is a GPU, and find how many passes make a sample."""
    device = next(iter(sets[0].inputs.values())).device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):  # None: no change
        steps = [_step(function, call, backward) for call in sets]
        results = [t.detach().clone() for t in outputs(steps[0]()) if t is not None]
        for step in steps:
            step()
    run: Callable[[], object] = lambda: [step() for step in steps]
    how = "calls"
    if stream is not None:
        stream.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                kept = run()
            # Keep what was captured, and what the steps hold of a forward done before: the next
            # capture empties the allocator's cache, and a replay would read unmapped memory.
            held = (kept, steps)
            run, how = functools.partial(lambda graph, held: graph.replay(), graph, held), "graph"
        except Exception as error:
            warnings.warn(f"not captured: {error}", stacklevel=1)
            torch.cuda.synchronize()
    clock = Clock(device)
    run()
    once = min(clock.time(run) for _ in range(2))
    passes = max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))
    return Prepared(lambda: clock.time(run, passes) / len(sets), how, results)


def _step(function: Function, call: Call, backward: bool) -> Callable[[], Any]:
    """One call; in the backward, the gradients of one forward that was done before."""
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return function(call.inputs)

        return forward
    leaves = {n: call.inputs[n].detach().requires_grad_() for n in call.gradients}
    made = outputs(function(call.inputs | leaves))
    generator = torch.Generator(made[0].device).manual_seed(0)
    draw = lambda t: torch.empty_like(t).normal_(generator=generator)
    seeds, wanted = [draw(t) for t in made], list(leaves.values())
    return lambda: torch.autograd.grad(made, wanted, seeds, retain_graph=True, allow_unused=True)


def rounds(
    prepared: Mapping[str, Prepared], count: int, enough: Callable[[int], bool] = lambda _: False
) -> dict[str, list[float]]:
    """Seconds a call of every contender, in interleaved rounds."""
    steps = [lambda _, each=each: each.sample() for each in prepared.values()]
    return dict(zip(prepared, interleave(steps, count, enough=enough), strict=True))
