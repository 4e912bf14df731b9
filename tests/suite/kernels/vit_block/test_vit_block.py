"""vit_block's contract: what it refuses, and that its reference is the block it says it is."""

import pytest
import torch
from torch import nn

import deit
from deit.kernels import attention, gelu_mlp, layer_norm, linear, vit_block
from deit.kernels.engine import limits, native
from deit.kernels.prove import reference
from deit.kernels.vit_block import vit_blocks

needs_library = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)
B, N, D, M, HEADS = 2, 5, 64, 96, 2
X = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0))


def tensors(dtype=torch.float32):
    """The public function's tensors by name."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)
    return {
        "x": X.to(dtype),
        "norm1_weight": 1 + draw(D),
        "norm1_bias": draw(D),
        "qkv_weight": draw(3 * D, D),
        "qkv_bias": draw(3 * D),
        "proj_weight": draw(D, D),
        "proj_bias": draw(D),
        "norm2_weight": 1 + draw(D),
        "norm2_bias": draw(D),
        "w1": draw(M, D),
        "b1": draw(M),
        "w2": draw(D, M),
        "b2": draw(D),
    }


OPTIONAL = {
    "gamma1": torch.ones(D),
    "gamma2": torch.ones(D),
    "key_bias": torch.zeros(B, N),
    "row_stats": reference.row_stats(X),
}


@pytest.mark.parametrize("name", [*tensors(), *OPTIONAL])
def test_a_wrong_shape_is_named(name):
    given = tensors() | OPTIONAL
    given[name] = given[name][..., :-1] if name != "row_stats" else given[name][:, :-1]
    # A wrong x is reported by the first weight that does not fit it.
    named = "x: expected a last axis" if name == "x" else f"{name}: expected shape"
    with pytest.raises(ValueError, match=named):
        vit_block(**given, num_heads=HEADS)


@pytest.mark.parametrize("name", [*tensors(), *OPTIONAL])
def test_a_wrong_dtype_is_named(name):
    given = tensors() | OPTIONAL
    given[name] = given[name].bfloat16()
    named = {"x": "x", "qkv_weight": "qkv_bias"}.get(name, name)
    with pytest.raises(TypeError, match=f"^{named}: expected torch.(float32|bfloat16)"):
        vit_block(**given, num_heads=HEADS)


@pytest.mark.parametrize("name", [*tensors(), *OPTIONAL])
def test_what_is_no_tensor_is_named(name):
    given = tensors() | {name: 3.0}
    with pytest.raises(TypeError, match=f"^{name}: expected a Tensor; got float"):
        vit_block(**given, num_heads=HEADS)


@pytest.mark.parametrize("name", ["proj_weight", "w1", "w2", "norm2_weight"])
def test_a_weight_cannot_be_none(name):
    with pytest.raises(TypeError, match=f"^{name}: expected a Tensor; got NoneType"):
        vit_block(**tensors() | {name: None}, num_heads=HEADS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_heads": 0}, "num_heads: expected a positive integer; got 0"),
        ({"num_heads": 3}, "a multiple of num_heads=3"),
        ({"eps": -1.0}, r"eps: expected a number >= 0; got -1\.0"),
        ({"x": X[0]}, r"x: expected rank 3; got shape \(5, 64\)"),
        ({"impl": "fast"}, "impl: expected 'auto' or one of"),
        ({"activation": "relu"}, "activation: expected one of 'gelu', .*; got 'relu'"),
        ({"activation": None}, "activation: expected one of 'gelu', .*; got None"),
    ],
)
def test_bad_values(change, why):
    with pytest.raises(ValueError, match=why):
        vit_block(**tensors() | {"num_heads": HEADS} | change)


@needs_library
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": X}, "a stream in torch.float32 beside products in torch.bfloat16"),
        ({"x": X.bfloat16()[:0]}, "an empty axis"),
    ],
)
def test_what_the_cpu_kernel_cannot_take_is_a_reason(change, why):
    given = tensors(torch.bfloat16) | change
    if change["x"].dtype == torch.float32:
        for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"):
            given[name] = given[name].float()
    with pytest.raises(NotImplementedError, match=why):
        vit_block(**given, num_heads=HEADS, impl="cpu")


def by_operators(x, given, heads, scale=None, eps=1e-6):
    """The block by the CPU's operators, one after another."""
    norm = lambda x, i: layer_norm(
        x, given[f"norm{i}_weight"], given[f"norm{i}_bias"], eps, impl="cpu"
    )
    qkv = linear(norm(x, 1), given["qkv_weight"], given["qkv_bias"], impl="cpu")
    mixed = attention(qkv, heads, scale=scale, key_bias=given.get("key_bias"), impl="cpu")
    stream = linear(
        mixed,
        given["proj_weight"],
        given["proj_bias"],
        residual=x,
        gamma=given.get("gamma1"),
        impl="cpu",
    )
    return gelu_mlp(
        norm(stream, 2),
        *(given[name] for name in ("w1", "b1", "w2", "b2")),
        activation=given.get("activation", "gelu"),
        residual=stream,
        gamma=given.get("gamma2"),
        impl="cpu",
    )


@needs_library
@pytest.mark.parametrize("images", [3, 4, 9])  # by operators, image by image, uneven
@pytest.mark.parametrize(
    ("dtype", "dim", "hidden", "heads"),
    [(torch.float32, 64, 96, 2), (torch.float32, 200, 390, 5), (torch.bfloat16, 104, 790, 2)],
)
def test_the_cpu_kernel_gives_the_operators_bits_at_any_number_of_threads(
    isa, threads, monkeypatch, images, dtype, dim, hidden, heads
):
    # Every set multiplies bf16, if slowly; "auto" would leave it to PyTorch without AVX512-BF16.
    monkeypatch.setattr(limits, "cpu_isa", lambda: "avx512_bf16")
    generator = torch.Generator().manual_seed(images)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    given = {
        "norm1_weight": 1 + 0.1 * draw(dim),
        "norm1_bias": draw(dim),
        "qkv_weight": draw(3 * dim, dim) * dim**-0.5,
        "qkv_bias": None if images == 3 else draw(3 * dim),
        "proj_weight": draw(dim, dim) * dim**-0.5,
        "proj_bias": draw(dim),
        "norm2_weight": 1 + 0.1 * draw(dim),
        "norm2_bias": None if images == 9 else draw(dim),
        "w1": draw(hidden, dim) * dim**-0.5,
        "b1": draw(hidden),
        "w2": draw(dim, hidden) * hidden**-0.5,
        "b2": None if images == 4 else draw(dim),
        "activation": {3: "quick_gelu", 4: "gelu_tanh", 9: "gelu"}[images],
    }
    if images > 3:
        given |= {"gamma1": draw(dim), "gamma2": draw(dim).float()}
        given["key_bias"] = draw(images, 11)
    x = draw(11, images, dim).transpose(0, 1)  # not contiguous
    want = by_operators(x, given, heads)
    for number in (1, 2, 8):
        threads(number)
        y, row_stats = vit_block(x, **given, num_heads=heads, impl="cpu")
        assert torch.equal(y, want)
        torch.testing.assert_close(row_stats, reference.row_stats(y))


@needs_library
def test_blocks_in_a_row_are_vit_block_after_vit_block():
    given = tensors()
    x = given.pop("x")
    block = given | {"num_heads": HEADS, "impl": "cpu"}
    want = vit_block(vit_block(x, **block)[0], **block)[0]
    assert torch.equal(vit_blocks(x, [block, block]), want)
    assert vit_blocks(x, []) is x
    with pytest.raises(ValueError, match="w2: expected shape"):
        vit_blocks(x, [block, block | {"w2": given["w1"]}])


@needs_library
def test_what_is_differentiated_in_one_block_is_in_those_after_it():
    given = tensors()
    x = given.pop("x")
    frozen = given | {"num_heads": HEADS}
    weight = given["w1"].clone().requires_grad_()
    vit_blocks(x, [frozen, frozen | {"w1": weight}, frozen]).sum().backward()
    want = given["w1"].clone().requires_grad_()
    for w1 in (given["w1"], want, given["w1"]):
        x = vit_block(x, **frozen | {"w1": w1}, impl="reference")[0]
    x.sum().backward()
    torch.testing.assert_close(weight.grad, want.grad, atol=1e-4, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="requires grad"):
        vit_blocks(X, [frozen, frozen | {"w1": weight, "impl": "cpu"}])


def test_the_stream_may_be_fp32_beside_half_precision_products():
    given = tensors(torch.bfloat16) | {"x": X}
    for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"):
        given[name] = given[name].float()
    y, row_stats = vit_block(**given, num_heads=HEADS)
    assert (y.dtype, row_stats.dtype) == (torch.float32, torch.float32)
    exact, _ = vit_block(**{name: t.double() for name, t in given.items()}, num_heads=HEADS)
    torch.testing.assert_close(y.double(), exact, atol=3e-2, rtol=3e-2)


def test_autocast_casts_the_products_and_leaves_the_stream():
    given = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = vit_block(**given, num_heads=HEADS)
    products = ("qkv", "proj", "w1", "b1", "w2", "b2")
    cast = {n: t.bfloat16() if n.startswith(products) else t for n, t in given.items()}
    assert y.dtype == torch.float32
    assert torch.equal(y, vit_block(**cast, num_heads=HEADS)[0])


def test_the_reference_is_the_models_block():
    model = deit.create("deit_ti", img_size=32)
    block = model.blocks[0].eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(2, 5, 192)
        attn, mlp = block.attn, block.mlp
        modules = (block.norm1, attn.qkv, attn.proj, block.norm2, mlp.fc1, mlp.fc2)
        given = [t for module in modules for t in (module.weight, module.bias)]
        y, row_stats = vit_block(x, *given, 3, impl="reference")
        torch.testing.assert_close(y, block(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row_stats.sum(-1)[..., 0] / 3, y.mean(-1))


def test_gradients_reach_every_tensor_by_auto():
    given = {n: nn.Parameter(t) for n, t in (tensors() | OPTIONAL).items() if n != "row_stats"}
    vit_block(**given, num_heads=HEADS)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in given.values())
