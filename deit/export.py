"""A trained network for other programs, each file checked against the network.

safetensors   the weights and a model card
torch         torch.export's program (.pt2), of PyTorch's own operators
onnx          plain operators, with the package onnxscript
aoti          AOTInductor's compiled package (.pt2), which calls the fused operators: run it by
              deit.export.load_package
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deit.data.images import crop_ratio
from deit.model import DeiT
from deit.weights import checkpoint, networks

# Logits of unit scale: fp32 rounding through twelve blocks stays below 1e-5.
TOLERANCE = 1e-4

_CARD = """\
---
library_name: fused-deit
pipeline_tag: image-classification
---
# {title}

{parameters:,} parameters, {size} x {size} pixels, {classes} classes.

Input: RGB in [0, 1], resized bicubically to a short side of {short} pixels, centre crop of {size},
then (x - mean) / std with mean {mean} and std {std}.

{training}
Classes: {names}.

Load it with `deit.load("{file}")`, or name it to `deit predict --weights` and `deit eval`, which
prepare images in this way.
"""


def to_safetensors(model: DeiT, about: dict[str, Any], out: Path) -> None:
    """Weights with their Config and what is known of their images, and a model card (README.md).

    Raises ValueError where a README.md that is no card of ours would be overwritten.
    """
    readme = out.with_name("README.md")
    begins = _CARD.partition("\n#")[0]
    if readme.exists() and not readme.read_text(encoding="utf-8", errors="replace").startswith(
        begins
    ):
        raise ValueError(
            f"out: the model card would overwrite {readme}, which is none; name a folder for it"
        )
    known: dict[str, Any] = {
        name: about[name] for name in ("classes", "mean", "std") if name in about
    }
    size, options = model.config.img_size, about.get("options")
    if options:
        known["options"] = {name: options[name] for name in ("data", "recipe")}
    checkpoint.save(model, out, known)
    training = ""
    if options:
        lines = ", ".join(f"{name} {value}" for name, value in options["recipe"].items())
        training = f"Trained on {options['data']} by the recipe: {lines}.\n"
    card = _CARD.format(
        title=model.config.label,
        parameters=networks.parameters(model),
        size=size,
        short=int(size / (networks.crop_of(about) or crop_ratio(size))),
        classes=model.config.num_classes,
        mean=about.get("mean", "ImageNet's"),
        std=about.get("std", "ImageNet's"),
        training=training,
        names=", ".join(about.get("classes", ())) or "ImageNet's, if a thousand; else not known",
        file=out.name,
    )
    readme.write_text(card, encoding="utf-8", errors="backslashreplace")  # classes may be any bytes


def to_program(model: nn.Module, images: Tensor, out: Path) -> Callable[[Tensor], Tensor]:
    """torch.export's program for any batch size; returns the loaded one."""
    torch.export.save(_program(model, images), out)
    return torch.export.load(out).module()


def to_onnx(model: nn.Module, images: Tensor, out: Path) -> Callable[[Tensor], Tensor] | None:
    """An ONNX model for any batch size; returns it in ONNX Runtime, None where that is missing.

    Raises ValueError where the package onnxscript is missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError(
            "format: onnx needs the package onnxscript (pip install onnxscript)"
        ) from None
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    batch = {"images": {0: torch.export.Dim("batch")}}
    torch.onnx.export(model, (images,), out, dynamo=True, dynamic_shapes=batch, **names)
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def to_aoti(model: nn.Module, images: Tensor, out: Path) -> Callable[[Tensor], Tensor]:
    """The fused network compiled by AOTInductor for this kind of processor; returns the loaded one.

    The package calls the fused operators by name: another program loads it by `load_package`.
    """
    from deit.fused_vit import fuse

    fused = copy.deepcopy(model)
    fuse(fused)
    program = _program(fused, images)
    torch._inductor.aoti_compile_and_package(program, package_path=str(out))
    return load_package(out)


def load_package(path: str | Path) -> Callable[[Tensor], Tensor]:
    """A package of `to_aoti`, ready to run, with the library of the operators that it calls.

    Images [B, C, H, W], fp32 on the CPU -> logits [B, classes]. Raises RuntimeError for a file
    that is none; where the C++ library is not built here, the first call does.
    """
    from deit.kernels.engine import native

    native.why_not("cpu")  # loads the library, without which the operators' names mean nothing
    return torch._inductor.aoti_load_package(str(path))


def _program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=65536)}}
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=batch)


def difference(model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The largest difference of logits on `images`, the network's in fp32 on the same device."""
    with torch.no_grad():
        return float((model(images) - exported(images)).abs().max())
