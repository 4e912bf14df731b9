"""A fused block with its four products in 8 bits, for `fuse(model, dtype="int8")` and "fp8".

LayerNorm, softmax, GELU, LayerScale and the residual stream stay what they were, and so do the
patch embedding and the heads. The parameters stay too: the 8-bit weights are copies that
`deit.kernels.engine.packing` keeps while a weight does not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deit.kernels import attention, fp8, fp8_gelu_mlp, int8_gelu_mlp
from deit.kernels.engine import limits
from deit.kernels.thirds import fp8_linear, int8_linear, int8_vit_block


@dataclass(frozen=True)
class Kind:
    """One kind of 8 bits: the operators of its products, and of a whole block where it has one.

    refuse: raises ValueError where these cannot run a model by `impl`. rest: what is not in 8 bits.
    """

    name: str
    linear: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    refuse: Callable[[nn.Module, str], None]
    rest: str
    block: Callable[..., Tensor] | None = None

    @property
    def operators(self) -> tuple[str, ...]:
        """Their names."""
        calls = (self.linear, self.mlp, self.block)
        return tuple(call.__name__ for call in calls if call is not None)

    @property
    def remark(self) -> str:
        """What the report says of a block."""
        return f"in eval qkv, proj, fc1, fc2 in {self.name}; {self.rest}"


def _refuse_int8(model: nn.Module, impl: str) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(
                f"dtype: 'int8' expects fp32 parameters on a CPU; {name} is {parameter.dtype} on "
                f"{parameter.device}"
            )


def _refuse_fp8(model: nn.Module, impl: str) -> None:
    for name, parameter in model.named_parameters():
        found = limits.unserved(parameter)
        if impl != "reference":
            found += fp8.why_not(parameter.device)
        if found:
            raise ValueError(
                "dtype: 'fp8' expects fp32, fp16 or bf16 parameters on a GPU of compute capability "
                f"8.9 or later, or impl='reference'; {name}: {'; '.join(found)}"
            )


INT8 = Kind(
    "int8",
    int8_linear,
    int8_gelu_mlp,
    _refuse_int8,
    "norms, softmax, GELU, residual in fp32",
    int8_vit_block,
)
FP8 = Kind(
    "fp8",
    fp8_linear,
    fp8_gelu_mlp,
    _refuse_fp8,
    "attention and the residual stream in the model's dtype",
)
KINDS = {kind.name: kind for kind in (INT8, FP8)}
OPERATORS = (*INT8.operators, *FP8.operators)
WHOLE = int8_vit_block.__name__


def implementations(dtype: str, impl: str) -> dict[str, str]:
    """Operator -> the implementation that runs it, for the operators of the kind `dtype` names.

    fp8's were measured on no GPU, so "auto" would take the reference. Asking for fp8 by name is
    therefore asking for its kernels by name.
    """
    if dtype == FP8.name:
        return dict.fromkeys(FP8.operators, "reference" if impl == "reference" else "triton")
    return dict.fromkeys(INT8.operators, impl if impl in ("reference", "cpu") else "auto")


def asked(impls: dict[str, str]) -> Kind | None:
    """The kind that fuse() was asked for: `impls` name the operators of no other."""
    for kind in KINDS.values():
        if kind.linear.__name__ in impls:
            return kind
    return None


def advance(kind: Kind, block: Any, x: Tensor, key_bias: Tensor | None, rows: int | None) -> Tensor:
    """`FusedBlock.advance` with the products in 8 bits: [B, N, D] -> [B, N or rows, D].

    Raises NotImplementedError for x that is not the kind's, and where a gradient is wanted.
    """
    if kind is INT8 and (x.device.type != "cpu" or x.dtype != torch.float32):
        raise NotImplementedError(
            f"a block fused with dtype='int8' takes fp32 tokens on a CPU; got {x.dtype} on "
            f"{x.device}: unfuse the model, or fuse it again without dtype"
        )
    _, _, norm2, mlp = block.parts()
    impls = block.fused_impls
    as_mlp = mlp.apart() is None and mlp.activation_name() == "gelu"
    if kind.block is not None and rows is None and as_mlp:
        whole = kind.block.__name__
        if whole in impls and block.apart() is None:
            return kind.block(x, **block.arguments(whole), key_bias=key_bias)
    stream = _attended(kind, block, x, key_bias, rows)
    (normed, norm), gamma = _folded(norm2, stream), block.gamma(1)
    if not as_mlp:  # its products one by one
        if mlp.FIRST:
            normed, norm = mlp.entered(norm2.normalise(stream)), None
        product = functools.partial(kind.linear, impl=impls[kind.linear.__name__])
        hidden = mlp.hidden(lambda weight, bias: product(normed, weight, bias, norm=norm))
        last = mlp.output()
        hidden = hidden.to(stream.dtype)  # autocast's, if it is on
        return product(hidden, last.weight, last.bias, residual=stream, gamma=gamma)
    fc1, fc2 = (mlp._modules[name] for name in mlp.LINEARS)
    return kind.mlp(
        normed,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        norm=norm,
        residual=stream,
        gamma=gamma,
        impl=impls[kind.mlp.__name__],
    )


def _folded(norm: Any, x: Tensor) -> tuple[Tensor, Any]:
    """What a product in 8 bits reads, and the LayerNorm that it folds in: of other norms None."""
    if isinstance(norm, nn.LayerNorm):
        return x, (norm.weight, norm.bias, norm.eps)
    return norm.normalise(x), None


def _attended(
    kind: Kind, block: Any, x: Tensor, key_bias: Tensor | None, rows: int | None
) -> Tensor:
    """The stream after attention: x + gamma * proj(attention(qkv(LN(x)))), its first `rows`."""
    norm1, attn, _, _ = block.parts()
    (normed, norm), impl = _folded(norm1, x), block.fused_impls[kind.linear.__name__]

    def project(tokens: Tensor, weight: Any, bias: Any) -> Tensor:
        return kind.linear(tokens, weight, bias, norm=norm, impl=impl)

    weight, bias = attn.projection()
    if rows is None:
        heads, scale = attn.geometry()
        qkv, named = project(normed, weight, bias), block.fused_impls["attention"]
        mixed = attention(qkv, heads, scale=scale, key_bias=key_bias, impl=named)
    else:
        mixed = attn.mix_prefix(normed, rows, weight, bias, project)
    proj = attn.output()
    return kind.linear(
        mixed.to(x.dtype),  # autocast's, if it is on
        proj.weight,
        proj.bias,
        residual=x if rows is None else x[:, :rows],
        gamma=block.gamma(0),
        impl=impl,
    )
