"""Compile every shipped kernel for GPUs that are not here, and check what came out.

    python -m deit.kernels.prove.aot [--arch 90 100] [--dtype bf16] [--operator linear]

Runs Triton's whole compiler, ptxas included, on a CPU, and reads registers and spills out of
the machine code. The exit status is 1 if a kernel spills a register, asks for more shared memory
than the architecture has, lacks the matrix instructions (wgmma on Hopper, tcgen05 on Blackwell,
mma elsewhere) or the tensor copies (TMA) meant for it, computes an index that its bits cannot
hold (`offsets`), or may overwrite what a product still reads (`hazards`). Where ptxas could not
leave Hopper's products in flight together it is said, and no fault. Launches of the same
kernel share one compilation. Nothing is proved about values.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from deit.kernels.device import chips, common
from deit.kernels.prove import hazards, launches, offsets

_MATRIX = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
_TMA = "cp.async.bulk.tensor"
_SERIALISED = "wgmma.mma_async instructions are serialized"
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Result:
    """What the compiler made of a case. Shared memory and spills in bytes.

    blocks: how many blocks of `warps` warps a multiprocessor holds at once.
    overflows: what `offsets` says of the case on tensors of more than 2**31 elements.
    overwrites: what `hazards` says of the kernel.
    serialised: ptxas waits for each wgmma before the next; known only of what is compiled anew.
    """

    case: launches.Shipped
    kernel: str
    registers: int
    spills: int
    shared: int
    instructions: tuple[str, ...]
    warps: int = 0
    blocks: int = 0
    overflows: tuple[str, ...] = ()
    overwrites: tuple[str, ...] = ()
    serialised: bool = False
    error: str = ""

    @property
    def occupancy(self) -> float:
        """Resident warps, as a part of those that a multiprocessor can hold."""
        return self.blocks * self.warps / chips.CHIPS[self.case.arch].warps

    @property
    def faults(self) -> list[str]:
        """Why this kernel must not ship; empty where it may."""
        if self.error:
            return [self.error]
        found = []
        case, limit = self.case, chips.SHARED_MEMORY[self.case.arch]
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {limit} are there")
        if case.tensor_cores and _MATRIX[case.arch] not in self.instructions:
            found.append(f"no {_MATRIX[case.arch]}")
        if case.tma and _TMA not in self.instructions:
            found.append(f"no {_TMA}")
        return [*found, *self.overflows, *self.overwrites]


class _Target:
    """As much of a Triton driver as compiling needs: a GPU of this architecture, not there.

    The "device" is the architecture's number, so Triton keeps the kernels of each apart.
    """

    def __init__(self, arch: int, device: int) -> None:
        self.arch, self.device = arch, device

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def target(arch: int, device: int | None = None) -> Iterator[None]:
    """Kernels compiled inside are for this architecture."""
    driver.set_active(_Target(arch, arch if device is None else device))
    try:
        yield
    finally:
        # Not reset_active(): that looks for a real driver at once, and fails where there is none.
        driver.set_active(None)


@contextlib.contextmanager
def _ptxas_log() -> Iterator[io.StringIO]:
    """What ptxas says of the kernels compiled inside, which Triton prints where it is asked to."""
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        yield log


def compile_case(case: launches.Shipped) -> Result:
    """Compile one case. Raises RuntimeError under TRITON_INTERPRET, which has no compiler."""
    return compile_group([case])[0]


def compile_group(group: list[launches.Shipped]) -> list[Result]:
    """Compile a kernel once for every case that launches it (`kernel_of`)."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("ahead-of-time compilation needs TRITON_INTERPRET unset")
    launch = group[0].build()
    result, compiled = compile_launch(group[0], launch)
    if compiled is None:
        return [replace(result, case=each) for each in group]
    ir = compiled.asm["ttir"]
    return [replace(result, case=each, overflows=tuple(_overflows(each, ir))) for each in group]


def compile_launch(case: launches.Shipped, launch: common.Launch) -> tuple[Result, Any]:
    """What became of a launch, and the compiled kernel; None where it does not compile."""
    name = launch.kernel.fn.__name__
    try:
        with target(case.arch), _ptxas_log() as log:
            compiled = launch.compile()
    except (triton.TritonError, RuntimeError) as error:  # a pass that gives up is a RuntimeError
        message = f"does not compile: {' '.join(str(error).split())[-300:]}"
        return Result(case, name, 0, 0, 0, (), error=message), None
    registers, spills = resource_usage(compiled.asm["cubin"])
    ptx, made = compiled.asm["ptx"], compiled.metadata
    columns = getattr(made, "tmem_size", None) or 0
    result = Result(
        case=case,
        kernel=name,
        registers=registers,
        spills=spills,
        shared=made.shared,
        instructions=tuple(i for i in (*sorted(set(_MATRIX.values())), _TMA) if i in ptx),
        warps=made.num_warps,
        overwrites=tuple(hazards.faults(compiled.asm["ttgir"])),
        serialised=_SERIALISED in log.getvalue(),
        blocks=chips.resident_blocks(case.arch, made.num_warps, registers, made.shared, columns),
    )
    return result, compiled


def _overflows(case: launches.Shipped, ir: str) -> list[str]:
    launch = replace(case, batch=offsets.LARGE_BATCH).build()
    try:
        return offsets.read(ir, launch.arguments, launch.grid).faults(launch.arguments)
    except NotImplementedError as error:
        return [f"offsets not understood: {error}"]


def kernel_of(case: launches.Shipped) -> tuple[object, ...]:
    """What two cases have in common exactly where they launch the same kernel."""
    return key_of(case.build(), case.arch)


def key_of(launch: common.Launch, arch: int) -> tuple[object, ...]:
    """What two launches have in common exactly where an architecture runs one kernel for both."""
    seen: list[tuple[object, ...]] = []

    def note(*, key: str, fn: Any, **_: object) -> bool:
        seen.append((arch, fn.module, fn.name, key))
        return True  # that is all: do not compile

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with target(arch, device=-arch):  # has no kernel in memory
            launch.compile()
    finally:
        knobs.runtime.jit_cache_hook = before
    return seen[0]


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


def compile_all(chosen: Iterable[launches.Shipped], jobs: int = 2) -> Iterator[list[Result]]:
    """The results of each kernel, from `jobs` processes with an empty compilation cache."""
    groups: dict[tuple[object, ...], list[launches.Shipped]] = {}
    for case in chosen:
        groups.setdefault(kernel_of(case), []).append(case)
    with (
        tempfile.TemporaryDirectory(prefix="deit-aot-") as cache,
        ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_use_cache,
            initargs=(cache,),
        ) as pool,
    ):
        yield from pool.map(compile_group, groups.values())


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def row(result: Result) -> str:
    """One line of the table."""
    case = result.case
    limit = chips.SHARED_MEMORY[case.arch]
    return (
        f"sm_{case.arch:<4}{case.operator:<22}{case.size:>5} {case.dtype:<5}{case.variant:<27}"
        f"{result.registers:>4}{result.spills:>7}{result.shared:>8}/{limit:<7}"
        f"{result.blocks:>2} x {result.warps:<2}{result.occupancy:>6.0%}  "
        f"{', '.join(result.instructions)}"
        + ", one by one" * result.serialised
        + "".join(f"  FAULT: {fault}" for fault in result.faults)
    )


HEADER = (
    f"{'arch':<7}{'operator':<22}{'size':>5} {'dtype':<5}{'variant':<27}{'regs':>4}{'spills':>7}"
    f"{'shared/limit':>15}  blocks x warps, occupancy; matrix and copy instructions"
)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if any kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=chips.CHIPS,
                        default=launches.ARCHITECTURES)  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=launches.DTYPES, default=tuple(launches.DTYPES)
    )
    parser.add_argument("--operator", nargs="+", help="only these operators")
    parser.add_argument("--triton", help="fail unless this is the version that compiles")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if options.triton not in (None, triton.__version__):
        parser.error(f"--triton is {options.triton}, and {triton.__version__} was imported")
    chosen = [
        case
        for case in launches.shipped(tuple(options.arch), tuple(options.dtype))
        if not options.operator or case.operator in options.operator
    ]
    began = time.monotonic()
    print(f"triton {triton.__version__} from {Path(triton.__file__).parent}")
    print(HEADER)
    kernels = faulty = 0
    for results in compile_all(chosen, options.jobs):
        print(*map(row, results), sep="\n", flush=True)
        kernels += 1
        faulty += any(result.faults for result in results)
    print(
        f"triton {triton.__version__}: {len(chosen)} launches of {kernels} kernels compiled in "
        f"{time.monotonic() - began:.0f} s, {faulty} with a fault"
    )
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
