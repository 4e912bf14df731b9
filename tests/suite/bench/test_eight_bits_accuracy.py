"""bench/eight_bits_accuracy.py on a small network: what it finds, and what it asks for."""

from __future__ import annotations

import pytest
import torch

import deit
import eight_bits_accuracy as accuracy

SMALL = deit.Config("small", embed_dim=64, num_heads=1, depth=2, img_size=32, num_classes=10)


@pytest.fixture(scope="module")
def model() -> deit.model.DeiT:
    torch.manual_seed(0)
    return deit.model.DeiT(SMALL).eval()


@pytest.mark.parametrize(("dtype", "least", "most"), [("int8", 36, 55), ("fp8", 24, 36)])
def test_each_kind_has_its_noise_and_leaves_the_model(
    dtype: str, least: float, most: float, model: deit.model.DeiT
) -> None:
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = model(images)
    found = accuracy.compare(model, images, before.argmax(1), dtype)
    assert found["top1_fp32"] == 100.0
    assert found[f"top1_{dtype}"] == found["agreement"]
    assert {name: len(blocks) for name, blocks in found["operator_sqnr_db"].items()} == {
        "qkv": 2, "proj": 2, "mlp": 2
    }  # fmt: skip
    for blocks in found["operator_sqnr_db"].values():
        assert all(least < decibels < most for decibels in blocks)
    assert least - 10 < found["logits_sqnr_db"] < most
    assert type(model) is deit.model.DeiT
    with torch.inference_mode():
        assert torch.equal(model(images), before)


def test_photographs_have_no_labels(model: deit.model.DeiT) -> None:
    found = accuracy.compare(model, torch.randn(4, 3, 32, 32), None, "fp8")
    assert not any(name.startswith("top1") for name in found)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "a run and its --data, or --arch alone"),
        (["--arch", "deit_ti", "--data", "fashion-mnist"], "or --arch alone"),
        (["somewhere"], "expected --data"),
        (["--arch", "deit_ti", "--device", "meta"], "int8 runs on a CPU; got meta"),
    ],
)
def test_what_it_asks_for(arguments: list[str], why: str) -> None:
    with pytest.raises(SystemExit, match=why):
        accuracy.main(arguments)
