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

    def run(self) -> int:
        """Write the file, compare it with the network, say how far they differ; returns 0.

        Raises ValueError where they differ by more than TOLERANCE.
        """
        import torch

        from deit.export import (
            TOLERANCE,
            difference,
            to_aoti,
            to_onnx,
            to_program,
            to_safetensors,
        )
        from deit.weights import checkpoint, networks

        model, about = networks.opened_deit(self.weights)
        size = model.config.img_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(3, model.config.in_chans, size, size, generator=generator)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        exported: Any
        if self.format == "safetensors":
            to_safetensors(model, about, self.out)
            exported = checkpoint.load(self.out)
        else:
            write = {"torch": to_program, "onnx": to_onnx, "aoti": to_aoti}[self.format]
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
        return 0
