"""Makes `deit` and `deit.kernels` importable from a checkout that is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def importable() -> None:
    """Put this checkout's packages and bench/ in front of any installed."""
    for folder in (ROOT, ROOT / "bench"):
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
