"""Schemas and fakes of the patch embedding; the weight's gradient alone reads the images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deit.kernels.engine.fakes import like, of_wanted
from deit.kernels.engine.registry import CSRC, define


def _embed(
    images: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor, pos_embed: Tensor
) -> Tensor:
    return images.new_empty((images.shape[0], pos_embed.shape[1], weight.shape[0]))


def _bwd(
    dout: Tensor,
    images: Tensor | None,
    weight: Tensor,
    prefix_tokens: int,
    wanted: Sequence[bool] | None = None,
) -> tuple[Tensor, ...]:
    _, tokens, dim = dout.shape
    dprefix, dpos = weight.new_empty((1, prefix_tokens, dim)), weight.new_empty((1, tokens, dim))
    return of_wanted(wanted, like(weight, weight), weight.new_empty(dim), dprefix, dpos)


define(
    "patch_embed",
    "(Tensor images, Tensor weight, Tensor? bias, Tensor prefix, Tensor pos_embed) -> Tensor",
    _embed,
    cpu=CSRC,
    cuda=CSRC,
    triton="patch_embed.triton",
)
define(
    "patch_embed_bwd",
    "(Tensor dout, Tensor? images, Tensor weight, int prefix_tokens, bool[]? wanted=None) "
    "-> (Tensor dweight, Tensor dbias, Tensor dprefix, Tensor dpos_embed)",
    _bwd,
    cpu=CSRC,
    triton="patch_embed.triton_bwd",
)
