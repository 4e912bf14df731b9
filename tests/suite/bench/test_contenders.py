"""The networks that are compared, and what a contender runs."""

from __future__ import annotations

import pytest
import torch
from racing import tiny

from deit import fused_vit
from deit.kernels.engine import dispatch
from evidence import paper_table
from race import contenders

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("deit_ti", ["resnet18", "regnety_4gf", "efficientnet_b0"]),
        ("deit_s", ["resnet101", "regnety_4gf", "efficientnet_b3"]),
        ("deit_b", ["resnet152", "regnety_16gf", "efficientnet_b4"]),
        ("deit_base_distilled_patch16_384", ["resnet152", "regnety_16gf", "efficientnet_b6"]),
    ],
)
def test_nearest_convnets_by_quoted_speed(arch: str, expected: list[str]) -> None:
    assert contenders.neighbours(contenders.deit_network(arch)) == expected


def test_neighbours_of_networks_the_table_lacks() -> None:
    for arch, size in (("deit_b", 320), ("vit_l", 224), ("deit_s", 384)):
        network = contenders.deit_network(arch, size)
        assert network.quoted is None
        assert len(contenders.neighbours(network)) == 3


def test_convnets_have_the_papers_sizes_and_flops() -> None:
    network = contenders.convnet("efficientnet_b4")
    assert network.img_size == 380
    resnet = contenders.convnet("resnet50")
    assert resnet.flops == pytest.approx(2 * 4.09e9, rel=0.01)  # 4.09 G multiply-adds, two each
    assert contenders.convnet("regnety_160").name == "regnety_16gf"
    assert len(paper_table.rows()) == 32


def test_flop_counter_agrees_with_the_config() -> None:
    network = contenders.deit_network("deit_s")
    counted = contenders.forward_flops(network.build, 224)
    assert counted == pytest.approx(network.flops, rel=1e-6)


def test_fused_shares_weights_in_inference_and_owns_them_in_training() -> None:
    base = tiny()
    pointer = base.module.pos_embed.data_ptr()
    assert contenders.fused(base, "auto", train=False).module.pos_embed.data_ptr() == pointer
    assert contenders.fused(base, "auto", train=True).module.pos_embed.data_ptr() != pointer
    assert type(base.module.blocks[0]).__name__ == "Block"  # the eager model stays as it was


@pytest.mark.parametrize("train", [False, True])
def test_operators_are_watched_as_they_run(train: bool) -> None:
    network = contenders.deit_network("deit_ti", 32)
    base = contenders.eager(network, CPU, torch.float32, train=train)
    images = torch.randn(2, 3, 32, 32)
    assert contenders.operators_in(lambda: base.module(images)) == {}
    made = contenders.fused(base, "auto", train=train)
    step = contenders.make_step(made, torch.float32, train=train)
    seen = contenders.operators_in(lambda: step(images))
    assert {"attention" if train else "vit_block", "gelu_mlp"} <= set(seen)
    assert set(" ".join(seen.values()).split()) <= {*dispatch.IMPLEMENTATIONS, "and"}
    assert contenders.operators_in(lambda: None) == {}  # the watch was called off


def test_a_training_step_updates_the_weights() -> None:
    network = contenders.deit_network("deit_ti_distilled", 32)
    base = contenders.eager(network, CPU, torch.float32, train=True)
    before = base.module.pos_embed.detach().clone()
    step = contenders.make_step(base, torch.float32, train=True)
    assert step(torch.randn(2, 3, 32, 32)).isfinite()
    assert not torch.equal(before, base.module.pos_embed)


@pytest.mark.parametrize("arch", ["deit_ti", "deit_ti_distilled"])
def test_a_teacher_labels_for_the_last_head(arch: str) -> None:
    """Hard distillation, equation (3): half the labels' cross-entropy, half the teacher's."""
    base = contenders.eager(contenders.deit_network(arch, 32), CPU, torch.float32, train=True)
    images = torch.randn(4, 3, 32, 32)
    taught = torch.tensor([9, 8, 7, 6])
    teacher = lambda given: torch.nn.functional.one_hot(taught, 1000) * (1.0 + given.mean() * 0)
    outputs = base.module(images)
    heads = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    cross = lambda logits, labels: -logits.log_softmax(-1)[range(4), labels].mean()
    expected = (cross(heads[0], range(4)) + cross(heads[1], taught)) / 2
    found = contenders.training_loss(base, images, torch.float32, teacher)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("train", [False, True])
def test_a_network_is_fused_in_the_mode_and_dtype_that_it_runs_in(
    train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []
    monkeypatch.setattr(
        fused_vit,
        "fuse",
        lambda module, impl: asked.append((module.training, torch.is_autocast_enabled("cpu"))),
    )
    base = contenders.eager(contenders.deit_network("deit_ti", 32), CPU, torch.bfloat16, train)
    contenders.fused(base, "auto", train, torch.bfloat16)
    assert asked == [(train, train)]
