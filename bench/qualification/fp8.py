"""The products in e4m3 on a GPU: their rounding to the bit, their results beside the reference's.

The rule against fp64, which every other operator must meet, cannot apply to these. The row says how
far off fp64 they are (`sqnr_db`). They are held to the reference, within the bounds below.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

import deit.kernels.fp8
import numerics
from deit.kernels.fp8.quantize import GROUP, quantize
from deit.kernels.prove import calls
from qualification.context import Context

# Relative L2 distance from the reference. linear: an H100 adds each 128 products with some 14
# bits. gelu_mlp: a hidden value that is an ulp off may round to the next of e4m3, 6 to 12 % away;
# 8 bits themselves are off by 4 to 5 %.
ALLOWED = {"linear": 2e-3, "gelu_mlp": 1e-2}
DTYPES = ("bf16", "fp16", "fp32")
SHAPES = ((3, 197, 768), (2, 577, 192), (1, 198, 384), (3, 1, 1024), (0, 197, 192))


def fp8(context: Context) -> None:
    """A row a dtype, operator, shape and family of inputs; the quantiser first."""
    reasons = deit.kernels.fp8.why_not(context.device)
    if reasons:
        context.note(f"fp8: not run, {'; '.join(reasons)}")
        return
    dtypes, shapes = (("fp32",), ((1, 5, 192),)) if context.dry else (DTYPES, SHAPES)
    for dtype in dtypes:
        context.attempt(f"rounding of {dtype}", functools.partial(_rounding, context, dtype))
        for operator in ALLOWED:
            for shape in shapes:
                families = (
                    ("random", "large_mean", "outlier") if shape is shapes[0] else ("random",)
                )
                for family in families:
                    if context.left() < 0:
                        context.skip(f"fp8 {operator} {dtype}: no time from {shape}, {family} on")
                        return
                    case = (operator, dtype, shape, family)
                    context.attempt(f"{case}", functools.partial(_compare, context, *case))


def _rounding(context: Context, dtype: str) -> None:
    """Every scale and every value of the kernel's, against PyTorch's casts."""
    from deit.kernels.fp8 import triton_rows as fp8_rows

    generator = torch.Generator(context.device).manual_seed(1)
    x = torch.randn((515, 768), device=context.device, generator=generator)
    x *= torch.logspace(-3, 3, len(x), device=context.device)[:, None]
    x = x.to(numerics.DTYPES[dtype])
    x[1] = 0.0
    x[2, 5], x[3, 300], x[4, 767] = math.nan, math.inf, -math.inf
    rows, launch = fp8_rows.plan(x, None)
    assert launch is not None  # x is not empty
    launch.run(x)
    e4m3, scales = quantize(x, GROUP)
    same = torch.equal(rows.scales.T.nan_to_num(-1.0), scales.nan_to_num(-1.0))
    wrong = int((rows.e4m3.float() != e4m3.float()).sum())
    used = float(wrong > 0 or not same)
    context.row(impl="triton", operator="fp8 rounding", dtype=dtype, quantity="e4m3",
                family="random", shape=list(x.shape), used=used)  # fmt: skip
    if wrong or not same:
        context.fail(f"fp8 rounding of {dtype}: {wrong} values differ, scales equal: {same}")


def _compare(
    context: Context, operator: str, dtype: str, shape: tuple[int, ...], family: str
) -> None:
    draw = calls.Draw(family, numerics.DTYPES[dtype], context.device)
    call = calls.build(operator, draw, calls.Size(*shape), "inference")
    public = getattr(deit.kernels, f"fp8_{operator}")
    with torch.no_grad():
        out, expected = (public(**call.inputs, impl=i).double() for i in ("triton", "reference"))
        wide = {name: tensor.double() for name, tensor in call.inputs.items()}
        exact = call.function("reference")(wide)
    error, noise = ((out - other).norm() for other in (expected, exact))
    found: dict[str, Any] = {
        "impl": "triton",
        "operator": f"fp8_{operator}",
        "dtype": dtype,
        "quantity": "out",
        "family": family,
        "shape": list(shape),
    }
    if out.numel() == 0:
        context.row(**found, used=0.0)
        return
    relative = float(error / expected.norm())
    used = relative / (ALLOWED[operator] + torch.finfo(numerics.DTYPES[dtype]).eps / 2)
    context.row(**found, used=used, norm=relative,
                sqnr_db=20 * math.log10(float(exact.norm() / noise)))  # fmt: skip
    if not used <= 1:
        context.fail(f"fp8_{operator} {dtype} {list(shape)} {family}: {relative:.2g} off the "
                     f"reference (relative), {used:.2f} of what is allowed")  # fmt: skip


def contenders(call: Any, backward: bool) -> dict[str, Any]:
    """The call in e4m3, for a race beside its own dtype: {} where it has no such form."""
    tensor = next(iter(call.inputs.values()))
    if call.operator not in ALLOWED or backward or call.options or not tensor.is_cuda:
        return {}
    if deit.kernels.fp8.why_not(tensor.device):
        return {}
    public = getattr(deit.kernels, f"fp8_{call.operator}")
    return {"triton, fp8": lambda inputs: public(**inputs, impl="triton")}
