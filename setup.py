"""Builds the native libraries of csrc/ beside the Python package.

    csrc/cpu   ->  deit/kernels/_cpu.abi3.so    needs a C++20 compiler (CXX, c++, g++ or clang++)
    csrc/cuda  ->  deit/kernels/_cuda.abi3.so   needs nvcc too (CUDA_HOME, CUDA_PATH,
                                                /usr/local/cuda or PATH); no GPU

Both use PyTorch's stable C++ interface at version 2.11: what is built against one torch runs on
any later one, so the build environment's torch need not be the one that runs. What could not be
built is written down, with the reason, in a record that `deit info` and every error quote.

FUSED_DEIT_BUILD says what must be built:
    auto      whatever can be; the installation succeeds without (the default)
    cpu       the C++ library or an error; the CUDA library is not tried
    required  both, or an error
    none      nothing
MAX_JOBS limits the compilers running at once.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODES = ("auto", "cpu", "required", "none")
TORCH_TARGET = "0x020b000000000000"  # 2.11
SUFFIX = ".abi3.so"

# GCC 12's own AVX-512 headers read `_mm512_undefined_ps` before setting it.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -Wno-maybe-uninitialized"
AVX2 = "-mavx2 -mfma -mf16c"
NEON = "-DDEIT_NEON"


def instruction_sets(machine: str, system: str) -> tuple[dict[str, str], dict[str, str]]:
    """Instruction set -> the flags its copy of csrc/cpu/kernels.cpp is compiled with, for a
    processor and a system by Python's names; and the same for csrc/cpu/int8_kernels.cpp."""
    floats: dict[str, str] = {}
    eights: dict[str, str] = {}
    if machine.lower() in ("x86_64", "amd64"):
        floats = {"avx512_bf16": f"{AVX512} -mavx512bf16", "avx512": AVX512, "avx2": AVX2}
        eights = {
            "avx512vnni": f"{AVX512} -mavx512vnni",
            "avxvnni": f"{AVX2} -mavxvnni",
            "avx2": AVX2,
        }
    elif machine.lower() in ("aarch64", "arm64") and system == "linux":  # whose sets it can tell
        floats = {"neon_bf16": f"{NEON} -march=armv8.2-a+bf16", "neon": NEON}
        eights = {
            "neon_i8mm": f"{NEON} -march=armv8.2-a+i8mm",
            "neon_dotprod": f"{NEON} -march=armv8.2-a+dotprod",
            "neon": NEON,
        }
    return floats | {"portable": ""}, eights | {"portable": ""}


CPU_SETS, INT8_SETS = instruction_sets(platform.machine(), sys.platform)

# Machine code for A100, H100, B200 and GeForce's Blackwell; PTX for whatever comes after B200.
CUDA_CODE = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "sm_100": "arch=compute_100,code=sm_100",
    "sm_120": "arch=compute_120,code=sm_120",
    "compute_100": "arch=compute_100,code=compute_100",
}
CXXFLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra"


class NotBuilt(Exception):
    """Why a library was not built, in words for the user."""


@dataclass(frozen=True)
class Torch:
    """The torch whose headers and libraries a build uses."""

    version: str
    cuda: str | None
    include: Path
    lib: Path


def _load_record_module() -> ModuleType:
    path = ROOT / "deit" / "kernels" / "engine" / "build_record.py"
    spec = importlib.util.spec_from_file_location("build_record", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_record = _load_record_module()


def mode(env: Mapping[str, str]) -> str:
    """FUSED_DEIT_BUILD, checked."""
    chosen = env.get("FUSED_DEIT_BUILD", "auto").strip().lower() or "auto"
    if chosen not in MODES:
        raise SystemExit(f"FUSED_DEIT_BUILD: expected one of {', '.join(MODES)}; got {chosen!r}")
    return chosen


def find_compiler(env: Mapping[str, str]) -> str:
    """The C++ compiler's command."""
    named = env.get("CXX", "").strip()
    candidates = [named] if named else ["c++", "g++", "clang++"]
    for command in candidates:
        if shutil.which(shlex.split(command)[0], path=env.get("PATH")):
            return command
    if named:
        raise NotBuilt(f"the C++ compiler named by CXX, {named!r}, was not found")
    raise NotBuilt(f"no C++ compiler: none of {', '.join(candidates)} on PATH, and no CXX")


def find_nvcc(env: Mapping[str, str], default: str = "/usr/local/cuda") -> Path:
    """The CUDA compiler. Whether this machine has a GPU does not matter."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(variable):
            nvcc = Path(env[variable]) / "bin" / "nvcc"
            if nvcc.is_file():
                return nvcc
            raise NotBuilt(f"no nvcc: {variable} is {env[variable]!r}, without bin/nvcc")
    nvcc = Path(default) / "bin" / "nvcc"
    if nvcc.is_file():
        return nvcc
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    if on_path:
        return Path(on_path).resolve()
    raise NotBuilt(f"no nvcc: not in CUDA_HOME, CUDA_PATH, {default} or PATH")


def find_ninja(env: Mapping[str, str]) -> str:
    found = shutil.which("ninja", path=env.get("PATH"))
    beside = Path(sys.executable).parent / "ninja"
    if found is None and beside.is_file():
        found = str(beside)
    if found is None:
        raise NotBuilt("no ninja on PATH (pip install ninja)")
    return found


def find_torch() -> Torch:
    try:
        import torch
    except ImportError as error:
        raise NotBuilt(f"torch does not import in the build environment: {error}") from error
    root = Path(torch.__file__).resolve().parent
    return Torch(torch.__version__, torch.version.cuda, root / "include", root / "lib")


def version_line(command: str) -> str:
    """What a compiler says of itself: the line of `--version` that holds the version."""
    try:
        run = subprocess.run(
            [*shlex.split(command), "--version"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"{command} ({error})"
    lines = run.stdout.strip().splitlines() or ["unknown"]
    return next((line for line in lines if "release" in line), lines[0])


def cpu_objects(
    sets: tuple[dict[str, str], dict[str, str]] = (CPU_SETS, INT8_SETS),
) -> list[tuple[str, Path, str]]:
    """(object, source, flags) of all that knows no torch: what the sanitizers run, too."""
    source = CSRC / "cpu"
    kernels = [
        (f"kernels_{isa}.o", source / "kernels.cpp", f"-DDEIT_ISA={isa} {flags}")
        for isa, flags in sets[0].items()
    ]
    eights = [
        (f"int8_{isa}.o", source / "int8_kernels.cpp", f"-DDEIT_ISA={isa} {flags}")
        for isa, flags in sets[1].items()
    ]
    others = [*sorted(source.glob("*dispatch.cpp")), source / "team.cpp"]
    return [*kernels, *eights, *((f"{path.stem}.o", path, "") for path in others)]


def cpu_ninja(compiler: str, torch: Torch, target: Path) -> str:
    """The build file of the C++ library."""
    interface = f"-isystem {torch.include} -DTORCH_TARGET_VERSION={TORCH_TARGET}"
    edges = cpu_objects()
    kernels = {source for _, source, _ in edges}
    launchers = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path not in kernels]
    launchers.append(CSRC / "schemas" / "cpu.cpp")
    edges += [(f"{path.stem}.o", path, interface) for path in launchers]
    return ninja_file(
        {"cxx": compile_rule(compiler, CXXFLAGS)},
        [(out, "cxx", path, flags) for out, path, flags in edges],
        link_command(compiler, torch, ["torch_cpu"]),
        target,
    )


def cuda_ninja(compiler: str, nvcc: Path, torch: Torch, target: Path) -> str:
    """The build file of the CUDA library."""
    home = nvcc.parent.parent
    kernels, launchers = (sorted((CSRC / "cuda").glob(kind)) for kind in ("*.cu", "*.cpp"))
    launchers.append(CSRC / "schemas" / "cuda.cpp")
    every = " ".join(f"-gencode {arch}" for arch in CUDA_CODE.values())
    # Hopper's asynchronous units have instructions of their own.
    hopper = {"linear_hopper.cu": f"-gencode {CUDA_CODE['sm_90a']}"}
    device = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
    interface = (
        f"-isystem {torch.include} -isystem {home / 'include'} -DUSE_CUDA "
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    )
    host = shutil.which(shlex.split(compiler)[-1]) or compiler
    nvcc_rule = f"  command = {nvcc} -ccbin {host} {device} $flags -MD -MF $out.d -c $in -o $out"
    # The CUDA runtime is linked in: torch may bring another version of the shared one.
    runtime = f"-L{home / 'lib64'} -lcudart_static -ldl -lrt -lpthread"
    return ninja_file(
        {"cxx": compile_rule(compiler, CXXFLAGS), "nvcc": f"{nvcc_rule}\n  depfile = $out.d"},
        [
            *((f"{path.name}.o", "nvcc", path, hopper.get(path.name, every)) for path in kernels),
            *((f"{path.name}.o", "cxx", path, interface) for path in launchers),
        ],
        f"{link_command(compiler, torch, ['torch_cuda', 'torch_cpu'])} {runtime}",
        target,
    )


def compile_rule(compiler: str, flags: str) -> str:
    return (
        f"  command = {compiler} {flags} $flags -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc"
    )


def link_command(compiler: str, torch: Torch, libraries: list[str]) -> str:
    """No run path: at run time `import torch` has loaded these libraries, by the same names."""
    if sys.platform == "darwin":
        return f"{compiler} -shared -undefined dynamic_lookup -o $out $in"
    names = " ".join(f"-l{name}" for name in libraries)
    return f"{compiler} -shared -o $out $in -L{torch.lib} {names}"


def ninja_file(
    rules: dict[str, str], edges: list[tuple[str, str, Path, str]], link: str, target: Path
) -> str:
    escape = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
    lines = [f"rule {name}\n{body}" for name, body in rules.items()]
    lines.append(f"rule link\n  command = {link}")
    lines += [
        f"build {out}: {rule} {escape(path)}\n  flags = {flags}" for out, rule, path, flags in edges
    ]
    objects = " ".join(out for out, *_ in edges)
    lines.append(f"build {escape(target)}: link {objects}")
    return "\n".join(lines) + "\n"


def run_ninja(folder: Path, text: str, env: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text, encoding="utf-8")
    jobs = ["-j", env["MAX_JOBS"]] if env.get("MAX_JOBS") else []
    run = subprocess.run(
        [find_ninja(env), "-C", str(folder), *jobs],
        env=dict(env),
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(run.stdout)
    if run.returncode != 0:
        errors = [line for line in run.stdout.splitlines() if "error" in line.lower()]
        shown = "; ".join(errors[:3]) or run.stdout[-300:]
        raise NotBuilt(f"the compiler failed: {shown}")


def build_library(kind: str, target: Path, temp: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """Build one library and return its entry of the record, or raise NotBuilt."""
    if sys.platform == "win32":
        raise NotBuilt("Windows is not supported yet")
    compiler = find_compiler(env)
    nvcc = find_nvcc(env) if kind == "cuda" else None
    torch = find_torch()
    if nvcc and torch.cuda is None:
        raise NotBuilt(f"torch {torch.version} in the build environment has no CUDA to link to")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = (temp / kind / target.name).resolve()
    started = time.monotonic()
    text = cuda_ninja(compiler, nvcc, torch, made) if nvcc else cpu_ninja(compiler, torch, made)
    run_ninja(temp / kind, text, env)
    # Put in place by a rename: processes that have the old library open keep it whole.
    fresh = target.with_suffix(".new")
    shutil.copy2(made, fresh)
    fresh.replace(target)
    return {
        "built": True,
        "file": target.name,
        "torch": torch.version,
        "compiler": version_line(compiler) + (f", nvcc {version_line(str(nvcc))}" if nvcc else ""),
        "architectures": list(CUDA_CODE if nvcc else CPU_SETS),
        "seconds": round(time.monotonic() - started, 1),
    }


def build_all(target: Path, temp: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """Build what FUSED_DEIT_BUILD asks for into `target`, and write the record there.

    Raises SystemExit, after the record is written, for a library that had to be built and was
    not.
    """
    wanted = mode(env)
    missing, libraries = [], {}
    for kind in build_record.KINDS:
        library = target / f"_{kind}{SUFFIX}"
        try:
            if wanted == "none" or (wanted == "cpu" and kind == "cuda"):
                raise NotBuilt(f"FUSED_DEIT_BUILD={wanted} at installation")
            libraries[kind] = build_library(kind, library, temp, env)
        except NotBuilt as error:
            library.unlink(missing_ok=True)  # never an old library under a new record
            libraries[kind] = {"built": False, "reason": str(error)}
            if wanted == "required" or (wanted == "cpu" and kind == "cpu"):
                missing.append(f"the {kind} library was not built: {error}")
            print(f"fused-deit: the {kind} library is NOT built: {error}", file=sys.stderr)
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sources": build_record.sources_hash(CSRC),
        "libraries": libraries,
    }
    build_record.write(target, record)
    if missing:
        raise SystemExit(f"FUSED_DEIT_BUILD={wanted}: " + "; ".join(missing))
    return record


class BuildNative(build_ext):
    """Builds through ninja into the wheel's tree, or into kernels/ for an editable install."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = (ROOT if in_place else Path(self.build_lib)) / "deit" / "kernels"
        build_all(target, Path(self.build_temp), os.environ)

    def get_outputs(self) -> list[str]:
        if self.inplace or self.editable_mode:
            return []
        folder = Path(self.build_lib) / "deit" / "kernels"
        names = [build_record.FILE, *(f"_{kind}{SUFFIX}" for kind in build_record.KINDS)]
        return [str(folder / name) for name in names if (folder / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in place: nothing is left to copy


def packages() -> list[str]:
    """Every package of deit/; deit/kernels is a link to kernels/, so as to be deit.kernels.

    Never a top-level package "kernels": PyPI has one, and transformers imports it.
    """
    return find_packages(str(ROOT), include=["deit", "deit.*"])


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_data={"deit.kernels.engine": ["priors/*.json"]},  # what "auto" knows unmeasured
        # Named for the wheel's platform tag; BuildNative knows their sources.
        ext_modules=[
            Extension(f"deit.kernels._{kind}", [], py_limited_api=True)
            for kind in build_record.KINDS
        ],
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
