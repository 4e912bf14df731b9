"""Networks by name: ours, timm's, or one that a run trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from deit.configs import reshaped
from deit.model import DeiT
from deit.weights.beside import RUN_FILE, TIMM, WEIGHTS_FILE, read_run, run_of
from deit.weights.checkpoint import load
from deit.weights.readers import about_of, read


def create(
    arch: str,
    *,
    img_size: int,
    num_classes: int,
    distilled: bool = False,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    shape: Mapping[str, int] | None = None,
) -> nn.Module:
    """A network with fresh weights: `arch` is one of ours, or "timm:NAME".

    Raises ValueError for an unknown name, an impossible shape, or an option it does not have.
    """
    if arch.startswith(TIMM):
        if distilled or shape:
            raise ValueError(f"arch: {arch} takes no distillation token and no other shape")
        options: dict[str, Any] = {"num_classes": num_classes}
        if drop_path:
            options["drop_path_rate"] = drop_path
        if layer_scale is not None:
            options["init_values"] = layer_scale
        return _timm(arch[len(TIMM) :], img_size, **options)
    settings = reshaped(
        arch,
        img_size=img_size,
        num_classes=num_classes,
        distilled=distilled,
        shape=shape or {},
    )
    return DeiT(replace(settings, layer_scale=layer_scale), drop_path=drop_path)


def pretrained(name: str, img_size: int, drop_path: float = 0.0) -> nn.Module:
    """The network of "timm:NAME" with its published weights, or of "timm:NAME=FILE" with a file's.

    A file's classes are its own; it holds a state dict, or a checkpoint with one, and runs no code.
    Raises ValueError for an unknown name or weights that do not fit, OSError where there are none.
    """
    name, _, file = name.removeprefix(TIMM).partition("=")
    how: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if not file:
        return _timm(name, img_size, pretrained=True, **how).eval()
    state = read(Path(file)).state
    model: Any = _timm(name, img_size, **how)
    classifier = state.get(f"{model.pretrained_cfg['classifier']}.weight")
    if classifier is not None:
        model.reset_classifier(len(classifier))
    _fill(model, state, file)
    return model.eval()


def _fill(model: nn.Module, state: dict[str, Any], name: object) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from error


def _timm(name: str, img_size: int, **options: Any) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"arch: timm has no model {name!r} (near: {near})")
    try:  # networks with position embeddings are made for one size, convnets for any
        return timm.create_model(name, img_size=img_size, **options)
    except TypeError:
        return timm.create_model(name, **options)


def weights_of(run: Path) -> Path | None:
    """The weights' file of a run, given its folder, a checkpoint's or the file; else None."""
    weights = run if run.is_file() else run / WEIGHTS_FILE
    return weights if weights.is_file() and run_of(weights) else None


def restore(run: Path, img_size: int | None = None, **how: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a run trained, in evaluation mode, and what `run.json` says of it.

    Args:
        run: the run's folder, one of its checkpoints', or a file of weights in either
            (`average.safetensors`).
        img_size: for another image size than the run's.
        how: options of `deit.load`; a timm network has drop_path alone of them.

    Raises:
        ValueError: no run's weights there, weights that do not fit, or a run.json that is none.
    """
    weights = weights_of(run)
    folder = run_of(weights) if weights else None
    if weights is None or folder is None:
        raise ValueError(f"{run}: expected the folder of a finished run, with {WEIGHTS_FILE}")
    about = read_run(folder)
    network = about["network"]
    if not network["arch"].startswith(TIMM):
        return load(weights, img_size=img_size, **how), about
    classes, state = len(about.get("classes", ())), read(weights).state
    if all(classes not in tensor.shape[:1] for tensor in state.values()):
        raise ValueError(
            f"{folder / RUN_FILE}: classes: expected as many as {weights} has; got {classes}"
        )
    drop = how.get("drop_path", 0.0)
    size = network["img_size"] if img_size is None else img_size
    model = create(network["arch"], img_size=size, num_classes=classes, drop_path=drop)
    _fill(model, state, weights)
    return model.eval(), about


def opened(
    weights: Path, img_size: int | None = None, **how: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run or of a DeiT's weights, and what is known of its images.

    Args:
        weights: a run's folder, a weights' file in it, or anything that `deit.load` takes.
        img_size, how: as for `restore`.

    Returns:
        The network in evaluation mode, and `run.json`, or what an exported run, a Hugging Face
        model's folder or timm's says ("classes", "mean", "std", "options"; all may be missing,
        where ImageNet's statistics are meant).

    Raises ValueError and OSError as `restore` and `deit.load` do, and ValueError for another number
    of classes than the network has.
    """
    model: nn.Module
    if weights_of(weights) is None:
        model, about = load(weights, img_size=img_size, **how), about_of(weights)
    else:
        model, about = restore(weights, img_size, **how)
    if isinstance(model, DeiT) and "classes" in about:
        said, has = len(about["classes"]), model.config.num_classes
        if said != has:
            raise ValueError(f"{weights}: expected names of {has} classes beside it; got {said}")
    return model, about


def opened_deit(
    weights: Path, img_size: int | None = None, **how: Any
) -> tuple[DeiT, dict[str, Any]]:
    """`opened` for what needs a DeiT; raises ValueError for a network of another kind."""
    model, about = opened(weights, img_size, **how)
    if not isinstance(model, DeiT):
        raise ValueError(f"weights: expected a DeiT; got a {type(model).__name__}")
    return model, about


def crop_of(about: dict[str, Any]) -> float | None:
    """The crop ratio that a run evaluates with; None for the paper's (`images.crop_ratio`).

    `about`: what `run.json` says; empty for weights that no run here trained.
    """
    return about.get("options", {}).get("recipe", {}).get("eval_crop")


def parameters(model: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(p.numel() for p in model.parameters())
