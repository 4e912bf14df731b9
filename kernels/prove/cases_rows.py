"""The launches of the norms, the losses and the patch embedding, for `cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deit.kernels.device import common, configs, partials
from deit.kernels.layer_norm import triton as layer_norm
from deit.kernels.layer_norm import triton_bwd as layer_norm_bwd
from deit.kernels.losses import triton as losses
from deit.kernels.losses import triton_bwd as losses_bwd
from deit.kernels.patch_embed import triton as patch_embed
from deit.kernels.patch_embed import triton_bwd as patch_embed_bwd

if TYPE_CHECKING:
    from deit.kernels.prove.cases import Case

_TOKENS = 197
CLASSES = (1000, 21841)  # ImageNet, and ImageNet-21k: one block and a loop

VARIANTS: dict[str, tuple[str, ...]] = {
    "layer_norm": ("plain", "fp32 weights", "fp32 rows"),  # the last one of a block in autocast
    "layer_norm_fwd": ("fp32 weights",),
    "layer_norm_bwd": ("plain", "fp32 weights"),
    "add_layer_norm": ("plain", "gamma keep fp32"),
    "add_layer_norm_fwd": ("gamma keep fp32",),
    "add_layer_norm_bwd": ("plain", "gamma keep fp32"),
    "partial_sums": ("264 of 3", "one"),
    "cross_entropy": ("index", "soft smoothed"),
    "cross_entropy_bwd": ("index", "soft smoothed"),
    "distillation_loss": ("index hard", "soft smoothed student hard", "soft smoothed student kl"),
    "distillation_loss_bwd": ("index hard", "soft smoothed student kl"),
    "patch_embed": ("channels first", "channels last"),
    "patch_embed_bwd": ("channels first", "channels last", "tokens"),
}
# Those whose work is a matrix product; none reads by tensor descriptors.
PRODUCTS = ("patch_embed", "patch_embed_bwd")


def config(operator: str, arch: int, dtype: torch.dtype, size: int) -> object:
    """What, beside the size, the kernels of an operator are compiled for."""
    if operator == "partial_sums":
        return "fp32" if dtype == torch.float32 else None  # whatever the operator's dtype
    if size in CLASSES:
        return configs.loss(size)
    name = operator.removeprefix("add_").removesuffix("_fwd")
    return getattr(configs, name)(arch, dtype, size)


def build(case: Case) -> common.Launch:
    """The launch, its tensors on the meta device."""
    return _BUILDERS[case.operator.removesuffix("_fwd")](case)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _first(planned: tuple[object, common.Launch | None]) -> common.Launch:
    assert planned[1] is not None  # no case is empty
    return planned[1]


def _layer_norm(case: Case) -> common.Launch:
    dtype, dim = case.torch_dtype, case.size
    full, save = case.variant != "plain", case.operator.endswith("_fwd")
    weight, bias = (_empty(dim, dtype=torch.float32 if full else dtype) for _ in range(2))
    wide = case.variant == "fp32 rows"
    x = _empty(case.batch, _TOKENS, dim, dtype=torch.float32 if wide else dtype)
    config = configs.layer_norm(case.arch, x.dtype, dim)
    if case.operator.startswith("layer_norm"):
        return _first(
            layer_norm.plan_layer_norm(
                x, weight, bias, 1e-6, save=save, dtype=dtype if wide else None, config=config
            )
        )
    residual = _empty(*x.shape, dtype=torch.float32 if full else dtype)
    gamma, keep = (_empty(dim), _empty(case.batch)) if full else (None, None)
    return _first(
        layer_norm.plan_add_layer_norm(
            x, residual, weight, bias, 1e-6, gamma, keep, save=save, config=config
        )
    )


def _layer_norm_bwd(case: Case) -> common.Launch:
    dtype, dim = case.torch_dtype, case.size
    full, add = case.variant != "plain", case.operator.startswith("add")
    wide = torch.float32 if full else dtype
    x = _empty(case.batch, _TOKENS, dim, dtype=dtype)
    total = _empty(*x.shape, dtype=wide) if add else x
    mean = _empty(*x.shape[:-1])
    gamma, keep = (_empty(dim), _empty(case.batch)) if add and full else (None, None)
    _, launches = layer_norm_bwd.plan(
        x,
        total if add else None,
        x if add else None,
        total,
        _empty(dim, dtype=wide),
        mean,
        mean,
        gamma,
        keep,
        config=configs.layer_norm_bwd(case.arch, dtype, dim),
    )
    return launches[0]


def _partial_sums(case: Case) -> common.Launch:
    # 264: two programs on each of 132 multiprocessors. More come of one a row of tiles.
    slots, count = (1, 1) if case.variant == "one" else (3, 200 + case.batch // 4)
    outs = [_empty(case.size, dtype=torch.bfloat16) for _ in range(slots)]
    return partials.plan_sum(_empty(slots, count, case.size), *outs)


def _loss(case: Case) -> common.Launch:
    logits = _empty(case.batch, case.size, dtype=case.torch_dtype)
    soft = "soft" in case.variant
    target = logits if soft else torch.empty(case.batch, dtype=torch.int64, device="meta")
    smoothing = 0.1 if "smoothed" in case.variant else 0.0
    teaching = None
    if case.operator.startswith("distillation"):
        student = logits if "student" in case.variant else None
        kind = "hard" if "hard" in case.variant else "soft"
        teaching = losses.Teaching(logits, student, kind, 0.5, 3.0, "batchmean")
    if case.operator.endswith("_bwd"):
        dloss, statistics = _empty(), _empty(losses.STATISTICS, case.batch)
        return _first(losses_bwd.plan(dloss, logits, target, statistics, smoothing, teaching))
    return losses.plan(logits, target, smoothing, teaching, save=True)[1][0]


def _patch_embed(case: Case) -> common.Launch:
    dtype, dim = case.torch_dtype, case.size
    images = _empty(case.batch, 3, 224, 224, dtype=dtype)
    if case.variant == "channels last":
        images = images.contiguous(memory_format=torch.channels_last)
    weight, bias = _empty(dim, 3, 16, 16, dtype=dtype), _empty(dim, dtype=dtype)
    tokens = _empty(1, _TOKENS, dim, dtype=dtype)
    if case.operator == "patch_embed":
        config = configs.patch_embed(case.arch, dtype, dim)
        return _first(patch_embed.plan(images, weight, bias, tokens[:, :1], tokens, config=config))
    dout = _empty(case.batch, _TOKENS, dim, dtype=dtype)
    if case.variant == "tokens":
        return patch_embed_bwd.plan_tokens(dout, weight, 1)[1][0]
    bwd_config = configs.patch_embed_bwd(case.arch, dtype, dim)
    return patch_embed_bwd.plan_weight(dout, images, weight, 1, config=bwd_config)[1][0]


_BUILDERS: dict[str, Callable[[Case], common.Launch]] = {
    "layer_norm": _layer_norm,
    "layer_norm_bwd": _layer_norm_bwd,
    "add_layer_norm": _layer_norm,
    "add_layer_norm_bwd": _layer_norm_bwd,
    "partial_sums": _partial_sums,
    "cross_entropy": _loss,
    "cross_entropy_bwd": _loss,
    "distillation_loss": _loss,
    "distillation_loss_bwd": _loss,
    "patch_embed": _patch_embed,
    "patch_embed_bwd": _patch_embed,
}
