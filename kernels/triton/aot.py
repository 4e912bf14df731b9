"""Compile every shipped kernel for GPUs that are not here, and check what came out.

    python -m deit.kernels.triton.aot [--arch 90 100] [--dtype bf16] [--operator linear]

Runs Triton's whole compiler, ptxas included, on a CPU, and reads registers and spills out of
the machine code. The exit status is 1 if a kernel spills registers (in fp32: more than
FP32_SPILLS bytes), asks for more shared memory than the architecture has, or lacks the matrix
instructions (wgmma on Hopper, tcgen05 on Blackwell, mma elsewhere) or the tensor copies (TMA)
meant for it. Nothing is proved about values.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from deit.kernels.triton import cases, configs

_MATRIX = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
_TMA = "cp.async.bulk.tensor"
# Bytes of spills that an fp32 kernel may have. Its IEEE products run on the plain cores, tens of
# times slower than the copies of a few registers; half-precision kernels may spill nothing.
FP32_SPILLS = 64
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Result:
    """What the compiler made of a case. Shared memory and spills in bytes."""

    case: cases.Case
    kernel: str
    registers: int
    spills: int
    shared: int
    instructions: tuple[str, ...]
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """Why this kernel must not ship; empty where it may."""
        if self.error:
            return [self.error]
        found = []
        case, limit = self.case, configs.SHARED_MEMORY[self.case.arch]
        if self.spills > (FP32_SPILLS if case.dtype == "fp32" else 0):
            found.append(f"spills {self.spills} bytes")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {limit} are there")
        if case.tensor_cores and _MATRIX[case.arch] not in self.instructions:
            found.append(f"no {_MATRIX[case.arch]}")
        if case.tma and _TMA not in self.instructions:
            found.append(f"no {_TMA}")
        return found


class _Target:
    """As much of a Triton driver as compiling needs: a GPU of this architecture, not there.

    The "device" is the architecture's number, so Triton keeps the kernels of each apart.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def target(arch: int) -> Iterator[None]:
    """Kernels compiled inside are for this architecture."""
    driver.set_active(_Target(arch))
    try:
        yield
    finally:
        # Not reset_active(): that looks for a real driver at once, and fails where there is none.
        driver.set_active(None)


def compile_case(case: cases.Case) -> Result:
    """Compile one case. Raises RuntimeError under TRITON_INTERPRET, which has no compiler."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("ahead-of-time compilation needs TRITON_INTERPRET unset")
    launch = case.build()
    name = launch.kernel.fn.__name__
    try:
        with target(case.arch):
            compiled = launch.compile()
    except (triton.TritonError, RuntimeError) as error:  # a pass that gives up is a RuntimeError
        message = " ".join(str(error).split())
        return Result(case, name, 0, 0, 0, (), f"does not compile: {message[-300:]}")
    registers, spills = resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Result(
        case=case,
        kernel=name,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        instructions=tuple(i for i in (*sorted(set(_MATRIX.values())), _TMA) if i in ptx),
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory a thread) from machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compile_all(chosen: Iterable[cases.Case], jobs: int = 2) -> Iterator[Result]:
    """Results in order, from `jobs` processes with an empty compilation cache."""
    with (
        tempfile.TemporaryDirectory(prefix="deit-aot-") as cache,
        ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_use_cache,
            initargs=(cache,),
        ) as pool,
    ):
        yield from pool.map(compile_case, chosen, chunksize=4)


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def row(result: Result) -> str:
    """One line of the table."""
    case = result.case
    limit = configs.SHARED_MEMORY[case.arch]
    return (
        f"sm_{case.arch:<4}{case.operator:<15}{case.size:>5} {case.dtype:<5}{case.variant:<20}"
        f"{result.registers:>4}{result.spills:>7}{result.shared:>8}/{limit:<7}"
        f"{', '.join(result.instructions)}"
        + "".join(f"  FAULT: {fault}" for fault in result.faults)
    )


HEADER = (
    f"{'arch':<7}{'operator':<15}{'size':>5} {'dtype':<5}{'variant':<20}{'regs':>4}{'spills':>7}"
    f"{'shared/limit':>14}   matrix and copy instructions"
)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if any kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=configs.SHARED_MEMORY,
                        default=cases.ARCHITECTURES)  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=cases.DTYPES, default=tuple(cases.DTYPES))
    parser.add_argument("--operator", nargs="+", help="only these operators")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    chosen = [
        case
        for case in cases.all_cases(tuple(options.arch), tuple(options.dtype))
        if not options.operator or case.operator in options.operator
    ]
    print(f"triton {triton.__version__}, {len(chosen)} kernels")
    print(HEADER)
    faulty = 0
    for result in compile_all(chosen, options.jobs):
        print(row(result), flush=True)
        faulty += bool(result.faults)
    print(f"{len(chosen)} compiled, {faulty} with a fault")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
