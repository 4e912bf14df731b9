"""Do the contenders compute the same thing? Nobody is timed before that is answered."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from peers import calibration
from race.contenders import Contender, training_loss

# A contender's error may be twice the eager model's own plus this floor, relative L2 distance
# against a wider dtype. The floors are one rounding of the logits in half precision; in fp32 they
# leave room for convolutions by Winograd's algorithm, whose error is ten times a direct one's.
FLOORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Gradients of two runs at the same dtype, relative L2 distance over all parameters.
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def gradients(contender: Contender, images: Tensor, dtype: torch.dtype) -> Tensor:
    """All parameters' gradients as one vector, on the CPU; the module is left without them."""
    contender.module.zero_grad(set_to_none=True)
    state = copy.deepcopy(contender.module.state_dict())  # batch norm's running statistics move
    training_loss(contender, images, dtype).backward()
    found = [p.grad.flatten().float() for p in contender.module.parameters() if p.grad is not None]
    contender.module.zero_grad(set_to_none=True)
    contender.module.load_state_dict(state)
    return torch.cat(found).cpu()


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative L2 distance, computed in fp64; infinite where `value` is not finite."""
    value, truth = value.double(), truth.double()
    if not bool(value.isfinite().all()):
        return float("inf")
    return float((value - truth).norm() / truth.norm().clamp_min(1e-300))


class WrongOutputs(Exception):
    """A contender that computes something else than the eager model; it is not timed."""


class Oracle:
    """What one network's logits ought to be: the eager model's in a wider dtype.

    fp64 for fp32, fp32 for half precision; on the first and the last image of a batch.
    """

    def __init__(self, base: Contender, images: Tensor) -> None:
        self.dtype = images.dtype
        self.rows = rows = sorted({0, len(images) - 1})
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        module = copy.deepcopy(base.module).to(wide).eval()
        with torch.inference_mode():
            self.truth = module(images[rows].to(wide))
            self.eager_error = distance(base.module(images[rows]), self.truth)
        if not self.eager_error < 0.5:
            kind = str(self.dtype).removeprefix("torch.")
            raise WrongOutputs(
                f"{base.label}: the eager model itself is off by {self.eager_error:.1e} in {kind}"
            )

    def verify(self, contender: Contender, logits: Tensor) -> float:
        """The error of a batch's logits; WrongOutputs where it exceeds what rounding explains."""
        if logits.shape[-1] != self.truth.shape[-1] or len(logits) <= self.rows[-1]:
            raise WrongOutputs(f"{contender.label}: logits have shape {tuple(logits.shape)}")
        error = distance(logits[self.rows], self.truth)
        allowed = 2 * self.eager_error + FLOORS[self.dtype]
        if not error <= allowed:
            raise WrongOutputs(
                f"{contender.label} is refused: its logits are off by {error:.1e} (relative), "
                f"the eager model's by {self.eager_error:.1e}, allowed {allowed:.1e}"
            )
        return error


class Agreement:
    """What a network's logits ought to be in 8 bits: the eager model's, on unseen photographs.

    Rounding to 8 bits is no rounding of the logits, so the rule is about what tells images apart:
    logits less their mean over the images, relative L2 distance. OpenVINO's DeiT-Ti is at 0.03,
    DeiT-Ti with one block's weights exchanged at 0.4 (the last) to 0.9 (the first).
    """

    ALLOWED = 0.2
    IMAGES = 16

    def __init__(self, base: Contender, images: Tensor) -> None:
        """images: a batch as the contenders take it; only its size, dtype and device are used."""
        batch = len(images)
        count = -(-self.IMAGES // batch) * batch
        photographs, _ = calibration.photographs(base.network.img_size, count, seed=1)
        self.batches = photographs.to(images).split(batch)
        with torch.inference_mode():
            self.truth = torch.cat([base.module(images) for images in self.batches])

    def verify(self, contender: Contender, call: Callable[[Tensor], Tensor]) -> float:
        """The distance; WrongOutputs where it is over `ALLOWED`."""
        found = torch.cat([call(images).clone() for images in self.batches])
        if found.shape != self.truth.shape:
            raise WrongOutputs(f"{contender.label}: logits have shape {tuple(found.shape)}")
        error = distance(found - found.mean(0), self.truth - self.truth.mean(0))
        same = int((found.argmax(-1) == self.truth.argmax(-1)).sum())
        agree = f"top-1 equal on {same} of {len(found)} photographs"
        if not error <= self.ALLOWED:
            raise WrongOutputs(
                f"{contender.label} is refused: what tells images apart in its logits is off by "
                f"{error:.1e} (relative), allowed {self.ALLOWED:.1e}; {agree}"
            )
        contender.about = f"{contender.about}; {agree}"
        return error


def verify_gradients(
    contender: Contender, base: Contender, images: Tensor, dtype: torch.dtype
) -> float:
    """The distance of two contenders' gradients; WrongOutputs beyond the dtype's tolerance."""
    expected = gradients(base, images, dtype)
    found = gradients(contender, images, dtype)
    if found.shape != expected.shape:
        raise WrongOutputs(f"{contender.label} is refused: some parameters got no gradient")
    error = distance(found, expected)
    allowed = GRADIENT_TOLERANCE[dtype]
    if not error <= allowed:
        raise WrongOutputs(
            f"{contender.label} is refused: its gradients are off by {error:.1e} (relative) "
            f"from the eager model's, allowed {allowed:.1e}"
        )
    return error
