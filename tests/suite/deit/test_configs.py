"""The table of variants: names, sizes, and what is refused."""

from dataclasses import replace

import pytest
import torch

import deit

PARAMETERS = {  # arXiv 2012.12877, Table 1, exact counts from the official checkpoints' shapes
    "deit_ti": 5_717_416,
    "deit_s": 22_050_664,
    "deit_b": 86_567_656,
    "deit_ti_distilled": 5_910_800,
    "deit_s_distilled": 22_436_432,
    "deit_b_distilled": 87_338_192,
    "deit_b_384": 86_859_496,
    "deit_b_distilled_384": 87_630_032,
    "vit_l": 304_326_632,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = deit.create(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_published_names_are_the_eight_of_the_paper():
    assert len(deit.PUBLISHED) == len(set(deit.PUBLISHED)) == 8
    for name in deit.PUBLISHED:
        settings = deit.config(name)
        assert settings.distilled == ("distilled" in name)
        assert settings.img_size == int(name[-3:])


def test_arguments_override_the_name():
    settings = deit.config("deit_b_distilled_384", distilled=False, img_size=160, num_classes=7)
    assert (settings.distilled, settings.img_size, settings.num_classes) == (False, 160, 7)
    assert settings.tokens == 101
    assert settings.label == "deit_b↑160"


def test_flops_match_a_counter():
    """Config.flops is quoted in every benchmark: hold it to what torch counts."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = deit.create("deit_ti_distilled").eval()
    counter, plainly = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    with counter, plainly, torch.no_grad():  # torch 2.11 does not count the CPU's fused attention
        model(torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() == model.config.flops


@pytest.mark.parametrize("size", [225, 8, 0, -16])
def test_impossible_image_size(size):
    with pytest.raises(ValueError, match=rf"img_size: expected a positive multiple .* got {size}"):
        deit.create("deit_ti", img_size=size)


def test_heads_must_divide_dim():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim=192; got 5"):
        deit.Config("odd", embed_dim=192, num_heads=5)


@pytest.mark.parametrize("name", ["deit_x", "resnet50", "deit_base_patch32_224", ""])
def test_unknown_arch_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="arch: unknown name") as error:
        deit.create(name)
    assert "deit_ti" in str(error.value)
    assert "deit_base_distilled_patch16_384" in str(error.value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"depth": 0}, ValueError, "depth: expected at least 1; got 0"),
        ({"depth": 10**9}, ValueError, "depth: expected at most 1000; got 1000000000"),
        ({"patch_size": 0}, ValueError, "patch_size: expected at least 1; got 0"),
        ({"mlp_ratio": -1}, ValueError, "mlp_ratio: expected at least 1; got -1"),
        ({"depth": 2.0}, TypeError, "depth: expected an int; got 2.0"),
        ({"num_heads": "3"}, TypeError, "num_heads: expected an int; got '3'"),
        ({"num_classes": True}, TypeError, "num_classes: expected an int; got True"),
        ({"eps": float("nan")}, ValueError, "eps: expected a number from 0 to 1; got nan"),
        ({"eps": -1e-6}, ValueError, "eps: expected a number from 0 to 1; got -1e-06"),
        ({"eps": None}, ValueError, "eps: expected a number from 0 to 1; got None"),
        ({"layer_scale": float("inf")}, ValueError, "layer_scale: expected a finite number or No"),
    ],
)
def test_a_config_that_no_network_has(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        replace(deit.config("deit_ti"), **change)
