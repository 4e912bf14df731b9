"""Triton's interpreter as later versions have it, where the one at hand needs that."""

from __future__ import annotations

import functools
import os
from typing import Any


@functools.cache
def mend() -> None:
    """Let Triton 3.6's interpreter run beside NumPy 2.4 and later; nothing outside the interpreter.

    It takes int() of an array of one element, which NumPy 2.4 refuses. Later versions squeeze the
    array first; so does this.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return
    import triton

    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_and_mend
