"""The recipes against their sources, line by line."""

from dataclasses import fields

import pytest

from deit.recipes import DEIT, FINETUNE, RECIPES, Recipe, recipe

# arXiv 2012.12877, Table 9 (DeiT-B) and the official defaults where the paper is silent.
TABLE_9 = {
    "epochs": 300,
    "batch_size": 1024,
    "optimizer": "adamw",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "lr": 0.0005,
    "lr_batch": 512,
    "min_lr": 1e-5,
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "drop_path": 0.1,
    "repeats": 3,
    "clip_grad": None,
    "policy": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.3,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_probability": 1.0,
    "mix_switch": 0.5,
    "random_erasing": 0.25,
    "ema": 0.99996,
    "loss": "ce",
    "layer_scale": None,
    "hflip": 0.5,
    "crop": "random",
    "crop_scale": (0.08, 1.0),
    "eval_crop": None,  # by the size: 0.875 at 224, 1.0 at 384 (deit.data.images.crop_ratio)
    "ema_warmup": False,
}


def test_the_default_recipe_is_the_papers_line_by_line():
    assert {f.name: getattr(DEIT, f.name) for f in fields(Recipe)} == TABLE_9
    assert DEIT.peak_lr == pytest.approx(1e-3)  # 5e-4 * 1024 / 512


def test_fine_tuning_at_384():
    assert FINETUNE.peak_lr == FINETUNE.min_lr == 5e-6  # constant
    assert (FINETUNE.weight_decay, FINETUNE.epochs, FINETUNE.batch_size) == (1e-8, 30, 512)
    assert FINETUNE.mixup == DEIT.mixup  # both labels, same augmentation


def test_every_setting_says_what_it_is():
    assert all(f.metadata["help"] for f in fields(Recipe))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", -1.0),
        ("label_smoothing", 1.0),
        ("drop_path", 1.0),
        ("ema", 1.0),
        ("clip_grad", 0.0),
        ("crop_scale", (0.5, 0.1)),
        ("mixup", -0.1),
        ("hflip", 1.1),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field}: expected"):
        recipe("deit", **{field: value})


def test_unknown_recipe_lists_the_known():
    with pytest.raises(ValueError, match=r"deit3.*got 'diet'"):
        recipe("diet")
    assert all(isinstance(r, Recipe) for r in RECIPES.values())
