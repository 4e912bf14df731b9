"""Runs the C++ kernels of csrc/cpu under sanitizers, on fuzzed shapes: `make sanitize`.

Builds the driver fuzz.cpp with the kernels twice, under AddressSanitizer with
UndefinedBehaviorSanitizer and under ThreadSanitizer, with setup.py's own sources, instruction sets
and flags. Before the kernels run, each sanitizer is set off on purpose: one that stays silent fails
the check.
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


@dataclass(frozen=True)
class Build:
    """One build of the driver: its flags, what each `--trip` must print, and its cases."""

    name: str
    flags: str
    alarms: dict[str, str]
    cases: int  # of each kernel, for each instruction set


# -O1 keeps accesses that -O3 would merge, at a third of the compile time.
BUILDS = (
    Build(
        "address",
        "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=address,undefined",
        {"address": "heap-buffer-overflow", "undefined": "signed integer overflow"},
        200,
    ),
    Build("thread", "-O1 -g -fsanitize=thread", {"thread": "data race"}, 50),
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


def compile_driver(
    setup: ModuleType,
    build: Build,
    folder: Path,
    compiler: str | None = None,
    sets: tuple[dict[str, str], dict[str, str]] | None = None,
) -> Path:
    """The driver built with one set of sanitizers; setup.NotBuilt where that fails.

    compiler, sets: another processor's, as setup.instruction_sets has them; None for this one's.
    """
    compiler = compiler or setup.find_compiler(os.environ)
    sets = sets or (setup.CPU_SETS, setup.INT8_SETS)
    sources = sorted(HERE.glob("*.cpp"))
    driver = [(f"{source.stem}.o", source, "") for source in sources if source != LANES]
    lanes = [
        (f"lanes_{isa}.o", LANES, f"-DDEIT_ISA={isa} {flags}") for isa, flags in sets[0].items()
    ]
    edges = [*setup.cpu_objects(sets), *driver, *lanes]
    text = setup.ninja_file(
        {"cxx": setup.compile_rule(compiler, f"{setup.CXXFLAGS} {build.flags}")},
        [(out, "cxx", source, flags) for out, source, flags in edges],
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
        rung = run([str(driver), "--trip", which])
        if rung.returncode == 0 or words not in rung.stderr:
            print(f"{build.name}: the sanitizer is silent: --trip {which} printed\n{rung.stderr}")
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
    parser.add_argument("--cases", type=int, help="cases of each kernel and instruction set")
    parser.add_argument("--seed", type=int, default=1, help="the first case's seed")
    options = parser.parse_args()
    setup = load_setup()
    passed = 0
    builds = [build for build in BUILDS if options.only in (None, build.name)]
    for build in builds:
        began = time.monotonic()
        try:
            driver = compile_driver(setup, build, ROOT / "build" / "sanitize" / build.name)
        except setup.NotBuilt as error:
            print(f"{build.name}: {error}")
            continue
        built = time.monotonic() - began
        cases = str(options.cases or build.cases)
        passed += check(driver, build, [cases, str(options.seed), *setup.CPU_SETS])
        print(f"{build.name}: built in {built:.0f} s, {time.monotonic() - began:.0f} s in all")
    print(f"{passed} passed, {len(builds) - passed} failed")
    return 0 if passed == len(builds) else 1


if __name__ == "__main__":
    sys.exit(main())
