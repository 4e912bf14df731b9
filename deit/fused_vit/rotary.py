"""Blocks with rotary positions: mix-ins for the families that have them."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from deit.fused_vit import blocks, eight_bits, modules
from deit.fused_vit.modules import hooked, unreadable
from deit.kernels import rotary_attention
from deit.kernels.engine import autocast, dispatch
from deit.kernels.thirds import rotary_vit_block


class Positions(NamedTuple):
    """Rotary positions, as `deit.kernels.rotary_attention` takes them."""

    sin: Tensor
    cos: Tensor
    prefix: int
    interleaved: bool


class RotaryAttention(modules.FusedAttention):
    """Over an attention that may rotate q and k, and normalise them and what it mixed.

    q, k and v have one projection, `qkv`, or one each, by the names in APART.
    """

    OPERATORS = ("linear", "attention", "rotary_attention")
    APART: ClassVar[tuple[str, str, str]] = ("q_proj", "k_proj", "v_proj")
    PROJ: ClassVar[str] = "proj"
    # Over q and k by head, and over all heads' channels after attention. Their modules are called.
    # Those of q and k find heads after tokens, so they must be of classes that do not mind.
    NORMS: ClassVar[tuple[str, str, str]] = ("q_norm", "k_norm", "norm")
    BY_HEAD: ClassVar[tuple[type[nn.Module], ...]] = (nn.Identity, nn.LayerNorm)

    @property
    def LINEARS(self) -> tuple[str, ...]:  # type: ignore[override]
        joined = self._modules.get("qkv") is not None
        return ("qkv", self.PROJ) if joined else (*self.APART, self.PROJ)

    def projection(self) -> tuple[Any, Any]:
        children = self._modules
        joined: Any = children.get("qkv")
        if joined is not None:
            return joined.weight, joined.bias
        parts: Any = [children[name] for name in self.APART]
        biases = [part.bias for part in parts]
        known = next((bias for bias in biases if bias is not None), None)
        if known is not None:  # keys have none in EVA-02 and DINOv3
            biases = [torch.zeros_like(known) if bias is None else bias for bias in biases]
        weights = tuple(part.weight for part in parts)
        return weights, None if known is None else tuple(biases)

    def width(self) -> int:
        joined: Any = self._modules.get("qkv")
        if joined is not None:
            return modules.weight_of(joined).shape[0] // 3
        return modules.weight_of(self._modules[self.APART[0]]).shape[0]

    def unsupported(self) -> str | None:
        reason = super(modules.FusedAttention, self).unsupported()
        if reason is not None:
            return reason
        children = self._modules
        if "qkv" not in self.LINEARS:
            rows = [modules.weight_of(children[name]).shape[0] for name in self.APART]
            if rows[1:] != rows[:2]:
                return f"{', '.join(self.APART)} have {rows} rows"
        if self.width() % self.geometry()[0]:
            return f"its projection is {self.width()} wide, it has {self.geometry()[0]} heads"
        for name in self.NORMS[:2]:
            norm = children.get(name)
            known = type(norm) in (type(None), *self.BY_HEAD)
            if not known and not isinstance(norm, modules.FusedNorm):
                return f"{name} is a {type(norm).__name__}"
        if children.get("gate") is not None:
            return "it gates its output"
        return None

    def interrupted(self) -> str | None:
        for name in self.NORMS:
            norm = self._modules.get(name)
            if norm is not None and hooked(norm):
                return f"{name} has a hook"
        return super().interrupted()

    def takes(self, x: Tensor, rope: Positions | None) -> bool:
        """Whether `rotary_attention` computes what the original would with these positions."""
        if rope is None:
            return True
        heads, tokens = self.geometry()[0], x.shape[1]
        shape = (heads, tokens - rope.prefix, self.width() // heads)
        dtype = autocast.dtype_of(x) or modules.weight_of(self._modules[self.PROJ]).dtype
        for table in (rope.sin, rope.cos):
            if unreadable(table) is not None or table.dtype not in (dtype, torch.float32):
                return False
            if table.shape != shape[-table.dim() :] or table.dim() not in (2, 3):
                return False
            if table.device != x.device or (table.requires_grad and torch.is_grad_enabled()):
                return False
        return shape[-1] % 2 == 0 and rope.prefix >= 0

    def mix(self, packed: Tensor, key_bias: Tensor | None = None, rope: Any = None) -> Tensor:
        packed = self.normalised(packed)
        if rope is None:
            mixed = super().mix(packed, key_bias)
        else:
            heads, scale = self.geometry()
            mixed = rotary_attention(
                packed,
                heads,
                rope.sin,
                rope.cos,
                prefix=rope.prefix,
                interleaved=rope.interleaved,
                scale=scale,
                impl=self.fused_impls["rotary_attention"],
            )
        norm = self._modules.get(self.NORMS[2])
        return mixed if norm is None or type(norm) is nn.Identity else norm(mixed)

    def normalised(self, packed: Tensor) -> Tensor:
        """[B, N, 3 * D'] with q and k normalised by head, where they are."""
        norms = [self._modules.get(name) for name in self.NORMS[:2]]
        if all(norm is None or type(norm) is nn.Identity for norm in norms):
            return packed
        split = packed.unflatten(-1, (3, self.geometry()[0], -1)).unbind(2)  # each [B, N, H, d]
        parts = [x if norm is None else norm(x) for norm, x in zip(norms, split, strict=False)]
        return torch.cat([x.to(packed.dtype).flatten(2) for x in (*parts, split[2])], dim=-1)


class RotaryBlock(blocks.FusedBlock):
    """Over a pre-norm block whose attention is a RotaryAttention."""

    OPERATORS = ()
    SCALES: ClassVar[tuple[str, ...]] = ()

    def remark(self) -> str:
        kind = eight_bits.asked(self.fused_impls)
        if kind is not None:
            return f"in the model's dtype: {kind.name} does not know rotary positions"
        return super().remark()

    def apart(self) -> str | None:
        norm, attn, _, _ = self.parts()
        impl = self.fused_impls.get("vit_block")
        if impl not in ("auto", "cpu"):
            return "the CPU's whole block alone knows rotary positions"
        if any(type(attn._modules.get(name)) not in _NO_NORM for name in attn.NORMS):
            return "a whole block knows no norms within attention"
        # What is known of vit_block was measured without a rotation.
        known = dispatch.expected("rotary_attention", impl, norm.weight.device)
        unknown = "no rotary_attention kernel is measured on this device"
        return super().apart() or (unknown if known == "reference" else None)

    def advance(
        self,
        x: Tensor,
        *,
        key_bias: Tensor | None = None,
        rows: int | None = None,
        rope: Positions | None = None,
    ) -> Tensor:
        if self.runs_whole(x):
            if rope is None:
                return self.whole(x)[0]
            whole = rotary_vit_block(x, **self.arguments(), rope=rope)
            if whole is not None:
                return whole
        norm1, attn, norm2, mlp = self.parts()
        normed, keep = norm1.normalise(x), self.keep(0, x)
        stream = attn.attend(normed, x, self.gamma(0), keep, key_bias=key_bias, rope=rope)
        return mlp.feed_forward(norm2.normalise(stream), stream, self.gamma(1), self.keep(1, x))


_NO_NORM = (type(None), nn.Identity)
