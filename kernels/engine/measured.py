"""What is shipped of measurements: what "auto" picks on a device before anything is measured there.

A prior belongs to devices: a processor's vendor, family and instruction sets, or a GPU's
capability. It is a table by operator, given here with its figures, or verdicts as `deit tune
--prior` writes them, a file of the folder priors/. Operators are named here as data.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deit.kernels.engine import json_files
from deit.kernels.engine.device_key import DeviceKey
from deit.kernels.engine.json_files import Fields
from deit.kernels.engine.problems import ShapeClass

FOLDER = Path(__file__).with_name("priors")
SCHEMA = 1


@dataclass(frozen=True)
class Prior:
    """What is shipped for a kind of device.

    operators: operator, or operator_bwd for its training -> implementations, the fastest first;
    where it is left out, PyTorch's was the fastest or none was measured. unmeasured: such names, of
    which it says nothing. in_fp32: entries of `operators` that speak for fp32 alone. file: verdicts
    instead of a table.
    """

    kind: str
    vendor: str = ""
    family: int | None = None
    instruction_sets: tuple[str, ...] = ()
    name: str = ""
    capability: tuple[int, int] | None = None
    operators: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unmeasured: tuple[str, ...] = ()
    in_fp32: tuple[str, ...] = ()
    file: Path | None = None

    @property
    def label(self) -> str:
        """Whom it is for, in words."""
        if self.kind == "cpu":
            sets = f", {' '.join(self.instruction_sets)}" * bool(self.instruction_sets)
            return f"{self.vendor} family {self.family}{sets}"
        return self.name or "compute capability {}.{}".format(*self.capability or (0, 0))

    def suits(self, key: DeviceKey) -> bool:
        """Whether a device is one of those it was measured on, as far as is told of it."""
        if self.kind != key.kind:
            return False
        if self.kind == "cuda":
            return self.capability == key.capability and self.name in ("", key.name)
        sets = set(self.instruction_sets) <= set(key.instruction_sets)
        return (self.vendor, self.family) == (key.vendor, key.family) and sets

    def of(self, shape: ShapeClass) -> tuple[tuple[str, ...], str]:
        """What the table says of a class, and why it says nothing ("" where it speaks)."""
        if self.file is not None:
            return (), "its sizes are not among those shipped"
        entry = _entry(shape.operator, shape.training)
        if shape.operator in self.unmeasured:
            return (), f"{shape.operator} was not measured here"
        if entry in self.unmeasured:
            return (), f"{shape.operator} was not measured in training here"
        if entry in self.in_fp32 and shape.dtype != torch.float32:
            return (), f"{shape.operator} was trained in fp32 alone here"
        return self.of_any(shape.operator, shape.training, shape.dtype), ""

    def of_any(
        self, operator: str, training: bool, dtype: torch.dtype = torch.float32
    ) -> tuple[str, ...]:
        """What the table says of an operator, whatever its sizes and rows."""
        entry = _entry(operator, training)
        if entry in self.in_fp32 and dtype != torch.float32:
            return ()
        return self.operators.get(entry, ())


def _entry(operator: str, training: bool) -> str:
    return f"{operator}_bwd" if training else operator


TABLES = (
    # Speed over PyTorch 2.15 (F.layer_norm; F.scaled_dot_product_attention and its copy of the
    # heads), CPU time of one thread, interleaved, median of 40 to 60, Zen 5 with AVX-512, B = 8,
    # N = 197, D = 192 / 384 / 768. attention: fp32 2.3 / 2.1 / 2.1, bf16 2.5 / 2.4 / 2.3, fp16
    # 5.1 / 4.8 / 4.7. layer_norm: fp32 2.2 / 2.2 / 1.9, bf16 1.6 / 1.8 / 2.0, fp16 2.0 / 1.7 / 2.1.
    # add_layer_norm: fp32 2.1 / 1.9 / 1.6, bf16 1.8 / 2.0 / 2.2, fp16 1.9 / 2.0 / 2.3. At B = 64
    # and D = 768 fp32 LayerNorm is bound by memory: 1.0. linear and gelu_mlp: docs/performance.md;
    # bf16, over PyTorch, N = 197 to 788: qkv 1.0 to 1.2, proj 1.1 to 1.5, MLP 1.06 to 1.13.
    Prior(
        "cpu",
        "AMD",
        26,
        ("AVX512",),
        operators={
            "layer_norm": ("cpu",),
            "add_layer_norm": ("cpu",),
            "attention": ("cpu",),
            "linear": ("cpu",),
            "gelu_mlp": ("cpu",),
            "patch_embed": ("cpu",),
            # Forward and backward against autograd of the same: docs/performance.md, CPU training.
            "add_layer_norm_bwd": ("cpu",),
            "attention_bwd": ("cpu",),
            "gelu_mlp_bwd": ("cpu",),
            "layer_norm_bwd": ("cpu",),
            "linear_bwd": ("cpu",),
            "vit_block": ("cpu",),
            "int8_linear": ("cpu",),
            "int8_gelu_mlp": ("cpu",),
            "int8_vit_block": ("cpu",),
        },
        unmeasured=(
            "rotary_attention",
            "cross_attention",
            "cross_entropy",
            "distillation_loss",
            "patch_embed_bwd",
        ),
        in_fp32=("gelu_mlp_bwd", "linear_bwd"),
    ),
)


def prior(key: DeviceKey) -> Prior | None:
    """What is shipped for a device: verdicts before a table, the most instruction sets first."""
    suited = [each for each in (*_files(), *TABLES) if each.suits(key)]
    return max(suited, key=lambda each: len(each.instruction_sets), default=None)


@functools.cache
def _files() -> tuple[Prior, ...]:
    return tuple(_prior(path) for path in sorted(FOLDER.glob("*.json")))


def _prior(path: Path) -> Prior:
    found = Fields(_document(path)["device"], path.name, "device")
    if found.choice("kind", ("cpu", "cuda")) == "cpu":
        sets = tuple(found.array("instruction_sets", str, "names"))
        family = found.optional("family", found.integer, 0, 1 << 20)
        return Prior("cpu", found.text("vendor"), family, sets, file=path)
    major, minor = found.array("capability", int, "two whole numbers")
    return Prior("cuda", name=found.text("name"), capability=(major, minor), file=path)


@functools.cache
def _document(path: Path) -> dict[str, Any]:
    found = Fields(json_files.read(path), path.name)
    found.choice("schema", (SCHEMA,))
    found.fields("device")
    found.array("verdicts", dict, "verdicts")
    return found.values


def shipped(prior: Prior) -> tuple[list[Any], str]:
    """The verdicts of a prior's file as JSON, and the file's name; none of a table."""
    if prior.file is None:
        return [], ""
    return _document(prior.file)["verdicts"], prior.file.name


def document(key: DeviceKey, verdicts: list[Any]) -> dict[str, Any]:
    """Verdicts of a device, as JSON, as a file of priors/ holds them."""
    if key.kind == "cpu":
        sets = list(key.instruction_sets)
        device: dict[str, Any] = {
            "kind": "cpu", "vendor": key.vendor, "family": key.family, "instruction_sets": sets,
        }  # fmt: skip
    else:
        device = {"kind": key.kind, "name": key.name, "capability": list(key.capability or ())}
    return {"schema": SCHEMA, "device": device, "verdicts": verdicts}


@functools.cache
def warn_unmeasured(key: str, command: str) -> None:
    """Say once a process that "auto" knows nothing of a device."""
    warnings.warn(
        f"deit.kernels: nothing has been measured on {key} yet, so impl='auto' uses PyTorch's "
        f"operators there; {command} measures",
        stacklevel=2,
    )
