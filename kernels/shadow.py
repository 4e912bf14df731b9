"""Gives the import name `kernels` back to the PyPI package that owns it.

With the repository's root on sys.path (`python -m ...` or `python -c ...` run there), `import
kernels` finds this folder first, and transformers 5.x imports names from the PyPI package
without asking again: DeiT models would not import. So the folder, imported under that name,
loads the other package in its own place. Where that is not installed, a module without a file or a
version takes the place: transformers imports what it finds there to ask for the version, and goes
on without the package only if it looks like a bare folder.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


class _Absent(ModuleType):
    """Stands where the other package is not: any use of it raises ImportError and says why."""

    def __getattr__(self, attribute: str) -> object:
        if attribute.startswith("__") and attribute != "__path__":
            raise AttributeError(attribute)
        name = self.__name__
        raise ImportError(
            f"the folder {name}/ of fused-deit is imported as deit.kernels; `import {name}` means "
            f"the PyPI package {name!r}, which is not installed",
            name=name,
        )


def hand_over(name: str, own_folder: Iterable[str]) -> None:
    """Load the package `name` from further down sys.path and put it into sys.modules.

    Where there is none, any use of the module that is found instead raises ImportError, naming
    both packages.
    """
    own = {Path(folder).resolve() for folder in own_folder}
    elsewhere = [path for path in sys.path if (Path(path) / name).resolve() not in own]
    spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
    if spec is None or spec.loader is None:
        sys.modules[name] = _Absent(name)
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: it imports its own submodules by this name
    spec.loader.exec_module(module)
