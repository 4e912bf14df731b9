"""Runs the C++ kernels of csrc/cpu for Arm under an emulator, on fuzzed shapes: `make arm`.

Builds the driver fuzz.cpp by a cross compiler, with setup.py's own sources, sets and flags, and
runs it as several processors. It checks values, and which sets each processor is found to run. No
time is measured, and none would say anything of an Arm processor.

Needs Debian's packages g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import sanitize


@dataclass(frozen=True)
class Processor:
    """An emulated processor: the driver's sets that it runs, and the best of either kind."""

    name: str
    sets: tuple[str, ...]
    best: str


PROCESSORS = (
    Processor("cortex-a53", ("neon", "portable"), "neon neon"),
    Processor("neoverse-n1", ("neon",), "neon neon_dotprod"),
    Processor("max", ("neon_bf16", "neon"), "neon_bf16 neon_i8mm"),
)
LIBRARIES = "/usr/aarch64-linux-gnu"  # where the cross compiler's package puts them
# UBSan alone: AddressSanitizer's memory does not fit an emulator's. The driver's fences stay.
BUILD = sanitize.Build(
    "arm",
    "-O1 -g -fno-sanitize-recover=all -fsanitize=undefined",
    {"--trip undefined": "signed integer overflow"},
    20,
)


def emulated(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check(driver: str, processor: Processor, cases: int, seed: int) -> bool:
    """Whether a processor runs the sets that it should, and every case passes; says so."""
    run = ("qemu-aarch64", "-L", LIBRARIES, "-cpu", processor.name, driver)
    for which, words in BUILD.alarms.items():
        rung = emulated(*run, *which.split())
        if rung.returncode == 0 or words not in rung.stderr:
            print(f"{processor.name}: the sanitizer is silent: {which}: {rung.stderr}")
            return False
    best = emulated(*run, "--best")
    if best.stdout.strip() != processor.best:
        print(f"{processor.name}: expected {processor.best}, found {best.stdout}{best.stderr}")
        return False
    done = emulated(*run, str(cases), str(seed), *processor.sets)
    print(done.stdout, end="")
    skipped = "does not run it" in done.stdout
    if done.returncode != 0 or skipped:
        print(f"{processor.name}: failed (exit {done.returncode})\n{done.stderr}")
    return done.returncode == 0 and not skipped


def main() -> int:
    """Command line; exit status 1 where anything failed or could not be built."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=BUILD.cases, help="of each kernel and set")
    parser.add_argument("--seed", type=int, default=1, help="the first case's seed")
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    options = parser.parse_args()
    for program in (options.compiler, "qemu-aarch64"):
        if shutil.which(program) is None:
            print(f"arm: no {program} (apt-get install g++-aarch64-linux-gnu qemu-user)")
            return 1
    setup = sanitize.load_setup()
    began = time.monotonic()
    sets = setup.instruction_sets("aarch64", "linux")
    folder = sanitize.ROOT / "build" / "arm"
    try:
        driver = sanitize.compile_driver(setup, BUILD, folder, options.compiler, sets)
    except setup.NotBuilt as error:
        print(f"arm: {error}")
        return 1
    print(f"arm: built in {time.monotonic() - began:.0f} s")
    passed = 0
    for processor in PROCESSORS:
        started = time.monotonic()
        passed += check(os.fspath(driver), processor, options.cases, options.seed)
        spent = time.monotonic() - started
        print(f"{processor.name}: {spent:.0f} s under the emulator, values only")
    print(f"{passed} passed, {len(PROCESSORS) - passed} failed")
    return 0 if passed == len(PROCESSORS) else 1


if __name__ == "__main__":
    sys.exit(main())
