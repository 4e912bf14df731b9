"""Read the CUDA library's machine code: every kernel's registers, shared memory, spills, units.

    python -m deit.kernels.prove.machine_code [LIBRARY]

No GPU is needed, and without a library built here there is nothing to read. The exit status is 1 if
a kernel spills a register, asks for more shared memory than the least of its architecture's GPUs
has, or lacks the matrix instructions meant for it (HMMA of mma.sync, HGMMA of wgmma; ldmatrix and
cp.async beside mma.sync). Nothing is proved about values.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

from deit.kernels.engine.native import FOLDER, LIBRARIES

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BUILT = FOLDER / LIBRARIES["cuda"]
_FLOAT = {"float": 4, "__half": 2, "__nv_bfloat16": 2}
# Instructions that are looked for: the matrix units', and what feeds them.
_UNITS = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG")
# Shared memory that a block may have on every GPU that runs the code: 8.6 and 8.9 run sm_80's.
_SHARED = {"sm_80": 99 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024,
           "sm_120": 99 * 1024}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture. Shared memory and spills in bytes."""

    arch: str
    name: str
    registers: int
    spills: int
    static: int
    units: tuple[str, ...]

    @property
    def shared(self) -> int:
        """With what it is launched with."""
        return self.static + _dynamic(self.name)

    @property
    def faults(self) -> list[str]:
        """Why it must not ship; empty where it may."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > _SHARED[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {_SHARED[self.arch]} are there")
        missing = [unit for unit in _meant(self.name) if unit not in self.units]
        return [*found, *(f"no {unit}" for unit in missing)]


def _dynamic(name: str) -> int:
    """Shared memory that a kernel is launched with, by its template arguments (csrc/cuda)."""
    if tile := re.search(r"Tile<(\d+), (\d+), (\d+)>", name):
        down, across, high = map(int, tile.groups())
        return 4 * 64 * (down * high * 16 + across * 32)
    if head := re.search(r"attention_kernel<(\w+), (\d+)>", name):
        size = _FLOAT[head[1]]
        keys = (64 if size == 2 else 32) * 64 // int(head[2])
        return (64 + 2 * keys) * int(head[2]) * size
    if wide := re.search(r"linear_kernel<\w+, (\d+),", name):
        return 1024 + 4 * (128 + int(wide[1])) * 128 + 4 * 64 * 128 + 2 * 4 * 8
    return 0


def _meant(name: str) -> tuple[str, ...]:
    if "linear_kernel<" in name:
        return "HGMMA", "UTMALDG"
    product = re.search(r"(?:product|attention)_kernel<(\w+),", name)
    if product is None:
        return ()
    return ("LDGSTS",) if product[1] == "float" else ("HMMA", "LDSM", "LDGSTS")


def _dump(option: str, library: Path) -> str:
    command = [str(_CUOBJDUMP), option, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _by_kernel(text: str, function: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, symbol, what is said of it)."""
    for code in re.split(r"^Fatbin elf code:$", text, flags=re.MULTILINE)[1:]:
        arch = re.search(r"^arch = (\w+)$", code, flags=re.MULTILINE)
        parts = re.split(function, code, flags=re.MULTILINE)
        for symbol, said in zip(parts[1::2], parts[2::2], strict=True):
            yield arch[1] if arch else "", symbol, said


def read(library: Path) -> list[Kernel]:
    """Every kernel of a library, in its order."""
    units = {
        (arch, symbol): tuple(unit for unit in _UNITS if re.search(rf"\b{unit}\b", said))
        for arch, symbol, said in _by_kernel(_dump("-sass", library), r"^\s*Function : (\S+)$")
    }
    found = []
    usage = _by_kernel(_dump("--dump-resource-usage", library), r"^ Function (\S+):$")
    for arch, symbol, said in usage:
        used = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", said)}
        spills = used["STACK"] + used["LOCAL"]
        found.append(Kernel(arch, symbol, used["REG"], spills, used["SHARED"],
                            units[arch, symbol]))  # fmt: skip
    names = _demangled([kernel.name for kernel in found])
    return [Kernel(**{**vars(k), "name": name}) for k, name in zip(found, names, strict=True)]


def _demangled(symbols: list[str]) -> list[str]:
    text = "\n".join(symbols)
    run = subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True)
    return run.stdout.splitlines()


def short(name: str) -> str:
    """A kernel's name without its arguments and namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|deit::|^void ", "", name)
    return re.sub(r"\(.*", "", name.replace("__nv_bfloat16", "bf16").replace("__half", "f16"))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if any kernel has a fault, or there is no library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, default=BUILT)
    library = parser.parse_args(arguments).library
    if not library.is_file():
        print(f"{library}: not there; `deit info` says why the CUDA library was not built")
        return int(library != BUILT)
    kernels = read(library)
    print(f"{'arch':<8}{'kernel':<66}{'regs':>5}{'spills':>7}{'shared':>8}  units")
    for k in kernels:
        faults = "".join(f"  FAULT: {fault}" for fault in k.faults)
        print(f"{k.arch:<8}{short(k.name):<66}{k.registers:>5}{k.spills:>7}{k.shared:>8}  "
              f"{', '.join(k.units)}{faults}")  # fmt: skip
    faulty = sum(bool(kernel.faults) for kernel in kernels)
    print(f"{len(kernels)} kernels, {faulty} with a fault")
    return 1 if faulty or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
