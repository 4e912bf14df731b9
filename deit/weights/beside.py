"""What lies beside weights and says what their shapes do not: heads, epsilon, classes, statistics.

config.json              of Hugging Face (transformers), or of timm as it publishes models there
preprocessor_config.json the statistics of Hugging Face's images
run.json                 of a run here, beside its weights or two folders above a checkpoint's
"""

from __future__ import annotations

import re
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

from deit.configs import SHAPE, VARIANTS, Config, reshaped
from deit.kernels.engine import json_files
from deit.kernels.engine.json_files import Fields

RUN_FILE = "run.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
TIMM = "timm:"
MOST = 1 << 20  # of any width, depth or number of classes that a file may state
LARGEST = 1 << 12  # pixels along a side

# What transformers calls the weights that a config.json is of.
_THEIRS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")


def run_of(weights: Path) -> Path | None:
    """The folder of the run that a weights' file is of; None where it is of none."""
    above = [weights.parent]
    if weights.parent.parent.name == "checkpoints":
        above.append(weights.parent.parent.parent)
    return next((folder for folder in above if (folder / RUN_FILE).is_file()), None)


def config_file(weights: Path) -> Path | None:
    """The config.json beside a file of weights that is named as transformers and timm name them."""
    beside = weights.with_name(CONFIG_FILE)
    return beside if _THEIRS.fullmatch(weights.name) and beside.is_file() else None


# ---- a run of ours


def read_run(folder: Path) -> dict[str, Any]:
    """A run's run.json. Raises ValueError naming the field that is not what a run writes."""
    path = folder / RUN_FILE
    about = json_files.read(path)
    found = Fields(about, str(path))
    network = found.fields("network")
    network.text("arch")
    network.integer("img_size", 1, LARGEST)
    check_about(found)
    return about


def check_about(about: Fields) -> None:
    """Refuses what a run, or a file exported from one, says of its images where it cannot be so."""
    if "classes" in about.values and not about.array("classes", str, "names"):
        raise about.wrong("classes", "one name at least", [])
    for name in ("mean", "std"):
        if name in about.values:
            numbers = about.array(name, (int, float), "three numbers")
            bad = len(numbers) != 3 or not all(abs(n) < 1e6 for n in numbers)
            if bad or (name == "std" and min(numbers) <= 0):
                raise about.wrong(name, "three finite numbers, std's above 0", numbers)
    if "options" in about.values:
        recipe = about.fields("options").fields("recipe")
        recipe.optional("eval_crop", recipe.number, 1e-3, 10.0)


def run_config(about: dict[str, Any], file: Path) -> Config | None:
    """The Config of a run's network; None where run.json does not say it (timm's, or an old run's
    that began with weights of its own shape).

    about: of `read_run`. Raises ValueError for a field that no network has.
    """
    found = Fields(about, str(file))
    network = found.fields("network")
    if "config" in network.values:
        return config_of(network.fields("config"))
    arch = network.text("arch")
    if arch.startswith(TIMM) or "options" not in about:
        return None
    options = found.fields("options")
    if options.optional("weights", options.text) is not None:
        return None
    shape = options.fields("shape", {})
    shape.only(SHAPE)
    given = {name: shape.optional(name, shape.integer, 1, MOST) for name in SHAPE}
    recipe = options.fields("recipe", {})
    settings = reshaped(
        arch,
        img_size=network.integer("img_size", 1, LARGEST),
        num_classes=len(found.array("classes", str, "names")),
        distilled=options.flag("distilled", False),
        shape={name: value for name, value in given.items() if value is not None},
    )
    return replace(settings, layer_scale=recipe.optional("layer_scale", recipe.number, -1e6, 1e6))


def config_of(found: Fields) -> Config:
    """A Config as `dataclasses.asdict` and JSON keep it. Raises ValueError naming the field."""
    found.only([one.name for one in fields_of(Config)])
    values: dict[str, Any] = {
        "name": found.text("name"),
        "embed_dim": found.integer("embed_dim", 1, MOST),
        "num_heads": found.integer("num_heads", 1, MOST),
    }
    optional: dict[str, tuple[Any, ...]] = {
        "depth": (found.integer, 1, MOST),
        "distilled": (found.flag,),
        "img_size": (found.integer, 1, LARGEST),
        "num_classes": (found.integer, 1, 1 << 30),
        "patch_size": (found.integer, 1, LARGEST),
        "in_chans": (found.integer, 1, MOST),
        "mlp_ratio": (found.integer, 1, MOST),
        "eps": (found.number, 0.0, 1.0),
    }
    for name, (kind, *limits) in optional.items():
        if name in found.values:
            values[name] = kind(name, *limits)
    values["layer_scale"] = found.optional("layer_scale", found.number, -1e6, 1e6)
    try:
        return Config(**values)
    except ValueError as error:
        raise ValueError(f"{found.file}: {found.path}{': ' * bool(found.path)}{error}") from None


# ---- Hugging Face and timm


def neighbour(path: Path, layout: str, *, strict: bool) -> tuple[Config | None, int | None]:
    """What a config.json says of weights whose keys are of `layout`: a Config, or heads alone.

    strict: the folder was named, so a config.json of something else is an error; beside a file it
    is passed over. Raises ValueError naming the file and the field that is not our network's.
    """
    found = Fields(json_files.read(path), str(path))
    if layout == "timm" and "architecture" in found.values:
        arguments = found.fields("model_args", {})
        return None, arguments.optional("num_heads", arguments.integer, 1, MOST)
    if layout == "Hugging Face" and (strict or "model_type" in found.values):
        return _hugging_face(found), None
    if strict:
        found.choice("model_type", ("deit", "vit"))
        raise ValueError(f"{path}: of a Hugging Face model, but the keys beside it are {layout}'s")
    return None, None


def _hugging_face(found: Fields) -> Config:
    """The network of a DeiTConfig or ViTConfig, once all it says is what our network computes.

    The defaults are theirs: older files leave them out.
    """
    kind = found.choice("model_type", ("deit", "vit"))
    found.choice("hidden_act", ("gelu",), "gelu")
    found.choice("qkv_bias", (True,), True)
    width = found.integer("hidden_size", 1, MOST, 768)
    heads = found.integer("num_attention_heads", 1, MOST, 12)
    if width % heads:
        raise found.wrong("num_attention_heads", f"a divisor of hidden_size {width}", heads)
    if "head_dim" in found.values:
        found.choice("head_dim", (width // heads, None))
    hidden = found.integer("intermediate_size", 1, MOST, 3072)
    if hidden % width:
        raise found.wrong("intermediate_size", f"a multiple of hidden_size {width}", hidden)
    patch, pixels = _square(found, "patch_size", 16), _square(found, "image_size", 224)
    if pixels % patch:
        raise found.wrong("image_size", f"a multiple of patch_size {patch}", pixels)
    same = (v.name for v in VARIANTS.values() if (v.embed_dim, v.num_heads) == (width, heads))
    return Config(
        next(same, "vit"),
        embed_dim=width,
        num_heads=heads,
        depth=found.integer("num_hidden_layers", 1, MOST, 12),
        distilled=kind == "deit",
        img_size=pixels,
        patch_size=patch,
        in_chans=found.integer("num_channels", 1, MOST, 3),
        mlp_ratio=hidden // width,
        eps=found.number("layer_norm_eps", 0.0, 1.0, 1e-12),
    )


def _square(found: Fields, name: str, default: int) -> int:
    """A side in pixels: 16, or [16, 16]."""
    value = found.values.get(name)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return Fields({name: value[0]}, found.file).integer(name, 1, LARGEST)
    return found.integer(name, 1, LARGEST, default)


def about_images(weights: Path) -> dict[str, Any]:
    """Classes and statistics that lie beside Hugging Face's or timm's weights; {} where none do.

    weights: a folder, or the file in it. Raises ValueError naming a file and its field.
    """
    path = weights / CONFIG_FILE if weights.is_dir() else config_file(weights)
    if path is None or not path.is_file():
        return {}
    config = Fields(json_files.read(path), str(path))
    about: dict[str, Any] = {}
    if "architecture" in config.values:
        trained = config.fields("pretrained_cfg", {})
        about = {name: trained.values[name] for name in ("mean", "std") if name in trained.values}
        check_about(Fields(about, str(path), "pretrained_cfg"))
        if "label_names" in config.values:
            about["classes"] = config.array("label_names", str, "names")
    elif config.values.get("model_type") in ("deit", "vit"):
        about = _classes(config) | _statistics(path.with_name(PREPROCESSOR_FILE))
    return about


def _classes(config: Fields) -> dict[str, Any]:
    labels = config.fields("id2label", {})
    names = [labels.values.get(str(number)) for number in range(len(labels.values))]
    if not names or names == [f"LABEL_{number}" for number in range(len(names))]:
        return {}  # transformers' own names for labels without any
    if not all(isinstance(name, str) for name in names):
        raise config.wrong("id2label", "a name for each number from 0 on", labels.values)
    return {"classes": names}


def _statistics(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = Fields(json_files.read(path), str(path))
    if not found.flag("do_normalize", True):
        return {"mean": [0.0] * 3, "std": [1.0] * 3}
    known = (("mean", "image_mean"), ("std", "image_std"))
    about = {ours: found.values[name] for ours, name in known if name in found.values}
    check_about(Fields(about, str(path)))
    return about
