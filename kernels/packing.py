"""Copies of weights in the form that a kernel reads, made once and kept while the weight lives.

A copy belongs to one tensor object and to the bytes it had. It is kept beside the tensor, in no
attribute of it, so no state_dict, pickle or deepcopy ever meets one; it goes when the tensor goes.

What makes a new copy: an in-place write (`Tensor._version`: optimiser steps, `copy_`,
load_state_dict, an EMA swap by `copy_`), another tensor in its place (`.to`, load_state_dict with
assign), and `weight.data = other` (the storage's identity; a weak reference keeps the address of a
dead storage from being given to a new one). What leaves no trace: writes through an alias with a
counter of its own (`weight.data.copy_()`, NumPy views, raw pointers), and PyTorch's optimisers with
fused=True, whose kernels do not count. So a call with gradients forgets the copy; after the others
call `forget(weight)`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Packed = TypeVar("Packed")

_PLAIN = (Tensor, nn.Parameter)  # a subclass may hold its data elsewhere


class _Copies:
    """One tensor's copies: (view of it, key) -> (storage, version, address, copy)."""

    def __init__(self, owner: Tensor) -> None:
        identity = id(owner)
        # Not `_kept.pop` under the lock: the collector may call this while this thread holds it.
        self.owner = weakref.ref(owner, lambda _: _kept.pop(identity, None))
        self.entries: dict[Hashable, tuple[StorageWeakRef, int, int, Any]] = {}


_kept: dict[int, _Copies] = {}
_lock = threading.Lock()  # guards making, so that two threads do not both make a copy


def packed(weight: Tensor, key: Hashable, make: Callable[[Tensor], Packed]) -> Packed:
    """`make(weight)`, or what it returned the last time if `weight` has not changed since.

    Args:
        weight: a tensor, or a view of one: `weight[:n]` finds its copy again by its base.
        key: what `make` makes: one tensor may have several copies.
        make: must read nothing but `weight`'s values and return what nobody writes to.

    For implementations of operators, which torch.compile and torch.export do not trace into: a
    captured graph holds the operator and the weight, never a copy; a CUDA graph reads the copy that
    was kept before its capture. Nothing is kept for tensors whose changes cannot be seen (made
    under inference_mode, tensor subclasses), and a call in which gradients flow to the weight
    forgets its copies. Thread-safe; `make` runs under a lock.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        forget(weight)  # an optimiser may come next
        return make(weight)
    if not _may_keep(weight):
        return make(weight)
    owner = weight if weight._base is None else weight._base
    view = (weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, key)
    found = _find(owner, view, weight)
    if found is not None:
        return found[-1]
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return make(weight)  # in the graph's memory, and made anew by every replay
    with _lock:
        found = _find(owner, view, weight)
        if found is not None:
            return found[-1]
        # Noted before the weight is read: a write meanwhile makes the copy stale, not the note.
        storage = StorageWeakRef(weight.untyped_storage())
        version, address = weight._version, weight.data_ptr()
        with torch.inference_mode(False), torch.no_grad():
            value = make(weight.detach())
        if weight.is_cuda:  # another stream may be the next to read it
            torch.cuda.current_stream(weight.device).synchronize()
        copies = _kept.get(id(owner))
        if copies is None or copies.owner() is not owner:
            copies = _kept[id(owner)] = _Copies(owner)
        copies.entries[view] = (storage, version, address, value)
        return value


def forget(weight: Tensor | None = None) -> None:
    """Drop the copies of one tensor (and of its views), or all copies."""
    if weight is None:
        _kept.clear()
    else:
        _kept.pop(id(weight if weight._base is None else weight._base), None)


def kept_bytes() -> int:
    """The size of all copies that are tensors."""
    values = [e[-1] for copies in list(_kept.values()) for e in list(copies.entries.values())]
    return sum(_bytes(value) for value in values)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):  # oneDNN's own tensors show no storage
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


def _may_keep(weight: Tensor) -> bool:
    return (
        type(weight) in _PLAIN
        and not weight.is_inference()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _find(owner: Tensor, view: Hashable, weight: Tensor) -> Any:
    copies = _kept.get(id(owner))
    if copies is None or copies.owner() is not owner:
        return None
    entry = copies.entries.get(view)
    if entry is None:
        return None
    storage, version, address, _ = entry
    same = (
        version == weight._version
        and address == weight.data_ptr()
        and storage.cdata == weight.untyped_storage()._cdata
    )
    return entry if same else None
