"""The gated MLP: the rule against fp64, packed and apart, gradients, and bad input."""

import pytest
import torch
import torch.nn.functional as F

from deit.kernels import glu_mlp
from deit.kernels.engine import native
from deit.kernels.prove import oracle

IMPLS = ["auto", "reference", *(["cpu"] if not native.why_not("cpu") else [])]


def plain(x, wg, bg, wu, bu, wd, bd, nw=None, nb=None, residual=None, gamma=None, keep=None):
    hidden = F.silu(F.linear(x, wg, bg)) * F.linear(x, wu, bu)
    if nw is not None:
        hidden = F.layer_norm(hidden, nw.shape, nw, nb, 1e-6)
    y = F.linear(hidden, wd, bd)
    y = y if gamma is None else y * gamma
    y = y if keep is None else y * keep[:, None, None]
    return y if residual is None else residual + y


def ours(impl, activation="silu"):
    def call(x, wg, bg, wu, bu, wd, bd, nw=None, nb=None, residual=None, gamma=None, keep=None):
        norm = None if nw is None else (nw, nb, 1e-6)
        return glu_mlp(
            x, wg, bg, wu, bu, wd, bd, activation=activation, norm=norm, residual=residual,
            gamma=gamma, keep=keep, impl=impl,
        )  # fmt: skip

    return call


def inputs(dtype, *, full, family="random", dim=48, hidden=80):
    make = lambda *shape, seed, scale=1.0: oracle.make("random", shape, dtype, seed=seed) * scale
    found = [oracle.make(family, (3, 17, dim), dtype)]
    for seed, (rows, columns) in enumerate([(hidden, dim), (hidden, dim), (dim, hidden)]):
        found += [make(rows, columns, seed=seed + 1, scale=columns**-0.5)]
        found += [make(rows, seed=seed + 11) if full else None]
    if full:
        found += [1 + make(hidden, seed=21, scale=0.1), make(hidden, seed=22)]
        found += [make(3, 17, dim, seed=23), make(dim, seed=24)]
        found += [torch.tensor([0.0, 1.25, 1.5], dtype=dtype)]
    return found


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_error_rule(family, impl, full):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = inputs(dtype, full=full, family=family)
        oracle.check(ours(impl)(*arguments), plain, arguments, name="glu_mlp")


def test_packed_halves_are_read_where_they_lie():
    x, wg, bg, wu, bu, *rest = inputs(torch.float32, full=True)
    packed, biases = torch.cat([wg, wu]), torch.cat([bg, bu])
    halves = (packed[:80], biases[:80], packed[80:], biases[80:])
    want = ours("auto")(x, wg, bg, wu, bu, *rest)
    assert torch.equal(ours("auto")(x, *halves, *rest), want)


@pytest.mark.parametrize("full", [False, True])
def test_gradients(full):
    arguments = inputs(torch.float32, full=full)
    *differentiated, keep = arguments if full else (*arguments, None)
    dout = oracle.make("random", (3, 17, 48), torch.float32, seed=31)

    def backward(call):
        def run(dout, *given):
            leaves = [t if t is None else t.detach().requires_grad_() for t in given]
            last = None if keep is None else keep.to(dout.dtype)
            rest = (last,) if full else ()
            with torch.enable_grad():
                out = call(*leaves, *rest)
                out.backward(dout)
            return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]

        return run

    got = backward(ours("auto"))(dout, *differentiated)
    oracle.check(got, backward(plain), (dout, *differentiated), name="glu_mlp")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_gates_by_name(activation):
    arguments = inputs(torch.float64, full=False)
    x, wg, bg, wu, bu, wd, bd = arguments
    gate = F.linear(x, wg, bg)
    acts = {
        "gelu": F.gelu(gate),
        "gelu_tanh": F.gelu(gate, approximate="tanh"),
        "quick_gelu": gate * torch.sigmoid(1.702 * gate),
    }
    want = F.linear(acts[activation] * F.linear(x, wu, bu), wd, bd)
    torch.testing.assert_close(ours("reference", activation)(*arguments), want)


def test_autocast_casts_the_products_and_keeps_the_stream():
    arguments = inputs(torch.float32, full=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours("auto")(*arguments)
        bare = ours("auto")(*arguments[:7])
    assert (out.dtype, bare.dtype) == (torch.float32, torch.bfloat16)
    want = plain(*arguments)
    assert (out - want).norm() / want.norm() < 2e-2


X, W, D = torch.randn(2, 5, 8), torch.randn(12, 8), torch.randn(8, 12)
BAD = {
    "w_up": ((X, W, None, W[:6], None, D, None), {}, ValueError, r"w_up: expected shape \(12, 8\)"),
    "w_up of none": ((X, W, None, None, None, D, None), {}, TypeError, "w_up: expected a Tensor"),
    "w_down": ((X, W, None, W, None, W, None), {}, ValueError, r"w_down: expected shape \(12, 12"),
    "b_gate": ((X, W, X[0, 0], W, None, D, None), {}, ValueError, r"b_gate: expected shape \(12,"),
    "dtype": ((X, W, None, W.half(), None, D, None), {}, TypeError, "w_up: expected torch.float32"),
    "activation": (
        (X, W, None, W, None, D, None), {"activation": "sigmoid"}, ValueError, "got 'sigmoid'",
    ),
    "norm": ((X, W, None, W, None, D, None), {"norm": W}, TypeError, "norm: expected .weight"),
    "norm's weight": (
        (X, W, None, W, None, D, None), {"norm": (W, None, 1e-6)}, ValueError, "norm's weight:",
    ),
    "gamma": (
        (X, W, None, W, None, D, None), {"gamma": torch.ones(3)}, ValueError, "gamma: expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    places, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        glu_mlp(*places, **options)
