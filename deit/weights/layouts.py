"""Whose key names a state dict uses, and the way from there to ours.

Ours are timm's, which are the official checkpoints'. A layout is an ordered list of rules, each
a pattern for the whole source key and our name for it. "name@0/3" is the first of three tensors
to be stacked along the output axis: the query, key and value projections that other libraries
keep apart. A key that no rule matches is left for the caller to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deit.configs import VARIANTS, Config, published

# What DistributedDataParallel and torch.compile put before every key.
_WRAPPERS = ("module.", "_orig_mod.")

_PART = re.compile(r"(?P<name>.+)@(?P<index>\d)/(?P<count>\d)")


@dataclass(frozen=True)
class Layout:
    """One library's key names.

    marker: matches a key that every state dict of this layout has and no other layout does.
    rules:  (pattern, replacement).
    eps:    the LayerNorm epsilon its models run with unless a configuration says otherwise.
    """

    name: str
    marker: str
    rules: tuple[tuple[str, str], ...]
    eps: float


_WB = r"(weight|bias)"  # every layer here has both

# Ours, but for DeiT III's LayerScale in the official files, where timm's is named as here.
_TIMM = (
    (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
    (r"(.*)", r"\1"),
)

# The model's own name comes first in classifiers ("deit.layers...", but "classifier.weight").
# Blocks are encoder.layer.0 on disk, and were in memory before transformers 5; layers.0 since.
_HF = r"(?:deit\.|vit\.)?"
_HF_BLOCK = _HF + r"(?:encoder\.layer|layers)\.(\d+)"

_HUGGING_FACE = (
    (rf"{_HF}embeddings\.cls_token", r"cls_token"),
    (rf"{_HF}embeddings\.distillation_token", r"dist_token"),
    (rf"{_HF}embeddings\.position_embeddings", r"pos_embed"),
    (rf"{_HF}embeddings\.patch_embeddings\.projection\.{_WB}", r"patch_embed.proj.\1"),
    (rf"{_HF}layernorm\.{_WB}", r"norm.\1"),
    (rf"(?:cls_)?classifier\.{_WB}", r"head.\1"),
    (rf"distillation_classifier\.{_WB}", r"head_dist.\1"),
    (rf"{_HF_BLOCK}\.layernorm_before\.{_WB}", r"blocks.\1.norm1.\2"),
    (rf"{_HF_BLOCK}\.layernorm_after\.{_WB}", r"blocks.\1.norm2.\2"),
    # on disk
    (rf"{_HF_BLOCK}\.attention\.attention\.query\.{_WB}", r"blocks.\1.attn.qkv.\2@0/3"),
    (rf"{_HF_BLOCK}\.attention\.attention\.key\.{_WB}", r"blocks.\1.attn.qkv.\2@1/3"),
    (rf"{_HF_BLOCK}\.attention\.attention\.value\.{_WB}", r"blocks.\1.attn.qkv.\2@2/3"),
    (rf"{_HF_BLOCK}\.attention\.output\.dense\.{_WB}", r"blocks.\1.attn.proj.\2"),
    (rf"{_HF_BLOCK}\.intermediate\.dense\.{_WB}", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_HF_BLOCK}\.output\.dense\.{_WB}", r"blocks.\1.mlp.fc2.\2"),
    # in memory
    (rf"{_HF_BLOCK}\.attention\.q_proj\.{_WB}", r"blocks.\1.attn.qkv.\2@0/3"),
    (rf"{_HF_BLOCK}\.attention\.k_proj\.{_WB}", r"blocks.\1.attn.qkv.\2@1/3"),
    (rf"{_HF_BLOCK}\.attention\.v_proj\.{_WB}", r"blocks.\1.attn.qkv.\2@2/3"),
    (rf"{_HF_BLOCK}\.attention\.o_proj\.{_WB}", r"blocks.\1.attn.proj.\2"),
    (rf"{_HF_BLOCK}\.mlp\.(fc1|fc2)\.{_WB}", r"blocks.\1.mlp.\2.\3"),
)

_TV_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)"

_TORCHVISION = (
    (r"class_token", r"cls_token"),
    (r"encoder\.pos_embedding", r"pos_embed"),
    (rf"conv_proj\.{_WB}", r"patch_embed.proj.\1"),
    (rf"encoder\.ln\.{_WB}", r"norm.\1"),
    (rf"heads\.head\.{_WB}", r"head.\1"),
    (rf"{_TV_BLOCK}\.ln_([12])\.{_WB}", r"blocks.\1.norm\2.\3"),
    (rf"{_TV_BLOCK}\.self_attention\.in_proj_{_WB}", r"blocks.\1.attn.qkv.\2"),
    (rf"{_TV_BLOCK}\.self_attention\.out_proj\.{_WB}", r"blocks.\1.attn.proj.\2"),
    # 0 and 3 in a module's state dict; linear_1 and linear_2 in the files torchvision publishes
    (rf"{_TV_BLOCK}\.mlp\.(?:0|linear_1)\.{_WB}", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_TV_BLOCK}\.mlp\.(?:3|linear_2)\.{_WB}", r"blocks.\1.mlp.fc2.\2"),
)

LAYOUTS = (
    Layout("timm", r"patch_embed\.proj\.weight", _TIMM, 1e-6),
    # transformers runs the official weights, trained with 1e-6, with its own default of 1e-12.
    Layout(
        "Hugging Face",
        rf"{_HF}embeddings\.patch_embeddings\.projection\.weight",
        _HUGGING_FACE,
        1e-12,
    ),
    Layout("torchvision", r"conv_proj\.weight", _TORCHVISION, 1e-6),
)


@dataclass
class Converted:
    """A state dict under our names.

    tensors:    our name -> tensor.
    unexpected: source keys that stand for nothing here.
    broken:     sentences on keys that clash or lack their counterparts.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    unexpected: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def strip_wrappers(state: Mapping[str, Tensor], prefix: str | None = None) -> dict[str, Tensor]:
    """The state dict without the prefixes of DDP and torch.compile, in any order and number.

    `prefix`: take only the keys under it, and without it. Raises ValueError if there are none.
    """
    state = dict(state)
    while wrapper := next((w for w in _WRAPPERS if state and _all_start(state, w)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    if prefix is None:
        return state
    chosen = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not chosen:
        raise ValueError(f"prefix: no key starts with {prefix!r}; there are {sample(state)}")
    return chosen


def _all_start(keys: Iterable[str], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)


def detect(keys: Iterable[str]) -> Layout:
    """The layout that the keys are of. Raises ValueError for none, naming those known."""
    keys = list(keys)
    for layout in LAYOUTS:
        if any(re.fullmatch(layout.marker, key) for key in keys):
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(f"no DeiT or ViT by its keys ({sample(keys)}); the layouts known are {known}")


def convert(state: Mapping[str, Tensor]) -> Converted:
    """Give the tensors our names, stacking separate query, key and value projections.

    Raises ValueError for an unknown layout.
    """
    converted = _rename(state, detect(state))
    _place_prefix(converted.tensors)
    return converted


def _place_prefix(tensors: dict[str, Tensor]) -> None:
    """Give DeiT III's prefix tokens positions of zero: it adds none to them.

    The sums are the same bits, and such weights train on as DeiT's do.
    """
    positions = tensors.get("pos_embed")
    if positions is None or positions.dim() != 3 or "cls_token" not in tensors:
        return
    # With the positions of one or two prefix tokens their number is never a square.
    if _is_square(positions.shape[1]):
        prefix = positions.new_zeros(1, 2 if "dist_token" in tensors else 1, positions.shape[2])
        tensors["pos_embed"] = torch.cat([prefix.expand(len(positions), -1, -1), positions], 1)


def _rename(state: Mapping[str, Tensor], layout: Layout) -> Converted:
    rules = [(re.compile(pattern), ours) for pattern, ours in layout.rules]
    result = Converted(layout, {})
    origin: dict[str, str] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        matches = ((pattern.fullmatch(key), ours) for pattern, ours in rules)
        name = next((match.expand(ours) for match, ours in matches if match), None)
        if name is None:
            result.unexpected.append(key)
        elif name in origin:
            result.broken.append(f"{origin[name]} and {key} are the same tensor")
        else:
            origin[name] = key
            if part := _PART.fullmatch(name):
                parts.setdefault(part["name"], {})[int(part["index"])] = tensor
            else:
                result.tensors[name] = tensor
    for name, pieces in parts.items():
        _stack(name, pieces, origin, result)
    return result


def _stack(name: str, pieces: dict[int, Tensor], origin: dict[str, str], result: Converted) -> None:
    keys = [origin[f"{name}@{index}/3"] for index in sorted(pieces)]
    shapes = {tuple(piece.shape[1:]) for piece in pieces.values()}
    if len(pieces) < 3:
        result.broken.append(f"{name} has only {', '.join(keys)} of its query, key and value")
    elif len(shapes) > 1 or any(piece.dim() == 0 for piece in pieces.values()):
        found = (
            f"{key} {list(pieces[i].shape)}" for key, i in zip(keys, sorted(pieces), strict=True)
        )
        result.broken.append(f"shapes that do not stack: {', '.join(found)}")
    else:
        result.tensors[name] = torch.cat([pieces[index] for index in range(3)])


def infer(
    converted: Converted, saved: Config | None = None, where: str = "metadata"
) -> tuple[Config, bool]:
    """The network that converted weights are of, from their shapes, and whether its number of
    heads, which no shape shows, is known.

    `saved`: the configuration kept with them, in `where`, for what shapes do not show. Without it
    the number of heads is that of the published network with this whole shape, and unknown where
    there is none; eps is the layout's, and LayerScale counts as started from DeiT III's 1e-4.
    Nothing here looks at whether every tensor is there and fits. Raises ValueError where the shapes
    are of no square-image transformer, or not those that `saved` says.
    """
    tensors = converted.tensors
    needed = ("patch_embed.proj.weight", "pos_embed", "cls_token")
    for name, dims in zip(needed, (4, 3, 3), strict=True):
        if name not in tensors or tensors[name].dim() != dims or not tensors[name].numel():
            got = list(tensors[name].shape) if name in tensors else "none"
            raise ValueError(f"{name}: expected {dims} dimensions; got {got}")
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    blocks = {int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d{1,9})\.", key))}
    distilled = "dist_token" in tensors
    tokens = tensors["pos_embed"].shape[1] - (2 if distilled else 1)
    side = round(max(tokens, 0) ** 0.5)
    if side * side != tokens or side == 0:
        raise ValueError(f"pos_embed: expected a square grid of patches; got {tokens} patches")
    head = tensors.get("head.weight")
    shape: dict[str, Any] = {
        "embed_dim": width,
        "depth": len(blocks),
        "distilled": distilled,
        "img_size": side * patch,
        "patch_size": patch,
        "in_chans": channels,
        "mlp_ratio": _mlp_ratio(tensors, width),
    }
    if saved is not None:
        wrong = [
            f"{name}: expected {value}, as the weights have; got {getattr(saved, name)}"
            for name, value in shape.items()
            if value != getattr(saved, name)
        ]
        if wrong:
            raise ValueError(f"{where}: " + "; ".join(wrong))
    known = saved or published(width, len(blocks), patch, shape["mlp_ratio"])
    near = (variant for variant in VARIANTS.values() if variant.embed_dim == width)
    base = known or next(near, Config("vit", embed_dim=width, num_heads=1))
    own = replace(
        base,
        **shape,
        num_classes=base.num_classes if head is None or head.dim() != 2 else head.shape[0],
        eps=saved.eps if saved else converted.layout.eps,
        layer_scale=_layer_scale(tensors, saved),
    )
    return own, known is not None


def _mlp_ratio(tensors: Mapping[str, Tensor], width: int) -> int:
    """The hidden layer's width over the blocks'; 4 where there is no layer to ask."""
    weight = tensors.get("blocks.0.mlp.fc1.weight")
    if weight is None or weight.dim() != 2 or not weight.shape[0]:
        return 4
    if weight.shape[0] % width:
        raise ValueError(
            f"blocks.0.mlp.fc1.weight: expected a multiple of {width} rows; got {weight.shape[0]}"
        )
    return weight.shape[0] // width


def _layer_scale(tensors: Mapping[str, Tensor], saved: Config | None) -> float | None:
    if not any(re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", key) for key in tensors):
        return None
    return 1e-4 if saved is None or saved.layer_scale is None else saved.layer_scale


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


def sample(keys: Iterable[str], limit: int = 6) -> str:
    """The first keys and how many more there are, for messages."""
    keys = list(keys)
    shown = ", ".join(keys[:limit]) or "none at all"
    return shown + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def describe(settings: Config) -> str:
    """A network in a few words, for messages: "deit_b⚗↑384 (12 blocks of 768, 1000 classes)"."""
    return (
        f"{settings.label} ({settings.depth} blocks of {settings.embed_dim}, "
        f"{settings.num_classes} classes)"
    )
