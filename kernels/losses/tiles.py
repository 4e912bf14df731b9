"""Classes that a program of the losses holds at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deit.kernels.device.tiles import Choice, Choices, Configuration
from deit.kernels.device.tuning import tunable


@dataclass(frozen=True)
class LossConfig(Configuration):
    """block: classes a program holds at once."""

    block: int
    num_warps: int


@tunable(LossConfig)
def loss(classes: int) -> LossConfig:
    """ImageNet's 1,000 classes in one block, 8 a thread; ImageNet-21k's in eleven of 2,048.

    With 4,096, 16 a thread, the gradient of cross-entropy spills 40 bytes on sm_120 in fp16.
    """
    block = min(2048, 1 << max(classes - 1, 15).bit_length())
    return LossConfig(block=block, num_warps=4 if block <= 1024 else 8)


def _choose(logits: Tensor, *_: Any) -> Choice:
    return [loss.explain(logits.shape[-1])]


CHOICES: Choices = {
    "cross_entropy": _choose,
    "distillation_loss": _choose,
}
