"""The CUDA library for CPU tensors, as if on a GPU; cuBLASLt is a stub."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from emulated import build
from native import sanitize

from deit.kernels.engine import dispatch, limits


@pytest.fixture(scope="session")
def library() -> Path:
    path = build.library(sanitize.load_setup(), sanitize.ROOT / "build" / "emulated")
    torch.ops.load_library(path)
    return path


@pytest.fixture(scope="session")
def cublaslt() -> ctypes.CDLL:
    """The stub, loaded as torch loads the real one."""
    folder = sanitize.ROOT / "build" / "emulated_cublaslt"
    stub = ctypes.CDLL(str(build.cublaslt_stub(sanitize.load_setup(), folder)))
    stub.stub_log.restype = ctypes.c_char_p
    stub.stub_fault.argtypes, stub.stub_fault.restype = [ctypes.c_char_p], None
    stub.stub_workspace.argtypes, stub.stub_workspace.restype = [ctypes.c_size_t], None
    return stub


@pytest.fixture
def emulated(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """impl="cuda" and "cublaslt" take CPU tensors, as on a GPU of compute capability 8.0."""
    before = dispatch.environment
    monkeypatch.setattr(
        dispatch,
        "environment",
        lambda name, *rest: () if name in ("cuda", "cublaslt") else before(name, *rest),
    )
    monkeypatch.setattr(limits, "capability", lambda *_: (8, 0))
