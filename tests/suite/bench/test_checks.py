"""Wrong logits and gradients are refused before anything is timed."""

from __future__ import annotations

import math

import pytest
import torch
from racing import Scaled, tiny

from race import checks, contenders

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "wrong"), [(torch.float32, 1.0001), (torch.bfloat16, 1.1), (torch.float32, math.nan)]
)
def test_wrong_logits_are_refused(dtype: torch.dtype, wrong: float) -> None:
    base = tiny(dtype)
    images = torch.randn(5, 3, 32, 32).to(dtype)
    oracle = checks.Oracle(base, images)
    with torch.inference_mode():
        assert oracle.verify(base, base.module(images)) < 0.05
        with pytest.raises(checks.WrongOutputs, match=r"deit_ti↑32 eager is refused: its log"):
            oracle.verify(base, Scaled(base.module, wrong)(images))
        logits = base.module(images).clone()
        logits[-1] = logits[0]  # one wrong sample at the end of a batch
        with pytest.raises(checks.WrongOutputs):
            oracle.verify(base, logits)
    with pytest.raises(checks.WrongOutputs, match="shape"):
        oracle.verify(base, torch.zeros(5, 10))


def test_wrong_gradients_are_refused() -> None:
    network = contenders.deit_network("deit_ti", 32)
    base = contenders.eager(network, CPU, torch.float32, train=True)
    images = torch.randn(2, 3, 32, 32)
    good = contenders.fused(base, "auto", train=True)
    base.module.pos_embed.grad = torch.ones_like(base.module.pos_embed)  # left by an earlier step
    assert checks.verify_gradients(good, base, images, torch.float32) < 1e-3
    good.call = Scaled(good.module, 1.05)
    with pytest.raises(checks.WrongOutputs, match="gradients are off"):
        checks.verify_gradients(good, base, images, torch.float32)
