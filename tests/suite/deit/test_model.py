"""The plain model: its heads, its input checks, its stochastic depth."""

import pytest
import torch

import deit
from deit.model import TEST_HEADS, DropPath, combine_heads


@pytest.fixture(scope="module")
def distilled():
    torch.manual_seed(0)
    return deit.create("deit_ti_distilled", img_size=32, num_classes=10)


def test_training_returns_both_heads_and_evaluation_one(distilled):
    images = torch.randn(2, 3, 32, 32)
    both = distilled.train()(images)
    assert isinstance(both, tuple)
    assert [tuple(t.shape) for t in both] == [(2, 10), (2, 10)]
    assert distilled.eval()(images).shape == (2, 10)


def test_test_heads_by_their_definitions():
    a, b = torch.randn(4, 10), torch.randn(4, 10)
    assert torch.equal(combine_heads(a, b, "class"), a)
    assert torch.equal(combine_heads(a, b, "distillation"), b)
    assert torch.equal(combine_heads(a, b, "logit-mean"), (a + b) / 2)
    fused = combine_heads(a, b, "softmax-sum")
    summed = a.softmax(-1) + b.softmax(-1)
    torch.testing.assert_close(2 * fused.exp(), summed)
    assert torch.equal(fused.argsort(-1), summed.argsort(-1))
    torch.testing.assert_close(fused.softmax(-1), summed / 2)  # usable as logits


def test_softmax_sum_and_logit_mean_can_disagree():
    """The paper's rule is not timm's: a confident head outweighs a lukewarm one differently."""
    a, b = torch.tensor([[8.0, 0.0, 6.5]]), torch.tensor([[0.0, 7.0, 6.5]])
    assert combine_heads(a, b, "softmax-sum").argmax() != combine_heads(a, b, "logit-mean").argmax()


def test_unknown_head():
    with pytest.raises(ValueError, match="test_head: expected one of"):
        deit.create("deit_ti", test_head="mean")
    with pytest.raises(ValueError, match="how: expected one of"):
        combine_heads(torch.zeros(1, 2), torch.zeros(1, 2), "sum")


@pytest.mark.parametrize("head", TEST_HEADS)
def test_every_head_differs_from_the_others_on_one_model(distilled, head):
    distilled.eval()
    distilled.test_head = head
    out = distilled(torch.randn(1, 3, 32, 32))
    assert out.shape == (1, 10)
    assert out.isfinite().all()


def test_integer_images_are_refused(distilled):
    with pytest.raises(TypeError, match=r"images: expected a floating-point dtype.*uint8"):
        distilled(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 3, 32, 48), (3, 32, 32), (1, 3, 64, 64)])
def test_wrong_image_shape_is_refused(distilled, shape):
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, 32, 32\]; got"):
        distilled(torch.randn(shape))


def test_nan_images_give_nan_for_their_sample_alone(distilled):
    images = torch.randn(2, 3, 32, 32)
    images[1, 0, 0, 0] = float("nan")
    out = distilled.eval()(images)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_empty_batch(distilled):
    assert distilled.eval()(torch.randn(0, 3, 32, 32)).shape == (0, 10)


def test_stochastic_depth_grows_linearly_and_keeps_the_mean():
    model = deit.create("deit_ti", drop_path=0.1)
    rates = [block.drop_path.rate for block in model.blocks]
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates)
    drop = DropPath(0.25).train()
    torch.manual_seed(0)
    keep = drop.keep(torch.empty(20_000, 1, 1))
    assert keep.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert keep.mean().item() == pytest.approx(1.0, abs=0.02)
    assert drop.eval().keep(torch.empty(4, 1, 1)) is None


def test_drop_path_out_of_range():
    with pytest.raises(ValueError, match=r"drop_path: expected in \[0, 1\); got 1.0"):
        deit.create("deit_ti", drop_path=1.0)


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = deit.create("deit_ti_distilled")
    for parameter in (model.cls_token, model.dist_token, model.pos_embed, model.head_dist.weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.blocks[3].mlp.fc1.bias.abs().max() == 0
