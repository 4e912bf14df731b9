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
class Scope:
    """The calls that a table speaks for: of these dtypes and widths of the first argument, and of
    at least 2**rows rows."""

    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...]
    rows: int

    def excludes(self, shape: ShapeClass, *, open_rows: bool = False) -> str:
        """Why a class is not among them; "" where it is. The first of `sizes` is the width."""
        width = shape.sizes[0] if shape.sizes else None
        if shape.dtype not in self.dtypes:
            return f"dtype {shape.dtype} was not measured here"
        if width not in self.widths:
            return f"a width of {width} was not measured here"
        if not open_rows and shape.rows < self.rows:
            return f"fewer than {2**self.rows} rows were not measured here"
        return ""


@dataclass(frozen=True)
class Prior:
    """What is shipped for a kind of device.

    operators: operator, or operator_bwd for its training -> implementations, the fastest first;
    where it is left out, PyTorch's was the fastest or none was measured. scope: the calls that the
    table speaks for; None: any. unmeasured: operators of which it says nothing. file: verdicts
    instead of a table.
    """

    kind: str
    vendor: str = ""
    family: int | None = None
    instruction_sets: tuple[str, ...] = ()
    name: str = ""
    capability: tuple[int, int] | None = None
    operators: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scope: Scope | None = None
    unmeasured: tuple[str, ...] = ()
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

    def of(self, shape: ShapeClass, *, open_rows: bool = False) -> tuple[tuple[str, ...], str]:
        """What the table says of a class, and why it says nothing ("" where it speaks)."""
        if self.file is not None:
            return (), "its sizes are not among those shipped"
        why_not = self.scope.excludes(shape, open_rows=open_rows) if self.scope else ""
        if shape.operator in self.unmeasured:
            why_not = f"{shape.operator} was not measured here"
        if why_not:
            return (), why_not
        return self._named(shape.operator, shape.training), ""

    def whatever(self, operator: str, training: bool) -> tuple[str, ...] | None:
        """What the table says of any sizes and rows; None where these decide."""
        named = self._named(operator, training)
        return named if self.scope is None or not named else None

    def any_of(self, operator: str) -> tuple[str, ...]:
        """What the table says of inference within its scope."""
        return self._named(operator, training=False)

    def _named(self, operator: str, training: bool) -> tuple[str, ...]:
        return self.operators.get(f"{operator}_bwd" if training else operator, ())


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
        unmeasured=("rotary_attention", "cross_entropy", "distillation_loss"),
    ),
    # An H100, torch 2.11, bf16, 256 images of 197 tokens, D = 192 / 384 / 768, inputs rotated past
    # L2, CUDA graphs. The products were held to fp64 at up to 50,432 rows and repeated bit for bit.
    # The norms were held to it at up to 1,154 rows and not repeated. gelu_mlp at D = 384 was timed
    # with an earlier epilogue: 302 to PyTorch's 351. Microseconds, PyTorch's and these kernels':
    #   layer_norm           66 / 77 / 105 and 21 / 37 / 61
    #   add_layer_norm       87 / 117 / 182 and 33 / 62 / 112
    #   gelu_mlp at D = 768  fc1 566 and 476, fc2 with its residual 376 and 340
    #   gelu_mlp at D = 192  fc1 100 and 69, fc2 with its residual 59 and 49
    # attention is not here, because cuDNN's is faster (163 to our 174). Nor is linear, because
    # without an epilogue cuBLAS's is faster (272 to 314). 50,432 rows lie between 2**15 and 2**16.
    Prior(
        "cuda",
        capability=(9, 0),
        operators={
            "layer_norm": ("cuda",),
            "add_layer_norm": ("cuda",),
            "gelu_mlp": ("cuda",),
        },
        scope=Scope((torch.bfloat16,), (192, 384, 768), 15),
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
