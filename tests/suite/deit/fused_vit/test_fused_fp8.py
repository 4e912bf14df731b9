"""fuse(model, dtype="fp8"): what runs in e4m3, what stays, and who refuses.

By the reference, which runs anywhere; by the kernels in interpreted/test_triton_fp8.py.
"""

import copy

import pytest
import torch
from test_fused_int8 import BUILDERS, logits, ours, ran

from deit.fused_vit import eight_bits, fuse, fused, unfuse
from deit.kernels import fp8

EIGHT = {"fp8_linear", "fp8_gelu_mlp"}


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", BUILDERS)
def test_every_library_runs_in_e4m3_and_comes_back(build, images):
    model = BUILDERS[build]()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        expected = logits(model, images)
        report = fuse(model, "reference", dtype="fp8")
        seen = ran(lambda: logits(model, images))
        out = logits(model, images)
    assert {(name, "reference") for name in EIGHT} <= seen
    assert not {name for name, _ in seen} & {"linear", "gelu_mlp", "vit_block", "int8_linear"}
    assert {report.operators[name] for name in EIGHT} == {"reference"}
    assert "fc2 in fp8" in str(report)
    error = (out - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.1  # close, and neither fp32 nor int8 in disguise
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    unfuse(model)
    with torch.inference_mode():
        assert torch.equal(logits(model, images), expected)


def test_it_is_coarser_than_int8(images):
    """e4m3 has 3 bits of mantissa where int8 has 7 bits of the largest number."""
    model, errors = ours(), {}
    with torch.inference_mode():
        expected = model(images)
        for dtype in ("int8", "fp8"):
            with fused(model, "reference", dtype=dtype):
                errors[dtype] = float((model(images) - expected).norm())
    assert errors["fp8"] > 2 * errors["int8"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype, images):
    model = ours()
    with torch.inference_mode():
        expected = model(images)
        fuse(model.to(dtype), "reference", dtype="fp8")
        out = model(images.to(dtype))
    assert out.dtype == dtype
    assert (out - expected).norm() < 0.1 * expected.norm()


def test_it_is_never_chosen_unasked(images):
    model = ours()
    for options in ({}, {"impl": "reference"}, {"dtype": "int8"}):
        report = fuse(model, **options)
        with torch.inference_mode():
            assert not EIGHT & {name for name, _ in ran(lambda: model(images))}
        assert not EIGHT & set(report.operators)
    fuse(model, "reference", dtype="fp8")
    with torch.inference_mode():
        assert {name for name, _ in ran(lambda: model(images))} >= EIGHT


@pytest.mark.parametrize("impl", ["auto", "triton", "cpu", "cuda"])
def test_who_asks_for_fp8_asks_for_its_kernels(impl):
    """ "auto" knows none that is measured, and would take the reference."""
    assert set(eight_bits.implementations("fp8", impl)) == EIGHT
    assert set(eight_bits.implementations("fp8", impl).values()) == {"triton"}


def test_a_cpu_is_refused_and_nothing_changes(images):
    model = ours()
    with pytest.raises(
        ValueError, match=r"'fp8' expects .* cls_token: Triton runs CPU tensors only"
    ):
        fuse(model, dtype="fp8")
    assert type(model) is type(ours())
    with pytest.raises(ValueError, match="or impl='reference'"):
        fuse(model, "cpu", dtype="fp8")
    with pytest.raises(ValueError, match=r"cls_token: dtype torch.float64 \(fp32, fp16 and bf16"):
        fuse(model.double(), "reference", dtype="fp8")


def test_an_older_gpu_is_refused(monkeypatch):
    old = "e4m3 products need compute capability 8.9, this GPU has 8.0"
    monkeypatch.setattr(fp8, "_too_old", lambda device_type, index: (old,))
    with pytest.raises(ValueError, match=old):
        fuse(ours(), dtype="fp8")


def test_the_last_block_for_the_rows_that_are_read(images):
    model = ours()
    with torch.inference_mode():
        with fused(model, "reference", dtype="fp8", last_block="full"):
            full = model(images)
        with fused(model, "reference", dtype="fp8"):
            short = model(images)
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-4)


def test_training_is_in_the_model_s_dtype_and_a_gradient_in_eval_is_refused(images):
    model = ours()
    fuse(model, "reference", dtype="fp8")
    with pytest.raises(NotImplementedError, match="inference_mode"):
        model(images)
    model.train()
    seen = ran(lambda: model(images).sum().backward())
    assert not EIGHT & {name for name, _ in seen}
    assert all(p.grad is not None for p in model.parameters())


def test_copies(images):
    model = ours()
    fuse(model, "reference", dtype="fp8")
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_compile(images):
    model = ours()
    fuse(model, "reference", dtype="fp8")
    with torch.no_grad():
        expected = model(images)
        out = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
