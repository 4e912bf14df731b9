"""The parts of a training run, made from its options: network, teacher, optimiser, schedule."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deit import fused_vit
from deit.data.images import IMAGENET_MEAN, IMAGENET_STD
from deit.data.sources import Source
from deit.model import DeiT
from deit.recipes import Recipe
from deit.training.distillation import Teacher, check_classes, statistics
from deit.training.options import Options
from deit.weights import checkpoint, networks

# Beside biases and norms, which have one axis. Section 6 of the paper; timm's models name theirs.
NO_DECAY = ("cls_token", "dist_token", "pos_embed")


def network(options: Options, classes: int) -> nn.Module:
    """The student: fresh, or with the weights asked for, its positions resized to `img_size`."""
    recipe = options.recipe
    if options.weights is None:
        return networks.create(
            options.arch,
            img_size=options.img_size,
            num_classes=classes,
            distilled=options.distilled,
            drop_path=recipe.drop_path,
            layer_scale=recipe.layer_scale,
            shape=options.shape.changes(),
        )
    if options.arch.startswith(networks.TIMM):
        return _timm(options.weights, options, classes)
    source: Any = networks.weights_of(Path(options.weights)) or options.weights
    heads = options.shape.num_heads  # for weights that do not say it
    own = checkpoint.load(source, num_heads=heads, drop_path=recipe.drop_path)
    return checkpoint.load(
        source,
        own.config,
        distilled=options.distilled or own.config.distilled,
        img_size=options.img_size,
        num_classes=classes,
        reset_head=classes != own.config.num_classes,
        drop_path=recipe.drop_path,
    )


def _timm(weights: str, options: Options, classes: int) -> nn.Module:
    """timm's network from a run or from "timm:NAME[=FILE]", with a fresh head for other classes."""
    name, drop_path = weights.partition("=")[0], options.recipe.drop_path
    if not name.startswith(networks.TIMM):
        model: Any = networks.restore(Path(weights), options.img_size, drop_path=drop_path)[0]
    elif name == options.arch:
        model = networks.pretrained(weights, options.img_size, drop_path)
    else:
        raise ValueError(f"weights: expected those of arch {options.arch}; got {weights}")
    if model.num_classes != classes:
        model.reset_classifier(classes)
    return model


def average(model: nn.Module, recipe: Recipe) -> Any:
    """timm's exponential moving average of the weights; None where the recipe has none."""
    if recipe.ema is None:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=recipe.ema, use_warmup=recipe.ema_warmup)


def teacher(options: Options, source: Source, device: torch.device) -> Teacher | None:
    """The teacher that the options name: a run's folder, "timm:NAME[=FILE]", or a DeiT's weights.

    Its images get its own statistics: a run's, timm's, or ImageNet's where a file names none.

    Raises ValueError for one that is not there, or has other classes than the data.
    """
    name = options.teacher
    if name is None:
        return None
    if name.startswith(networks.TIMM):
        model = networks.pretrained(name, options.img_size)
        mean, std = statistics(model) or (IMAGENET_MEAN, IMAGENET_STD)
    else:
        model, about = networks.opened(Path(name))
        mean = tuple(about.get("mean", IMAGENET_MEAN))
        std = tuple(about.get("std", IMAGENET_STD))
    if isinstance(model, DeiT) and model.config.img_size != options.img_size:
        raise ValueError(
            f"teacher: expected one for {options.img_size} pixels; got {model.config.img_size}"
        )
    check_classes(model, torch.zeros(2, 3, options.img_size, options.img_size), len(source.classes))
    return Teacher(model, mean=mean, std=std, student_mean=source.mean, student_std=source.std).to(
        device
    )


def optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """AdamW or LAMB over two groups of weights, with decay and without."""
    from timm.optim import param_groups_weight_decay

    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=NO_DECAY)
    lr = recipe.peak_lr
    if recipe.optimizer == "lamb":
        from timm.optim import Lamb

        # LAMB's own clipping is off: the loop clips as the recipe says.
        return Lamb(groups, lr=lr, betas=recipe.betas, eps=recipe.eps, max_grad_norm=None)
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=recipe.betas, eps=recipe.eps, fused=fused)


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, updates_an_epoch: int) -> Any:
    """timm's cosine with linear warm-up, a function of the update's number alone.

    The official code moves it once an epoch, this one every update.
    """
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * updates_an_epoch,
        lr_min=recipe.min_lr,
        warmup_t=round(recipe.warmup_epochs * updates_an_epoch),
        warmup_lr_init=recipe.warmup_lr,
        t_in_epochs=False,
    )


def fuse(model: nn.Module) -> str:
    """Put the fused operators under `model`, as far as they fit; what runs now, for people."""
    with warnings.catch_warnings():  # a convnet is no mistake here
        warnings.filterwarnings("ignore", "fuse: nothing")
        report = fused_vit.fuse(model)
    if report.fused:
        return str(report)
    return f"nothing in a {type(model).__name__} has a fused form: it runs on PyTorch's operators"


def freeze(model: nn.Module) -> None:
    """Leave only the classifiers, and batch norms with their statistics, to be trained (FixRes)."""
    heads = [name for name in ("head", "head_dist", "fc", "classifier") if hasattr(model, name)]
    if not heads:
        raise ValueError(f"train_only: {type(model).__name__} has no classifier of a known name")
    model.requires_grad_(False)
    for name in heads:
        getattr(model, name).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(True)


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute each block in the backward instead of keeping its activations."""
    from torch.utils.checkpoint import checkpoint as recompute

    blocks = getattr(model, "blocks", None)
    timms: Any = getattr(model, "set_grad_checkpointing", None)
    if timms is not None:
        timms()
    elif isinstance(blocks, nn.Sequential):
        for block in blocks:
            block.forward = _recomputing(block.forward, recompute)
    else:
        raise ValueError("checkpoint_activations: expected a network with `blocks`")


def _recomputing(forward: Any, recompute: Any) -> Any:
    def run(*inputs: Any) -> Any:
        return recompute(forward, *inputs, use_reentrant=False)

    return run
