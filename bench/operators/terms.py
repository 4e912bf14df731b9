"""The terms of a run of the operators' benchmarks, and what its cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import deit
import evidence
from evidence import devices
from operators import measure
from race import tables


@dataclass
class Run:
    """What the benchmarks of one run share."""

    archs: list[deit.Config]
    batch: int
    dtype: torch.dtype
    device: torch.device
    impl: str
    rounds: int
    compiled: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    ceilings: measure.Ceilings | None = None

    def __post_init__(self) -> None:
        self.kernels = evidence.kernels(self.device.type, int8=True)  # as it begins

    def measured_ceilings(self) -> measure.Ceilings:
        """The device's, measured when first asked for."""
        if self.ceilings is None:
            self.ceilings = measure.measure_ceilings(self.device, self.dtype)
        return self.ceilings

    def finish(self) -> None:
        """Measure the ceilings once more: a ceiling is the best seen, early or late in the run."""
        early = self.measured_ceilings()
        self.ceilings = early.best(measure.measure_ceilings(self.device, self.dtype))
        for row in (row for row in self.rows if row["share"] is not None):
            row["share"] = self.ceilings.seconds(row["bytes"], row["flops"]) / row["seconds"]


def settle(option: Callable[[str], Any]) -> Run:
    """The options as terms; ValueError for what cannot be had."""
    device = devices.resolve(option("device"))
    gpu = device.type == "cuda"
    archs = [deit.config(name) for name in option("archs").split(",")]
    batch = option("bs") if option("bs") is not None else 256 if gpu else 16
    for name, value in (("bs", batch), ("rounds", option("rounds"))):
        if value < 1:
            raise ValueError(f"--{name}: expected at least 1; got {value}")
    if option("impl") not in ("auto", *measure.OURS):
        known = ", ".join(("auto", *measure.OURS))
        raise ValueError(f"--impl: expected one of {known}; got {option('impl')!r}")
    if option("threads"):
        torch.set_num_threads(option("threads"))
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = tables.DTYPES[option("dtype") or ("bf16" if gpu else "fp32")]
    compiled = not option("no_compiled")
    return Run(archs, batch, dtype, device, option("impl"), option("rounds"), compiled)
