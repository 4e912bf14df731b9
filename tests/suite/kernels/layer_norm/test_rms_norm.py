"""rms_norm by the C++ library, against fp64 by the rule of docs/design.md."""

import gradients
import pytest
import torch

from deit.kernels import explain, layer_norm, rms_norm
from deit.kernels.engine import registry
from deit.kernels.prove import oracle, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = registry.COMPILED["cpu"]


# As for layer_norm in test_native.py: tails, less than a vector, several blocks and a tail.
@pytest.mark.parametrize("channels", [1, 33, 100, 768, 2000])
def test_forward(isa, channels):
    for family in oracle.FAMILIES:
        for dtype in DTYPES:
            x = oracle.make(family, (3, 17, channels), dtype)
            weight = oracle.make("random", (channels,), dtype, seed=1)
            for w in (weight, weight.float()):
                arguments = (x, w, 1e-5)
                oracle.check(OPS["rms_norm"](*arguments), reference.rms_norm, arguments)


# 69 rows are a chunk and a part.
@pytest.mark.parametrize("channels", [5, 33, 192, 768])
def test_gradients(base_isa, channels):
    for family in oracle.FAMILIES:
        for dtype in DTYPES:
            draws = 8 if family == "outlier" and channels == 33 else 1
            xs = [oracle.make(family, (3, 23, channels), dtype, seed=50 * i) for i in range(draws)]
            dout = oracle.make("random", xs[0].shape, dtype, seed=9)
            weight = oracle.make("random", (channels,), dtype, seed=1)
            for w in (weight, weight.float()):
                given = [(x, w) for x in xs]
                gradients.check_draws(rms_norm, given, [0, 1], [dout], impl="cpu")


def test_it_is_layer_norm_of_rows_without_a_mean(base_isa):
    """The same kernels: bits of LayerNorm where its mean is 0 exactly, forward and backward."""
    half = torch.randint(-8, 9, (7, 48), generator=torch.Generator().manual_seed(0)).float()
    x, weight = torch.cat([half, -half], -1), torch.linspace(0.5, 2, 96)
    out, mean, rstd = OPS["layer_norm_fwd"](x, weight, None, 1e-6)
    assert not mean.any()
    found = OPS["rms_norm_fwd"](x, weight, 1e-6)
    assert torch.equal(found[0], out)
    assert torch.equal(found[1], rstd)
    dout = x / weight  # weight * dout has no mean either
    want = OPS["layer_norm_bwd"](dout, x, weight, mean, rstd)[:2]
    got = OPS["rms_norm_bwd"](dout, x, weight, rstd)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_a_mean_stays_where_it_is():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) + 3
    weight = torch.ones(64)
    assert (rms_norm(x, weight) - layer_norm(x, weight)).abs().mean() > 0.5
    assert explain("rms_norm", x, weight).reasons["cuda"]


def test_empty_rows():
    x, weight = torch.empty(0, 5, 24, requires_grad=True), torch.ones(24, requires_grad=True)
    rms_norm(x, weight, impl="cpu").sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
