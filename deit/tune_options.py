"""What `deit tune` is asked for; its flags are these lines (commands/tune.py). No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Options:
    """What is measured, and how long."""

    arch: tuple[str, ...] = ("deit_ti", "deit_s", "deit_b")
    """The networks whose shapes are measured."""
    dtype: tuple[Literal["bf16", "fp16", "fp32", "int8", "fp8"], ...] = ()
    """What the networks compute in; on a GPU bf16, on a CPU fp32 and bf16 if left out."""
    batch_size: int | None = None
    """Images in a batch, measured beside one image; on a GPU 256, on a CPU 8 if left out."""
    img_size: int | None = None
    """Pixels along a side; the networks' own if left out."""
    train: bool = True
    """Also training: operators with their gradients, the kernels of the backward."""
    only: tuple[str, ...] = ()
    """Operators and kernels to measure, such as linear; all if left out."""
    candidates: int = 40
    """Configurations to try for each of Triton's kernels and shapes."""
    seconds: float = 300.0
    """After this time nothing else is begun."""
    jobs: int | None = None
    """Processes that compile at once; half the cores, 8 at most, if left out."""
    device: str = "auto"
    """A torch device; auto is the first GPU, the CPU where there is none."""
    prior: Path | None = None
    """Also write what was found to this file, in the form in which kernels/engine/priors/ holds
    what is shipped for a kind of device."""
