"""What the contenders are fed: fresh random images, the same for all."""

from __future__ import annotations

import torch
from torch import Tensor

from race.contenders import Contender


class Inputs:
    """Random images, regenerated apart from timing and rotated: never zeros, never cached ones."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        # Four of a GPU's batches exceed its L2 cache; a CPU's batch does so alone.
        self.count = 4 if device.type == "cuda" else 2
        self.pools: dict[tuple[int, int], list[Tensor]] = {}

    def get(self, contender: Contender, batch: int, turn: int = 0) -> Tensor:
        """A batch for this contender, in its memory format."""
        shape = (batch, contender.network.img_size)
        if shape not in self.pools:
            self.pools[shape] = [self._fresh(*shape) for _ in range(self.count)]
        return contender.to_layout(self.pools[shape][turn % self.count])

    def refresh(self, turn: int) -> None:
        """New values in the batch that `turn` will use."""
        for pool in self.pools.values():
            pool[turn % self.count].normal_()

    def forget(self) -> None:
        """Free all batches."""
        self.pools.clear()

    def _fresh(self, batch: int, size: int) -> Tensor:
        return torch.randn(batch, 3, size, size, device=self.device, dtype=self.dtype)
