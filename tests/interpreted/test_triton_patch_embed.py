"""patch_embed on Triton, values and gradients, in the interpreter.

It has 3 multiprocessors: the sum over patches is split for 6 programs, as far as there are rows for
them.
"""

from __future__ import annotations

import gradients
import pytest
import torch

from deit.kernels import explain, patch_embed
from deit.kernels.engine import registry
from deit.kernels.patch_embed import triton_bwd
from deit.kernels.prove import oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _make(batch, patches, dim, *, patch=(16, 16), channels=3, prefix=1, dtype=torch.float16,
          family="random"):  # fmt: skip
    """(images, weight, bias, prefix, pos_embed) with patches = (down, across)."""
    size = [p * n for p, n in zip(patch, patches, strict=True)]
    tokens = prefix + patches[0] * patches[1]
    scale = (channels * patch[0] * patch[1]) ** -0.5
    return (
        oracle.make(family, (batch, channels, *size), dtype),
        oracle.make("random", (dim, channels, *patch), dtype, seed=1, scale=scale),
        oracle.make("random", (dim,), dtype, seed=2),
        oracle.make("random", (1, prefix, dim), dtype, seed=3),
        oracle.make("random", (1, tokens, dim), dtype, seed=4),
    )


def _check(arguments, dout=None):
    """Value and gradients under the rule, and the same value in inference."""
    images, weight, bias, _, pos_embed = arguments
    shape = (images.shape[0], pos_embed.shape[1], weight.shape[0])
    dout = oracle.make("random", shape, images.dtype, seed=9) if dout is None else dout
    wanted = (1, 3, 4) if bias is None else (1, 2, 3, 4)
    found = gradients.check(patch_embed, arguments, wanted, (dout,))
    inference = registry.COMPILED["triton"]["patch_embed"](*arguments)
    torch.testing.assert_close(inference, found[0], rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_error_rule(family, dtype):
    _check(_make(2, (2, 3), 192, dtype=dtype, family=family))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_prefix_tokens(prefix):
    _check(_make(2, (2, 2), 64, prefix=prefix, patch=(4, 4)))


# A width and a depth that fill no tile; patches that are not square; one channel and four.
@pytest.mark.parametrize(
    ("dim", "patch", "channels"), [(40, (14, 14), 3), (72, (4, 8), 1), (64, (2, 3), 4)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_shapes(dim, patch, channels, channels_last):
    images, *rest = _make(2, (3, 2), dim, patch=patch, channels=channels)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    _check((images, *rest))


def test_without_bias():
    images, weight, _, *rest = _make(2, (2, 2), 64, patch=(4, 4))
    _check((images, weight, None, *rest))


STRIDES = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a crop": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
    "a channels-last crop": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 2)).contiguous(
        memory_format=torch.channels_last
    )[:, :, 1:-2, 3:-5],
    "rows and columns swapped": lambda x: x.transpose(2, 3),
    "every second pixel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "one grey channel for all": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "flipped channels": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    images, *rest = _make(2, (2, 2), 64, patch=(8, 8))
    _check((STRIDES[name](images), *rest))


@pytest.mark.parametrize("channels_last", [False, True])
def test_dweight_is_split_over_programs(channels_last):
    """576 patches: 6 partial sums in fp32; a weight that is channels last, or not."""
    images, weight, *rest = _make(9, (8, 8), 48, patch=(4, 4), dtype=torch.float32)
    if channels_last:
        images, weight = (t.contiguous(memory_format=torch.channels_last) for t in (images, weight))
    _check((images, weight, *rest))


def test_no_part_of_dweight_is_empty():
    """400 patches, six parts of whole blocks of 16: five of 80, which a sixth would follow."""
    images, weight, *rest = _make(25, (4, 4), 48, patch=(4, 4), dtype=torch.float32)
    dout = oracle.make("random", (25, 17, 48), seed=9)
    _, launches = triton_bwd.plan_weight(dout, images, weight, 1)
    assert launches[0].grid == (5,)
    assert launches[0].arguments["span"] == 80
    _check((images, weight, *rest), dout)


def test_strided_gradients():
    arguments = _make(2, (2, 2), 64, patch=(4, 4))
    wide = oracle.make("random", (2, 5, 130), torch.float16, seed=9)
    for dout in (wide[..., :64], wide[..., 1:129:2], wide[:1, :1, :1].expand(2, 5, 64),
                 wide[..., :64].transpose(0, 1).contiguous().transpose(0, 1)):  # fmt: skip
        _check(arguments, dout)


def test_no_images():
    found = _check(_make(0, (2, 2), 64, patch=(4, 4)))
    assert found[0].shape == (0, 5, 64)
    assert not any(gradient.any() for gradient in found[1:])


def test_nan_stays_in_its_patch():
    images, *rest = _make(2, (2, 2), 64, patch=(4, 4))
    images[1, 0, 0, 5] = float("nan")  # the second patch
    out, dweight, *others = _check((images, *rest))
    assert out[1, 2].isnan().all()
    assert int(out.isnan().sum()) == 64
    assert int(dweight.isnan().sum()) == 64  # one pixel of each channel
    assert all(gradient.isfinite().all() for gradient in others)


def test_offsets_past_32_bits():
    """Two images 2**31 elements apart; the 4 GB between them are never touched."""
    packed, *rest = _make(2, (2, 2), 64, patch=(4, 4))
    size = packed[0].numel()
    images = torch.empty(2**31 + size, dtype=torch.float16)
    images = images.as_strided(packed.shape, (2**31, *packed.stride()[1:]))
    images.copy_(packed)
    dout = oracle.make("random", (2, 5, 64), torch.float16, seed=9)
    run = gradients.outputs_and_gradients(patch_embed, "triton", (1,), (dout,))
    for far, near in zip(run(images, *rest), run(packed, *rest), strict=True):
        assert torch.equal(far, near)


def test_repeats_bit_for_bit():
    arguments = _make(9, (8, 8), 48, patch=(4, 4), dtype=torch.float32)
    dout = oracle.make("random", (9, 65, 48), seed=9)
    gradients.check_repeats(patch_embed, arguments, (1, 2, 3, 4), (dout,))


def test_images_get_no_gradient():
    images, *rest = _make(1, (2, 2), 64, patch=(4, 4))
    why_not = explain("patch_embed", images.requires_grad_(), *rest).reasons["triton"]
    assert why_not == ["images requires grad and the kernel has no gradient for it"]


def test_opcheck():
    triton = registry.COMPILED["triton"]
    for prefix, layout in ((2, torch.contiguous_format), (0, torch.channels_last)):
        images, weight, bias, *rest = _make(2, (2, 2), 64, patch=(4, 4), prefix=prefix)
        images, weight = (t.contiguous(memory_format=layout) for t in (images, weight))
        out = triton["patch_embed"](images, weight, bias, *rest)
        torch.library.opcheck(triton["patch_embed"], (images, weight, bias, *rest))
        torch.library.opcheck(triton["patch_embed_bwd"], (out, images, weight, prefix))
