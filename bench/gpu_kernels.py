"""Compiles the Triton kernels that `make gpu` launches, on a machine without a GPU.

    python bench/gpu_kernels.py                      # for an H100, into build/gpu-kernels
    python bench/gpu_kernels.py --only right --jobs 8
    python bench/gpu_kernels.py --list               # what would be compiled

Compiling them takes a thousand seconds of a core, which a GPU's time is too dear for. Take
build/gpu-kernels along with the checkout: qualify.py hands it to Triton. It has to be compiled by
the Python and Triton of the GPU's machine. Given again, this goes on where it was stopped.

Each kernel is checked as `make aot` checks those that ship: spills, shared memory, products that
are not waited for, indices that overflow. Of a configuration that `deit tune` only tries they are
said, and are no fault. Exit status: 0; 1 for a fault, or for kernels that are not compiled yet.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import triton

import evidence
from deit.commands import flags
from deit.kernels.device import chips
from deit.kernels.prove import aot, recorded
from qualification import compiled, kernels
from qualify import stages_of


@dataclass(frozen=True)
class Settings:
    """For which GPU, and which of its stages."""

    out: Path = compiled.FOLDER
    """the folder that travels; beside it, .cache, stays"""
    arch: int = 90
    """compute capability, without the dot"""
    multiprocessors: int = recorded.MULTIPROCESSORS
    """of the GPU; an H100 SXM has 132"""
    only: str = ""
    """stages of qualify.py, or right, robust, fast; by commas"""
    forms: bool = False
    """also every form of each operator, on rows off 16 bytes too"""
    jobs: int = min(8, os.cpu_count() or 1)
    """processes"""
    seconds: float | None = None
    """begin no kernel after so long"""
    list: bool = False
    """say what there is, and compile nothing"""


def main(settings: Settings) -> int:
    if settings.arch not in chips.CHIPS:
        print(f"--arch: expected one of {', '.join(map(str, chips.CHIPS))}; got {settings.arch}",
              file=sys.stderr)  # fmt: skip
        return 2
    for name in ("multiprocessors", "jobs", "seconds"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            print(f"--{name}: expected a positive number; got {value}", file=sys.stderr)
            return 2
    try:
        stages = tuple(stage.name for stage in stages_of(settings.only))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    noted = kernels.of_stages(stages, settings.arch, settings.multiprocessors, forms=settings.forms)
    cases = list(noted.cases.values())
    print(f"{len(cases)} kernels in {noted.launches} launches, triton {triton.__version__}")
    if settings.list:
        print(*(f"{case.operator}: {case.variant}" for case in cases), sep="\n")
        return 0
    began, faulty, hashes = time.monotonic(), 0, set()
    seconds = float("inf") if settings.seconds is None else settings.seconds
    cache = settings.out.with_name(f"{settings.out.name}.cache")
    print(aot.HEADER)
    for one in recorded.compile_all(cases, cache, settings.jobs, seconds):
        tried = one.result.case.variant.startswith(kernels.TRIED)
        faulty += bool(one.result.faults) and not tried
        hashes.add(one.hash)
        if one.result.faults:
            print(f"{aot.row(one.result)}  by {one.result.kernel}", flush=True)
    about = {"arch": settings.arch, "triton": triton.__version__, "stages": list(stages),
             "kernels_sha256": evidence.kernels_sha256()}  # fmt: skip
    count = compiled.pack(cache, hashes, settings.out, about)
    print(f"{count} of {len(cases)} kernels in {settings.out}, {time.monotonic() - began:.0f} s, "
          f"{faulty} with a fault")  # fmt: skip
    return 1 if faulty or count < len(cases) else 0


if __name__ == "__main__":
    sys.exit(main(flags.parse(Settings, None, __doc__)))
