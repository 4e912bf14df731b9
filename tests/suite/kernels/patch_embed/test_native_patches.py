"""The C++ patch embedding against fp64: grids, layouts, bands, and what it refuses."""

import gradients
import pytest
import torch

from deit.kernels import explain, patch_embed
from deit.kernels.engine import native, registry
from deit.kernels.prove import oracle, reference

pytestmark = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)

DTYPES = [torch.float32, torch.bfloat16]


def arguments(
    images=2, size=(64, 48), patch=(16, 16), dim=96, prefix=1, dtype=torch.float32, family="random"
):
    tokens = prefix + size[0] // patch[0] * (size[1] // patch[1])
    depth = 3 * patch[0] * patch[1]
    return [
        oracle.make(family, (images, 3, *size), dtype),
        oracle.make("random", (dim, 3, *patch), dtype, seed=1, scale=depth**-0.5),
        oracle.make("random", (dim,), dtype, seed=2),
        oracle.make("random", (1, prefix, dim), dtype, seed=3),
        oracle.make("random", (1, tokens, dim), dtype, seed=4),
    ]


def run(*given):
    return registry.COMPILED["cpu"]["patch_embed"](*given)


# 33 and 50 channels leave a rest in every panel; (2, 6) is a patch that is not square; 240 x 224
# has 210 patches, two bands of an image.
SHAPES = [
    {"prefix": 2, "size": (32, 32)},
    {"size": (30, 60), "patch": (6, 10), "dim": 33},
    {"size": (8, 12), "patch": (2, 6), "dim": 50, "images": 5},
    {"size": (240, 224), "dim": 48, "images": 1},
    {"size": (16, 16), "images": 1, "dim": 64, "prefix": 0},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_values(isa, shape, family):
    for dtype in DTYPES:
        given = arguments(**shape, dtype=dtype, family=family)
        oracle.check(run(*given), reference.patch_embed, given)
        given[2] = None
        oracle.check(run(*given), reference.patch_embed, given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_gradients(isa, shape, family):
    """Of weight, bias, prefix and positions; of each of them alone; with no bias."""
    for dtype in DTYPES:
        given = arguments(**shape, dtype=dtype, family=family)
        if reasons := explain("patch_embed", *given).reasons["cpu"]:
            assert dtype == torch.bfloat16, reasons  # of which this processor has no products
            continue
        dout = oracle.make("random", run(*given).shape, dtype, seed=9)
        wanted = [1, 2, 3, 4] if given[3].numel() else [1, 2, 4]
        found = gradients.check(patch_embed, given, wanted, [dout], impl="cpu")
        for i, one in zip(wanted, found[1:], strict=True):
            alone = gradients.outputs_and_gradients(patch_embed, "cpu", [i], [dout])(*given)
            assert torch.equal(alone[1], one)
        given[2] = None
        gradients.check(patch_embed, given, [1], [dout], impl="cpu")


def test_any_memory_layout_has_the_same_gradients(isa):
    """Lines of whole vectors are read where they lie, others element by element."""
    for dtype in DTYPES:
        images, weight, _, prefix, _ = arguments(images=4, dtype=dtype)
        dout = oracle.make("random", (4, 13, 96), dtype, seed=9)
        backward = registry.COMPILED["cpu"]["patch_embed_bwd"]
        expected = backward(dout, images, weight, prefix.shape[1])
        wide = torch.full((4, 5, 66, 100), torch.nan, dtype=dtype)
        wide[:, 1:4, 1:65, 2:98:2] = images
        for layout in (
            images.contiguous(memory_format=torch.channels_last),
            images.transpose(0, 1).contiguous().transpose(0, 1),
            wide[:, 1:4, 1:65, 2:98:2],
        ):
            for one, other in zip(backward(dout, layout, weight, 1), expected, strict=True):
                assert torch.equal(one, other)


def test_what_is_not_finite_in_the_prefix_stays_there():
    given = arguments(prefix=2)
    dout = oracle.make("random", (2, 14, 96), seed=9)
    dout[0, 1, 5] = torch.inf
    found = registry.COMPILED["cpu"]["patch_embed_bwd"](dout, given[0], given[1], 2)
    assert found[0].isfinite().all()
    assert found[1].isfinite().all()
    assert found[2][0, 1, 5] == torch.inf
    assert (found[3] == torch.inf).sum() == 1


def test_no_image_has_no_gradient():
    images, weight, _, prefix, _ = arguments(images=0)
    found = registry.COMPILED["cpu"]["patch_embed_bwd"](torch.empty(0, 13, 96), images, weight, 1)
    assert [one.shape for one in found] == [weight.shape, (96,), prefix.shape, (1, 13, 96)]
    assert all((one == 0).all() for one in found)


def test_any_memory_layout_has_the_same_bits():
    given = arguments(images=4)
    expected = run(*given)
    images = given[0]
    wide = torch.full((4, 5, 66, 100), torch.nan)
    wide[:, 1:4, 1:65, 2:98:2] = images
    layouts = (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(0, 1).contiguous().transpose(0, 1),
        wide[:, 1:4, 1:65, 2:98:2],
        images[:1].expand(4, -1, -1, -1),
    )
    for layout in layouts[:3]:
        assert torch.equal(run(layout, *given[1:]), expected)
    assert torch.equal(run(layouts[3], *given[1:])[3], expected[0])
    strided = [given[1].transpose(2, 3).contiguous().transpose(2, 3), *given[2:]]
    assert torch.equal(run(images, *strided), expected)


def test_an_image_has_the_same_bits_in_any_batch_and_by_any_threads(threads):
    """Bands of images and packed weights: one image, fewer than threads, and many."""
    given = arguments(images=9, size=(96, 96))
    threads(1)
    expected = run(*given)
    for count in (2, 3, 8):
        threads(count)
        assert torch.equal(run(*given), expected)
        assert torch.equal(run(given[0][:1], *given[1:]), expected[:1])
        assert torch.equal(run(given[0][4:7], *given[1:]), expected[4:7])


def test_what_is_not_finite_stays_in_its_token():
    given = arguments()
    given[0][1, 2, 17, 20] = torch.nan
    out = run(*given)
    spoilt = torch.zeros(out.shape[:2], dtype=torch.bool)
    spoilt[1, 1 + 3 + 1] = True  # the second row of three patches, its second
    assert out[spoilt].isnan().all()
    assert out[~spoilt].isfinite().all()


def test_no_image_at_all():
    given = arguments()
    assert run(given[0][:0], *given[1:]).shape == (0, 13, 96)
    assert explain("patch_embed", given[0][:0], *given[1:]).chosen == "reference"


def test_what_it_refuses_goes_to_the_reference():
    with torch.no_grad():
        assert explain("patch_embed", *arguments()).chosen == "cpu"
        half = [a.half() for a in arguments()]
        assert explain("patch_embed", *half).chosen == "reference"
        with pytest.raises(NotImplementedError, match=r"torch\.float16"):
            patch_embed(*half, impl="cpu")
        odd = arguments(size=(9, 9), patch=(3, 3), dtype=torch.bfloat16)
        with pytest.raises(NotImplementedError, match="odd depth"):
            patch_embed(*odd, impl="cpu")
    trained = arguments()
    trained[1].requires_grad_()
    assert explain("patch_embed", *trained).chosen == "reference"  # measured by nobody yet
    patch_embed(*trained).sum().backward()
    assert trained[1].grad is not None
    found = explain("patch_embed", trained[0].requires_grad_(), *trained[1:])
    assert "no gradient for it" in found.reasons["cpu"][0]
