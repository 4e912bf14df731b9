"""Faster ViTs with the same outputs: `from deit.fused_vit import fuse; fuse(model)`.

`fuse` puts the operators of `deit.kernels` under a model in place, `unfuse` takes them out, and
`with fused(model):` does both. For `deit.DeiT`, timm's VisionTransformer and torch's LayerNorm.
The eight DeiTs with published weights have constructors here that return them fused.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deit import configs
from deit.fused_vit import plain
from deit.fused_vit.modules import Fused, original_class
from deit.fused_vit.report import Report, Row
from deit.kernels import dispatch, ops
from deit.model import DeiT

__all__ = ["Report", "Row", "fuse", "fused", "unfuse", *configs.PUBLISHED]

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: nn.Module, impl: str = "auto") -> Report:
    """Put the fused operators under `model`, in place, and report on every module.

    Parameters keep their identity and `state_dict` its keys and bits; hooks, deepcopy, pickling,
    DDP, train/eval and torch.compile work as before. What cannot be fused stays as it was, and
    where fused arithmetic would not be what was asked for (a hook on a module inside a fused
    one, dropout in training, an attention mask) the original forward runs. Calling it again
    changes nothing but `impl`. Order: fuse, move to the device, compile, wrap in DDP.

    Args:
        model: any module; DeiT and timm blocks, attentions, MLPs and LayerNorms in it are fused.
        impl: "auto" for the fastest measured implementation of each operator; or "reference",
            "cpu", "triton" or "cuda" for that one wherever it has a kernel for the operator.

    Returns:
        A Report; print it for a table.

    Raises:
        TypeError: `model` is not a module. ValueError: an unknown `impl`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if impl != "auto" and impl not in dispatch.IMPLEMENTATIONS:
        known = ", ".join(dispatch.IMPLEMENTATIONS)
        raise ValueError(f"impl: expected 'auto' or one of {known}; got {impl!r}")
    impls = {
        operator: impl if impl == "reference" or operator in ops.KERNELS.get(impl, ()) else "auto"
        for operator in ops.SCHEMAS
    }
    leaves, blocks = _families()
    notes: dict[str, str] = {}
    for table in (leaves, blocks):  # a block fuses only over fused parts
        for name, module in model.named_modules():
            _swap(module, table, impls, name, notes)
    report = _report(model, impls, notes)
    if not report.fused:
        warnings.warn(
            f"fuse: nothing in this {type(model).__name__} could be fused; the report says why",
            stacklevel=2,
        )
    return report


def unfuse(model: Model) -> Model:
    """Give every fused module in `model` its original class back; returns the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, Fused):
            _restore(module)
    return model


@contextlib.contextmanager
def fused(model: nn.Module, impl: str = "auto") -> Iterator[Report]:
    """Within the block, `model` runs fused; afterwards every module is what it was before."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    before = {module: module.fused_impls for module in model.modules() if isinstance(module, Fused)}
    try:
        yield fuse(model, impl)
    finally:
        for module in model.modules():
            if module in before:
                module.fused_impls = before[module]
            elif isinstance(module, Fused):
                _restore(module)


def _families() -> tuple[dict[type, type[Fused]], dict[type, type[Fused]]]:
    """The fused class of each known class; timm's only where timm is loaded (its model is)."""
    leaves, blocks = dict(plain.LEAVES), dict(plain.BLOCKS)
    if "timm.models.vision_transformer" in sys.modules:
        from deit.fused_vit import timm

        leaves |= timm.LEAVES
        blocks |= timm.BLOCKS
    return leaves, blocks


def _swap(
    module: nn.Module,
    table: dict[type, type[Fused]],
    impls: dict[str, str],
    name: str,
    notes: dict[str, str],
) -> None:
    original = type(module)
    if isinstance(module, Fused):
        if original in table.values():
            module.fused_impls = impls
        return
    if original not in table:
        for base in original.__mro__[1:]:
            if base in table:
                notes[name] = f"a subclass of {base.__name__}: its forward may differ"
                break
        return
    module.__class__ = table[original]  # type: ignore[assignment]
    reason = module.unsupported()  # type: ignore[operator]
    if reason is None:
        module.fused_impls = impls  # type: ignore[assignment]
    else:
        module.__class__ = original
        notes[name] = reason


def _restore(module: Any) -> None:
    del module.fused_impls
    module.__class__ = original_class(module)


def _report(model: nn.Module, impls: dict[str, str], notes: dict[str, str]) -> Report:
    rows = []
    operators: set[str] = set()
    absorbed: set[nn.Module] = set()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, Fused):
            operators.update(module.OPERATORS)
            absorbed.update(module._modules[part] for part in module.LINEARS)  # type: ignore[attr-defined]
            waiting = module.interrupted()
            rows.append(Row(name, kind, True, f"plain for now: {waiting}" if waiting else ""))
        elif module not in absorbed and (name in notes or _owns_parameters(module)):
            rows.append(Row(name, kind, False, notes.get(name) or _why_left(module)))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ordered = [operator for operator in ops.SCHEMAS if operator in operators]
    return Report(rows, {op: dispatch.expected(op, impls[op], device) for op in ordered})


def _owns_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _why_left(module: nn.Module) -> str:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return f"a {type(module).__name__} alone: PyTorch's own is used"
    names = ", ".join(name for name, value in module._parameters.items() if value is not None)
    return f"its own {names}: no fused form of this class"


def _constructor(name: str) -> Any:
    def construct(
        weights: str | PathLike[str] | dict[str, Tensor] | None = None,
        *,
        num_classes: int | None = None,
        drop_path: float = 0.0,
        test_head: str = "softmax-sum",
        impl: str = "auto",
    ) -> DeiT:
        import deit

        if weights is None:
            model = deit.create(
                name, num_classes=num_classes, drop_path=drop_path, test_head=test_head
            )
        else:
            model = deit.load(
                weights, name, num_classes=num_classes, drop_path=drop_path, test_head=test_head
            )
        fuse(model, impl)
        return model

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"""{configs.config(name).label}, fused.

    Args:
        weights: a checkpoint as `deit.load` takes it, or None for a fresh initialisation.
        num_classes, drop_path, test_head: as for `deit.create`.
        impl: as for `fuse`.

    Returns:
        The model, on the CPU, in training mode.

    Raises:
        ValueError: as `deit.create`, `deit.load` and `fuse` do.
    """
    return construct


for _name in configs.PUBLISHED:
    globals()[_name] = _constructor(_name)
