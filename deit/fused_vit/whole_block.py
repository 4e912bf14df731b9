"""A block in inference as one operator, in place of its norms, attention and MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deit.fused_vit.modules import Fused
from deit.kernels import thirds
from deit.kernels.engine import dispatch
from deit.kernels.vit_block import served


class WholeBlock:
    """What `fuse(model, block="auto")` and "whole" add to a block; a mix-in for a FusedBlock.

    It is asked for where `fused_impls` names an implementation of vit_block.
    """

    if TYPE_CHECKING:  # the attributes of the class that this is mixed over

        def __getattr__(self, name: str) -> Any: ...

    def operators(self) -> tuple[str, ...]:
        parts = (part for part in self.parts() if isinstance(part, Fused) and part is not self)
        found = dict.fromkeys(op for part in parts for op in part.operators())
        whole = ("vit_block",) if self.why_parts() is None else ()
        return (*found, *self.OPERATORS, *whole)

    def remark(self) -> str:
        if "vit_block" not in self.fused_impls:
            return ""
        reason = self.why_parts()
        return "whole in inference" if reason is None else f"by its parts: {reason}"

    def why_parts(self, device: torch.device | None = None) -> str | None:
        """Why inference on `device` (that of the weights) runs the parts and not `vit_block`."""
        impl = self.fused_impls.get("vit_block")
        if impl is None:
            return "a whole block was not asked for"
        reason = self.apart()
        if reason is not None:
            return reason
        found = dispatch.expected("vit_block", impl, device or self.parts()[0].weight.device)
        if found == "reference" != impl:
            return "no vit_block kernel is measured on this device"
        return None

    def apart(self) -> str | None:
        """Why `vit_block` does not compute this block; None where it does."""
        norm1, attn, norm2, mlp = self.parts()
        if not (isinstance(norm1, nn.LayerNorm) and isinstance(norm2, nn.LayerNorm)):
            return "a whole block knows no norm but LayerNorm"
        if norm1.eps != norm2.eps:
            return f"its norms' eps differ, {norm1.eps} and {norm2.eps}"
        width, channels = attn.width(), norm1.weight.shape[0]
        if width != channels:
            return f"its heads are {width} wide together, its tokens {channels}"
        return mlp.apart()

    def runs_whole(self, x: Tensor) -> bool:
        """Whether `vit_block` takes this call: inference, nothing dropped, nothing recorded."""
        if self.why_parts(x.device) is not None or self.training:
            return False
        output = self.parts()[1].output()
        if self.fused_impls["vit_block"] == "auto" and not served(
            x, output.weight, self.proportions
        ):
            return False
        drops = (self._modules.get(name) for name in self.DROP_PATHS)
        if any(drop is not None and drop.training for drop in drops):
            return False
        if not torch.is_grad_enabled():
            return True
        parameters = self.parameters()
        return not x.requires_grad and not any(p.requires_grad for p in parameters)

    def proportions(self) -> tuple[int, int]:
        """The MLP's hidden channels, and the heads."""
        _, attn, _, mlp = self.parts()
        return mlp._modules[mlp.LINEARS[0]].weight.shape[0], attn.geometry()[0]

    def whole(
        self, x: Tensor, row_stats: Tensor | None = None, key_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The block's output and its row statistics, from x and the statistics that came with x."""
        return thirds.vit_block(x, **self.arguments(), row_stats=row_stats, key_bias=key_bias)

    def arguments(self, operator: str = "vit_block") -> dict[str, Any]:
        """What `operator`, "vit_block" or "int8_vit_block", is told of this block."""
        norm1, attn, norm2, mlp = self.parts()
        qkv_weight, qkv_bias = attn.projection()
        proj, (heads, scale) = attn.output(), attn.geometry()
        fc1, fc2 = (mlp._modules[name] for name in mlp.LINEARS)
        # In 8 bits there is the exact GELU alone.
        named = {"activation": mlp.activation_name()} if operator == "vit_block" else {}
        return {
            **named,
            "norm1_weight": norm1.weight,
            "norm1_bias": norm1.bias,
            "qkv_weight": qkv_weight,
            "qkv_bias": qkv_bias,
            "proj_weight": proj.weight,
            "proj_bias": proj.bias,
            "norm2_weight": norm2.weight,
            "norm2_bias": norm2.bias,
            "w1": fc1.weight,
            "b1": fc1.bias,
            "w2": fc2.weight,
            "b2": fc2.bias,
            "num_heads": heads,
            "scale": scale,
            "eps": norm1.eps,
            "gamma1": self.gamma(0),
            "gamma2": self.gamma(1),
            "impl": self.fused_impls[operator],
        }
