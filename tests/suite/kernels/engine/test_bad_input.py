"""Every operator and implementation on spoilt arguments: a clear error or a correct result."""

import bad_input
import pytest
import torch
from bad_input import ALWAYS_WRONG, LAYOUTS, WRONG, outcome

import deit.kernels
from deit.kernels import attention, explain
from deit.kernels.engine import native, registry
from deit.kernels.engine.operator import operator_names

RUNS = [(name, impl) for name in operator_names(eight_bits=False) for impl in ("auto", "reference")]
if not native.why_not("cpu"):
    RUNS += [
        (name, "cpu")
        for name in operator_names(eight_bits=False)
        if name in registry.KERNELS["cpu"]
    ]
each_run = pytest.mark.parametrize(("name", "impl"), RUNS, ids=map("-".join, RUNS))


@each_run
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_gives_the_right_values(name, impl, layout):
    for argument in bad_input.tensors(name):
        assert outcome(name, impl, argument, LAYOUTS[layout]) == "right", argument


@each_run
@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_argument_is_named_or_served(name, impl, change):
    for argument in bad_input.tensors(name):
        if (name, argument) == ("cross_entropy", "logits") and change in ("longer", "shorter"):
            continue  # another number of classes
        found = outcome(name, impl, argument, WRONG[change])
        if change in ALWAYS_WRONG:
            assert found == "error", argument


@each_run
def test_tensors_on_two_devices(name, impl):
    for argument in bad_input.tensors(name):
        assert outcome(name, impl, argument, WRONG["meta"]) == "error", argument


@each_run
def test_a_gradient_is_right_or_refused(name, impl):
    """Each input requires grad in its turn, even where no kernel has a gradient for it."""
    trains = impl in registry.KERNELS and f"{name}_bwd" in registry.KERNELS[impl]
    for argument in bad_input.tensors(name):
        call = bad_input.given(name)
        if not call[argument].is_floating_point():
            continue
        call[argument] = call[argument].clone().requires_grad_()
        found = bad_input.judge(name, impl, call)
        assert found == "right" or (impl == "cpu" and found == "refused")
        if impl == "cpu" and not trains:
            assert found == "refused"
            continue
        if found == "right":
            outputs = bad_input.each(getattr(deit.kernels, name)(**call, impl=impl))
            (grad,) = torch.autograd.grad(sum(o.square().sum() for o in outputs), call[argument])
            assert grad.isfinite().all()
            assert grad.shape == call[argument].shape


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("attention", "num_heads", 5),
        ("attention", "num_heads", 0),
        ("attention", "num_heads", -1),
        ("attention", "num_heads", 1.0),
        ("attention", "num_heads", None),
        ("attention", "num_heads", True),
        ("attention", "scale", "small"),
        ("attention", "scale", float("nan")),
        ("layer_norm", "eps", -1e-6),
        ("layer_norm", "eps", float("nan")),
        ("layer_norm", "eps", "tiny"),
        ("add_layer_norm", "eps", None),
        ("rms_norm", "eps", -1e-6),
        ("linear", "activation", "relu"),
        ("linear", "activation", 1),
        ("cross_entropy", "label_smoothing", 1.0),
        ("cross_entropy", "label_smoothing", float("nan")),
        ("cross_entropy", "label_smoothing", "0.1"),
        ("distillation_loss", "label_smoothing", -0.1),
        ("distillation_loss", "alpha", 1.5),
        ("distillation_loss", "alpha", "half"),
        ("distillation_loss", "temperature", 0.0),
        ("distillation_loss", "temperature", float("nan")),
        ("distillation_loss", "temperature", float("inf")),
        ("distillation_loss", "kind", "medium"),
        ("distillation_loss", "kind", None),
        ("distillation_loss", "kind", ["hard"]),
        ("distillation_loss", "kl_reduction", "mean"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference", "cpu"])
def test_a_wrong_number_is_named(name, argument, value, impl):
    if impl == "cpu" and name not in registry.KERNELS["cpu"]:
        impl = "auto"
    assert bad_input.judge(name, impl, bad_input.given(name) | {argument: value}) == "error"


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("head_dim", [1, 7, 16, 32, 48, 64, 80, 96, 128, 160])
def test_head_dimensions(head_dim, impl):
    """The C++ kernel takes any; where one does not, it says so and "auto" runs another."""
    call = {"qkv": torch.randn(2, 9, 3 * 2 * head_dim), "num_heads": 2, "key_bias": None}
    assert bad_input.judge("attention", impl, call) == "right"


def test_explain_raises_what_the_operator_does():
    with pytest.raises(ValueError, match="qkv: expected rank 3"):
        explain("attention", torch.randn(5, 192), 1)
    with pytest.raises(ValueError, match="qkv: expected rank 3"):
        attention(torch.randn(5, 192), 1)


def test_sparse_activations_are_named():
    x = torch.eye(64).to_sparse()
    with pytest.raises(TypeError, match=r"x: expected a dense tensor; got torch\.sparse_coo"):
        deit.kernels.layer_norm(x, torch.ones(64))


def test_a_patch_without_pixels_is_named():
    images, tokens = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match=r"weight: expected a patch .* got \(4, 3, 0, 0\)"):
        deit.kernels.patch_embed(images, torch.zeros(4, 3, 0, 0), None, tokens, tokens)
