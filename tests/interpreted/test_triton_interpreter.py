"""What is mended of Triton's interpreter: bf16."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _cast_kernel(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def _dot_kernel(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def _special() -> torch.Tensor:
    """Ties, both ways, at every exponent; the largest numbers, denormals, infinities and NaN."""
    patterns = torch.tensor([0x0, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x1FFFF, 0x7F8000, 0x7FFFFF])
    bits = torch.arange(0, 256)[:, None] << 23 | patterns
    return torch.cat([bits, bits - 2**31]).flatten().to(torch.int32).view(torch.float32)


def test_a_cast_to_bf16_rounds_to_nearest_even():
    x = _special()
    out = torch.empty(len(x), dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, len(x))
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_every_bf16_is_read():
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(len(x))
    _cast_kernel[(1,)](x, out, len(x))
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_sums_in_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, out, 64)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
