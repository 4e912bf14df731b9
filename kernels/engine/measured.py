"""The log of measurements: what "auto" may pick, and for which calls its figures speak.

Operators are named here as data: this is what was measured, where, and how fast it was.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from deit.kernels.engine.tracing import constant_when_traced

# Device -> operator -> implementations, the fastest measured one first. A device is "cpu" or a
# CUDA architecture ("sm_90"). An architecture is entered here with its evidence, a row under
# bench/results/ from that GPU: until then "auto" uses the reference there and says so.
MEASURED: dict[str, dict[str, tuple[str, ...]]] = {
    # Speed over PyTorch 2.15 (F.layer_norm; F.scaled_dot_product_attention and its copy of the
    # heads), CPU time of one thread, interleaved, median of 40 to 60, Zen 5 with AVX-512, B = 8,
    # N = 197, D = 192 / 384 / 768. attention: fp32 2.3 / 2.1 / 2.1, bf16 2.5 / 2.4 / 2.3, fp16
    # 5.1 / 4.8 / 4.7. layer_norm: fp32 2.2 / 2.2 / 1.9, bf16 1.6 / 1.8 / 2.0, fp16 2.0 / 1.7 / 2.1.
    # add_layer_norm: fp32 2.1 / 1.9 / 1.6, bf16 1.8 / 2.0 / 2.2, fp16 1.9 / 2.0 / 2.3. At B = 64
    # and D = 768 fp32 LayerNorm is bound by memory: 1.0. linear and gelu_mlp: docs/performance.md;
    # bf16, over PyTorch, N = 197 to 788: qkv 1.0 to 1.2, proj 1.1 to 1.5, MLP 1.06 to 1.13.
    # rotary_attention on a Zen 4, beside other work, 6 heads of 64, N = 201: fp32 2.7 (B = 8), with
    # its gradient (B = 4, medians of 12) fp32 2.4, bf16 2.1.
    "cpu": {
        "layer_norm": ("cpu",),
        "add_layer_norm": ("cpu",),
        "attention": ("cpu",),
        "rotary_attention": ("cpu",),
        "linear": ("cpu",),
        "gelu_mlp": ("cpu",),
        "patch_embed": ("cpu",),
        # Forward and backward against autograd of the same: docs/performance.md, CPU training.
        "add_layer_norm_bwd": ("cpu",),
        "attention_bwd": ("cpu",),
        "rotary_attention_bwd": ("cpu",),
        "gelu_mlp_bwd": ("cpu",),
        "layer_norm_bwd": ("cpu",),
        "linear_bwd": ("cpu",),
        "vit_block": ("cpu",),
        "int8_linear": ("cpu",),
        "int8_gelu_mlp": ("cpu",),
        "int8_vit_block": ("cpu",),
    },
    # An H100, torch 2.11, bf16, 256 images of 197 tokens, D = 192 / 384 / 768, inputs rotated past
    # L2, CUDA graphs. The products were held to fp64 at up to 50,432 rows and repeated bit for bit.
    # The norms were held to it at up to 1,154 rows and not repeated. gelu_mlp at D = 384 was timed
    # with an earlier epilogue: 302 to PyTorch's 351. Microseconds, PyTorch's and these kernels':
    #   layer_norm           66 / 77 / 105 and 21 / 37 / 61
    #   add_layer_norm       87 / 117 / 182 and 33 / 62 / 112
    #   gelu_mlp at D = 768  fc1 566 and 476, fc2 with its residual 376 and 340
    #   gelu_mlp at D = 192  fc1 100 and 69, fc2 with its residual 59 and 49
    # attention is not here, because cuDNN's is faster (163 to our 174). Nor is linear, because
    # without an epilogue cuBLAS's is faster (272 to 314).
    "sm_90": {
        "layer_norm": ("cuda",),
        "add_layer_norm": ("cuda",),
        "gelu_mlp": ("cuda",),
    },
}


@dataclass(frozen=True)
class Scope:
    """The calls that an architecture's measurements speak for: x of these dtypes and widths, and
    of at least so many rows. Others get the reference."""

    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...]
    rows: int

    def excludes(self, x: Tensor) -> str:
        """Why x is not among them; "" where it is."""
        width = x.shape[-1]
        if x.dtype not in self.dtypes:
            return f"dtype {x.dtype} was not measured here"
        if width not in self.widths:
            return f"a width of {width} was not measured here"
        if x.numel() < self.rows * width:
            return f"fewer than {self.rows} rows were not measured here"
        return ""


# Architecture -> the scope of what MEASURED says of it; without one, any call. 50,432 rows lie
# between 32,768 and the next power of two.
SCOPES = {"sm_90": Scope((torch.bfloat16,), (192, 384, 768), 32768)}


@constant_when_traced
def implementations(operator: str, device_type: str, index: int | None) -> tuple[str, ...]:
    """The implementations "auto" tries on a device, the fastest first; warns on an unproven GPU."""
    if device_type != "cuda":
        return MEASURED.get(device_type, {}).get(operator, ())
    architecture = _architecture(index)
    if architecture not in MEASURED:
        _warn_unproven(architecture)
        return ()
    return MEASURED[architecture].get(operator, ())


@constant_when_traced
def scope(index: int | None) -> Scope | None:
    """The calls that the figures of a CUDA device speak for; None: any."""
    return SCOPES.get(_architecture(index))


def _architecture(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.cache
def _warn_unproven(architecture: str) -> None:
    warnings.warn(
        f"deit.kernels: no kernel has been run and checked on {architecture} yet, so impl='auto' "
        "uses PyTorch there; impl='triton' runs the unproven kernels",
        stacklevel=2,
    )
