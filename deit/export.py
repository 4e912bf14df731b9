"""A trained network for other programs, each file checked against the network.

safetensors   the weights and a model card
torch         torch.export's program (.pt2), of PyTorch's own operators
onnx          plain operators, with the package onnxscript
aoti          AOTInductor's compiled package (.pt2), which calls the fused operators: run it by
              deit.export.load_package, or without Python as examples/cpp does
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deit.data.images import IMAGENET_MEAN, IMAGENET_STD, crop_ratio
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
    options = about.get("options")
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
        size=model.config.img_size,
        short=_short_side(model, about),
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


def to_aoti(
    model: nn.Module, images: Tensor, out: Path, metadata: Mapping[str, str] | None = None
) -> Callable[[Tensor], Tensor]:
    """The fused network compiled by AOTInductor for the images' device; returns the loaded one.

    The package calls the fused operators by name: another program loads it by `load_package`, and
    one in C++ as examples/cpp does. On a GPU it calls the CUDA library's: Triton's are launched by
    Python. It is compiled for this kind of processor or GPU.

    Args:
        model, images: on one device; images [B, C, H, W] fp32, B of at least 2.
        metadata: what the package says of itself beside the network, such as `preparation`'s.

    Raises ValueError where an operator would need Python, or on a GPU without the CUDA library.
    """
    from deit.fused_vit import fuse
    from deit.kernels.engine import native

    if images.is_cuda and (reasons := native.why_not("cuda")):
        raise ValueError(f"images: on a GPU a package calls the CUDA library: {'; '.join(reasons)}")
    fused = copy.deepcopy(model)
    fuse(fused, "cuda" if images.is_cuda else "auto")
    program = _program(fused, images)
    if launched := _launched_by_python(program):
        raise ValueError(f"model: its {', '.join(launched)} would need Python to run")
    about = {"aot_inductor.metadata": dict(metadata or {})}
    torch._inductor.aoti_compile_and_package(program, package_path=str(out), inductor_configs=about)
    return load_package(out)


def preparation(model: DeiT, about: dict[str, Any], classes: Sequence[str]) -> dict[str, str]:
    """How photographs become `model`'s images, and its classes, as a package's metadata says it.

    image_size and short_side are in pixels; mean and std are of the channels in [0, 1], apart by
    spaces; classes a name a line. `about`: of a run, as `networks.opened` gives it. Nothing is said
    of images that are no photographs: of other than three channels.
    """
    if model.config.in_chans != 3:
        return {}
    return {
        "image_size": str(model.config.img_size),
        "short_side": str(_short_side(model, about)),
        "mean": " ".join(map(str, about.get("mean", IMAGENET_MEAN))),
        "std": " ".join(map(str, about.get("std", IMAGENET_STD))),
        "classes": "\n".join(name.replace("\n", " ") for name in classes),
    }


def library_of(device: torch.device) -> Path | None:
    """The library of the operators that a package for `device` calls; None where it is not usable.

    A program without Python loads it, and calls its deit_cpu_define_schemas or
    deit_cuda_define_schemas, before it loads the package.
    """
    from deit.kernels.engine import native

    return None if native.why_not(device.type) else native.FOLDER / native.LIBRARIES[device.type]


def load_package(path: str | Path) -> Callable[[Tensor], Tensor]:
    """A package of `to_aoti`, ready to run, with the library of the operators that it calls.

    Images [B, C, H, W], fp32 on the device that it was compiled for -> logits [B, classes]. Raises
    RuntimeError for a file that is none; where the library is not built here, the first call does.
    """
    from deit.kernels.engine import native

    native.why_not("cpu")  # loads the library, without which the operators' names mean nothing
    if torch.cuda.is_available():
        native.why_not("cuda")
    return torch._inductor.aoti_load_package(str(path))


def _short_side(model: DeiT, about: dict[str, Any]) -> int:
    """Pixels to which the short side of a photograph is resized before the crop."""
    size = model.config.img_size
    return int(size / (networks.crop_of(about) or crop_ratio(size)))


def _launched_by_python(program: torch.export.ExportedProgram) -> list[str]:
    """The operators in a program that no library has a kernel of."""
    from deit.kernels.engine import registry

    called = {str(node.target).removesuffix(".default") for node in program.graph.nodes}
    return sorted(
        f"{space}.{name}"
        for implementation, space in registry.NAMESPACES.items()
        for name in registry.MODULES[implementation]
        if f"{space}.{name}" in called
    )


def _program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=65536)}}
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=batch)


def difference(model: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """The largest difference of logits on `images`, the network's in fp32 on the same device."""
    with torch.no_grad():
        return float((model(images) - exported(images)).abs().max())
