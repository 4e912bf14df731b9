"""A pre-norm block of fused parts."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from deit.fused_vit import eight_bits
from deit.fused_vit.feed_forward import FeedForward
from deit.fused_vit.modules import (
    Fused,
    FusedAttention,
    FusedNorm,
    hooked,
    original_class,
)
from deit.fused_vit.whole_block import WholeBlock


class FusedBlock(WholeBlock, Fused):
    """Over a pre-norm block: both residual additions move into the products' epilogues."""

    OPERATORS = eight_bits.OPERATORS  # beside those of its parts
    # In the order in which they run: norm, attention, norm, MLP.
    PARTS: ClassVar[tuple[tuple[str, type[Fused]], ...]] = (
        ("norm1", FusedNorm),
        ("attn", FusedAttention),
        ("norm2", FusedNorm),
        ("mlp", FeedForward),
    )
    SCALES: ClassVar[tuple[str, ...]] = ("ls1", "ls2")
    DROP_PATHS: ClassVar[tuple[str, ...]] = ("drop_path1", "drop_path2")
    # What they may be: LayerScale with its `gamma`, stochastic depth that `keep` draws for.
    SCALE_KINDS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Identity,)
    DROP_PATH_KINDS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Identity,)

    def remark(self) -> str:
        kind = eight_bits.asked(self.fused_impls)
        return super().remark() if kind is None else kind.remark

    def absorbed(self) -> list[nn.Module]:
        scales = (self._modules[name] for name in self.SCALES)
        return [*super().absorbed(), *scales]

    def parts(self) -> tuple[Any, ...]:
        """What normalises, attends, normalises and feeds forward."""
        return tuple(self._modules[name] for name, _ in self.PARTS)

    def unsupported(self) -> str | None:
        children = self._modules
        for name, kind in self.PARTS:
            part = children.get(name)
            if not isinstance(part, kind):
                if isinstance(part, Fused):
                    return f"{name} is a {original_class(part).__name__}, not what a block takes"
                return f"{name} is a {type(part).__name__} that is not fused"
            reason = part.unsupported()
            if reason is not None:
                return f"{name}: {reason}"
        fixed = ((self.SCALES, self.SCALE_KINDS), (self.DROP_PATHS, self.DROP_PATH_KINDS))
        for names, kinds in fixed:
            for name in names:
                if type(children.get(name)) not in kinds:
                    return f"{name} is a {type(children.get(name)).__name__}"
        return super().unsupported()

    def interrupted(self) -> str | None:
        children = self._modules
        for name, _ in self.PARTS:
            part = children[name]
            reason = "it has a hook" if self.watched(part) else part.interrupted()
            if reason is not None:
                return f"{name}: {reason}"
        for name in (*self.SCALES, *self.DROP_PATHS):
            child = children.get(name)
            if child is not None and hooked(child):
                return f"{name} has a hook"
        return super().interrupted()

    def replaced(self) -> str | None:
        reason = super().replaced()
        for name, _ in self.PARTS:
            reason = reason or self._modules[name].replaced()
        return reason

    def watched(self, part: nn.Module) -> bool:
        """Whether a hook on `part` wants to be run by this call."""
        return hooked(part)

    def gamma(self, index: int) -> Tensor | None:
        """LayerScale's [D] of the first or second branch; None where there is none."""
        if not self.SCALES:
            return None
        return getattr(self._modules.get(self.SCALES[index]), "gamma", None)

    def keep(self, index: int, x: Tensor) -> Tensor | None:
        """Stochastic depth's factors [B] of a branch, drawn as the original draws them."""
        return None

    def hands_over(self, x: Tensor) -> bool:
        """Whether a caller that keeps row statistics may call `whole` in place of the module."""
        return not hooked(self) and self.runs_fused(x) and self.runs_whole(x)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        if not self.runs_fused(x):
            return super().forward(x)  # type: ignore[misc]
        return self.advance(x)

    def advance(
        self, x: Tensor, *, key_bias: Tensor | None = None, rows: int | None = None
    ) -> Tensor:
        """The block's output [B, N, D], or [B, rows, D]: its first `rows` tokens alone."""
        kind = eight_bits.asked(self.fused_impls)
        if kind is not None and not self.training:
            return eight_bits.advance(kind, self, x, key_bias, rows)
        if rows is None and self.runs_whole(x):
            return self.whole(x, key_bias=key_bias)[0]
        norm1, attn, norm2, mlp = self.parts()
        stream = x if rows is None else x[:, :rows]
        stream = attn.attend(
            norm1.normalise(x),
            stream,
            self.gamma(0),
            self.keep(0, x),
            key_bias=key_bias,
            rows=rows,
        )
        return mlp.feed_forward(norm2.normalise(stream), stream, self.gamma(1), self.keep(1, x))
