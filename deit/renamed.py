"""Modules under the names they had before they moved into rooms: importing one still works.

`import deit.images` gives `deit.data.images` itself, with a DeprecationWarning that says so: one
module, one set of classes, whichever name it was found by.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# Where those that kept their own names are now: (package, room in it) -> names.
_MOVED = {
    ("deit", "commands"): ("cli", "flags"),
    ("deit", "data"): ("decoding", "images", "limits"),
    ("deit", "training"): ("options", "report", "runs", "trackers"),
    ("deit", "weights"): ("beside", "layouts", "networks", "readers"),
    ("deit.kernels", "device"): ("tuning",),
    ("deit.kernels", "engine"): ("dispatch", "json_files", "native", "packing", "validate"),
    ("deit.kernels", "prove"): ("reference",),
}
RENAMED = {
    f"{package}.{name}": f"{package}.{room}.{name}"
    for (package, room), names in _MOVED.items()
    for name in names
} | {
    "deit.continuing": "deit.training.resume",
    "deit.distill": "deit.training.distillation",
    "deit.evaluate": "deit.training.evaluation",
    "deit.scale": "deit.training.distributed",
}


class _Finder:
    """Finds a module by an old name; it is its own loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in RENAMED:
            return None
        return importlib.util.spec_from_loader(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = RENAMED[spec.name]
        # The import system's own frames are not counted: 2 is the import statement.
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        return importlib.import_module(new)

    def exec_module(self, module: ModuleType) -> None:
        # The import system has put this finder's in its place, by which it could not be reloaded.
        module.__spec__ = importlib.machinery.PathFinder.find_spec(
            module.__name__, sys.modules[module.__name__.rpartition(".")[0]].__path__
        )


def find_by_old_names() -> None:
    """Have the import system ask here when no other finder knows a name."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
