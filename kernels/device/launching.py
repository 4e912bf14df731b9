"""A call like one before launches the same kernels again, without planning and binding anew.

Planning a launch and Triton's own binding take 140 to 200 us of host time an operator, more than
most kernels of a small model run. Both depend on what a call's key holds: every tensor's shape,
strides, dtype, device and address modulo 16, and every other argument. So the first call with a
key runs as it is written while a dispatch mode watches it, and what it did is kept: which tensors
it allocated, which kernels it launched, and for each argument of theirs from which tensor, how far
into it, an address came. A later call allocates, puts the addresses in and hands the compiled
kernels to the driver.

A call is kept only if that is all it did. One that copies an input, fills an output or reads what
is neither an argument nor its own allocation runs as it is written, every time; so does every call
that is not plain: other than CUDA tensors, Triton's interpreter, a version of Triton whose
launcher is not known here, its hooks or debugging in use, a dispatch mode, a functorch transform.

A tensor descriptor is encoded by the driver, from an address and what the key determines. The
encoded ones are kept by address: weights stay where they are, and the caching allocator gives
activations the same few places. They hold no memory, and are copied by each launch.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from deit.kernels.device import drivers, tuning
from deit.kernels.device.drivers import Launch

# Calls an operator keeps, and encoded addresses a descriptor keeps. DeiT-B's 12 blocks need 2 of
# the first and 12 to 24 of the second; a kept call is some 10 KB, an encoded descriptor 0.2 KB.
CALLS, ADDRESSES = 256, 1024

Function = TypeVar("Function", bound=Callable[..., Any])
_VALUES = frozenset({type(None), bool, int, float, str})


_all: list[Kept] = []


class Kept:
    """An operator's implementation, a function of tensors and plain values, with its kept calls.

    calls: key -> what such a call does, or None where it cannot be kept.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.calls: dict[tuple[Any, ...], _Call | None] = {}
        self._tables: object = None
        _all.append(self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        found = None if options else self._key(arguments)
        if found is None:
            return self.function(*arguments, **options)
        key, addresses = found
        try:
            call = self.calls[key]
        except KeyError:
            return self._first(key, arguments)
        outputs = None if call is None else call.repeat(addresses)
        return self.function(*arguments) if outputs is None else outputs

    def again(self, arguments: tuple[Any, ...]) -> Any:
        """The outputs of a call that is kept, which nobody but this kernel has to see; else None.

        It does not pass through PyTorch's dispatcher, which takes 3 us of such a call.
        """
        found = None if _dispatch_matters() else self._key(arguments)
        call = None if found is None else self.calls.get(found[0])
        return None if found is None or call is None else call.repeat(found[1])

    def _key(self, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int]] | None:
        """What a call rests on, and each argument's address; None where it runs as written."""
        driver = drivers.active()
        if driver is None or not driver.serves(arguments[0]) or _watched_by_others():
            return None
        addresses: list[int] = []
        key: list[Any] = []
        low = 0
        for argument in arguments:
            kind = type(argument)
            if kind is Tensor or kind is Parameter:
                address = argument.data_ptr()
                # The dispatcher would hand over a copy that holds the numbers meant.
                if argument.is_neg() or (not address and argument._is_zerotensor()):
                    return None
                addresses.append(address)
                low |= address
                key += (argument.shape, argument.stride(), argument.dtype, argument.device)
            elif kind in _VALUES:
                addresses.append(0)
                key.append(argument)
            elif kind is list and all(type(value) in _VALUES for value in argument):
                addresses.append(0)  # as a schema's bool[] comes
                key.append(tuple(argument))
            else:  # a subclass may hold its data elsewhere
                return None
        if low & 15:  # seldom: all at once costs less than each
            key += (address & 15 for address in addresses)
        if tuning.tables() is not self._tables:  # tuned anew: other configurations
            self.calls, self._tables = {}, tuning.tables()
        return tuple(key), addresses

    def _first(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
        """The outputs of a call that is not known yet."""
        if len(self.calls) >= CALLS:  # a copy of the keys: other threads add theirs meanwhile
            for oldest in list(self.calls)[: len(self.calls) - CALLS + 1]:
                self.calls.pop(oldest, None)
        outputs, self.calls[key] = _watched(self.function, arguments)
        return outputs


def kept(function: Function) -> Function:
    """Keep the calls of an operator's implementation.

    What it allocates, launches and returns must be determined by its arguments' values and by its
    tensors' shapes, strides, dtypes, devices and addresses modulo 16: not by their contents, nor
    by anything that may change during the process other than the tuning tables.
    """
    return cast(Function, Kept(function))


def forget() -> None:
    """Forget every kept call: the next ones run as they are written."""
    for function in _all:
        function.calls = {}


def started(launch: Launch, start: Callable[[], Any]) -> None:
    """Start a launch; where a call is watched, note it and the compiled kernel that it ran."""
    watch = _watching.call
    if watch is None:
        start()
        return
    with _disable_current_modes():  # what Triton does with tensors meanwhile is not the call's
        compiled = start()
    watch.launched(launch, compiled)


class _Watching(threading.local):
    call: _Watch | None = None


_watching = _Watching()


def _watched_by_others() -> bool:
    """Whether somebody asks to see launches or operators, to debug or to transform them."""
    runtime, compilation = knobs.runtime, knobs.compilation
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or compilation.instrumentation_mode
        or _watching.call is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def _dispatch_matters() -> bool:
    """Whether PyTorch's dispatcher has more to do with a call than to hand it to its kernel."""
    return bool(
        torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def _watched(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, _Call | None]:
    """(outputs, what the call did or None where it did something else).

    The function gets an alias of each tensor. Where two arguments are one tensor, or parts of
    one, the alias shows which of them is meant.
    """
    aliases = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    watch = _watching.call = _Watch(aliases)
    try:
        with watch:
            outputs = function(*aliases)
    finally:
        _watching.call = None
    return outputs, watch.call(outputs)


_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }
)


@dataclass(frozen=True)
class _Place:
    """A tensor among the arguments and allocations of a call, and what a launch needs of it."""

    slot: int
    address: int
    dtype: torch.dtype


class _Watch(TorchDispatchMode):
    """Sees a call's allocations, views and launches."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.places = WeakIdKeyDictionary()  # tensor -> _Place of what it is, or is a view of
        self.slots = 0
        for argument in arguments:
            if isinstance(argument, Tensor):
                self.places[argument] = _Place(self.slots, argument.data_ptr(), argument.dtype)
            self.slots += 1
        self.inputs, self.device = self.slots, arguments[0].device
        self.steps: list[_Allocation | _Kernel] = []
        self.refused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.places[result] = _Place(self.slots, result.data_ptr(), result.dtype)
            self.slots += 1
            self.steps.append(_Allocation.like(result))
            self.refused |= result.device != self.device or result.data_ptr() % 16 != 0
        elif _is_view(func) and args[0] in self.places:
            for view in result if isinstance(result, (list, tuple)) else (result,):
                self.places[view] = self.places[args[0]]
        else:
            self.refused = True
        return result

    def launched(self, launch: Launch, compiled: Any) -> None:
        """Add a launch, or refuse."""
        driver = drivers.active()
        assert driver is not None  # or nothing would be watched
        handed = driver.launcher(launch, compiled)
        if handed is None or launch.kernel.pre_run_hooks:
            self.refused = True
            return
        template: list[Any] = []
        pointers, descriptors = [], []
        metadata = iter(compiled.metadata.tensordesc_meta or ())
        for name in launch.kernel.arg_names:
            value = launch.arguments[name]
            described = isinstance(value, TensorDescriptor)
            tensor = value.base if described else value
            if not isinstance(tensor, Tensor):
                template.append(value)
                continue
            place = self.places.get(tensor)
            if place is None:
                self.refused = True
                return
            offset = tensor.data_ptr() - place.address
            if described:
                encoded = _Encoded(driver, value, next(metadata, None))
                if encoded.metadata is None:  # no tensor copies here: it is taken apart
                    self.refused = True
                    return
                descriptors.append((len(template), place.slot, offset, encoded))
                template += (None, *value.shape, *value.strides)
            else:
                pointers.append((len(template), place.slot, offset))
                template.append(None)
        self.steps.append(_Kernel(handed, template, pointers, descriptors))

    def call(self, outputs: Any) -> _Call | None:
        """What the call did, once it has returned these outputs."""
        returned = outputs if isinstance(outputs, tuple) else (outputs,)
        if self.refused or type(outputs) not in (Tensor, tuple):
            return None
        parts = []
        for output in returned:
            place = self.places.get(output)
            if place is None or place.slot < self.inputs or output.dtype != place.dtype:
                return None
            geometry = (tuple(output.shape), output.stride(), output.storage_offset())
            parts.append((place.slot, geometry))
        return _Call(self.steps, self.inputs, parts, isinstance(outputs, tuple), self.device)


def _is_view(func: Any) -> bool:
    """Whether an operator's outputs are views of its first argument, and nothing is written."""
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns]
    return bool(returns) and all(a is not None and not a.is_write for a in aliases)


class _Allocation(NamedTuple):
    """A tensor that a call allocates."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def like(cls, tensor: Tensor) -> _Allocation:
        """As `tensor` was allocated."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)


@dataclass(frozen=True)
class _Kernel:
    """A launch whose addresses are still to come.

    template: the arguments as the driver takes them. pointers and descriptors: (position there,
        slot, bytes past the slot's address), the latter with their encoded forms.
    """

    launch: Callable[[int, list[Any]], None]
    template: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int, _Encoded]]

    def __call__(self, addresses: list[int], stream: int) -> None:
        arguments = self.template.copy()
        for position, slot, offset in self.pointers:
            arguments[position] = addresses[slot] + offset
        for position, slot, offset, encoded in self.descriptors:
            arguments[position] = encoded[addresses[slot] + offset]
        self.launch(stream, arguments)


class _Encoded(dict[int, Any]):
    """address -> the driver's form of one descriptor at that address."""

    def __init__(self, driver: drivers.Driver, descriptor: TensorDescriptor, metadata: Any) -> None:
        super().__init__()
        # Without its tensor, whose memory would stay with it.
        self.descriptor, self.metadata = copy.copy(descriptor), metadata
        self.descriptor.base = None
        self.encode = driver.encode

    def __missing__(self, address: int) -> Any:
        moved = copy.copy(self.descriptor)
        moved.base = _At(address)
        if len(self) >= ADDRESSES:
            self.clear()
        encoded = self[address] = self.encode(moved, self.metadata)
        return encoded


@dataclass(frozen=True)
class _At:
    """As much of a tensor as encoding a descriptor needs."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class _Call:
    """What a call did: allocations and launches in order, and what it returned."""

    def __init__(
        self,
        steps: list[_Allocation | _Kernel],
        inputs: int,
        parts: list[tuple[int, Any]],
        many: bool,
        device: torch.device,
    ) -> None:
        self.steps = list(_with_releases(steps, inputs, {slot for slot, _ in parts}))
        self.many, self.index = many, device.index
        self.parts: list[tuple[int, Any]] = []
        allocations = [step for step in steps if isinstance(step, _Allocation)]
        for slot, geometry in parts:
            whole = (*allocations[slot - inputs][:2], 0)
            self.parts.append((slot - inputs, None if geometry == whole else geometry))
        active = drivers.active()
        assert active is not None
        self.driver = active

    def repeat(self, addresses: list[int]) -> Any:
        """Do it again with arguments at these addresses (0 for what is no tensor).

        Returns new outputs; None where memory came that the kernels were not compiled for.
        """
        if self.driver.current_device() == self.index:
            return self._repeat(addresses)
        with torch.cuda.device(self.index):
            return self._repeat(addresses)

    def _repeat(self, addresses: list[int]) -> Any:
        allocate, stream = self.driver.allocate, self.driver.current_stream(self.index)
        allocated: list[Any] = []
        for step, released in self.steps:
            if isinstance(step, _Kernel):
                step(addresses, stream)
                for slot in released:
                    allocated[slot] = None
            else:
                tensor = allocate(*step)
                address = tensor.data_ptr()
                if address & 15:
                    return None
                allocated.append(tensor)
                addresses.append(address)
        outputs = [
            allocated[i] if part is None else allocated[i].as_strided(*part)
            for i, part in self.parts
        ]
        return tuple(outputs) if self.many else outputs[0]


def _with_releases(
    steps: list[_Allocation | _Kernel], inputs: int, returned: set[int]
) -> Iterator[tuple[_Allocation | _Kernel, tuple[int, ...]]]:
    """Each step, with the allocations (from 0) that no later step needs and no output is."""
    last: dict[int, int] = {}
    for at, step in enumerate(steps):
        if isinstance(step, _Kernel):
            last |= dict.fromkeys((slot for _, slot, _ in step.pointers), at)
            last |= dict.fromkeys((slot for _, slot, *_ in step.descriptors), at)
    for at, step in enumerate(steps):
        ended = (s for s, end in last.items() if end == at and s >= inputs and s not in returned)
        yield step, tuple(s - inputs for s in ended)
