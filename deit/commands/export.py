"""`deit export`: a trained network for other programs, compared with the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deit.commands import flags


@dataclass(frozen=True)
class Export:
    """Write a trained network for other programs, and compare the file with the network."""

    weights: flags.Positional[Path]
    """A run's folder, or a DeiT's weights."""
    out: Path
    """The file: .safetensors, .pt2 or .onnx."""
    format: Literal["safetensors", "torch", "onnx", "aoti"] = "safetensors"
    """safetensors with a model card, torch.export, ONNX, or AOTInductor with fused operators."""
    device: str = "cpu"
    """What aoti compiles for: the CPU, or a torch device that is a GPU of the kind to run on."""

    def run(self) -> int:
        """Write the file, compare it with the network, say how far they differ; returns 0.

        Raises ValueError where they differ by more than TOLERANCE, and for a device not served.
        """
        import torch

        from deit import devices
        from deit.export import (
            TOLERANCE,
            difference,
            library_of,
            preparation,
            to_aoti,
            to_onnx,
            to_program,
            to_safetensors,
        )
        from deit.predict import class_names
        from deit.weights import checkpoint, networks

        device = devices.named(self.device)
        served = ("cpu", "cuda") if self.format == "aoti" else ("cpu",)
        if device.type not in served:
            expected = " or ".join(served)
            raise ValueError(f"device: expected {expected} for {self.format}; got {device}")
        model, about = networks.opened_deit(self.weights)
        model.to(device)
        size = model.config.img_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(3, model.config.in_chans, size, size, generator=generator).to(device)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        exported: Any
        if self.format == "safetensors":
            to_safetensors(model, about, self.out)
            exported = checkpoint.load(self.out)
        elif self.format == "aoti":
            names = about.get("classes") or class_names(model.config.num_classes)
            exported = to_aoti(model, images[:2], self.out, preparation(model, about, names))
        else:
            write = to_program if self.format == "torch" else to_onnx
            exported = write(model, images[:2], self.out)
        if exported is None:
            print(f"{self.out} is written; not compared: ONNX Runtime is not installed")
            return 0
        apart = difference(model, exported, images)
        if not apart <= TOLERANCE:
            raise ValueError(
                f"out: {self.out} differs from the network by {apart:.2g} in its logits"
            )
        print(f"{self.out} is written; its logits differ by {apart:.2g} at most")
        if self.format == "aoti" and (library := library_of(device)):
            print(f"its operators are in {library}; examples/cpp runs them without Python")
        return 0
