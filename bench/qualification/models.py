"""Whole networks: bench/throughput.py, briefly, each run in a process of its own."""

from __future__ import annotations

import functools
import importlib.util
import time

from qualification.context import Context

ARCHITECTURES = ("deit_b", "deit_s", "deit_ti")
IMPLEMENTATIONS = ("triton", "auto")
FP8 = ("deit_b", "triton")
PACKAGES = ("PIL", "rich", "timm", "torchvision")  # which the other stages do without


def throughput(context: Context) -> None:
    """As a stage: one job a network and implementation, one at a time. As a job: its rows."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        context.skip(f"every network: bench/throughput.py needs {', '.join(missing)}")
    elif context.job:
        arch, impl = context.job.split(":")
        context.attempt(context.job, functools.partial(measure, context, arch, impl))
    elif context.dry:
        context.attempt("deit_ti:auto", functools.partial(measure, context, "deit_ti", "auto"))
    else:
        context.jobs = 1  # two on one GPU would time each other
        context.fan_out([f"{a}:{impl}" for a in ARCHITECTURES for impl in IMPLEMENTATIONS])


def measure(context: Context, arch: str, impl: str) -> None:
    """Fused, as a CUDA graph too, and eager; what is compiled takes minutes, left to the script.

    DeiT-B's products are wide enough for e4m3 to pay: it is raced there, by its kernels.
    """
    import throughput
    from evidence import devices
    from race import tables
    from race.progress import Progress

    peers = ("fused-graph", "fused-fp8") if (arch, impl) == FP8 else ("fused-graph",)
    options = throughput.Options(
        arch=arch,
        against=("none",),
        bs=1 if context.dry else 256,
        img_size=32 if context.dry else None,
        impl=impl,
        device=str(context.device),
        seconds=0.05 if context.dry else 2.0,
        budget=4.0 if context.dry else 0.0,
        peers=peers,
    )
    with Progress(time.perf_counter()) as progress:
        settings = throughput.settle(options)
        race, _ = throughput.measure(settings, [], progress)
    if race.refused:
        context.fail(f"{arch} {impl}: wrong outputs: {'; '.join(race.notes)}")
    if not race.finalists:
        context.fail(f"{arch} {impl}: nothing was timed")
        return
    arguments = ["--arch", arch, "--impl", impl, "--against", "none", "--peers", ",".join(peers)]
    for row in tables.rows(race, devices.describe(settings.device), arguments, {}):
        context.row(**{**row, "impl": impl})
