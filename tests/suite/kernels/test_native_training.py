"""What the C++ training kernels promise beside their error, and whole models that train by them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from layers import feed_forward, keep_of, layer
from torch.utils._python_dispatch import TorchDispatchMode

import deit
from deit.fused_vit import fuse
from deit.kernels import add_layer_norm, attention, explain, gelu_mlp, layer_norm, linear
from deit.kernels.engine import dispatch, native, registry
from deit.kernels.prove import reference

pytestmark = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)

OPS = registry.COMPILED["cpu"]


def calls():
    """Every `_fwd` and `_bwd` on small inputs: name -> a call that returns its outputs."""
    x, weight, bias, residual, gamma, dout = layer(3, 197, 48, 200)
    h, w1, b1, w2, b2, r, g2, dy = feed_forward(3, 197, 48, 200)
    keep, nothing = keep_of(3), torch.empty(0)
    total, norm_weight, norm_bias = x + 1, torch.linspace(0.5, 2, 48), torch.randn(48)
    qkv, dmixed = torch.randn(3, 197, 192), torch.randn(3, 197, 64)
    mean, rstd = total.mean(-1), total.std(-1).reciprocal()
    out, lse = OPS["attention_fwd"](qkv, 1, 0.125, None)
    affine = OPS["linear_fwd"](x, weight, bias, "gelu", None, None, None)[1]
    hidden, mlp_affine = OPS["gelu_mlp_fwd"](h, w1, b1, w2, b2, None, g2, None)[1:]
    arguments = {
        "layer_norm_fwd": (x, norm_weight, norm_bias, 1e-6),
        "layer_norm_bwd": (x, total, norm_weight, mean, rstd),
        "rms_norm_fwd": (x, norm_weight, 1e-6),
        "rms_norm_bwd": (x, total, norm_weight, rstd),
        "add_layer_norm_fwd": (x, total, norm_weight, None, 1e-6, norm_bias, keep),
        "add_layer_norm_bwd": (x, x, x, total, norm_weight, mean, rstd, norm_bias, keep),
        "attention_fwd": (qkv, 1, 0.125, None),
        "attention_bwd": (dmixed, qkv, out, lse, 1, 0.125, None),
        "linear_fwd": (x, weight, bias, "gelu", residual, gamma, keep),
        "linear_bwd": (dout, x, weight, affine, "gelu", gamma, keep),
        "gelu_mlp_fwd": (h, w1, b1, w2, b2, r, g2, keep),
        "gelu_mlp_bwd": (dy, h, w1, w2, hidden, mlp_affine, g2, keep),
        "linear_bwd_plain": (dout, x, weight, nothing, None, None, None),
        "patch_embed_bwd": (
            torch.randn(3, 14, 48), torch.randn(3, 3, 64, 48), torch.randn(48, 3, 16, 16), 2
        ),
    }  # fmt: skip
    for name, stream in STREAM.items():  # which stays in fp32, as under autocast
        arguments[f"{name}_bf16"] = tuple(
            a.bfloat16() if isinstance(a, torch.Tensor) and i != stream else a
            for i, a in enumerate(arguments[name])
        )
    return {name: (_operator(name), given) for name, given in arguments.items()}


def _operator(name):
    return name.removesuffix("_plain").removesuffix("_bf16")


# What may stay in fp32 beside bf16 by position, the products' residual or dout; None: nothing.
STREAM = {
    "linear_fwd": 4,
    "linear_bwd": 0,
    "gelu_mlp_fwd": 5,
    "gelu_mlp_bwd": 0,
    "attention_fwd": None,
    "attention_bwd": 3,  # lse
    "patch_embed_bwd": None,
}


CALLS = ["_".join(pair) for pair in itertools.product(
    ("layer_norm", "rms_norm", "add_layer_norm", "attention", "linear", "gelu_mlp"),
    ("fwd", "bwd"),
)] + ["linear_bwd_plain", "patch_embed_bwd"] + [f"{name}_bf16" for name in STREAM]  # fmt: skip


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    return calls()


def outputs_of(name, arguments):
    outputs = OPS[name](*arguments)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@pytest.mark.parametrize("name", CALLS)
def test_threads_change_no_bit(isa, threads, prepared, name):
    operator, arguments = prepared[name]
    threads(1)
    alone = outputs_of(operator, arguments)
    for count in (2, 8):
        threads(count)
        for one, many in zip(alone, outputs_of(operator, arguments), strict=True):
            assert torch.equal(one, many)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(prepared, name):
    operator, arguments = prepared[name]
    torch.library.opcheck(OPS[operator], arguments)


@pytest.mark.parametrize("name", CALLS)
def test_strides_change_no_bit(prepared, name):
    """Every tensor as every second element of a larger one, and from an odd offset."""
    operator, arguments = prepared[name]

    def strided(value):
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            return value
        wide = value.new_empty((*value.shape[:-1], 2 * value.shape[-1] + 1))
        wide[..., 1::2] = value
        return wide[..., 1::2]

    def shifted(value):
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            return value
        wide = value.new_empty((*value.shape[:-1], value.shape[-1] + 3))
        wide[..., 3:] = value
        return wide[..., 3:]

    expected = outputs_of(operator, arguments)
    for view in (strided, shifted):
        found = outputs_of(operator, tuple(view(a) for a in arguments))
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)


def test_an_expanded_gradient():
    """`.sum().backward()` sends one element at stride 0."""
    x = torch.randn(2, 9, 48, requires_grad=True)
    weight = torch.randn(48, 48, requires_grad=True)
    for impl in ("cpu", "reference"):
        x.grad = weight.grad = None
        y = layer_norm(linear(x, weight, impl=impl), weight[0], impl=impl)
        attention(y, 1, impl=impl).sum().backward()
        if impl == "cpu":
            found = x.grad, weight.grad
    torch.testing.assert_close(found, (x.grad, weight.grad), rtol=1e-4, atol=1e-5)


class Made(TorchDispatchMode):
    """The names of the operators that run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(func)]
        return func(*args, **(kwargs or {}))


class Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return None


def test_nothing_is_made_for_outputs_without_a_gradient():
    """Autograd would fill zeros for what a forward saves; and pass on that there is no gradient."""
    x = torch.randn(2, 9, 192, requires_grad=True)
    weight, vector = torch.randn(192, 192, requires_grad=True), torch.randn(192, requires_grad=True)
    for call in (
        lambda: layer_norm(x, vector, impl="cpu"),
        lambda: add_layer_norm(x, x.detach(), vector, impl="cpu")[0],
        lambda: attention(x, 1, impl="cpu"),
        lambda: linear(x, weight, activation="gelu", impl="cpu"),
        lambda: gelu_mlp(x, weight, None, weight, None, gamma=vector, impl="cpu"),
    ):
        y = call()
        with Made() as made:
            y.backward(torch.ones_like(y))
        assert any("_bwd" in name for name in made.names)
        zeros = [name for name in made.names if "zeros." in name]
        assert zeros == [] or "add_layer_norm_bwd" in "".join(made.names)  # of its second output
        x.grad = None
        Dropped.apply(call()).sum().backward()
        assert x.grad is None


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape):
    """An empty batch has empty gradients and zeros for its parameters, by every kernel."""
    x = torch.empty(*shape, 24, requires_grad=True)
    weight = torch.randn(24, 24, requires_grad=True)
    vector = torch.randn(24, requires_grad=True)
    outputs = [
        layer_norm(x, vector, impl="cpu"),
        *add_layer_norm(x, x.detach(), vector, gamma=vector, impl="cpu"),
        attention(x, 1, impl="cpu"),
        linear(x, weight, vector),
        gelu_mlp(x, weight, vector, weight, vector, gamma=vector),
    ]
    torch.autograd.backward([y.sum() for y in outputs])
    assert x.grad.shape == x.shape
    assert (weight.grad == 0).all()
    assert (vector.grad == 0).all()
    raw = torch.empty(*shape, 24)
    dx, dweight, dbias, _ = OPS["linear_bwd"](raw, raw, weight.detach(), raw[:0], None, None, None)
    assert dx.shape == raw.shape
    assert (dweight == 0).all()
    assert (dbias == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_sample(isa, dtype):
    qkv, dout = torch.randn(2, 30, 192, dtype=dtype), torch.randn(2, 30, 64, dtype=dtype)
    dout[0, 3, 5] = torch.nan
    out, lse = OPS["attention_fwd"](qkv, 1, 0.125, None)
    dqkv = OPS["attention_bwd"](dout, qkv, out, lse, 1, 0.125, None)
    assert dqkv[0].isnan().any()
    assert dqkv[1].isfinite().all()


def test_what_it_does_not_train_is_left_to_pytorch():
    half = torch.randn(2, 8, requires_grad=True, dtype=torch.bfloat16)
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    assert explain("linear", half, weight).chosen == "reference"  # in bf16 measured by nobody yet
    assert explain("linear", half.detach().float().requires_grad_(), weight.float()).chosen == "cpu"
    fp16 = explain("linear", half.detach().half().requires_grad_(), weight.half())
    assert "fp32 and bf16" in "; ".join(fp16.reasons["cpu"])
    bias = torch.zeros(2, 5, requires_grad=True)
    refused = explain("attention", torch.randn(2, 5, 192), 1, key_bias=bias)
    assert "no gradient for it" in refused.reasons["cpu"][0]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("linear_fwd", (1, torch.ones(4, 7)), "weight"),
        ("linear_fwd", (4, torch.ones(3, 197, 7)), "residual"),
        ("linear_bwd", (0, torch.ones(3, 197, 7)), "dout"),
        ("linear_bwd", (0, torch.ones(3, 197, 200).double()), "dout"),
        ("linear_bwd", (4, "relu"), "activation"),
        ("linear_bwd", (0, torch.ones(3, 198, 200)), "dout"),
        ("gelu_mlp_bwd", (0, torch.ones(3, 196, 48)), "dout"),
        ("gelu_mlp_bwd", (4, torch.ones(3, 196, 200)), "hidden"),
        ("gelu_mlp_bwd", (2, torch.ones(199, 48)), "hidden"),
        ("gelu_mlp_fwd", (3, torch.ones(4, 7)), "w2"),
        ("layer_norm_bwd", (0, torch.ones(3, 197, 7)), "dout"),
        ("layer_norm_bwd", (3, torch.ones(5)), "mean"),
        ("rms_norm_bwd", (3, torch.ones(5)), "rstd"),
        ("add_layer_norm_bwd", (1, torch.ones(3, 197, 48).half()), "dtotal"),
        ("attention_bwd", (0, torch.ones(3, 197, 65)), "dout"),
        ("attention_bwd", (4, 5), "qkv"),
        ("linear_fwd_bf16", (1, torch.ones(200, 48)), "weight: expected the product's dtype"),
        ("linear_fwd_bf16", (4, torch.ones(3, 197, 200).half()), "residual: expected"),
        ("linear_bwd_bf16", (1, torch.ones(3, 197, 48)), "x: expected the product's dtype"),
        ("gelu_mlp_fwd_bf16", (3, torch.ones(48, 200)), "w2: expected the product's dtype"),
        ("patch_embed_bwd", (0, torch.ones(3, 14, 47)), "dout"),
        ("patch_embed_bwd", (0, torch.ones(2, 14, 48)), "images: expected those of dout"),
        ("patch_embed_bwd", (1, torch.ones(3, 3, 64, 32)), "images: expected those of dout"),
        ("patch_embed_bwd", (1, torch.ones(3, 3, 60, 48)), "images: expected height and width"),
        ("patch_embed_bwd_bf16", (1, torch.ones(3, 3, 64, 48)), "images: expected dout's dtype"),
        ("patch_embed_bwd_bf16", (0, torch.ones(3, 14, 48)), "dout: expected the product's dtype"),
    ],
)
def test_a_raw_call_with_wrong_shapes_raises(prepared, name, change, message):
    operator, arguments = prepared[name]
    position, value = change
    wrong = (*arguments[:position], value, *arguments[position + 1 :])
    with pytest.raises(RuntimeError, match=message):
        OPS[operator](*wrong)


# --- whole models -------------------------------------------------------------------------------


def train(model, steps, *, autocast=False, call=None):
    """The losses of `steps` AdamW steps on noise; stochastic depth draws from the same seed."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(steps):
        images = torch.randn(2, 3, 32, 32, generator=generator)
        target = torch.randint(10, (2,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            heads = (call or model)(images)
        heads = heads if isinstance(heads, tuple) else (heads,)
        loss = sum(F.cross_entropy(each.float(), target) for each in heads)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def pair(arch="deit_ti"):
    torch.manual_seed(0)
    plain = deit.create(arch, img_size=32, num_classes=10, drop_path=0.2).train()
    fused = copy.deepcopy(plain)
    by = fuse(fused).operators
    del by["cross_attention"]  # in inference; its kernel has no gradients
    assert set(by.values()) == {"cpu"}
    return plain, fused


@pytest.mark.parametrize("arch", ["deit_ti", "deit_ti_distilled"])
def test_loss_curves_are_those_of_the_plain_model(arch):
    plain, fused = pair(arch)
    torch.testing.assert_close(train(fused, 20), train(plain, 20), rtol=2e-4, atol=0)


@pytest.mark.parametrize("measured", [False, True], ids=["as shipped", "products measured faster"])
def test_loss_curve_under_autocast(measured, monkeypatch):
    plain, fused = pair()
    if measured:
        monkeypatch.setattr(dispatch, "_of_any", lambda *_: ("cpu",))
    found, expected = (train(m, 5, autocast=True) for m in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


def test_layer_scale_and_gradient_checkpointing_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model(
        "deit3_small_patch16_224", img_size=32, depth=2, num_classes=10, drop_path_rate=0.2
    ).train()
    fused = copy.deepcopy(plain)
    fuse(fused)
    expected = train(plain, 5)
    torch.testing.assert_close(train(copy.deepcopy(fused), 5), expected, rtol=2e-4, atol=0)
    fused.set_grad_checkpointing()
    torch.testing.assert_close(train(fused, 5), expected, rtol=2e-4, atol=0)


def test_compiled_training_step():
    torch.manual_seed(0)
    model = deit.create("deit_ti", img_size=32, num_classes=10).train()
    fuse(model)
    model.blocks = model.blocks[:2]
    expected = train(copy.deepcopy(model), 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = train(model, 3, call=compiled.__call__)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_reference_is_the_oracle():
    """The yardstick itself: autograd of the reference in fp64 against finite differences."""
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    w1, w2 = (torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x, a, b: reference.gelu_mlp(x, a, None, b, None, x, None, None), (x, w1, w2)
    )
