"""`deit tune`: configurations of the Triton kernels, measured on this GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from deit.commands import flags


@dataclass(frozen=True)
class Tune:
    """Measure configurations of the Triton kernels on this GPU and keep the best for later runs.

    The user's cache directory keeps them, by GPU model, driver, torch, Triton and kernels.

    Exits with 1 if a default configuration is found wrong.
    """

    arch: tuple[str, ...] = ("deit_ti", "deit_s", "deit_b")
    """The networks whose shapes are measured."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """What the networks compute in."""
    batch_size: int = 256
    """Images in a batch."""
    img_size: flags.OptionalInt = None
    """Pixels along a side; the networks' own if left out."""
    train: bool = True
    """Also the kernels of the backward."""
    only: Annotated[tuple[str, ...], flags.arg(help_behavior_hint="")] = ()
    """Kernels to measure, such as linear; all if left out."""
    candidates: int = 40
    """Configurations to try for each kernel and shape."""
    seconds: float = 300.0
    """After this time no other kernel is begun."""
    jobs: flags.OptionalInt = None
    """Processes that compile at once; half the cores, 8 at most, if left out."""
    device: str = "auto"
    """A torch device; auto is the first GPU."""

    def run(self) -> int:
        """Measure, keep and say what was found; 1 where a default configuration is wrong."""
        from deit import tune

        return tune.run(tune.Options(**vars(self)))
