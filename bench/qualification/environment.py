"""What the machine is, and the native libraries built on it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from qualification import compiled
from qualification.checkout import ROOT, load_setup
from qualification.context import Context, facts

PACKAGES = ("numpy", "rich", "timm", "torchvision", "transformers", "tyro")
TOOLS = ("nvcc", "ninja", "c++", "compute-sanitizer", "ncu")
GPU_STATE = "name,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def environment(context: Context) -> None:
    """One row: the device and its limits, versions of packages, and the tools at hand."""
    import importlib.metadata

    import torch

    from evidence import devices

    if not context.dry and not torch.cuda.is_available():
        context.fail("torch sees no GPU; --dry-run tries the stages on the CPU")
        return
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    gpu = {}
    if not context.dry:
        properties = torch.cuda.get_device_properties(context.device)
        gpu = {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        }
    context.row(
        gpu=gpu,
        cores=os.cpu_count(),
        packages=packages,
        tools={tool: bool(find_tool(tool)) for tool in TOOLS},
        nvidia_smi=devices.gpu_query(context.device, GPU_STATE),
    )
    if not context.dry:
        _kernels(context)
    given = facts(context)
    context.note(f"{given['device']}, driver {given['driver']}, torch {given['torch']}, "
                 f"triton {given['triton']}, Python {given['python']}")  # fmt: skip


def _kernels(context: Context) -> None:
    """Hand Triton the kernels that were compiled elsewhere (bench/gpu_kernels.py)."""
    import torch
    from triton import knobs

    from deit.kernels.device import chips

    if not compiled.FOLDER.is_dir():
        context.note("no kernels compiled beforehand: each is compiled when it is first launched")
        return
    arch = chips.family(*torch.cuda.get_device_capability(context.device))
    if reason := compiled.why_not(compiled.FOLDER, arch):
        context.note(f"kernels compiled beforehand are not used: {reason}")
        return
    count = compiled.unpack(compiled.FOLDER, Path(knobs.cache.dir))
    context.note(f"{count} kernels compiled beforehand")


def find_tool(name: str) -> str | None:
    """A program on PATH or among the CUDA toolkit's."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    return shutil.which(name) or (str(beside) if beside.is_file() else None)


def build(context: Context) -> None:
    """Build csrc/ into kernels/, as an editable installation does; a dry run builds nothing, and
    what is built of these very sources is not built again."""
    builder = load_setup()
    before = builder.build_record.read(ROOT / "kernels")
    if (
        not context.dry
        and before
        and before["sources"] == builder.build_record.sources_hash(builder.CSRC)
        and all(library["built"] for library in before["libraries"].values())
    ):
        context.note(f"built of these sources at {before['time']}")
        for kind, library in before["libraries"].items():
            context.row(library=kind, **library)
        return
    with tempfile.TemporaryDirectory() as temp:
        target = Path(temp) if context.dry else ROOT / "kernels"
        env = {**os.environ, **({"FUSED_DEIT_BUILD": "none"} if context.dry else {})}
        record = builder.build_all(target, Path(temp), env)
    for kind, library in record["libraries"].items():
        context.row(library=kind, **library)
        if library["built"]:
            context.note(f"{kind}: built in {library['seconds']} s")
        elif context.dry or "no " in library["reason"].split(":")[0]:
            context.note(f"{kind}: not built, {library['reason']}")
        else:  # the tools are there and the build broke
            context.fail(f"{kind}: not built, {library['reason']}")
