"""Gradients of linear and gelu_mlp on Triton against fp64 autograd, in the interpreter.

"PyTorch's own error" in the oracle's rule is that of autograd through the reference at the
kernel's dtype.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deit.kernels import gelu_mlp, linear
from deit.kernels.device import chips
from deit.kernels.engine import registry
from deit.kernels.linear import ACTIVATIONS
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.linear import triton_bwd as linear_bwd
from deit.kernels.linear import triton_gradients as products
from deit.kernels.prove import oracle, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _make(*shape, dtype=torch.float16, seed=1, family="random"):
    scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0  # weights are [M, K]
    return oracle.make(family, shape, dtype, seed=seed, scale=scale)


def _linear(x, weight, bias, activation, residual, gamma, keep):
    return linear(
        x,
        weight,
        bias,
        activation=activation,
        residual=residual,
        gamma=gamma,
        keep=keep,
        impl="triton",
    )


def _mlp(x, w1, b1, w2, b2, residual, gamma, keep, recompute=False):
    return gelu_mlp(
        x,
        w1,
        b1,
        w2,
        b2,
        residual=residual,
        gamma=gamma,
        keep=keep,
        recompute=recompute,
        impl="triton",
    )


def _recomputed(*arguments):
    return _mlp(*arguments, recompute=True)


def _backward(operator):
    """(dout, *schema arguments, keep last) -> the output, and every other tensor's gradient."""

    def run(dout, *arguments):
        *inputs, keep = arguments
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in inputs]
        with torch.enable_grad():
            out = operator(*leaves, keep)
            out.backward(dout.to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves if isinstance(leaf, Tensor))]

    return run


def _check(ours, plain, dout, *arguments):
    got = _backward(ours)(dout, *arguments)
    oracle.check(got, _backward(plain), (dout, *arguments), name=plain.__name__)
    return got


def _check_linear(dout, *arguments):
    return _check(_linear, reference.linear, dout, *arguments)


def _check_mlp(dout, *arguments, ours=_mlp):
    return _check(ours, reference.gelu_mlp, dout, *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("full", [False, True])
def test_linear(full, activation, dtype):
    x, weight = _make(3, 23, 48, dtype=dtype), _make(80, 48, dtype=dtype, seed=2)
    dout = _make(3, 23, 80, dtype=dtype, seed=3)
    if not full:
        _check_linear(dout, x, weight, None, activation, None, None, None)
        return
    residual, bias = _make(3, 23, 80, seed=5).float(), _make(80, dtype=dtype, seed=6)
    gamma, keep = _make(80, dtype=torch.float32, seed=4), torch.tensor([0.0, 1.25, 2.0])
    _check_linear(dout.float(), x, weight, bias, activation, residual, gamma, keep)


@pytest.mark.parametrize("family", oracle.FAMILIES[1:])
def test_linear_on_other_inputs(family):
    x, weight, bias = _make(2, 40, 64, family=family), _make(64, 64, seed=2), _make(64, seed=6)
    gamma, keep = _make(64, seed=4), torch.tensor([1.25, 2.0], dtype=torch.float16)
    dout = _make(2, 40, 64, seed=3, family=family)
    _check_linear(dout, x, weight, bias, "gelu", None, gamma, None)
    _check_linear(dout, x, weight, bias, None, None, None, keep)


@pytest.mark.parametrize(("out_features", "in_features"), [(7, 5), (10, 24), (1, 16), (16, 1)])
def test_widths_no_descriptor_can_take(out_features, in_features):
    x, weight = _make(30, in_features), _make(out_features, in_features, seed=2)
    bias, gamma = _make(out_features, seed=6), _make(out_features, seed=4)
    dout = _make(2, 15, out_features, seed=3).view(30, out_features)
    _check_linear(dout, x, weight, bias, "gelu", None, gamma, None)
    _check_linear(dout, x, weight, bias, None, None, None, None)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 5, 64), (0, 5, 64), (2, 0, 64)])
def test_ranks_and_empty_batches(shape):
    x, weight, bias = _make(*shape), _make(32, 64, seed=2), _make(32, seed=6)
    got = _check_linear(
        _make(*shape[:-1], 32, seed=3), x, weight, bias, "gelu", None, _make(32, seed=4), None
    )
    if x.numel() == 0:
        assert all(not t.any() for t in got)
        got = _check_mlp(x, x, _make(48, 64), None, _make(64, 48), None, None, None, None)
        assert all(not t.any() for t in got)


STRIDES = {
    "tokens after the first": lambda x: x[:, 1:],
    "batch and tokens swapped": lambda x: x.transpose(0, 1),
    "rows of odd length": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
    "odd first element": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "last axis strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded batch": lambda x: x[:1].expand(3, -1, -1),
    "one row for all": lambda x: x[:1, :1].expand(3, 20, -1),
    "one number for all": lambda x: x[:1, :1, :1].expand(3, 20, 64),
}


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    """x and dout with these strides; dout as it is in the products, and through the pass."""
    x = STRIDES[name](_make(3, 20, 64))
    contiguous, weight = _make(*x.shape, seed=3), _make(64, 64, seed=2)
    weight = weight.t() if name == "last axis strided" else weight
    keep = _make(x.shape[0], seed=4)
    _check_linear(x, contiguous, weight, None, None, None, None, None)
    _check_linear(contiguous, x.clone(), weight, None, None, None, None, None)
    empty = x.new_empty(0)
    for dout, saved in ((x, contiguous), (contiguous, x)):
        got = registry.COMPILED["triton"]["linear_bwd"](
            dout, saved, weight, empty, None, None, keep
        )

        def plain(dout, saved, weight, keep):
            leaves = (saved, weight, dout.new_zeros(64))
            return _backward(reference.linear)(dout, *leaves, None, None, None, keep)[1:]

        oracle.check(got[:3], plain, (dout, saved, weight, keep))


def test_gradient_of_a_sum():
    """dout is one number expanded to [..., M]."""
    x, weight = _make(3, 20, 64).requires_grad_(), _make(64, 64, seed=2)
    _linear(x, weight, None, None, None, None, None).sum().backward()
    expected = weight.double().sum(0).expand(3, 20, 64)
    assert oracle.errors(x.grad, expected).norm < 1e-3


@pytest.mark.parametrize("arch", chips.SHARED_MEMORY)
def test_every_architectures_configuration(arch):
    g = _make(1, 70, 96)[0]
    for width in (64, 128, 256):
        weight = _make(96, width, seed=2)
        config = linear_tiles.input_gradient(arch, g.dtype, width, 96, gelu=False)
        out = products.input_gradient(g, weight, config=config)
        oracle.check(out, torch.mm, (g, weight))
        config = linear_tiles.weight_gradient(arch, g.dtype, 96, width)
        x = _make(1, 70, width)[0]
        out = products.weight_gradient(g, x, config=config)
        oracle.check(out, lambda g, x: g.t() @ x, (g, x))
        config = linear_tiles.input_gradient(arch, g.dtype, width, 96, gelu=True)
        got = products.hidden_gradient(g, weight, x, config=config)

        def plain(g, weight, h):
            leaf = h.detach().requires_grad_()
            with torch.enable_grad():
                activated = torch.nn.functional.gelu(leaf)
                activated.backward(g @ weight)
            return leaf.grad, activated.detach(), leaf.grad.sum(0)

        oracle.check(got, plain, (g, weight, x))


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("rows", [15, 16, 33, 200])
def test_sums_in_parts(rows, tma):
    """Parts of unequal length, the last one not full, more units than programs."""
    config = linear_tiles.LinearConfig(16, 16, 16, 2, tma, num_warps=4, num_stages=2)
    g, x = _make(1, rows, 40)[0], _make(1, rows, 24, seed=2)[0]
    parts, _ = products.plan_weight_gradient(g, x, config=config, programs=64)
    assert parts.shape[0] == {15: 1, 16: 1, 33: 3, 200: 5}[rows]
    out = products.weight_gradient(g, x, config=config, programs=64)
    oracle.check(out, lambda g, x: g.t() @ x, (g, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_mlp_through_each_activation(activation):
    """The whole backward, whose first product goes through the activation."""
    x, w1, w2 = _make(2, 17, 48), _make(96, 48, seed=2), _make(48, 96, seed=3)
    b1, b2, dout = _make(96, seed=4), _make(48, seed=5), _make(2, 17, 48, seed=6)
    ours = lambda *given: gelu_mlp(*given[:-1], activation=activation, impl="triton")
    plain = lambda *given: reference.gelu_mlp(*given[:-1], None, None, None, activation)
    arguments = (x, w1, b1, w2, b2, None)
    oracle.check(
        _backward(ours)(dout, *arguments), _backward(plain), (dout, *arguments), name="mlp"
    )


def test_splits_fill_the_device():
    """DeiT-B's products at batch 256 on 132 multiprocessors."""
    for tiles in (18, 54, 72):
        count = linear_tiles.splits(tiles, 788, 132)
        busiest = -(-tiles * count // 132) * -(-788 // count)
        assert busiest < 1.2 * 788 * tiles / 132
    assert linear_tiles.splits(132, 788, 132) == 1
    assert linear_tiles.splits(6, 1, 132) == 1


def test_gradient_far_from_zero():
    """All slopes at arguments of +-200, where a careless exp overflows."""
    x = torch.linspace(-200, 200, 64).reshape(4, 16)
    for activation in ACTIVATIONS:
        got = _check_linear(torch.ones(4, 16), x, torch.eye(16), None, activation, None, None, None)
        assert got[1].isfinite().all()


def test_nan_stays_in_its_row():
    x, weight, dout = _make(2, 70, 64), _make(64, 64, seed=2), _make(2, 70, 64, seed=3)
    dout[1, 60, 5] = torch.nan
    got = _check_linear(dout, x, weight, _make(64), "gelu", None, _make(64, seed=4), None)
    assert got[1].isnan().any(-1).nonzero().tolist() == [[1, 60]]


def test_offsets_past_32_bits():
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    far = storage.as_strided((2, 64), (2**31, 1))
    far.copy_(_make(1, 2, 64)[0])
    weight, gamma = _make(64, 64, seed=2), _make(64, seed=4)
    oracle.check(products.input_gradient(far, weight), torch.mm, (far, weight))
    for tma in (True, False):
        config = replace(linear_tiles.weight_gradient(90, far.dtype, 64, 64), tma=tma)
        out = products.weight_gradient(far, far, config=config)
        oracle.check(out, lambda g, x: g.t() @ x, (far, far))
    g, dbias, _ = linear_bwd.output_gradient(far, far.dtype, weight[:2], None, gamma, None)
    oracle.check([g, dbias], lambda d, w: (d * w, (d * w).sum(0)), (far, gamma))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ours", [_mlp, _recomputed])
@pytest.mark.parametrize("full", [False, True])
def test_mlp(full, ours, dtype):
    x, dout = _make(3, 23, 48, dtype=dtype), _make(3, 23, 32, dtype=dtype, seed=3)
    w1, w2 = _make(96, 48, dtype=dtype, seed=2), _make(32, 96, dtype=dtype, seed=7)
    if not full:
        _check_mlp(dout, x, w1, None, w2, None, None, None, None, ours=ours)
        return
    b1, b2 = _make(96, dtype=dtype, seed=8), _make(32, dtype=dtype, seed=9)
    residual, gamma = _make(3, 23, 32, seed=5).float(), _make(32, dtype=torch.float32, seed=4)
    keep = torch.tensor([0.0, 1.25, 2.0], dtype=dtype)
    _check_mlp(dout.float(), x, w1, b1, w2, b2, residual, gamma, keep, ours=ours)


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_mlp_where_one_kernel_infers(family):
    """D = 192: the forward without gradients is one kernel, that of recompute=True too."""
    x, dout = _make(2, 35, 192, family=family), _make(2, 35, 192, seed=3)
    arguments = (x, _make(256, 192), _make(256), _make(192, 256, seed=7), _make(192), x, None, None)
    for ours in (_mlp, _recomputed):
        _check_mlp(dout, *arguments, ours=ours)


def _mlp_inputs():
    x, w1, w2 = _make(2, 20, 64), _make(128, 64, seed=2), _make(64, 128, seed=7)
    gamma, keep = _make(64, seed=4), torch.tensor([1.25, 2.0])
    return x, w1, _make(128, seed=8), w2, _make(64, seed=9), x.float(), gamma, keep


@pytest.mark.parametrize("gamma", [True, False])
def test_recomputing_gives_the_same_gradients(gamma):
    arguments = list(_mlp_inputs())
    arguments[6] = arguments[6] if gamma else None
    dout = _make(2, 20, 64, seed=3)
    kept, again = (_backward(f)(dout, *arguments) for f in (_mlp, _recomputed))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def _saved_elements(run, inputs):
    """Elements that autograd keeps for `run`'s backward, its own inputs left out."""
    kept = {}
    addresses = {t.data_ptr() for t in inputs if isinstance(t, Tensor)}

    def pack(tensor):
        if tensor.data_ptr() not in addresses:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(kept.values()), out


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_recomputing_saves_the_hidden_layer(impl):
    *inputs, _, _, _ = _mlp_inputs()
    leaves = [t.requires_grad_() for t in inputs]
    kept, _ = _saved_elements(lambda: gelu_mlp(*leaves, impl=impl), leaves)
    again, out = _saved_elements(lambda: gelu_mlp(*leaves, recompute=True, impl=impl), leaves)
    assert kept >= 2 * 20 * 128
    assert again == 0
    out.sum().backward()
    assert all(leaf.grad.any() for leaf in leaves)


def test_recomputing_by_the_reference_gives_its_gradients():
    def reference_again(x, w1, b1, w2, b2, residual, gamma, keep):
        return gelu_mlp(x, w1, b1, w2, b2, residual=residual, gamma=gamma, keep=keep,
                        recompute=True, impl="reference")  # fmt: skip

    arguments, dout = _mlp_inputs(), _make(2, 20, 64, seed=3)
    plain = _backward(reference.gelu_mlp)(dout, *arguments)
    again = _backward(reference_again)(dout, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recompute_changes_nothing_in_inference():
    arguments = _mlp_inputs()
    assert torch.equal(_mlp(*arguments), _recomputed(*arguments))


def test_linear_without_activation_or_gamma_keeps_its_inputs_alone():
    x, weight = _make(5, 64).requires_grad_(), _make(32, 64, seed=2).requires_grad_()
    count, _ = _saved_elements(lambda: linear(x, weight, impl="triton"), (x, weight))
    assert count == 0
    count, _ = _saved_elements(
        lambda: linear(x, weight, activation="gelu", impl="triton"), (x, weight)
    )
    assert count == 5 * 32


def test_repeats_bit_for_bit():
    x, weight, bias = _make(2, 150, 64), _make(48, 64, seed=2), _make(48, seed=6)
    gamma, keep = _make(48, seed=4), torch.tensor([1.25, 2.0])
    dout = _make(2, 150, 48, seed=3)
    for ours, arguments, given in (
        (_linear, (x, weight, bias, "gelu", None, gamma, keep), dout),
        (_mlp, _mlp_inputs(), _make(2, 20, 64, seed=3)),
    ):
        first, *others = (_backward(ours)(given, *arguments) for _ in range(5))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_registration():
    x, weight, bias = _make(2, 5, 16), _make(32, 16, seed=2), _make(32, seed=6)
    gamma, keep = _make(32, dtype=torch.float32, seed=4), torch.tensor([0.0, 1.25])
    residual = _make(2, 5, 32).float()
    compiled = registry.COMPILED["triton"]

    def check(name, *arguments):
        torch.library.opcheck(
            compiled[name],
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
        return compiled[name](*arguments)

    check("linear_fwd", x, weight, bias, None, None, None, None)
    _, affine = check("linear_fwd", x, weight, bias, "gelu", residual, gamma, keep)
    check("linear_bwd", residual, x, weight, affine, "gelu", gamma, keep)
    check("linear_bwd", affine, x, weight, x.new_empty(0), None, None, None)
    w2, b2, gamma = _make(16, 32, seed=7), _make(16, seed=8), gamma[:16].clone()
    _, hidden, affine = check("gelu_mlp_fwd", x, weight, bias, w2, b2, x, gamma, keep)
    check("gelu_mlp_bwd", x, x, weight, w2, hidden, affine, gamma, keep)
    check("gelu_mlp_bwd", x, x, weight, w2, hidden, x.new_empty(0), None, None)


def test_compiles_whole():
    """Forward and backward in one graph, also where x is its own residual."""
    x, w1, w2 = _make(2, 5, 16), _make(32, 16, seed=2), _make(16, 32, seed=7)

    def run(x, w1, w2, keep):
        y = linear(x, w1, activation="gelu", impl="triton")
        y = linear(y, w2, residual=x, impl="triton")
        y = gelu_mlp(y, w1, None, w2, None, residual=y, recompute=True, impl="triton")
        return gelu_mlp(x, w1, None, w2, None, residual=x, keep=keep, impl="triton") + y

    arguments = (_make(2, 5, 16, seed=3), x, w1, w2, torch.tensor([1.25, 2.0]))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(_backward(run)(*arguments), _backward(compiled)(*arguments), strict=True):
        assert torch.equal(a, b)


def test_recompute_is_a_bool():
    x = _make(5, 16)
    with pytest.raises(TypeError, match="recompute: expected a bool; got int"):
        gelu_mlp(x, x, None, x.t(), None, recompute=1)


def test_keep_has_no_gradient():
    x, weight = _make(2, 5, 16), _make(16, 16)
    keep = torch.ones(2, requires_grad=True)
    for call in (
        lambda: linear(x, weight, keep=keep, impl="triton"),
        lambda: gelu_mlp(x, weight, None, weight, None, keep=keep, impl="triton"),
        lambda: gelu_mlp(x, weight, None, weight, None, keep=keep, recompute=True, impl="triton"),
    ):
        with pytest.raises(NotImplementedError, match="keep requires grad"):
            call()
