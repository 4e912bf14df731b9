"""Whether a class still is as its library shipped it.

Tools that draw attention maps, merge tokens or quantise put a forward of their own on a library's
class. A fused module stands for the library's forward and for no other, so it asks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# The libraries whose classes fused ones stand for. A class of another package is not theirs,
# whatever name it was put under.
LIBRARIES = frozenset({"deit", "timm", "torch", "torchvision", "transformers"})


class Methods:
    """The methods that a fused class stands for: forwards of classes, and steps of the first."""

    def __init__(self, kinds: Iterable[type], steps: Iterable[str] = ()) -> None:
        self.kinds: list[Any] = list(dict.fromkeys(kinds))
        self.steps = tuple(steps)
        self._own: list[Any] | None = None  # those that were found to be their library's

    def replaced(self) -> str | None:
        """Which of them is not its library's own, and what that means; None for none."""
        found = [kind.forward for kind in self.kinds]
        found += [getattr(self.kinds[0], step) for step in self.steps]
        if found == self._own:  # functions are equal where they are the same: 1 us
            return None
        for kind in self.kinds:
            for name in ("forward", *self.steps) if kind is self.kinds[0] else ("forward",):
                if not _is_own(kind, name):
                    return f"{kind.__name__}.{name} was replaced: not as its library shipped it"
        self._own = found
        return None


def replaced(fused: Any) -> str | None:
    """`Methods.replaced` of a fused class; torch.compile evaluates it once and traces nothing."""
    return fused.METHODS.replaced()


replaced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_own(kind: type, name: str) -> bool:
    owner = next(base for base in kind.__mro__ if name in base.__dict__)
    library = owner.__module__.partition(".")[0]
    function = owner.__dict__[name]
    if library not in LIBRARIES:
        return False
    if getattr(function, "__qualname__", None) != f"{owner.__qualname__}.{name}":
        return False
    # Decorators keep the qualified name, so the code must be the library's, too. The library's own
    # decorators are its code, a user's are not.
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
