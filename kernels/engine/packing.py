"""Copies of weights in the form that a kernel reads, made once and kept while the weight lives.

A copy belongs to a view of a storage and to the bytes it had. It is kept beside the storage, in no
attribute of it, so no state_dict, pickle or deepcopy ever meets one; it goes when the storage goes.
Nothing refers to the tensor weakly, or torch.utils.swap_tensors would refuse it.

What makes a new copy: an in-place write (`Tensor._version`: optimiser steps, `copy_`,
load_state_dict, an EMA swap by `copy_`), another tensor in its place (`.to`, load_state_dict with
assign, swap_tensors), and `weight.data = other` (another storage).

Writes that PyTorch does not count are seen in the memory itself (`deit.kernels.engine.marks`), at
about a hundredth of the call's time. The next call sees a write to all of a weight, or to a 64th
of its rows. A write to fewer rows, or to a few numbers, is seen when their turn comes: after 64
calls at most, or some thousand. `forget(weight)` works at once.

On a GPU no call looks at the memory, and only parameters' copies are kept. A call with gradients
forgets the copy (PyTorch's optimisers with fused=True do not count); after other uncounted writes
call `forget`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from deit.kernels.engine.marks import ALL, Marks, possible

Packed = TypeVar("Packed")

_PLAIN = (Tensor, nn.Parameter)  # a subclass may hold its data elsewhere


class _Source(NamedTuple):
    """What one weight of a copy was when the copy was made."""

    storage: weakref.ref[torch.UntypedStorage]
    version: int
    address: int
    marks: Marks | None  # None on a GPU


class _Entry(NamedTuple):
    sources: list[_Source]
    value: Any


class _Copies:
    """The copies of one storage, and of others beside it, by the views of them and the key."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        identity = id(storage)  # PyTorch keeps the object for as long as there is the storage
        # Not `_kept.pop` under the lock: the collector may call this while this thread holds it.
        self.storage = weakref.ref(storage, lambda _: _kept.pop(identity, None))
        self.entries: dict[Hashable, _Entry] = {}


_kept: dict[int, _Copies] = {}
_lock = threading.Lock()  # guards making, so that two threads do not both make a copy


def packed(
    weight: Tensor | tuple[Tensor, ...],
    key: Hashable,
    make: Callable[..., Packed],
    work: int = ALL,
) -> Packed:
    """`make(weight)`, or what it returned the last time if `weight` has not changed since.

    Args:
        weight: a tensor, or a view of one: `weight[:n]` finds its copy again by its storage. Or
            several, which are given to `make` one after another.
        key: what `make` makes: one tensor may have several copies.
        make: must read nothing but `weight`'s values and return what nobody writes to.
        work: multiply-adds of an output channel in this call, which set how much of the weight is
            looked at for writes that PyTorch did not count; a line of every row by default.

    For implementations of operators, which torch.compile and torch.export do not trace into: a
    captured graph holds the operator and the weight, never a copy, and a CUDA graph makes its copy
    in every replay. Nothing is kept for tensors whose changes cannot be seen (made under
    inference_mode, tensor subclasses), and a call in which gradients flow to the weight forgets its
    copies. Thread-safe; `make` runs under a lock.
    """
    weights = weight if isinstance(weight, tuple) else (weight,)
    view: tuple[Hashable, ...] = (key,)
    for each in weights:
        if not _may_keep(each):
            return make(*weights)
        if each.requires_grad and torch.is_grad_enabled():
            for source in weights:
                forget(source)  # an optimiser may come next
            return make(*weights)
        view += (each.storage_offset(), each.shape, each.stride(), each.dtype)
    first = weights[0]
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return make(*weights)  # in the graph's memory, and made anew by every replay
    found = _find(view, weights, work)
    if found is not None:
        return found.value
    with _lock:
        found = _find(view, weights, work)
        if found is not None:
            return found.value
        # Noted before they are read: a write meanwhile makes the copy stale, not the note.
        sources = [_source(each) for each in weights]
        with torch.inference_mode(False), torch.no_grad():
            value = make(*(each.detach() for each in weights))
        if first.is_cuda:  # another stream may be the next to read it
            torch.cuda.current_stream(first.device).synchronize()
        storage = first.untyped_storage()
        copies = _kept.get(id(storage))
        if copies is None or copies.storage() is not storage:
            copies = _kept[id(storage)] = _Copies(storage)
        copies.entries[view] = _Entry(sources, value)
        return value


def forget(weight: Tensor | None = None) -> None:
    """Drop the copies of one tensor and of what shares its memory, or all copies."""
    if weight is None:
        _kept.clear()
        return
    storage = weight.untyped_storage()
    for copies in list(_kept.values()):
        for view, entry in list(copies.entries.items()):
            if any(source.storage() is storage for source in entry.sources):
                copies.entries.pop(view, None)


def kept_bytes() -> int:
    """The size of all copies that are tensors."""
    values = [e.value for copies in list(_kept.values()) for e in list(copies.entries.values())]
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
        and _watchable(weight)
    )


def _watchable(weight: Tensor) -> bool:
    """Whether writes to it are seen: by marks, or by a counter that nobody else's memory has."""
    if not weight.is_cuda:
        return possible(weight)
    # `weight.data` and its like have counters of their own, and are new tensors every time.
    return isinstance(weight if weight._base is None else weight._base, nn.Parameter)


def _source(weight: Tensor) -> _Source:
    storage = weakref.ref(weight.untyped_storage())
    marks = None if weight.is_cuda else Marks(weight)
    return _Source(storage, weight._version, weight.data_ptr(), marks)


def _find(view: Hashable, weights: tuple[Tensor, ...], work: int) -> _Entry | None:
    copies = _kept.get(id(weights[0].untyped_storage()))
    entry = None if copies is None else copies.entries.get(view)
    if copies is None or entry is None:
        return None
    for weight, (storage, version, address, marks) in zip(weights, entry.sources, strict=True):
        if (
            version != weight._version
            or address != weight.data_ptr()
            or storage() is not weight.untyped_storage()
        ):
            return None
        if marks is not None and not marks.still_there(work):
            copies.entries.pop(view, None)  # or the next to ask would look at other lines
            return None
    return entry
