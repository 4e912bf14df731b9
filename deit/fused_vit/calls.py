"""Which operators a fused model calls, and on what: found by running it without its weights.

A twin of the model over fake tensors (of the same shapes, dtypes and devices, with no memory) runs
once by parts and once by whole blocks, and `dispatch.recording` notes each operator's arguments.
Nothing is computed, and no weight, hook, buffer or generator of the user's is touched.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deit.fused_vit import swapping
from deit.fused_vit.modules import Fused
from deit.fused_vit.racing import said
from deit.kernels.engine import dispatch
from deit.kernels.engine.problems import Problem

WHOLE = ("vit_block", "int8_vit_block")  # what a model runs its parts in the place of


class Unknown(Exception):
    """Why the calls of a model cannot be known."""


def calls_of(
    model: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    training: bool,
    impls: dict[str, str] | None = None,
) -> list[Problem]:
    """The distinct calls of a fused model's operators that "auto" chooses for.

    Args:
        model: fused. It runs in evaluation mode, or with `training` in training mode with
            gradients; under the autocast that is on.
        shape, dtype: of its input, which lies where its first parameter does.
        impls: operator -> implementation, as if it were fused with these; None: as it is.

    Raises:
        Unknown: the model does not run on such an input, or not without its weights.
    """
    given = [module.fused_impls if impls is None else impls for module in _fused(model)]
    asked = {name for each in given for name, impl in each.items() if impl == "auto"}
    named = {name for each in given for name in each}
    found: dict[Problem, None] = {}
    # The parts first: a whole block is measured against them.
    for operators in dict.fromkeys((frozenset(named - {*WHOLE}), frozenset(named))):
        with dispatch.recording() as problems:
            run_without_weights(model, shape, dtype, training=training, operators=operators)
        found.update((each, None) for each in problems if each.operator in asked)
    return list(found)


def _fused(model: nn.Module) -> Iterator[Fused]:
    return (module for module in model.modules() if isinstance(module, Fused))


def run_without_weights(
    model: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    training: bool,
    operators: Collection[str] = (),
) -> None:
    """Run a twin of `model` on fakes. Raises Unknown where it does not run.

    operators: those that its fused modules call, by the references; none: it runs unfused.
    """
    if nn.modules.module._has_any_global_hook():  # which would be called, and nothing runs fused
        raise Unknown("a hook on all modules is registered, under which nothing runs fused")
    fakes = Fakes()
    known: dict[Hashable, Tensor] = {}  # one for all that look alike: blocks repeat

    def fake(value: Tensor) -> Tensor:
        parameter = isinstance(value, nn.Parameter)
        shape = value.shape, value.stride(), value.dtype, value.device
        look = (*shape, parameter, value.requires_grad)
        if look not in known:
            with fakes:
                like = torch.empty_strided(*shape[:2], dtype=shape[2], device=shape[3])
            known[look] = nn.Parameter(like, value.requires_grad) if parameter else like
        return known[look]

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    twin = None
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(training):
            twin = stripped(model, fake)
            if not operators:
                twin = swapping.twin_of(twin, Fused, {}, fused=False)
            twin.train(training)
            for module in _fused(twin):
                module.adopt(dict.fromkeys(operators, "reference"))
            fakes.made.clear()  # the twin's own weights, which may live on in a cycle with it
            with same_generators(device), fakes:
                twin(torch.empty(tuple(shape), dtype=dtype, device=device))
    except Exception as error:  # whatever a model may raise
        raise Unknown(said(error)) from error
    finally:
        del twin
        known.clear()
        fakes.forget()


class Fakes(FakeTensorMode):
    """Fake tensors that can be told to have been kept after their run."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = super().__torch_dispatch__(func, types, args, kwargs)
        found = (given,) if isinstance(given, Tensor) else given
        if isinstance(found, (tuple, list)):
            self.made += [weakref.ref(each) for each in found if isinstance(each, Tensor)]
        return given

    def forget(self) -> None:
        """Empty every `functools.lru_cache` that holds one of them, for others to fill.

        transformers' DINOv3 keeps its patches' coordinates so, by their number and device: the
        next forward of any such model would be given a tensor without values.
        """
        holders: list[Any] = [each for ref in self.made if (each := ref()) is not None]
        self.made.clear()
        for _ in range(HOLDERS_DEEP):
            # A look at every object of the process, some 0.1 s, where something was kept at all.
            holders = gc.get_referrers(*holders) if holders else []
            for each in holders:
                if isinstance(each, functools._lru_cache_wrapper):
                    each.cache_clear()
            holders = [each for each in holders if type(each) in (tuple, list, dict)]


HOLDERS_DEEP = 3  # a cached tensor, or one in a tuple of tuples


def stripped(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """A twin of `model`, as fused as it is, with no hooks, over `replace`d parameters and buffers.

    A forward that was set on an instance reads the original's weights, so the class's runs.
    """
    twin = swapping.twin_of(_unwrapped(model), Fused, {}, fused=True)
    for module in twin.modules():
        for name, child in module._modules.items():
            module._modules[name] = _unwrapped(child)
        own = module.__dict__
        own.pop("forward", None)
        own["_compiled_call_impl"] = None
        for name, value in own.items():
            if name == "_modules":
                continue
            if name in ("_parameters", "_buffers"):
                own[name] = {n: t if t is None else replace(t) for n, t in value.items()}
            elif name.endswith(_HOOKS):
                own[name] = OrderedDict()
            elif isinstance(value, Tensor):
                own[name] = replace(value)
            elif isinstance(value, (dict, list, set)):  # a forward may add to it
                own[name] = type(value)(value) if type(value) in (dict, list, set) else value
    return twin


def _unwrapped(module: Any) -> Any:
    """What DDP or torch.compile has wrapped."""
    while type(module).__name__ in _WRAPPERS:
        module = module._modules[_WRAPPERS[type(module).__name__]]
    return module


_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module",
             "OptimizedModule": "_orig_mod"}  # fmt: skip
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


@contextlib.contextmanager
def same_generators(device: torch.device) -> Iterator[None]:
    """Within, random numbers may be drawn on the CPU and `device`; afterwards none were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def image_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """[C, H, W] of the images that a network says it is for; None where it does not say."""
    config: Any = getattr(model, "config", None)
    patches: Any = getattr(model, "patch_embed", None)
    timms: Any = getattr(model, "pretrained_cfg", None)
    proj: Any = getattr(patches, "proj", None)
    channels = proj.weight.shape[1] if isinstance(proj, nn.Conv2d) else 3
    for size, depth in (
        (getattr(config, "img_size", None), getattr(config, "in_chans", channels)),
        (getattr(config, "image_size", None), getattr(config, "num_channels", channels)),
        (getattr(patches, "img_size", None), channels),
        (getattr(model, "image_size", None), channels),
    ):
        both: Any = (size, size) if isinstance(size, int) else size
        if _sizes(both, 2) and isinstance(depth, int):
            return depth, both[0], both[1]
    sizes: Any = timms.get("input_size") if isinstance(timms, dict) else None
    return (sizes[0], sizes[1], sizes[2]) if _sizes(sizes, 3) else None


def _sizes(value: object, count: int) -> bool:
    """Whether it is so many positive whole numbers."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == count
        and all(isinstance(each, int) and each > 0 for each in value)
    )


def networks(model: nn.Module) -> list[tuple[nn.Module, tuple[int, int, int]]]:
    """The outermost modules in `model` that say which images they are for, with [C, H, W].

    The model itself, or what it holds: a vision tower, a network behind a normalisation.
    """
    shape = image_shape(model)
    if shape is not None:
        return [(model, shape)]
    return [found for child in model.children() for found in networks(child)]
