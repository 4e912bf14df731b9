"""Teachers, and what a student minimises: section 4 of arXiv 2012.12877."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deit.kernels import cross_entropy, distillation_loss
from deit.training.options import Distillation


class Objective:
    """The loss of a batch, from the student's outputs and the teacher's logits."""

    def __init__(
        self,
        distillation: Distillation,
        *,
        label_smoothing: float = 0.0,
        loss: str = "ce",
        impl: str = "auto",
    ) -> None:
        """`impl`: of the losses' operators, as those take it."""
        if loss == "bce" and distillation.kind != "none":
            raise ValueError("loss: distillation is defined for ce; got 'bce'")
        self.distillation, self.smoothing, self.loss = distillation, label_smoothing, loss
        self.impl = impl

    def __call__(
        self, outputs: Tensor | tuple[Tensor, Tensor], target: Tensor, teacher: Tensor | None
    ) -> Tensor:
        """A scalar, fp32.

        Args:
            outputs: logits [B, C], or (class, distillation) of a distilled student.
            target: [B] labels or [B, C] probabilities.
            teacher: its logits [B, C]; None without distillation.
        """
        logits, token = outputs if isinstance(outputs, tuple) else (outputs, None)
        if teacher is None:
            loss = self._labels(logits, target)
            # Both heads learn the labels without a teacher: the second would learn nothing else.
            return loss if token is None else (loss + self._labels(token, target)) / 2
        how = self.distillation
        return distillation_loss(
            logits,
            target,
            teacher,
            distillation_logits=token,
            kind=how.kind,
            alpha=how.alpha,
            temperature=how.temperature,
            label_smoothing=self.smoothing,
            kl_reduction=how.kl_reduction,
            impl=self.impl,
        )

    def _labels(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.loss == "ce":
            return cross_entropy(logits, target, label_smoothing=self.smoothing, impl=self.impl)
        if not target.is_floating_point():
            target = nn.functional.one_hot(target, logits.shape[-1]).float()
        classes = logits.shape[-1]
        target = target.float() * (1.0 - self.smoothing) + self.smoothing / classes
        # Summed over classes, averaged over the batch: the scale of cross-entropy.
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), target, reduction="sum"
        )
        return loss / len(logits)


class Teacher(nn.Module):
    """A trained network that labels the student's own augmented images, without gradients.

    Its images are normalised anew where its channel statistics are not the student's. On a GPU it
    runs in bf16 or fp16 with the student; convolutions get channels_last.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        student_mean: tuple[float, ...],
        student_std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        # ((x * s + m) - mean) / std, with s, m the student's, as one product and sum a channel.
        theirs, ours = torch.tensor([mean, std]), torch.tensor([student_mean, student_std])
        scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
        self.same = tuple(mean) == tuple(student_mean) and tuple(std) == tuple(student_std)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)
        self.convolves = any(
            isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in model.modules()
        )
        if self.convolves:
            self.model = self.model.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Teacher:  # a teacher never trains
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], normalised for the student -> logits [B, C]."""
        scale: Any = self.scale
        shift: Any = self.shift
        if not self.same:
            images = torch.addcmul(shift.to(images.dtype), images, scale.to(images.dtype))
        if self.convolves:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)


def statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """A timm model's own channel mean and deviation; None for a model that names none."""
    settings = getattr(model, "pretrained_cfg", None)
    if not settings or "mean" not in settings:
        return None
    return tuple(settings["mean"]), tuple(settings["std"])


def check_classes(model: nn.Module, images: Tensor, classes: int) -> None:
    """Raise ValueError unless `model` gives [B, classes] logits for images [B, 3, H, W]."""
    with torch.no_grad():
        out = model(images)
    if not isinstance(out, Tensor) or out.shape != (len(images), classes):
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"teacher: expected logits of shape {(len(images), classes)}, one for each class of "
            f"the data; got {shape}"
        )
