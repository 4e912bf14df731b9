"""Makes `deit` and `deit.kernels` importable from a checkout that is not installed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


class KernelsFinder:
    """Finds `deit.kernels` in the folder kernels/, as an installation's mapping would."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "deit.kernels":
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def importable() -> None:
    """Put this checkout's packages, bench/ and the tests' oracle in front of any installed."""
    if not any(finder is KernelsFinder for finder in sys.meta_path):
        sys.meta_path.insert(0, KernelsFinder)
    for folder in (ROOT, ROOT / "tests", ROOT / "bench"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def load_setup() -> ModuleType:
    """setup.py as a module: its builder of the native libraries."""
    spec = importlib.util.spec_from_file_location("fused_deit_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their own module up
    spec.loader.exec_module(module)
    return module
