"""fuse() on RMSNorms: timm's, torch's, and blocks with them."""

import pytest
import torch
from fusing import IMAGES, filled, forbid_originals, logits, same
from fusing import timms as vision_transformer
from timm.layers import RmsNorm, RmsNormFp32
from torch import nn

from deit.fused_vit import fuse, unfuse
from deit.fused_vit.modules import Fused

X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)) + 1


def one(norm, **options):
    torch.manual_seed(0)
    return filled(nn.Sequential(norm(48, **options)))


@torch.no_grad()
@pytest.mark.parametrize(
    "norm", [RmsNorm, RmsNormFp32, lambda dim: nn.RMSNorm(dim, eps=1e-5)], ids=["timm", "32", "nn"]
)
def test_a_norm_by_itself(norm, monkeypatch):
    for dtype, near in ((torch.float32, 2e-6), (torch.bfloat16, 0.03)):
        model, x = one(norm).to(dtype), X.to(dtype)
        want = model(x)
        assert fuse(model, "cpu").operators == {"rms_norm": "cpu"}
        with monkeypatch.context() as patch:
            forbid_originals(patch)
            got = model(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, atol=near, rtol=near)


@torch.no_grad()
def test_a_wider_weight_widens_what_it_widened():
    """timm's and torch's multiply in the wider dtype, and return it."""
    for norm in (RmsNorm, nn.RMSNorm):
        model = one(norm, eps=1e-5)
        want = model(X.bfloat16())
        fuse(model)
        assert torch.equal(model(X.bfloat16()), want)


def test_what_is_left_says_why():
    for norm, why in (
        (nn.RMSNorm(48), "its eps is that of a dtype"),
        (nn.RMSNorm((5, 48), eps=1e-6), "it normalises over 2 axes"),
        (RmsNorm(48, affine=False), "it has no weight"),
        (RmsNormFp32(48).double(), "it computes in fp32"),
    ):
        model = nn.Sequential(norm)
        with pytest.warns(UserWarning, match="nothing in this Sequential could be fused"):
            report = fuse(model)
        assert not isinstance(norm, Fused)
        assert all(note.startswith(why) for note in report.left.values())


@pytest.mark.parametrize("block", ["parts", "whole"])
def test_blocks_run_by_their_parts_and_the_last_one_for_its_token(block, monkeypatch):
    torch.manual_seed(0)
    model = filled(vision_transformer(norm_layer="rmsnorm"))
    want = logits(model)
    report = fuse(model, "cpu", block=block)
    assert {"rms_norm": "cpu", "linear": "cpu"}.items() <= report.operators.items()
    assert not {"layer_norm", "vit_block"} & report.operators.keys()
    if block == "whole":
        assert "by its parts: a whole block knows no norm but LayerNorm" in str(report)
    forbid_originals(monkeypatch)
    same(logits(model), want)
    rows = []
    model.norm.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[1]))
    monkeypatch.undo()
    same(logits(model), want)
    assert rows == [17]  # a hook is shown every token
    same(logits(unfuse(model)), want)
    assert model(IMAGES).shape == want.shape
