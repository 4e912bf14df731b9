"""Patches, prefix tokens and positions embedded by one operator, at the root of a network.

Step by step they are a convolution, a transposing copy, a concatenation and an addition, each with
fresh memory: 0.55 ms an image of DeiT-Ti on a CPU where `patch_embed` takes 0.36.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from deit.fused_vit.modules import hooked, unreadable
from deit.kernels import patch_embed
from deit.kernels.engine import autocast


class ImageEmbedding:
    """What a fused root adds for its embedding; a mix-in beside PrefixOnly.

    `why_steps` says when the original's steps run instead: what they do differs, or somebody
    watches one of them.
    """

    if TYPE_CHECKING:  # the attributes of the class that this is mixed over

        def __getattr__(self, name: str) -> Any: ...

    OPERATORS: ClassVar[tuple[str, ...]] = ("patch_embed",)
    # Methods of the original that the operator stands for.
    STEPS: ClassVar[tuple[str, ...]] = ()

    def prefix_tokens(self) -> Tensor:
        """[1, T, D]: the class token, then the distillation token where there is one."""
        raise NotImplementedError

    def by_steps(self, images: Tensor) -> Tensor:
        """The original's embedding: [B, C, H, W] -> [B, N, D]."""
        raise NotImplementedError

    def absorbed(self) -> list[nn.Module]:
        inherited = super().absorbed()  # type: ignore[misc]
        if self.why_steps() is not None:
            return inherited
        return [*inherited, self.patch_embed, self.patch_embed.proj]

    def operators(self) -> tuple[str, ...]:
        found: tuple[str, ...] = super().operators()  # type: ignore[misc]
        by_steps = () if self.why_steps() is None else ImageEmbedding.OPERATORS
        return tuple(name for name in found if name not in by_steps)

    def remark(self) -> str:
        reason, inherited = self.why_steps(), super().remark()  # type: ignore[misc]
        return inherited if reason is None else f"{inherited}; embedded step by step: {reason}"

    def why_steps(self) -> str | None:
        """Why the original's steps embed; None where the operator does."""
        patches = self._modules["patch_embed"]
        proj = patches._modules.get("proj")
        if type(proj) is not nn.Conv2d:
            return f"patch_embed.proj is a {type(proj).__name__}, not a Conv2d"
        settings = (proj.stride, proj.padding, proj.dilation, proj.groups)
        if settings != (proj.kernel_size, (0, 0), (1, 1), 1):
            return "patch_embed.proj is not a projection of patches side by side"
        if hooked(patches) or hooked(proj):
            return "patch_embed has a hook"
        for name in self.STEPS:
            if name in self.__dict__:
                return f"{name} was replaced"
        for parameter in (proj.weight, proj.bias, self.prefix_tokens(), self.pos_embed):
            what = None if parameter is None else unreadable(parameter)
            if what is not None:
                return f"a parameter is {what}"
        return None

    def embedded(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, D], positions added."""
        # A gradient for images is the convolution's; autocast leaves prefix and positions fp32.
        by_operator = not images.requires_grad and autocast.dtype_of(images) is None
        if not by_operator or self.why_steps() is not None:
            return self.by_steps(images)
        proj, impl = self.patch_embed.proj, self.fused_impls["patch_embed"]
        prefix = self.prefix_tokens()
        return patch_embed(images, proj.weight, proj.bias, prefix, self.pos_embed, impl=impl)
