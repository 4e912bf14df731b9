"""Runs the kernels of csrc/cpu and csrc/cuda under sanitizers, on fuzzed shapes: `make sanitize`.

Builds two drivers twice, under AddressSanitizer with UndefinedBehaviorSanitizer and under
ThreadSanitizer: fuzz.cpp with the CPU's kernels, by setup.py's own sources, instruction sets and
flags; and tests/emulated/fuzz.cpp with the CUDA kernels on emulator.h. Before the kernels run, each
sanitizer is set off on purpose: one that stays silent fails the check.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LANES = HERE / "lanes.cpp"  # compiled once per instruction set, as the kernels are
FOLDER = ROOT / "build" / "sanitize"
CUDA, EMULATED = ROOT / "csrc" / "cuda", ROOT / "tests" / "emulated"

# What compiles csrc/cuda for the CPU. Hopper's own products have units that nothing emulates.
EMULATION = f"-DDEIT_EMULATED -I{EMULATED} -Wno-unknown-pragmas"
NOT_EMULATED = ("linear_hopper.cu",)


@dataclass(frozen=True)
class Build:
    """One build of a driver: its flags, what each alarm must print, and its cases."""

    name: str
    flags: str
    alarms: dict[str, str]  # the driver's arguments -> what the sanitizer says
    cases: int  # of each kernel, for each instruction set
    emulated: bool = False


# -O1 keeps accesses that -O3 would merge, at a third of the compile time.
ADDRESS = "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=address,undefined"
THREAD = "-O1 -g -fsanitize=thread"
BUILDS = (
    Build(
        "address",
        ADDRESS,
        {
            "--trip address": "heap-buffer-overflow",
            "--trip undefined": "signed integer overflow",
        },
        200,
    ),
    Build("thread", THREAD, {"--trip thread": "data race"}, 50),
    Build("cuda-address", ADDRESS, {"--withhold 4 1 linear": "use-after-poison"}, 30, True),
    Build("cuda-thread", THREAD, {"--drop all 4 1 linear": "data race"}, 8, True),
)


def load_setup() -> ModuleType:
    """setup.py as a module: it knows the sources, the sets and the compiler."""
    spec = importlib.util.spec_from_file_location("fused_deit_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def emulated_objects(others: list[tuple[Path, str]]) -> list[tuple[str, Path, str]]:
    """(object, source, flags) of the CUDA kernels on the CPU, and of other sources."""
    kernels = [path for path in sorted(CUDA.glob("*.cu")) if path.name not in NOT_EMULATED]
    sources = [*((path, "-x c++") for path in kernels), (EMULATED / "hopper.cpp", ""), *others]
    return [(f"{path.name}.o", path, flags) for path, flags in sources]


def native_objects(
    setup: ModuleType, sets: tuple[dict[str, str], dict[str, str]]
) -> list[tuple[str, Path, str]]:
    """The same of the C++ kernels by setup.instruction_sets, and of their driver."""
    own = [(f"{path.stem}.o", path, "") for path in sorted(HERE.glob("*.cpp")) if path != LANES]
    lanes = [(f"lanes_{isa}.o", LANES, f"-DDEIT_ISA={isa} {each}") for isa, each in sets[0].items()]
    return [*setup.cpu_objects(sets), *own, *lanes]


def compile_driver(
    setup: ModuleType,
    build: Build,
    folder: Path,
    compiler: str | None = None,
    sets: tuple[dict[str, str], dict[str, str]] | None = None,
) -> Path:
    """The driver built with one set of sanitizers; setup.NotBuilt where that fails.

    compiler, sets: another processor's; None for this one's.
    """
    compiler = compiler or setup.find_compiler(os.environ)
    if build.emulated:
        objects, flags = emulated_objects([(EMULATED / "fuzz.cpp", "")]), EMULATION
    else:
        objects, flags = native_objects(setup, sets or (setup.CPU_SETS, setup.INT8_SETS)), ""
    text = setup.ninja_file(
        {"cxx": setup.compile_rule(compiler, f"{setup.CXXFLAGS} {build.flags} {flags}")},
        [(out, "cxx", source, flags) for out, source, flags in objects],
        f"{compiler} {build.flags} -o $out $in -pthread",
        folder / "fuzz",
    )
    setup.run_ninja(folder, text, os.environ)
    return folder / "fuzz"


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The command with its output captured; what it reports ends it."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        command, env=os.environ | options, capture_output=True, text=True, check=False
    )


def check(driver: Path, build: Build, arguments: Sequence[str]) -> bool:
    """Whether every alarm rings and every case passes; says so on stdout."""
    for which, words in build.alarms.items():
        rung = run([str(driver), *which.split()])
        if rung.returncode == 0 or words not in rung.stderr:
            print(f"{build.name}: the sanitizer is silent: {which} printed\n{rung.stderr}")
            return False
    done = run([str(driver), *arguments])
    print(done.stdout, end="")
    if done.returncode != 0:
        print(f"{build.name}: failed (exit {done.returncode})\n{done.stderr}")
    return done.returncode == 0


def main() -> int:
    """Command line; exit status 1 where anything was reported or could not be built."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[build.name for build in BUILDS])
    parser.add_argument("--cases", type=int, help="cases of each kernel and set")
    parser.add_argument("--seed", type=int, default=1, help="the first case's seed")
    options = parser.parse_args()
    setup = load_setup()
    passed = 0
    builds = [build for build in BUILDS if options.only in (None, build.name)]
    for build in builds:
        began = time.monotonic()
        try:
            driver = compile_driver(setup, build, FOLDER / build.name)
        except setup.NotBuilt as error:
            print(f"{build.name}: {error}")
            continue
        built = time.monotonic() - began
        cases = str(options.cases or build.cases)
        sets = () if build.emulated else setup.CPU_SETS
        passed += check(driver, build, [cases, str(options.seed), *sets])
        print(f"{build.name}: built in {built:.0f} s, {time.monotonic() - began:.0f} s in all")
    print(f"{passed} passed, {len(builds) - passed} failed")
    return 0 if passed == len(builds) else 1


if __name__ == "__main__":
    sys.exit(main())
