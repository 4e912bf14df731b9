"""Inputs of a linear layer and of an MLP, what stands behind them, and their output's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from deit.kernels.prove import oracle


def keep_of(batch: int) -> Tensor | None:
    """Stochastic depth that drops the second of up to three samples; None for no sample."""
    return None if batch == 0 else torch.tensor([1.25, 0.0, 1.25])[:batch]


def layer(
    batch: int, tokens: int, depth: int, width: int, family: str = "random", *, draw: int = 0
) -> tuple[Tensor, ...]:
    """x, weight, bias, residual, gamma and dout of a linear layer; x is of the family."""

    def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return oracle.make("random", shape, seed=seed + 100 * draw, scale=scale)

    mean = 8.0  # at 1000 the gradient hangs on the one hidden value that is nearest to 0
    x = oracle.make(family, (batch, tokens, depth), seed=100 * draw, mean=mean)
    weight = random(width, depth, seed=1, scale=depth**-0.5)
    bias, gamma = random(width, seed=2), random(width, seed=4)
    residual, dout = (random(batch, tokens, width, seed=seed) for seed in (3, 9))
    return x, weight, bias, residual, gamma, dout


def feed_forward(
    batch: int, tokens: int, width: int, hidden: int, family: str = "random", *, draw: int = 0
) -> tuple[Tensor, ...]:
    """x, w1, b1, w2, b2, residual, gamma and dout of an MLP; x is of the family."""
    x, w1, b1, *_ = layer(batch, tokens, width, hidden, family, draw=draw)
    _, w2, b2, residual, gamma, dout = layer(batch, tokens, hidden, width, draw=draw)
    return x, w1, b1, w2, b2, residual, gamma, dout
