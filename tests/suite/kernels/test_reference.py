"""The references against independent statements of what they compute, in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from deit.kernels import attention, cross_entropy, distillation_loss
from deit.kernels.engine import registry
from deit.kernels.engine.operator import OPERATORS, operator_names
from deit.kernels.prove import calls, reference

torch.manual_seed(0)


def fp64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_layer_norm_by_its_formula():
    x, w, b = fp64(3, 7, 20), fp64(20), fp64(20)
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    want = (x - mean) / (var + 1e-3).sqrt() * w + b
    torch.testing.assert_close(reference.layer_norm(x, w, b, 1e-3), want)


def test_rms_norm_by_its_formula():
    x, w = fp64(3, 7, 20), fp64(20)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w
    torch.testing.assert_close(reference.rms_norm(x, w, 1e-3), want)
    half = reference.rms_norm(x.half(), w.float(), 1e-3)
    torch.testing.assert_close(half, want.half(), atol=2e-2, rtol=2e-2)


def test_add_layer_norm_by_its_formula():
    x, r, w, g, k = fp64(2, 3, 8), fp64(2, 3, 8), fp64(8), fp64(8), fp64(2)
    normed, total = reference.add_layer_norm(x, r, w, None, 1e-6, g, k)
    torch.testing.assert_close(total, r + k[:, None, None] * g * x)
    torch.testing.assert_close(normed, reference.layer_norm(total, w, None, 1e-6))


def test_attention_by_its_formula():
    qkv, bias = fp64(2, 5, 3 * 12), fp64(2, 5)
    q, k, v = (t.view(2, 5, 3, 4).transpose(1, 2) for t in qkv.split(12, dim=-1))
    scores = q @ k.transpose(-1, -2) * 0.3 + bias[:, None, None]
    want = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(reference.attention(qkv, 3, 0.3, bias), want)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_keys(dtype, impl):
    """fp32's smallest number counts in half precision, too: keys that all have it are alike.

    Samples: none hidden; some by it, some by -inf; all by it; all by it but one a little less; all
    by -inf.
    """
    tokens, least = 40, torch.finfo(torch.float32).min
    qkv, bias = torch.randn(5, tokens, 3 * 64).to(dtype), torch.zeros(5, tokens)
    bias[1, 7:], bias[1, 20:] = least, -torch.inf
    bias[2:4], bias[3, 5], bias[4] = least, -1e38, -torch.inf
    q, k, v = qkv.double().view(5, tokens, 3, 2, 32).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * 0.2 + bias.double()[:, None, None]
    want = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).flatten(2)
    found = attention(qkv, 2, scale=0.2, key_bias=bias, impl=impl)
    near = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found.double(), want, atol=near, rtol=near)
    assert (found[4] == 0).all()


def test_linear_and_mlp_by_their_formulas():
    x, w1, b1, w2, b2 = fp64(2, 3, 8), fp64(16, 8), fp64(16), fp64(8, 16), fp64(8)
    residual, gamma, keep = fp64(2, 3, 8), fp64(8), fp64(2)
    erf_gelu = lambda t: t * (1 + torch.erf(t / math.sqrt(2))) / 2
    hidden = erf_gelu(x @ w1.T + b1)
    torch.testing.assert_close(reference.linear(x, w1, b1, "gelu", None, None, None), hidden)
    want = residual + keep[:, None, None] * gamma * (hidden @ w2.T + b2)
    torch.testing.assert_close(reference.gelu_mlp(x, w1, b1, w2, b2, residual, gamma, keep), want)
    tanh = reference.linear(x, w1, b1, "gelu_tanh", None, None, None)
    assert 0 < (tanh - hidden).abs().max() < 1e-2  # the approximation is another function
    affine = x @ w1.T + b1
    for name, factor in (("quick_gelu", 1.702), ("silu", 1.0)):
        hidden = affine / (1 + torch.exp(-factor * affine))
        torch.testing.assert_close(reference.linear(x, w1, b1, name, None, None, None), hidden)
        found = reference.gelu_mlp(x, w1, b1, w2, b2, None, None, None, name)
        torch.testing.assert_close(found, hidden @ w2.T + b2)


def test_patch_embed_by_its_formula():
    images, weight, bias = fp64(2, 3, 8, 4), fp64(5, 3, 4, 4), fp64(5)
    prefix, positions = fp64(1, 2, 5), fp64(1, 4, 5)
    patches = images.view(2, 3, 2, 4, 1, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 2, 48)
    tokens = torch.cat([prefix.expand(2, -1, -1), patches @ weight.view(5, 48).T + bias], 1)
    torch.testing.assert_close(
        reference.patch_embed(images, weight, bias, prefix, positions), tokens + positions
    )


def leaf(*shape):
    return fp64(*shape).requires_grad_()


def every(operator):
    """The schema's arguments with every optional, as leaves."""
    size = calls.Size(2, 3, 4, heads=2, hidden=6, width=5, side=2, patch=2, classes=5)
    call = calls.build(operator, calls.Draw(dtype=torch.float64), size, "every")
    return [
        value.requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for value in OPERATORS[operator].prepare(**call.inputs, **call.options)
    ]


# Only the reference differentiates by keep and by a probability target.
DIFFERENTIATED = {name: every(name) for name in operator_names(eight_bits=False)} | {
    "linear by tanh": (leaf(2, 3, 4), leaf(5, 4), leaf(5), "gelu_tanh", None, None, None),
    "linear by SiLU": (leaf(2, 3, 4), leaf(5, 4), leaf(5), "silu", None, None, None),
    "cross_entropy by probabilities": (leaf(3, 5), leaf(3, 5), 0.1),
    "distillation_loss by hard labels": (
        leaf(3, 5), leaf(3, 5), fp64(3, 5), leaf(3, 5), "hard", 0.3, 2.0, 0.1, "numel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENTIATED)
def test_gradcheck(case):
    function = getattr(reference, case.partition(" ")[0])
    assert torch.autograd.gradcheck(function, DIFFERENTIATED[case])


def test_every_reference_is_differentiated_with_every_optional():
    for name in operator_names(eight_bits=False):
        formals = registry.COMPILED["cpu"][name]._schema.arguments
        for value, formal in zip(DIFFERENTIATED[name], formals, strict=True):
            assert value is not None, f"{name}: {formal.name}"


def one_hot(index, classes):
    return F.one_hot(index, classes).double()


def test_cross_entropy_smoothing_and_soft_targets():
    logits, target = fp64(4, 10), torch.tensor([1, 0, 9, 4])
    smoothed = one_hot(target, 10) * 0.9 + 0.1 / 10
    want = -(smoothed * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, target, label_smoothing=0.1), want)
    torch.testing.assert_close(cross_entropy(logits, smoothed), want)


def test_hard_distillation_is_equation_3():
    logits, target, teacher = fp64(4, 10), torch.tensor([1, 0, 9, 4]), fp64(4, 10)
    want = 0.5 * F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(logits, teacher.argmax(1))
    torch.testing.assert_close(
        distillation_loss(logits, target, teacher, label_smoothing=0.0), want
    )


def test_label_smoothing_spares_the_teachers_labels():
    logits, token, teacher = fp64(4, 10), fp64(4, 10), fp64(4, 10)
    target = torch.tensor([1, 0, 9, 4])
    smoothed = one_hot(target, 10) * 0.9 + 0.01
    want = -0.5 * (smoothed * logits.log_softmax(-1)).sum(-1).mean() + 0.5 * F.cross_entropy(
        token, teacher.argmax(1)
    )
    got = distillation_loss(logits, target, teacher, distillation_logits=token)
    torch.testing.assert_close(got, want)


def test_soft_distillation_averages_over_the_batch_and_legacy_over_elements():
    logits, target, teacher = fp64(4, 10), torch.tensor([1, 0, 9, 4]), fp64(4, 10)
    p, q = (teacher / 3).softmax(-1), (logits / 3).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    hard = F.cross_entropy(logits, target)
    options = {"kind": "soft", "label_smoothing": 0.0}
    got = distillation_loss(logits, target, teacher, **options)
    torch.testing.assert_close(got, 0.9 * hard + 0.1 * 9 * divergence)
    legacy = distillation_loss(logits, target, teacher, kl_reduction="numel", **options)
    torch.testing.assert_close(legacy, 0.9 * hard + 0.1 * 9 * divergence / 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "medium"}, "kind: expected 'hard' or 'soft'"),
        ({"alpha": 2.0}, "alpha: expected in"),
        ({"temperature": 0.0}, "temperature: expected > 0"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected in"),
        ({"kl_reduction": "mean"}, "kl_reduction: expected one of"),
        ({"distillation_logits": torch.zeros(4, 9)}, r"distillation_logits: expected \(4, 10\)"),
    ],
)
def test_bad_loss_arguments(change, message):
    target = torch.tensor([1, 0, 9, 4])
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(4, 10), target, torch.zeros(4, 10), **change)


def test_target_kinds():
    with pytest.raises(TypeError, match="target: expected int64"):
        cross_entropy(torch.zeros(4, 10), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="target: expected probabilities"):
        cross_entropy(torch.zeros(4, 10), torch.zeros(4, 9))
