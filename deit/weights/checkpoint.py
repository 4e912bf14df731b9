"""Weights into a DeiT: from the official files, timm, Hugging Face, torchvision and ourselves.

`load` makes a network for given weights, `load_into` fills one that exists, `save` writes our
own safetensors. Everything is checked before anything is changed: a network whose weights do not
fit is left as it was, bit for bit, and one error lists all that is wrong.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.configs import VARIANTS, Config, config
from deit.model import DeiT
from deit.weights.beside import neighbour
from deit.weights.files import write_tensors
from deit.weights.layouts import Converted, convert, describe, infer, sample, strip_wrappers
from deit.weights.readers import ABOUT_KEY, METADATA_KEY, Weights, read

# The published files, by network (github.com/facebookresearch/deit).
OFFICIAL_FILES = {
    "deit_tiny_patch16_224": "deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small_patch16_224": "deit_small_patch16_224-cd65a155.pth",
    "deit_base_patch16_224": "deit_base_patch16_224-b5f2ef4d.pth",
    "deit_tiny_distilled_patch16_224": "deit_tiny_distilled_patch16_224-b40b3cf7.pth",
    "deit_small_distilled_patch16_224": "deit_small_distilled_patch16_224-649709d9.pth",
    "deit_base_distilled_patch16_224": "deit_base_distilled_patch16_224-df68dfff.pth",
    "deit_base_patch16_384": "deit_base_patch16_384-8de9b5d1.pth",
    "deit_base_distilled_patch16_384": "deit_base_distilled_patch16_384-d0272ac0.pth",
}

HEADS = ("head", "head_dist")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
          torch.float8_e5m2)  # fmt: skip


def load(
    source: str | os.PathLike[str] | Mapping[str, object],
    arch: str | Config | None = None,
    *,
    distilled: bool | None = None,
    img_size: int | None = None,
    num_classes: int | None = None,
    num_heads: int | None = None,
    test_head: str = "softmax-sum",
    reset_head: bool = False,
    drop_path: float = 0.0,
    eps: float | None = None,
    entry: str | None = None,
    prefix: str | None = None,
    ignore: Sequence[str] = (),
) -> DeiT:
    """A DeiT with the weights of `source`, in fp32 on the CPU and in evaluation mode.

    Args:
        source: an official, timm or torchvision `.pth`/`.pt`/`.bin`; a `.safetensors` of timm's,
            Hugging Face's or ours; the folder of a run here or of a Hugging Face model; or a
            state dict. Prefixes of DistributedDataParallel and torch.compile are removed. No
            code in a file is run. What lies beside a file is read: the run.json of a run (two
            folders above its checkpoints' weights), the config.json of transformers and timm.
        arch: a name as `deit.config` takes, or a Config; None to see it from the weights, as is
            everything that a name leaves open (image size, classes, LayerScale).
        num_heads: of attention, which no shape shows. None: what the file or its neighbour says,
            else `arch`'s, else the published network's that has this whole shape.
        distilled, img_size, num_classes: as in `deit.config`; None for the weights' own. Another
            img_size resizes the position embeddings as timm does (bicubic, antialiased).
        test_head, drop_path: of `DeiT`. A Hugging Face DeiTForImageClassification has the
            distillation token without its classifier and loads with test_head="class" only,
            which reads none; `head_dist` is then freshly initialised.
        reset_head: initialise the classifiers afresh, for another number of classes.
        eps: of the LayerNorms. None: that of a Config, of our own file or of a folder's
            config.json; else what the layout's library runs with, 1e-6, but 1e-12 for a bare
            Hugging Face state dict (so that logits are those of transformers).
        entry: which state dict of a training checkpoint ("model_ema"); None for "model".
        prefix: read only the keys under it ("backbone.").
        ignore: beginnings of keys to leave out, as the weights name them ("pooler.").

    Raises:
        ValueError: naming the file: damaged, holding anything but weights, of another
            architecture; with missing, unexpected and mis-shaped keys in one message; of a shape
            that is no published network's, where nothing says its number of heads.
        FileNotFoundError: no such file. TypeError: another kind of source.
    """
    weights = read(source, entry)
    converted = _converted(weights, prefix, ignore)
    own = _infer(weights, converted)
    given = {
        "distilled": distilled, "img_size": img_size, "num_classes": num_classes,
        "num_heads": num_heads,
    }  # fmt: skip
    settings = _target(own, arch, {name: v for name, v in given.items() if v is not None})
    if not isinstance(arch, Config):
        settings = replace(settings, eps=own.config.eps, layer_scale=own.config.layer_scale)
    if eps is not None:
        settings = replace(settings, eps=eps)
    with torch.device("meta"):  # shapes alone: no time goes into weights that get replaced
        model = DeiT(settings, drop_path=drop_path, test_head=test_head)
    ready = _fit(model, weights, converted, own, reset_head)
    model.to_empty(device="cpu")
    _copy(model, ready)
    return model.eval()


def load_into(
    model: DeiT,
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    reset_head: bool = False,
    entry: str | None = None,
    prefix: str | None = None,
    ignore: Sequence[str] = (),
) -> DeiT:
    """Fill `model`, a DeiT (fused or not), with the weights of `source`; returns it.

    Arguments and errors are those of `load`. The network's shape, LayerNorm eps, dtype, device
    and mode stay its own; half-precision weights are converted. After any error the network is
    as it was.
    """
    if not isinstance(model, DeiT):
        raise TypeError(f"model: expected a deit.DeiT; got {type(model).__name__}")
    weights = read(source, entry)
    converted = _converted(weights, prefix, ignore)
    _copy(model, _fit(model, weights, converted, _infer(weights, converted), reset_head))
    return model


def save(model: DeiT, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> None:
    """Write the weights, and the Config as metadata, to `path`, a .safetensors file.

    `about`: what a run says of its images and recipe (`networks.opened`), kept as metadata.
    Atomic: the file is complete on disk under its name, or not there (or as it was before).
    Raises ValueError for another suffix, TypeError for another kind of model, OSError.
    """
    if not isinstance(model, DeiT):
        raise TypeError(f"model: expected a deit.DeiT; got {type(model).__name__}")
    save_state(model.state_dict(), model.config, path, about)


def save_state(
    state: Mapping[str, Tensor],
    config: Config,
    path: str | os.PathLike[str],
    about: Mapping[str, Any] | None = None,
) -> None:
    """`save` for the state dict of a DeiT of `config`, such as one gathered from many processes."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a name ending in .safetensors; got {path.name!r}")
    metadata = {"format": "pt", METADATA_KEY: json.dumps(asdict(config))}
    if about:
        metadata[ABOUT_KEY] = json.dumps(about)
    write_tensors(state, path, metadata)


def resize_positions(pos_embed: Tensor, grid: int, prefix_tokens: int) -> Tensor:
    """[1, P + G*G, D] -> [1, P + grid*grid, D]: the patches' positions resized bicubically.

    The P prefix tokens' positions stay. As timm.layers.resample_abs_pos_embed: antialiased, in
    fp32. Raises ValueError where the patches are no square grid.
    """
    prefix, patches = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1] or side == 0:
        raise ValueError(
            f"pos_embed: expected {prefix_tokens} prefix tokens and a square grid of patches; "
            f"got {pos_embed.shape[1]} tokens"
        )
    if side == grid:
        return pos_embed
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    patches = image.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
    return torch.cat([prefix, patches.to(prefix.dtype)], dim=1)


def _converted(weights: Weights, prefix: str | None, ignore: Sequence[str]) -> Converted:
    try:
        state = strip_wrappers(weights.state, prefix)
        for start in ignore:
            kept = {key: value for key, value in state.items() if not key.startswith(start)}
            if len(kept) == len(state):
                raise ValueError(f"ignore: no key starts with {start!r}; got {sample(state)}")
            state = kept
        _check_tensors(state)
        return convert(state)
    except ValueError as error:
        raise ValueError(f"{weights.name}: {error}") from None


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    kinds = {
        "not floating point": lambda t: not t.is_floating_point(),
        "of no dtype that is converted": lambda t: t.is_floating_point() and t.dtype not in FLOATS,
        "without values (meta device)": lambda t: t.is_meta,
        "not dense": lambda t: t.layout != torch.strided or t.is_quantized,
    }
    problems = []
    for kind, is_wrong in kinds.items():
        if keys := [f"{key} ({value.dtype})" for key, value in state.items() if is_wrong(value)]:
            problems.append(f"{len(keys)} {kind}: {sample(keys)}")
    if problems:
        raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class _Own:
    """The network that weights are of. heads: what a file says of its number of heads, else None;
    known: whether that number is certain enough to be used unasked."""

    config: Config
    heads: int | None
    known: bool


def _infer(weights: Weights, converted: Converted) -> _Own:
    saved, heads, where = weights.config, None, weights.where
    try:
        if saved is None and weights.neighbour is not None:
            name, where = converted.layout.name, str(weights.neighbour)
            saved, heads = neighbour(weights.neighbour, name, strict=weights.named)
        own, known = infer(converted, saved, where)
        if saved is not None:
            heads = saved.num_heads
        elif heads is not None:
            own, known = replace(own, num_heads=heads), True
    except ValueError as error:
        named = where and str(error).startswith(where)
        raise ValueError(str(error) if named else f"{weights.name}: {error}") from None
    return _Own(own, heads, known)


def _target(weights_own: _Own, arch: str | Config | None, given: dict[str, Any]) -> Config:
    """The network asked for: `arch` with what is `given`, else the weights' own."""
    own = weights_own.config
    if isinstance(arch, str):
        settings = config(arch)
        if not re.search(r"_\d+$", arch):  # which names an image size
            given.setdefault("img_size", own.img_size)
        given.setdefault("num_classes", own.num_classes)
    elif arch is None and "num_heads" not in given and not weights_own.known:
        widths = ", ".join(f"{v.depth} of {v.embed_dim}" for v in VARIANTS.values())
        raise ValueError(
            "num_heads: expected a number, or a deit.Config as arch: nothing here says how many "
            f"heads {own.depth} blocks of {own.embed_dim} have, with patches of {own.patch_size} "
            f"pixels, and no published network has this shape ({widths}, ...)"
        )
    else:
        settings = own if arch is None else arch
    return replace(settings, **given)


def _fit(
    model: DeiT, weights: Weights, converted: Converted, weights_own: _Own, reset_head: bool
) -> dict[str, Tensor]:
    """Tensors for each of the model's keys, in its shapes and dtypes. Changes nothing.

    Raises ValueError listing everything that does not fit.
    """
    settings, own = model.config, weights_own.config
    expected = model.state_dict()
    problems = list(converted.broken)
    if weights_own.heads not in (None, settings.num_heads):
        problems.append(
            f"num_heads: the weights have {weights_own.heads}, by what is written in the file or "
            f"beside it; the network asked for has {settings.num_heads}"
        )
    if own.distilled != settings.distilled:
        has, wants = ("a", "without one") if own.distilled else ("no", "with one")
        problems.append(
            f"the weights have {has} distillation token, the network asked for is {wants} "
            f"(distilled={own.distilled} takes them as they are)"
        )
    heads = _fresh_heads(model, converted.tensors, reset_head, problems)
    # The heads have been judged; what is left must match key for key.
    tensors = {k: v for k, v in converted.tensors.items() if k not in heads}
    if own.distilled == settings.distilled and own.embed_dim == settings.embed_dim:
        positions = resize_positions(tensors["pos_embed"], settings.grid, own.prefix_tokens)
        tensors["pos_embed"] = positions
    unexpected = converted.unexpected + [k for k in tensors if k not in expected]
    missing = [key for key in expected if key not in tensors and key not in heads]
    misshapen = [
        f"{key} {list(value.shape)} for {list(expected[key].shape)}"
        for key, value in tensors.items()
        if key in expected and value.shape != expected[key].shape
    ]
    ready = {
        key: value.detach().to(expected[key].dtype)
        for key, value in tensors.items()
        if key in expected and value.shape == expected[key].shape
    }
    ready |= {key: value for key, value in heads.items() if value is not None}
    wild = [key for key, value in ready.items() if not value.isfinite().all()]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of the wrong shape": misshapen,
        "with NaN or infinity": wild,
    }
    problems += [f"{len(k)} {kind}: {sample(k)}" for kind, k in kinds.items() if k]
    if problems:
        raise ValueError(
            f"{weights.name}: {converted.layout.name} weights of {describe(own)} do not fit "
            f"{describe(settings)}: " + "; ".join(problems)
        )
    return ready


def _fresh_heads(
    model: DeiT, tensors: Mapping[str, Tensor], reset: bool, problems: list[str]
) -> dict[str, Tensor | None]:
    """The keys of heads that are not taken from the weights, with their fresh tensors.

    None stands for a head that does not fit, which is then in `problems`.
    """
    classes, width = model.config.num_classes, model.config.embed_dim
    found: dict[str, Tensor | None] = {}
    for head in HEADS[: model.config.prefix_tokens]:
        keys = (f"{head}.weight", f"{head}.bias")
        weight = tensors.get(keys[0])
        absent = all(key not in tensors for key in keys)
        unread = head == "head_dist" and model.test_head == "class"
        if reset or (absent and unread):
            dtype = next(model.head.parameters()).dtype
            found[keys[0]] = nn.init.trunc_normal_(
                torch.empty(classes, width, dtype=dtype), std=0.02
            )
            found[keys[1]] = torch.zeros(classes, dtype=dtype)
        elif absent:
            found.update(dict.fromkeys(keys))
            hint = " or test_head='class', which does not read it" if head == "head_dist" else ""
            problems.append(f"no weights of {head} (reset_head=True starts it afresh{hint})")
        elif weight is not None and weight.dim() == 2 and weight.shape[0] != classes:
            found.update(dict.fromkeys(keys))
            problems.append(
                f"{head} of {weight.shape[0]} classes for {classes} "
                "(reset_head=True starts it afresh)"
            )
    return found


def _copy(model: DeiT, ready: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(ready[key])
