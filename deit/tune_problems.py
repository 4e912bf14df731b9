"""What `deit tune` times: each kernel on the tensors of a DeiT, and the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit import tune_fp8
from deit.configs import Config
from deit.kernels.attention import triton as attention
from deit.kernels.attention import triton_bwd as attention_bwd
from deit.kernels.device import common
from deit.kernels.engine import tuning
from deit.kernels.gelu_mlp import triton as gelu_mlp
from deit.kernels.layer_norm import triton as layer_norm
from deit.kernels.layer_norm import triton_bwd as layer_norm_bwd
from deit.kernels.linear import triton as linear
from deit.kernels.linear import triton_gradients as products
from deit.kernels.linear import triton_norm_linear as norm_linear
from deit.kernels.linear import triton_row_stats as row_stats
from deit.kernels.patch_embed import triton as patch_embed
from deit.kernels.prove import reference

EPS = (1e-6,)
NEITHER = (None, None)  # gamma and keep


def joined(*parts: Sequence[Any]) -> list[Any]:
    """The parts' elements, in order."""
    return [element for part in parts for element in part]


@dataclass(frozen=True)
class Problem:
    """One entry of the table to be.

    arguments: those of the factory, by name. make: draws the tensors. run: the kernel on them
    with a configuration. plain: what must come out, from the same tensors in any dtype.
    """

    factory: str
    arguments: dict[str, Any]
    make: Callable[[], list[Tensor]]
    run: Callable[[Any, Sequence[Tensor]], list[Tensor]]
    plain: Callable[[Sequence[Tensor]], list[Tensor]]

    @property
    def name(self) -> str:
        """The entry's name in the table."""
        return tuning.entry_name(self.factory, self.arguments)


@dataclass(frozen=True)
class Size:
    """B images of N tokens and D channels, in `dtype` on `device`."""

    batch: int
    network: Config
    dtype: torch.dtype
    device: torch.device

    @property
    def arch(self) -> int:
        """The architecture whose configurations serve the device."""
        return common.architecture(torch.empty(0, device=self.device))

    def problem(
        self,
        factory: str,
        sizes: dict[str, Any],
        shapes: Sequence[tuple[int, ...]],
        run: Callable[[Any, Sequence[Tensor]], list[Tensor]],
        plain: Callable[[Sequence[Tensor]], list[Tensor]],
    ) -> Problem:
        """Normal numbers of these shapes; matrices of weights (rank 2) have unit gain."""

        def make() -> list[Tensor]:
            generator = torch.Generator(self.device).manual_seed(len(shapes))
            drawn = []
            for shape in shapes:
                scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0
                x = torch.empty(shape, dtype=self.dtype, device=self.device)
                drawn.append(x.normal_(0.0, scale, generator=generator))
            return drawn

        arguments = tuning.TUNABLE[factory].arguments(self.arch, self.dtype, **sizes)
        return Problem(factory, arguments, make, run, plain)


def problems(size: Size, training: bool) -> Iterator[Problem]:
    """The kernels of one network, those that take most of its time first."""
    network = size.network
    dim, hidden = network.embed_dim, 4 * network.embed_dim
    products_of = ((hidden, dim, "gelu"), (dim, hidden, None), (3 * dim, dim, None))
    for width, depth, activation in (*products_of, (dim, dim, None)):
        yield _linear(size, width, depth, activation)
    yield _gelu_mlp(size)
    yield _attention(size)
    for width, activation in ((hidden, "gelu"), (3 * dim, None)):  # of vit_block
        yield _norm_panel(size, width, activation)
    yield _layer_norm(size)
    yield _patch_embed(size)
    yield from tune_fp8.problems(size)
    if training:
        yield _attention_bwd(size)
        for width, depth, _ in (*products_of, (dim, dim, None)):
            yield _input_gradient(size, width=depth, depth=width, gelu=depth == hidden)
            yield _weight_gradient(size, width, depth)
        yield _layer_norm_bwd(size)


def _linear(size: Size, width: int, depth: int, activation: str | None) -> Problem:
    """With the residual where a block adds it: after the projection and after fc2."""
    rows = (size.batch, size.network.tokens)
    shapes: list[tuple[int, ...]] = [(*rows, depth), (width, depth), (width,)]
    if width == size.network.embed_dim:
        shapes.append((*rows, width))
    rest = lambda t: (activation, t[3] if len(t) > 3 else None, None, None)
    return size.problem(
        "linear",
        {"width": width, "depth": depth},
        shapes,
        lambda config, t: [linear.linear(*joined(t[:3], rest(t)), config=config)],
        lambda t: [reference.linear(*joined(t[:3], rest(t)))],
    )


def _norm_panel(size: Size, width: int, activation: str | None) -> Problem:
    """LayerNorm and a product: in one kernel, its rows' statistics given, or in two (None)."""
    depth, saved = size.network.embed_dim, []  # type: int, list[Tensor]
    sizes = {"width": width, "depth": depth}

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias, *norm = t
        if not saved:  # what the product before writes is not what is timed
            saved.append(row_stats.row_stats(x))
        given = row_stats.Norm(saved[0], norm[0], norm[1], *EPS)
        return [norm_linear.norm_linear(x, given, weight, bias, activation, config=config)]

    def plain(t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias, *norm = t
        normed = reference.layer_norm(*joined((x,), norm, EPS))
        return [reference.linear(normed, weight, bias, activation, None, *NEITHER)]

    rows = (size.batch, size.network.tokens, depth)
    shapes: list[tuple[int, ...]] = [rows, (width, depth), (width,), (depth,), (depth,)]
    return size.problem("norm_panel", sizes, shapes, run, plain)


def _gelu_mlp(size: Size) -> Problem:
    dim = size.network.embed_dim
    rows = (size.batch, size.network.tokens, dim)

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        x, w1, b1, w2, b2, residual = t
        if config is not None:
            return [gelu_mlp.gelu_mlp(*joined(t, NEITHER), config=config)]
        inner = linear.linear(x, w1, b1, "gelu", None, None, None)
        return [linear.linear(inner, w2, b2, None, residual, None, None)]

    return size.problem(
        "gelu_mlp",
        {"dim": dim},
        [rows, (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,), rows],
        run,
        lambda t: [reference.gelu_mlp(*joined(t, NEITHER))],
    )


def _attention(size: Size) -> Problem:
    heads, head_dim = size.network.num_heads, size.network.embed_dim // size.network.num_heads
    rest = (heads, head_dim**-0.5, None)
    return size.problem(
        "attention",
        {"head_dim": head_dim, "tokens": size.network.tokens},
        [(size.batch, size.network.tokens, 3 * size.network.embed_dim)],
        lambda config, t: [attention.attention(t[0], *rest, config=config)],
        lambda t: [reference.attention(t[0], *rest)],
    )


def _attention_bwd(size: Size) -> Problem:
    heads, dim = size.network.num_heads, size.network.embed_dim
    rest = (heads, (dim // heads) ** -0.5, None)
    rows = (size.batch, size.network.tokens)
    saved: list[tuple[Tensor, Tensor]] = []

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        if not saved:  # the forward is not what is timed
            saved.append(attention.attention_fwd(t[0], *rest))
        return [attention_bwd.attention_bwd(*joined((t[1], t[0]), saved[0], rest), config=config)]

    return size.problem(
        "attention_bwd",
        {"head_dim": dim // heads, "tokens": size.network.tokens},
        [(*rows, 3 * dim), (*rows, dim)],
        run,
        lambda t: _gradients(lambda x: reference.attention(x, *rest), t[:1], t[1]),
    )


def _layer_norm(size: Size) -> Problem:
    dim = size.network.embed_dim
    return size.problem(
        "layer_norm",
        {"dim": dim},
        [(size.batch, size.network.tokens, dim), (dim,), (dim,)],
        lambda config, t: [layer_norm.layer_norm(*joined(t, EPS), config=config)],
        lambda t: [reference.layer_norm(*joined(t, EPS))],
    )


def _layer_norm_bwd(size: Size) -> Problem:
    dim = size.network.embed_dim
    rows = (size.batch, size.network.tokens, dim)
    saved: list[tuple[Tensor, ...]] = []

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias, dout = t
        if not saved:
            saved.append(layer_norm.layer_norm_fwd(x, weight, bias, 1e-6)[1:])
        (_, dx, dweight, dbias, _), launches = layer_norm_bwd.plan(
            *joined((dout, None, None, x, weight), saved[0], NEITHER), config=config
        )
        for launch in launches:
            launch.run(x)
        return [dx, dweight, dbias]

    return size.problem(
        "layer_norm_bwd",
        {"dim": dim},
        [rows, (dim,), (dim,), rows],
        run,
        lambda t: _gradients(lambda *x: reference.layer_norm(*joined(x, EPS)), t[:3], t[3]),
    )


def _patch_embed(size: Size) -> Problem:
    network = size.network
    dim, patch = network.embed_dim, network.patch_size
    prefix = 2 if network.distilled else 1
    return size.problem(
        "patch_embed",
        {"dim": dim},
        [(size.batch, 3, network.img_size, network.img_size), (dim, 3, patch, patch), (dim,),
         (1, prefix, dim), (1, network.tokens, dim)],
        lambda config, t: [patch_embed.patch_embed(*t, config=config)],
        lambda t: [reference.patch_embed(*t)],
    )  # fmt: skip


def _input_gradient(size: Size, width: int, depth: int, gelu: bool) -> Problem:
    """`width` input channels; through fc1's GELU where `gelu`."""
    rows = size.batch * size.network.tokens

    def run(config: Any, t: Sequence[Tensor]) -> list[Tensor]:
        g, weight, *hidden = t
        g = g.view(rows, depth)
        if gelu:
            found = products.gelu_input_gradient(g, weight, hidden[0].view(rows, width),
                                                 config=config)  # fmt: skip
            return list(found[:2])
        return [products.input_gradient(g, weight, config=config)]

    def plain(t: Sequence[Tensor]) -> list[Tensor]:
        dout = t[0].view(rows, depth) @ t[1]
        if not gelu:
            return [dout]
        hidden = t[2].view(rows, width)
        return [*_gradients(F.gelu, [hidden], dout), F.gelu(hidden)]

    shapes: list[tuple[int, ...]] = [(rows, 1, depth), (depth, width)]
    return size.problem(
        "input_gradient",
        {"width": width, "depth": depth, "gelu": gelu},
        [*shapes, (rows, 1, width)] if gelu else shapes,
        run,
        plain,
    )


def _weight_gradient(size: Size, width: int, depth: int) -> Problem:
    rows = (size.batch, size.network.tokens)
    flat = lambda t: t.view(-1, t.shape[-1])
    return size.problem(
        "weight_gradient",
        {"width": width, "depth": depth},
        [(*rows, width), (*rows, depth)],
        lambda config, t: [products.weight_gradient(flat(t[0]), t[1], config=config)],
        lambda t: [flat(t[0]).T @ flat(t[1])],
    )


def _gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        return list(torch.autograd.grad(function(*leaves), leaves, dout))
