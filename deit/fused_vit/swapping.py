"""The classes of fused modules: the entrance of a call, and the way back to the original.

A fused class is concrete where its bases are fused forwards and one original. Others may derive
from it at run time, as torch's parametrizations and FSDP do with a module's class.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _entrance(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.fused_forward(*args, **kwargs)  # must read no global


def entrance(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with the original's signature and globals that calls the class's `fused_forward`.

    torch.fx looks in a forward's globals for functions that are not to be traced into. A library
    registers its own there, and they are found where the original forward finds them.
    """
    forward = types.FunctionType(_entrance.__code__, original.__globals__, "forward")
    forward.__wrapped__ = original  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward


def without(kind: type, base: type) -> type:
    """`kind` as it would be over the original of the fused class in it.

    base: `modules.Fused`. A class derived from a fused one is made again over the original.
    """
    if "fused_forward" in kind.__dict__:
        return kind.__mro__[kind.__mro__.index(base) + 1]
    bases = tuple(without(b, base) if issubclass(b, base) else b for b in kind.__bases__)
    named = kind.__name__
    for fused, original in zip(kind.__bases__, bases, strict=True):
        named = named.replace(fused.__name__, original.__name__)
    left_out = ("__dict__", "__weakref__")
    namespace = {name: v for name, v in kind.__dict__.items() if name not in left_out}
    made = type(kind)(named, bases, namespace)
    for name, value in namespace.items():
        if isinstance(value, types.FunctionType) and "__class__" in value.__code__.co_freevars:
            setattr(made, name, _of_class(value, made))
    return made


def _of_class(function: types.FunctionType, kind: type) -> types.FunctionType:
    """`function` with `kind` as the class that its super() starts from."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = tuple(types.CellType(kind) if name == "__class__" else cell for name, cell in cells)
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


# Unfused twin -> the fused module it was made of. torch.jit.script puts the twin in its place and
# goes by addresses meanwhile, so the fused one must not be freed while the twin is there.
_twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def scriptable(module: Any, base: type) -> Any:
    """What torch.jit.script compiles in place of a fused module: the original."""
    twin = original_of(module, base, {})
    _twins[twin] = module
    return twin


def original_of(module: Any, base: type, known: dict[int, Any]) -> Any:
    """The unfused module: other objects all the way down, the same parameters and buffers."""
    return twin_of(module, base, known, fused=False)


def twin_of(module: Any, base: type, known: dict[int, Any], *, fused: bool) -> Any:
    """The module in other objects all the way down, over the same parameters, buffers and hooks.

    fused: whether modules of `base` stay fused in it. known: id of a module -> its twin, filled.
    """
    if id(module) in known:
        return known[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    undone = isinstance(module, base) and not fused
    twin: Any = object.__new__(without(type(module), base) if undone else type(module))
    known[id(module)] = twin
    state = module.STATE if undone else ()
    twin.__dict__ = {name: v for name, v in module.__dict__.items() if name not in state}
    twin.__dict__["_modules"] = {
        name: child if child is None else twin_of(child, base, known, fused=fused)
        for name, child in module._modules.items()
    }
    return twin


def as_leaf(module: nn.Module, original: type, x: torch.fx.Proxy) -> Any:
    """The node of a call of `module`, where the tracer would not trace into the original.

    torch.fx knows leaves by where their class is defined, so fusing torch's own modules would cost
    them their nodes. None where the tracer traces into the original, too.
    """
    tracer: Any = x.tracer
    twin: Any = object.__new__(original)
    twin.__dict__ = module.__dict__
    path = tracer.path_of_module(module)
    if not tracer.is_leaf_module(twin, path):
        return None
    return tracer.create_proxy("call_module", path, (x,), {})
