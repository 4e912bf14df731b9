"""The last block of a classifier, computed for the tokens that the heads read.

A head reads the class token's row, and a distilled model's other head reads the distillation
token's. Nobody reads what the last block computes for patch tokens after its keys and values. So
their queries, scores, output projection and MLP are left out, and the final norm with them. The
logits are the same to rounding and so are the gradients; 6.9 % of DeiT-B's floating-point
operations are saved.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from deit.fused_vit.blocks import FusedBlock
from deit.fused_vit.modules import Fused, FusedNorm, hooked
from deit.kernels.vit_block import vit_blocks


class PrefixOnly(Fused):
    """Over a vision transformer whose `forward` classifies by its first tokens.

    Only `forward` is touched: `forward_features` and the like give every token as before. The
    original forward runs where a block is wrapped (checkpointing, compilation) and where a hook
    would see fewer tokens.
    """

    ROWS: ClassVar[int] = 1

    def rows(self) -> int:
        """How many tokens the heads read: the first ones."""
        return self.ROWS

    def remark(self) -> str:
        return f"last block for the first {self.rows()} of its tokens"

    def operators(self) -> tuple[str, ...]:
        return (*super().operators(), "cross_attention")

    def unsupported(self) -> str | None:
        if type(self.blocks) is not nn.Sequential or len(self.blocks) == 0:
            return "its blocks are not a Sequential of at least one"
        last = self.blocks[-1]
        if not isinstance(last, FusedBlock):
            return f"last block in full: it is a {type(last).__name__} that is not fused"
        if not _by_row(self.norm):
            return f"last block in full: the norm is a {type(self.norm).__name__}"
        reason = last.unsupported()
        return None if reason is None else f"last block in full: {reason}"

    def interrupted(self) -> str | None:
        for name in ("forward_features", "forward_head"):
            if name in self.__dict__:
                return f"{name} was replaced"
        last = self.blocks[-1]
        for name, part in (("blocks", self.blocks), ("last block", last), ("norm", self.norm)):
            if hooked(part):
                return f"{name} has a hook"
        reason = last.interrupted()
        return None if reason is None else f"last block: {reason}"

    def replaced(self) -> str | None:
        return super().replaced() or self.blocks[-1].replaced()

    def prefix_features(self, x: Tensor) -> Tensor:
        """Embedded tokens [B, N, D] -> the heads' tokens, normalised, [B, rows, D].

        Where all blocks before the last run whole, all are asked first, and then they run one after
        another. Asked in between, Python's questions would take three times as long (a tenth of
        DeiT-Ti's latency), because the kernels use all of the caches.
        """
        *body, last = self.blocks
        if all(isinstance(block, FusedBlock) and block.hands_over(x) for block in body):
            x = vit_blocks(x, [block.arguments() for block in body])
        else:
            for block in body:
                x = block(x)
        return self.norm(last.advance(x, rows=self.rows()))


def _by_row(norm: nn.Module) -> bool:
    """Whether `norm` treats every token by itself."""
    if isinstance(norm, nn.LayerNorm):
        return len(norm.normalized_shape) == 1
    return type(norm) is nn.Identity or isinstance(norm, FusedNorm)
