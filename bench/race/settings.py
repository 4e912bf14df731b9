"""The terms of a comparison, settled before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evidence.devices import Peak
from peers import Peer
from race import planning
from race.contenders import Network


@dataclass(frozen=True)
class Settings:
    """What to compare and under what terms; `budget` and `seconds` None for no limit."""

    networks: Sequence[Network]
    batch: int
    dtype: torch.dtype
    device: torch.device
    impl: str = "auto"
    train: bool = False
    protocol: str = "modern"
    teacher: Network | None = None  # a convnet that labels every batch of a training step
    peers: Sequence[Peer] = ()
    left_out: Sequence[str] = ()  # peers that cannot run here, and why
    latency: bool = False
    neighbour: bool = False  # another process keeps a core busy while the rounds are timed
    seconds: float | None = None
    budget: float | None = None
    keep: float = 0.0  # seconds of the budget that what follows the rounds will take
    early: bool = True  # with a budget: a first figure of the DeiTs before convnets are built
    formats: int = 2  # memory formats in which a convnet is compiled: 1 leaves them to Inductor
    peak: Peak | None = None  # measured before; not given: in this race, ahead of its rounds

    @property
    def rounds(self) -> int:
        return 30 if self.protocol == "deit2021" else planning.ROUNDS
