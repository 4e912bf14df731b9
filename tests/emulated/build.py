"""The CUDA library for CPU tensors, launchers and all: emulator.h takes the place of a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from native import sanitize


def library(setup: ModuleType, folder: Path) -> Path:
    """It registers the `deit_cuda` operators for CPU tensors; setup.NotBuilt where that fails."""
    compiler, torch = setup.find_compiler(os.environ), setup.find_torch()
    folder.mkdir(parents=True, exist_ok=True)
    # The launchers at once: torch's headers take most of the time that one takes.
    launchers = folder / "launchers.cpp"
    text = "".join(f'#include "{path}"\n' for path in sorted(sanitize.CUDA.glob("*.cpp")))
    if not launchers.is_file() or launchers.read_text() != text:
        launchers.write_text(text)
    interface = f"-isystem {torch.include} -DTORCH_TARGET_VERSION={setup.TORCH_TARGET}"
    objects = sanitize.emulated_objects([(launchers, interface)])
    flags = f"{setup.CXXFLAGS} -O2 {sanitize.EMULATION}"
    text = setup.ninja_file(
        {"cxx": setup.compile_rule(compiler, flags)},
        [(out, "cxx", source, own) for out, source, own in objects],
        setup.link_command(compiler, torch, ["torch_cpu"]),
        folder / "emulated.so",
    )
    setup.run_ninja(folder, text, os.environ)
    return folder / "emulated.so"


def cublaslt_stub(setup: ModuleType, folder: Path) -> Path:
    """What stands in for cuBLASLt there, under the name that csrc/cuda/cublaslt.cpp looks for."""
    compiler, target = setup.find_compiler(os.environ), folder / "libdeit_cublaslt_stub.so"
    flags = setup.CXXFLAGS.replace("-fvisibility=hidden", "")
    text = setup.ninja_file(
        {"cxx": setup.compile_rule(compiler, flags)},
        [("stub.o", "cxx", sanitize.EMULATED / "cublaslt_stub.cpp", "")],
        f"{compiler} -shared -Wl,-soname,{target.name} -o $out $in",
        target,
    )
    setup.run_ninja(folder, text, os.environ)
    return target
