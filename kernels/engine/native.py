"""Loads the compiled libraries built from csrc/, and says what stands in the way where it cannot.

Nothing is loaded, and no device touched, before the first question about a kind of library.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deit.kernels.engine import build_record, registry

FOLDER = Path(__file__).resolve().parents[1]
# The sources stand beside the folder in a checkout (editable install), not in a wheel.
CSRC = FOLDER.parent / "csrc"
LIBRARIES = {"cpu": "_cpu.abi3.so", "cuda": "_cuda.abi3.so"}
THREADS = "FUSED_DEIT_THREADS"
AGAIN = "run `pip install -e .` in the source tree again"


@functools.cache
def why_not(kind: str) -> tuple[str, ...]:
    """Load the library for `kind` ("cpu" or "cuda") once; () when its operators are usable.

    "cublaslt" is the CUDA library where it finds torch's cuBLASLt.
    """
    if kind == "cublaslt":
        return why_not("cuda") or _why_no_cublaslt()
    if kind == "cuda" and torch.version.cuda is None:
        # It needs libtorch_cuda, which this torch lacks: do not even try.
        return (f"torch {torch.__version__} is built without CUDA",)
    path = FOLDER / LIBRARIES[kind]
    if not path.is_file():
        return (_why_absent(kind),)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return (f"the {kind} library does not load: {error}",)
    others = ("cublaslt",) if kind == "cuda" else ()
    missing = [
        name
        for namespace in (kind, *others)
        for name in sorted(registry.KERNELS[namespace])
        if not _registered(namespace, name, kind)
    ]
    if missing:
        return (f"the {kind} library has no kernel for {', '.join(missing)}: {AGAIN}",)
    if kind == "cpu":
        library = ctypes.CDLL(str(path))
        if not hasattr(library, "deit_cpu_select_threads"):
            return (f"the {kind} library is of older sources: {AGAIN}",)
        _select_threads(library, os.environ.get(THREADS, "auto"), THREADS)
    return _why_no_device() if kind == "cuda" else ()


def _registered(implementation: str, name: str, kind: str) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(f"{registry.NAMESPACES[implementation]}::{name}", kind.upper())


def _why_no_cublaslt() -> tuple[str, ...]:
    library = ctypes.CDLL(str(FOLDER / LIBRARIES["cuda"]))
    library.deit_cuda_why_no_cublaslt.restype = ctypes.c_char_p
    found = library.deit_cuda_why_no_cublaslt()
    return () if found is None else (f"cuBLASLt: {found.decode()}",)


def _why_absent(kind: str) -> str:
    entry = _entry(kind)
    if entry is None:
        return f"the {kind} library is not built and no build is on record: {AGAIN}"
    if entry.get("built"):
        return f"the {kind} library was built, but {LIBRARIES[kind]} is gone: {AGAIN}"
    return f"the {kind} library was not built: {entry.get('reason', 'no reason on record')}"


def _why_no_device() -> tuple[str, ...]:
    """Whether any visible GPU runs the machine code that the CUDA library holds."""
    entry = _entry("cuda")
    if entry is None or not torch.cuda.is_available():
        return ()  # nothing is on record, or there is no GPU whose tensors could arrive
    built_for = entry.get("architectures", [])
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if any(runs_on(built_for, capability) for capability in capabilities):
        return ()
    found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    return (
        f"the cuda library is built for {', '.join(built_for)}; "
        f"the GPUs here have compute capability {found}",
    )


def runs_on(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for any of `built_for` ("sm_80", "sm_90a", "compute_100") runs there.

    Machine code runs on its own major version from its minor on, the "a" kinds on exactly their
    own; PTX ("compute_...") is compiled by the driver for any later capability.
    """
    for name in built_for:
        kind, _, digits = name.partition("_")
        exact = digits.endswith("a")
        number = int(digits.rstrip("af"))
        target = (number // 10, number % 10)
        if kind == "compute" and capability >= target:
            return True
        if exact and capability == target:
            return True
        if not exact and capability[0] == target[0] and capability[1] >= target[1]:
            return True
    return False


def _entry(kind: str) -> dict[str, Any] | None:
    record = build_record.read(FOLDER)
    return None if record is None else record["libraries"].get(kind)


def status(kind: str) -> dict[str, Any]:
    """The library for `kind` in plain data.

    path: str or None; usable: bool; reasons: why it is not; built: the build's record or None;
    stale: whether csrc/ has changed since it was built (None: no sources or no record here).
    """
    path = FOLDER / LIBRARIES[kind]
    record = build_record.read(FOLDER)
    now = build_record.sources_hash(CSRC)
    built = None if record is None else record["libraries"].get(kind)
    stale = None
    if record is not None and now is not None and built is not None and built.get("built"):
        stale = now != record.get("sources")
    reasons = why_not(kind)
    return {
        "path": str(path) if path.is_file() else None,
        "usable": not reasons,
        "reasons": list(reasons),
        "built": built,
        "time": None if record is None else record.get("time"),
        "sources": None if record is None else record.get("sources"),
        "stale": stale,
    }


@functools.cache
def _cpu_library() -> ctypes.CDLL:
    if why_not("cpu"):
        raise RuntimeError("; ".join(why_not("cpu")))
    library = ctypes.CDLL(str(FOLDER / LIBRARIES["cpu"]))
    library.deit_cpu_isa.restype = ctypes.c_char_p
    library.deit_cpu_select_isa.argtypes = [ctypes.c_char_p]
    library.deit_cpu_int8_isa.restype = ctypes.c_char_p
    library.deit_cpu_select_int8_isa.argtypes = [ctypes.c_char_p]
    library.deit_cpu_select_threads.argtypes = [ctypes.c_char_p]
    library.deit_cpu_make_marks.argtypes = [ctypes.c_void_p]
    library.deit_cpu_make_marks.restype = None
    library.deit_cpu_has_marks.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return library


def cpu_marks() -> tuple[Any, Any]:
    """csrc/cpu/marks.cpp's two functions, for `deit.kernels.engine.marks`.

    Raises RuntimeError where the library is not usable, with the reason.
    """
    library = _cpu_library()
    return library.deit_cpu_make_marks, library.deit_cpu_has_marks


def cpu_isa() -> str:
    """The instruction set in use: "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon" or
    "portable".

    Raises RuntimeError where the library is not usable, with the reason.
    """
    return _cpu_library().deit_cpu_isa().decode()


def select_cpu_isa(name: str | None) -> None:
    """Make the C++ library use one instruction set, or the best one again for None.

    For tests and measurements: it holds for the whole process, at once. Raises ValueError for a
    set the library does not have, RuntimeError for one this processor does not run.
    """
    known = "avx512_bf16, avx512, avx2, neon_bf16, neon or portable"
    _select(_cpu_library().deit_cpu_select_isa, name, known)


def cpu_int8_isa() -> str:
    """The instruction set of products in 8 bits: "avx512vnni", "avxvnni", "avx2", "neon_i8mm",
    "neon_dotprod", "neon" or "portable".

    Raises RuntimeError where the library is not usable, with the reason.
    """
    return _cpu_library().deit_cpu_int8_isa().decode()


def select_cpu_int8_isa(name: str | None) -> None:
    """As `select_cpu_isa`, for products in 8 bits."""
    known = "avx512vnni, avxvnni, avx2, neon_i8mm, neon_dotprod, neon or portable"
    _select(_cpu_library().deit_cpu_select_int8_isa, name, known)


def select_cpu_threads(name: str) -> None:
    """Whose threads the C++ kernels run by: "own", "torch", or "auto": PyTorch's while they come in
    time. Outputs are the same bits by any.

    It holds for the whole process, at once; FUSED_DEIT_THREADS says it from the start. Raises
    ValueError for another name, RuntimeError where the library is not usable.
    """
    _select_threads(_cpu_library(), name, "name")


def _select_threads(library: ctypes.CDLL, name: str, argument: str) -> None:
    if library.deit_cpu_select_threads(name.encode()) != 0:
        raise ValueError(f"{argument}: expected auto, own or torch; got {name!r}")


def _select(select: Callable[[bytes], int], name: str | None, known: str) -> None:
    answer = select((name or "").encode())
    if answer == 1:
        raise ValueError(f"name: expected {known}, as built; got {name!r}")
    if answer == 2:
        raise RuntimeError(f"this processor does not run {name}")
