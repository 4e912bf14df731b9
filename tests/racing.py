"""What several files of tests race: a small network, a wrong one, the terms."""

from __future__ import annotations

import torch

from race import contenders
from race import settings as terms

CPU = torch.device("cpu")


class Scaled(torch.nn.Module):
    """A network with outputs off by a factor."""

    def __init__(self, module: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.module, self.factor = module, factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images) * self.factor


def tiny(dtype: torch.dtype = torch.float32) -> contenders.Contender:
    """DeiT-Ti at 32 pixels, run by PyTorch."""
    torch.manual_seed(0)
    network = contenders.deit_network("deit_ti", 32)
    return contenders.eager(network, CPU, dtype, train=False)


def settings(**changes: object) -> terms.Settings:
    """Of a comparison on the CPU, within nine minutes."""
    base = {"networks": [], "batch": 256, "dtype": torch.float32, "device": CPU, "budget": 540.0}
    return terms.Settings(**(base | changes))
