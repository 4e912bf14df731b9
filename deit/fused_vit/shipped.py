"""Whether a class still is as its library shipped it.

Tools that draw attention maps, merge tokens or quantise put a forward of their own on a library's
class. A fused module stands for the library's forward and for no other, so it asks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Where the classes come from that fused ones stand for. A class of another package is not theirs,
# whatever name it was put under.
LIBRARIES = frozenset({"deit", "timm", "torch", "torchvision", "transformers"})

Method = tuple[type, str]

# Methods that were found to be their library's own: a call compares them by identity.
_own: dict[Method, Any] = {}


def replaced(methods: tuple[Method, ...]) -> str | None:
    """Which of these methods is not its library's own, and why that matters; None for none."""
    for method in methods:
        kind, name = method
        function = getattr(kind, name)
        if function is not _own.get(method):
            if not _is_own(kind, name):
                return f"{kind.__name__}.{name} was replaced: it is not as its library shipped it"
            _own[method] = function
    return None


# torch.compile evaluates it once in place of tracing into it.
replaced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_own(kind: type, name: str) -> bool:
    owner = next(base for base in kind.__mro__ if name in base.__dict__)
    library = owner.__module__.partition(".")[0]
    function = owner.__dict__[name]
    if library not in LIBRARIES:
        return False
    if getattr(function, "__qualname__", None) != f"{owner.__qualname__}.{name}":
        return False
    # Decorators keep the qualified name, so the code must be the library's, too: its own decorators
    # are, those of a user are not.
    folder = Path(str(sys.modules[library].__file__)).parent
    return all(Path(code.co_filename).is_relative_to(folder) for code in _codes(function))


def _codes(function: Callable[..., Any]) -> list[Any]:
    """The code of a function and of what it wraps; empty for compiled ones, which have none."""
    found = []
    inner: Any = function
    while inner is not None:
        if hasattr(inner, "__code__"):
            found.append(inner.__code__)
        inner = getattr(inner, "__wrapped__", None)
    return found
