"""compile_graph: what a replayed graph may answer, and when it must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deit
from deit.fused_vit import compile_graph, fuse
from deit.fused_vit.cuda_graph import Graph
from deit.model import DeiT

SMALL = deit.Config("deit_small", embed_dim=64, num_heads=1, depth=2, img_size=32)


@pytest.fixture
def model() -> DeiT:
    torch.manual_seed(0)
    found = DeiT(SMALL).eval()
    fuse(found)
    return found


def graphed(model: nn.Module) -> Graph:
    """A graph as compile_graph makes it. A CPU replays it, in the same memory."""
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        outputs = model(images)

        def replay() -> None:
            with torch.no_grad():
                outputs.copy_(model(images))

        return Graph(model, images, outputs, replay)


def test_each_answer_is_its_own(model: DeiT) -> None:
    graph = graphed(model)
    first, second = torch.randn(2, 2, 3, 32, 32)
    with torch.no_grad():
        expected = [model(first), model(second)]
    found = [graph(first), graph(second)]
    for mine, theirs in zip(found, expected, strict=True):  # the second left the first alone
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
    graph.images.copy_(first)
    assert torch.equal(graph(graph.images), expected[0])
    with torch.inference_mode():
        assert torch.equal(graph(second), expected[1])


def _assign(model: DeiT) -> None:
    model.blocks[1].mlp.fc1.weight = nn.Parameter(model.blocks[1].mlp.fc1.weight.detach().clone())


def _move(model: DeiT) -> None:
    model.head.weight.data = model.head.weight.data.clone()


def _remove(model: DeiT) -> None:
    model.head.bias = None


def _write(model: DeiT) -> None:
    with torch.no_grad():
        model.blocks[0].norm1.bias.add_(1)


def _write_data(model: DeiT) -> None:
    model.blocks[0].attn.qkv.weight.data.mul_(1.5)


def _load(model: DeiT) -> None:
    model.load_state_dict(DeiT(SMALL).state_dict())


@pytest.mark.parametrize("change", [_write, _write_data, _load])
def test_what_is_written_in_place_is_read(change: Any, model: DeiT) -> None:
    graph = graphed(model)
    images = torch.randn(2, 3, 32, 32)
    before = graph(images)
    change(model)
    with torch.no_grad():
        expected = model(images)
    assert not torch.allclose(before, expected)
    assert torch.equal(graph(images), expected)


@pytest.mark.parametrize("change", [_assign, _move, _remove])
def test_moved_and_replaced_weights_are_refused(change: Any, model: DeiT) -> None:
    graph = graphed(model)
    images = torch.randn(2, 3, 32, 32)
    graph(images)
    change(model)
    with pytest.raises(RuntimeError, match="weights have been moved or replaced since its graph"):
        graph(images)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(3, 3, 32, 32), r"got torch.float32 \[3, 3, 32, 32\] on cpu"),
        (torch.zeros(2, 3, 32, 32).bfloat16(), r"got torch.bfloat16 \[2, 3, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32, device="meta"), r"on meta"),
    ],
)
def test_other_images_are_refused(images: Tensor, got: str, model: DeiT) -> None:
    graph = graphed(model)
    with pytest.raises(
        ValueError, match=r"images: expected torch.float32 \[2, 3, 32, 32\].*" + got
    ):
        graph(images)
    with pytest.raises(TypeError, match="images: expected a tensor; got list"):
        graph([])


def test_bad_input(model: DeiT, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module; got function"):
        compile_graph(lambda x: x, images)
    with pytest.raises(TypeError, match="batch: expected a tensor of images; got int"):
        compile_graph(model, 256)
    with pytest.raises(ValueError, match="batch: expected images on a GPU; got cpu"):
        compile_graph(model, images)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    model.blocks[1].mlp.train()
    with pytest.raises(ValueError, match=r"evaluation mode; blocks\.1\.mlp is in training mode"):
        compile_graph(model, images)
    model.eval().to("meta")
    with pytest.raises(ValueError, match="model: expected all on cpu; got some on meta"):
        compile_graph(model, images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a capture needs a GPU")
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_captured_graph_gives_the_models_bits(impl: str, autocast: bool, model: DeiT) -> None:
    model.cuda()
    fuse(model, impl)
    images = torch.randn(3, 2, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        graph = compile_graph(model, images[0])
        with torch.no_grad():
            expected = [model(each) for each in images]
    for each, theirs in zip(images, expected, strict=True):
        assert torch.equal(graph(each), theirs)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        expected_now = model(images[0])
    assert torch.equal(graph(images[0]), expected_now)
