"""Operators by three weights are those by one, to the bit where the CPU reads the three."""

import pytest
import torch
from instruction_sets import SETS

from deit import kernels
from deit.kernels import thirds
from deit.kernels.engine import native

needs_library = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)


def random(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)


def projection(width, depth, bias=True, dtype=torch.float32):
    weight = tuple(random(width, depth, dtype=dtype) * (i + 1) for i in range(3))
    return weight, tuple(random(width, dtype=dtype) * (i + 1) for i in range(3)) if bias else None


def rest_of_a_block(dim, hidden, dtype=torch.float32):
    def given(*shape):
        return random(*shape, dtype=dtype)

    return {
        "norm1_weight": given(dim) + 1,
        "norm1_bias": given(dim),
        "proj_weight": given(dim, dim),
        "proj_bias": None,
        "norm2_weight": given(dim) + 1,
        "norm2_bias": None,
        "w1": given(hidden, dim),
        "b1": given(hidden),
        "w2": given(dim, hidden),
        "b2": given(dim),
        "num_heads": 2,
        "gamma1": given(dim),
    }


@pytest.fixture(params=SETS)
def isa(request):
    if native.why_not("cpu"):
        pytest.skip("; ".join(native.why_not("cpu")))
    try:
        native.select_cpu_isa(request.param)
    except (RuntimeError, ValueError) as error:
        pytest.skip(str(error))
    yield request.param
    native.select_cpu_isa(None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 16, 3), (7, 48, 64), (400, 80, 200)])
def test_linear_by_every_instruction_set(isa, rows, width, depth, bias):
    x, (weight, biases) = random(rows, depth), projection(width, depth, bias)
    joined = None if biases is None else torch.cat(biases)
    want = torch.ops.deit_cpu.linear(x, torch.cat(weight), joined, None, None, None, None)
    assert torch.equal(torch.ops.deit_cpu.linear_thirds(x, *weight, joined), want)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 24])  # 24, no multiple of 16, is joined
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("rows", [5, 100])  # products joined, and weights
def test_linear(rows, impl, width, dtype):
    x, (weight, bias) = random(2, rows, 64, dtype=dtype), projection(width, 64, dtype=dtype)
    want = kernels.linear(x, torch.cat(weight), torch.cat(bias), impl=impl)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(thirds.linear(x, weight, bias, impl=impl), want, **tolerance)


@pytest.mark.parametrize("images", [1, 8])  # operator by operator, and image by image
def test_a_block_by_every_instruction_set(isa, images):
    x, (weight, bias) = random(images, 19, 96), projection(96, 96)
    rest = rest_of_a_block(96, 200) | {"activation": "quick_gelu" if images == 1 else "silu"}
    impl = "auto" if isa == "portable" else "cpu"
    given = {"qkv_weight": torch.cat(weight), "qkv_bias": torch.cat(bias), "impl": impl}
    want = kernels.vit_block(x, **given, **rest)
    got = thirds.vit_block(x, qkv_weight=weight, qkv_bias=bias, impl=impl, **rest)
    if isa == "portable":
        torch.testing.assert_close(got, want)
    else:
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@needs_library
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_int8(impl):
    x, (weight, bias), rest = random(2, 19, 64), projection(64, 64), rest_of_a_block(64, 96)
    one = {"qkv_weight": torch.cat(weight), "qkv_bias": torch.cat(bias), "impl": impl}
    want = kernels.int8_vit_block(x, **one, **rest)
    three = {"qkv_weight": weight, "qkv_bias": bias, "impl": impl}
    assert torch.equal(thirds.int8_vit_block(x, **three, **rest), want)
    norm = (rest["norm1_weight"], rest["norm1_bias"], 1e-6)
    want = kernels.int8_linear(x, one["qkv_weight"], one["qkv_bias"], norm=norm, impl=impl)
    assert torch.equal(thirds.int8_linear(x, weight, bias, norm=norm, impl=impl), want)
    for third in weight:  # the copy is of all three
        third.detach().numpy()[...] *= 0.5
        want = kernels.int8_linear(x, torch.cat(weight), one["qkv_bias"], norm=norm, impl=impl)
        assert torch.equal(thirds.int8_linear(x, weight, bias, norm=norm, impl=impl), want)


def test_gradients():
    x, (weight, bias) = random(2, 19, 64).requires_grad_(), projection(32, 64)
    leaves = [t.requires_grad_() for t in (*weight, *bias)]
    dout = random(2, 19, 96)
    want = torch.autograd.grad(
        kernels.linear(x, torch.cat(weight), torch.cat(bias)), [x, *leaves], dout
    )
    got = torch.autograd.grad(thirds.linear(x, weight, bias, impl="auto"), [x, *leaves], dout)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_tangents_of_any_of_them():
    from torch.autograd import forward_ad

    x, (weight, bias) = random(2, 19, 64), projection(32, 64)
    for place in range(3):
        with torch.no_grad(), forward_ad.dual_level():
            dual = list(weight)
            dual[place] = forward_ad.make_dual(weight[place], torch.ones(32, 64))
            found = thirds.linear(x, tuple(dual), bias, impl="auto")
            want = kernels.linear(x, torch.cat(dual), torch.cat(bias), impl="reference")
            got, expected = (forward_ad.unpack_dual(each).tangent for each in (found, want))
            torch.testing.assert_close(got, expected)


def test_mapped_over_weights():
    x, (weight, bias) = random(2, 19, 64), projection(32, 64)
    scales = torch.tensor([1.0, 2.0])
    got = torch.vmap(
        lambda scale: thirds.linear(x, tuple(w * scale for w in weight), bias, impl="auto")
    )(scales)
    want = [thirds.linear(x, tuple(w * s for w in weight), bias, impl="auto") for s in scales]
    torch.testing.assert_close(got, torch.stack(want), atol=1e-5, rtol=1e-5)


@needs_library
def test_the_kernel_checks_what_it_reads():
    x, (weight, _) = random(4, 64), projection(32, 64)
    op = torch.ops.deit_cpu.linear_thirds
    with pytest.raises(RuntimeError, match="thirds of one shape"):
        op(x, weight[0], weight[1][:16], weight[2], None)
    with pytest.raises(RuntimeError, match="multiple of 16 rows"):
        op(x, *(w[:24] for w in weight), None)
    with pytest.raises(RuntimeError, match="dtype"):
        op(x, weight[0], weight[1].double(), weight[2], None)


@needs_library
def test_fakes_agree():
    x, (weight, bias), rest = random(2, 19, 64), projection(64, 64), rest_of_a_block(64, 96)
    joined, ops = torch.cat(bias), torch.ops.deit_cpu
    norm = (rest["norm1_weight"], rest["norm1_bias"])
    names = ("proj_weight", "proj_bias", "gamma1", "norm2_weight", "norm2_bias", "w1", "b1")
    after = [rest[name] for name in (*names, "w2", "b2")]
    block = (x, *norm, *weight, joined, *after, None, None, 2, 0.2, 1e-6)
    torch.library.opcheck(ops.linear_thirds.default, (x, *weight, joined))
    torch.library.opcheck(ops.vit_block_thirds.default, block)
    torch.library.opcheck(ops.int8_linear_thirds.default, (x, *weight, joined, *norm, 1e-6))
    torch.library.opcheck(ops.int8_vit_block_thirds.default, block)
