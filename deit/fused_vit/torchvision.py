"""Fused classes for torchvision's VisionTransformer (vit_b_16 and its siblings).

Its attention is torch's MultiheadAttention, which serves too many models to be swapped: the block
reads its packed in_proj_weight itself. Imported only where torchvision's models are in use already.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision.models import vision_transformer

from deit.fused_vit import blocks, deit_model, feed_forward, modules
from deit.fused_vit.self_attention import SelfAttention


class FusedMlp(feed_forward.FusedMlp, vision_transformer.MLPBlock):
    """torchvision's MLPBlock, a Sequential, on `deit.kernels.gelu_mlp`."""

    LINEARS = ("0", "3")
    DROPOUTS = ("2", "4")
    ACTIVATION = "1"

    def unsupported(self) -> str | None:
        if len(self) != 5:
            return f"it has {len(self)} layers, not 5"
        return super().unsupported()


class FusedEncoderBlock(SelfAttention, blocks.FusedBlock, vision_transformer.EncoderBlock):
    """torchvision's EncoderBlock with its residual additions in the products' epilogues."""

    OPERATORS = ("linear", "attention", *blocks.FusedBlock.OPERATORS)
    PARTS = (
        ("ln_1", deit_model.FusedLayerNorm),
        ("ln_2", deit_model.FusedLayerNorm),
        ("mlp", FusedMlp),
    )
    SCALES = ()
    DROP_PATHS = ()
    DROPOUTS = ("dropout",)
    STANDS_FOR = (nn.MultiheadAttention, nn.Linear)

    def parts(self) -> tuple[Any, ...]:
        return self.ln_1, self, self.ln_2, self.mlp

    def projection(self) -> tuple[Tensor, Tensor | None]:
        return self.self_attention.in_proj_weight, self.self_attention.in_proj_bias

    def output(self) -> nn.Linear:
        return self.self_attention.out_proj

    def geometry(self) -> tuple[int, float]:
        return self.self_attention.num_heads, self.self_attention.head_dim**-0.5

    def width(self) -> int:
        return self.self_attention.num_heads * self.self_attention.head_dim

    def absorbed(self) -> list[nn.Module]:
        return [self.self_attention, self.self_attention.out_proj]

    def unsupported(self) -> str | None:
        attn = self._modules.get("self_attention")
        if type(attn) is not nn.MultiheadAttention:
            return f"self_attention is a {type(attn).__name__}"
        if attn.in_proj_weight is None or not attn.batch_first:
            return "self_attention has no packed in_proj_weight, or is not batch_first"
        if attn.num_heads * attn.head_dim * 3 != attn.in_proj_weight.shape[0]:
            return "self_attention's heads do not fill its in_proj_weight"
        if attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
            return "self_attention adds keys of its own"
        if type(attn.out_proj) not in (nn.Linear, NonDynamicallyQuantizableLinear):
            return f"self_attention.out_proj is a {type(attn.out_proj).__name__}"
        for name, value in (("in_proj", attn.in_proj_weight), ("out_proj", attn.out_proj.weight)):
            what = modules.unreadable(value)
            if what is not None:
                return f"self_attention's {name} weight is {what}"
        return super().unsupported()

    def interrupted(self) -> str | None:
        attn = self.self_attention
        if attn.training and attn.dropout > 0.0:
            return f"self_attention drops {attn.dropout} in training"
        if modules.hooked(attn) or modules.hooked(attn.out_proj):
            return "self_attention has a hook"
        return super().interrupted()

    def forward(self, input: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        if not isinstance(input, Tensor) or input.dim() != 3:
            return vision_transformer.EncoderBlock.forward(self, input)  # it says what is wrong
        return super().forward(input)


LEAVES: dict[type[nn.Module], type[modules.Fused]] = {vision_transformer.MLPBlock: FusedMlp}
BLOCKS: dict[type[nn.Module], type[modules.Fused]] = {
    vision_transformer.EncoderBlock: FusedEncoderBlock
}
