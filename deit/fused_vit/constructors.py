"""The eight DeiTs with published weights, made or loaded, and fused: `deit.fused_vit.deit_ti()`."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import Tensor

from deit import configs
from deit.model import DeiT


def constructor(name: str, fuse: Callable[..., object]) -> Any:
    """The function that makes the network called `name` and hands it to `fuse`."""

    def construct(
        weights: str | PathLike[str] | dict[str, Tensor] | None = None,
        *,
        num_classes: int | None = None,
        drop_path: float = 0.0,
        test_head: str = "softmax-sum",
        impl: str = "auto",
        measure: str = "auto",
        example: Tensor | None = None,
        budget: float | None = None,
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
        # Measured for inference, which published weights are mostly for: training takes longer.
        fuse(model.eval(), impl, measure=measure, example=example, budget=budget)
        return model.train()

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"""{configs.config(name).label}, fused.

    Args:
        weights: a checkpoint as `deit.load` takes it, or None for a fresh initialisation.
        num_classes, drop_path, test_head: as for `deit.create`.
        impl, measure, example, budget: as for `fuse`, which measures inference on the CPU here. For
            a GPU or for training give measure="never", and fuse again where and as it will run.

    Returns:
        The model, on the CPU, in training mode.

    Raises:
        TypeError, ValueError: as `deit.create`, `deit.load` and `fuse` do.
    """
    return construct
