"""The Triton operators on spoilt arguments: a clear error, a refusal or a correct result."""

import bad_input
import pytest
import torch
from bad_input import ALWAYS_WRONG, LAYOUTS, WRONG, outcome

from deit.kernels import attention, explain
from deit.kernels.engine import registry
from deit.kernels.prove import calls

PUBLIC = sorted(calls.operators(implementation="triton"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PUBLIC)
def test_any_memory_gives_the_right_values(name, layout):
    for argument in bad_input.tensors(name):
        assert outcome(name, "triton", argument, LAYOUTS[layout]) == "right", argument


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("name", PUBLIC)
def test_a_wrong_argument_is_named_or_served(name, change):
    for argument in bad_input.tensors(name):
        if (name, argument) == ("cross_entropy", "logits") and change in ("longer", "shorter"):
            continue  # another number of classes
        found = outcome(name, "triton", argument, WRONG[change])
        if change in (*ALWAYS_WRONG, "meta"):
            assert found == "error", argument


@pytest.mark.parametrize("name", PUBLIC)
def test_a_gradient_is_right_or_refused(name):
    for argument in bad_input.tensors(name):
        call = bad_input.given(name)
        if not call[argument].is_floating_point():
            continue
        call[argument] = call[argument].clone().requires_grad_()
        forward_only = f"{name}_bwd" not in registry.KERNELS["triton"]
        held = forward_only or argument in bad_input.held(name)
        assert bad_input.judge(name, "triton", call) == ("refused" if held else "right")


@pytest.mark.parametrize("head_dim", [1, 7, 16, 32, 48, 64, 80, 96, 128, 160])
def test_head_dimensions(head_dim):
    """32, 64, 80, 96 and 128 natively; another is refused with the reason, and "auto" serves it."""
    call = {"qkv": torch.randn(2, 9, 3 * 2 * head_dim), "num_heads": 2}
    native = head_dim in (32, 64, 80, 96, 128)
    assert bad_input.judge("attention", "triton", call) == ("right" if native else "refused")
    if not native:
        with pytest.raises(NotImplementedError, match=f"head dimension {head_dim} "):
            attention(**call, impl="triton")
        assert explain("attention", **call).chosen != "triton"
        assert bad_input.judge("attention", "auto", call) == "right"
