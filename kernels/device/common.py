"""What the Triton operators share: launches, views of rows, descriptors, device functions."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deit.kernels.device import chips, interpreter, launching

interpreter.mend()

T = TypeVar("T")

# The interpreter stands for a Hopper GPU, so that it runs the descriptor forms, and has few
# "multiprocessors", so that its persistent programs meet several tiles each.
_INTERPRETED_ARCH, _INTERPRETED_SMS = 90, 3


@dataclass(frozen=True)
class Launch:
    """One kernel and everything it is launched with; `aot` compiles it, a launcher runs it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    # Multiply-adds may contract: PyTorch's own kernels are compiled so too.
    options: dict[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": True})

    def run(self, like: Tensor) -> None:
        """Launch on the GPU (or in the interpreter) that holds `like`."""
        with device_guard(like):
            launching.started(self, lambda: self._call(self.kernel[self.grid]))

    def compile(self) -> Any:
        """Compile for the active driver's target without running."""
        return self._call(functools.partial(self.kernel.warmup, grid=self.grid))

    def _call(self, kernel: Callable[..., Any]) -> Any:
        return kernel(
            **self.arguments,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **self.options,
        )


def written(planned: tuple[T, Launch | Sequence[Launch | None] | None], like: Tensor) -> T:
    """What a plan is to write, once its launches have run, in order, on the device of `like`."""
    outputs, launches = planned
    for launch in launches if isinstance(launches, Sequence) else (launches,):
        if launch is not None:
            launch.run(like)
    return outputs


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one: launches go to the current device's stream."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def architecture(tensor: Tensor) -> int:
    """The configuration family (80, 89, 90, 100, 120) of the device that holds `tensor`."""
    return _architecture(tensor.device.index) if tensor.is_cuda else _INTERPRETED_ARCH


@functools.cache
def _architecture(index: int | None) -> int:
    return chips.family(*torch.cuda.get_device_capability(index))


def multiprocessors(tensor: Tensor) -> int:
    """How many programs fill the device once; the size of a persistent grid."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else _INTERPRETED_SMS


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def last_contiguous(tensor: Tensor) -> Tensor:
    """`tensor`, copied only where its last axis is not contiguous."""
    if tensor.shape[-1] == 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def as_rows(*tensors: Tensor | None) -> list[Any]:
    """[..., D] tensors with the same leading axes as views [outer, inner, D], D contiguous.

    Where every tensor is one evenly spaced list of rows, inner is 1 (and the kernels' division
    by it vanishes); else inner is the last leading axis. A tensor is copied only where its last
    axis is not contiguous, or where three or more of its leading axes do not merge.
    """
    views: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is not None:
            inner = tensor.shape[-2] if tensor.dim() > 1 else 1
            outer = math.prod(tensor.shape[:-2])
            tensor = last_contiguous(tensor).reshape(outer, inner, tensor.shape[-1])
        views.append(tensor)
    if all(v is None or evenly_spaced(v) for v in views):
        return [None if v is None else v.view(-1, 1, v.shape[-1]) for v in views]
    return views


def evenly_spaced(view: Tensor) -> bool:
    """Whether an [outer, inner, D] view is one list of rows at equal distances."""
    outer, inner, _ = view.shape
    return outer == 1 or inner == 1 or view.stride(0) == inner * view.stride(1)


def row_strides(view: Tensor | None) -> tuple[int, int]:
    """(outer, inner) strides of what `as_rows` returned; (0, 0) for None."""
    return (0, 0) if view is None else (view.stride(0), view.stride(1))


def row_arguments(view: Tensor) -> dict[str, Any]:
    """The arguments of a kernel that reads the rows x of what `as_rows` returned."""
    outer, inner, dim = view.shape
    x_outer, x_inner = row_strides(view)
    return {
        "x": view,
        "rows": outer * inner,
        "dim": dim,
        "inner": inner,
        "x_outer": x_outer,
        "x_inner": x_inner,
    }


def rows_per_sample(tensor: Tensor) -> int:
    """How many rows of the last axis one entry of the first axis holds."""
    return math.prod(tensor.shape[1:-1])


def contiguous(**parameters: Tensor | None) -> dict[str, Tensor | None]:
    """Vectors as kernels read them; None stays None."""
    return {name: None if p is None else p.contiguous() for name, p in parameters.items()}


def epilogue_arguments(
    x: Tensor, residual_view: Tensor | None, gamma: Tensor | None, keep: Tensor | None
) -> dict[str, Any]:
    """The arguments that `add_residual` and its callers need; residual from `as_rows`."""
    outer, inner = row_strides(residual_view)
    return contiguous(gamma=gamma, keep=keep) | {
        "residual": residual_view,
        "residual_outer": outer,
        "residual_inner": inner,
        "rows_per_sample": rows_per_sample(x),
    }


def describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can be made: 16-byte address and strides, nothing empty."""
    if tensor.numel() == 0 or tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
        return False
    return all(s > 0 and s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:-1])


def descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    """Reads outside the tensor give zero, writes outside it vanish."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: fp32 products are IEEE, never tf32; half ones ignore it."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Offset of each row of an [outer, inner, D] view; 64 bits, row numbers fit 32."""
    outer = rows // inner
    return outer.to(tl.int64) * stride_outer + (rows - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def gelu(x):
    """x * Phi(x), exact (arXiv 1606.08415)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """The tanh approximation, as x * sigmoid(2u): tanh(u) = 2 * sigmoid(2u) - 1."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _tail(x):
    """min(|x|, 5), exp(-x^2 / 2), and their Mills ratio R: Phi(-|x|) = exp(-x^2 / 2) * R(|x|).

    R is a polynomial of degree 8, fitted here for the least relative error on [0, 5]: 1.2e-4, a
    quarter of half an ulp in fp16. One exponential and 8 multiply-adds; erf is 32 instructions.
    """
    a = tl.minimum(tl.abs(x), 5.0)
    root = 0.8493218002880191 * x  # sqrt(log2(e) / 2)
    ratio = 5.790430350316456e-06 * a - 0.0001453153818147257
    ratio = ratio * a + 0.0015831056516617537
    ratio = ratio * a - 0.009921562857925892
    ratio = ratio * a + 0.04025886952877045
    ratio = ratio * a - 0.11416839063167572
    ratio = ratio * a + 0.24129194021224976
    ratio = ratio * a - 0.3972645103931427
    ratio = ratio * a + 0.4999416470527649
    return a, tl.math.exp2(-(root * root)), ratio


@triton.jit
def gelu_into(out, x, TMA: tl.constexpr):
    """gelu(x) to be rounded to the dtype of `out`, a descriptor or pointers; shorter if not fp32.

    As x - |x| Phi(-|x|) or -|x| Phi(-|x|) nothing cancels, where 1 + erf loses the negative
    side: at x = -4 half of fp16's digits.
    """
    if (out.dtype if TMA else out.dtype.element_ty) == tl.float32:
        y = gelu(x)
    else:
        a, density, ratio = _tail(x)
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * density * ratio
    return y


@triton.jit
def gelu_and_slope(out, x, TMA: tl.constexpr):
    """gelu(x) and its derivative, Phi(x) + x * phi(x), to be rounded to the dtype of `out`."""
    if (out.dtype if TMA else out.dtype.element_ty) == tl.float32:
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = tl.exp(-0.5 * x * x)
    else:
        _, density, ratio = _tail(x)
        below = density * ratio
        below = tl.where(x > 0, 1.0 - below, below)
    return x * below, below + x * (0.3989422804014327 * density)


@triton.jit
def gelu_tanh_and_slope(x):
    """x * s(v), v = 2u, and its derivative s + x * s * (1 - s) * v'.

    s and s * (1 - s) are made of exp(-|v|), which cannot overflow; 1 - s would cancel.
    """
    v = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    small = tl.exp(-tl.abs(v))
    r = 1.0 / (1.0 + small)
    s = tl.where(v >= 0, r, small * r)
    return x * s, s + x * small * r * r * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def times_sigmoid_and_slope(x, FACTOR: tl.constexpr):
    """x * s(FACTOR * x) and its derivative: SiLU, and QuickGELU with 1.702.

    s is PyTorch's, and so is what 1 - s cancels. Made of exp(-|v|), as in `gelu_tanh_and_slope`,
    they spill 8 to 16 bytes on sm_100 and sm_120.
    """
    v = FACTOR * x
    s = tl.sigmoid(v)
    return x * s, s + v * s * (1.0 - s)


@triton.jit
def activate(out, x, ACTIVATION: tl.constexpr, TMA: tl.constexpr):
    """`linear`'s activation of x, to be rounded to the dtype of `out`, as for `gelu_into`."""
    if ACTIVATION == "gelu":
        x = gelu_into(out, x, TMA)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def activate_and_slope(out, x, ACTIVATION: tl.constexpr, TMA: tl.constexpr):
    """`activate`, and its derivative; 1 where there is no activation."""
    value, slope = x, 1.0
    if ACTIVATION == "gelu":
        value, slope = gelu_and_slope(out, x, TMA)
    elif ACTIVATION == "gelu_tanh":
        value, slope = gelu_tanh_and_slope(x)
    elif ACTIVATION == "quick_gelu":
        value, slope = times_sigmoid_and_slope(x, 1.702)
    elif ACTIVATION == "silu":
        value, slope = times_sigmoid_and_slope(x, 1.0)
    return value, slope


@triton.jit
def tile_origin(
    tile, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """First row and column of a tile: down GROUP tiles of rows, then to the next column."""
    m_tiles, n_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    first_m = tile // (GROUP * n_tiles) * GROUP
    group_m = tl.minimum(m_tiles - first_m, GROUP)
    within = tile % (GROUP * n_tiles)
    return (first_m + within % group_m) * BLOCK_M, within // group_m * BLOCK_N


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
    """The tile's columns as one, two or four tiles, left to right."""
    parts = (tile,)
    if PARTS > 1:
        halves = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2)
        left, right = halves.permute(0, 2, 1).split()
        parts = column_parts(left, PARTS // 2) + column_parts(right, PARTS // 2)
    return parts


@triton.jit
def store_tile(out, tile, m0, n0, rows, width, TMA: tl.constexpr):
    """Write the tile at row m0, column n0 of a contiguous [rows, width] matrix; what is stored."""
    if TMA:
        stored = tile.to(out.dtype)
        out.store([m0, n0], stored)
    else:
        row = m0 + tl.arange(0, tile.shape[0])
        col = n0 + tl.arange(0, tile.shape[1])
        at = row.to(tl.int64)[:, None] * width + col[None, :]
        mask = (row < rows)[:, None] & (col < width)[None, :]
        stored = tile.to(out.dtype.element_ty)
        tl.store(out + at, stored, mask=mask)
    return stored


@triton.jit
def add_residual(y, residual, gamma, keep, rows, cols, row_mask, col_mask, rows_per_sample):
    """residual + keep * gamma * y in fp32, for the tile y of these rows and columns.

    residual: a tile of pointers; gamma [D] and keep [B]: pointers; each may be None.
    """
    if gamma is not None:
        y = y * tl.load(gamma + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if keep is not None:
        factor = tl.load(keep + rows // rows_per_sample, mask=row_mask, other=0.0)
        y = y * factor.to(tl.float32)[:, None]
    if residual is not None:
        mask = row_mask[:, None] & col_mask[None, :]
        y = y + tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    return y
