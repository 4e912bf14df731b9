"""Which tiles few rows get: counted, and never for the many that a GPU has timed."""

from dataclasses import replace

import pytest
import torch

from deit.kernels.device import few_rows, tuning
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.linear import tiles as linear_tiles

ARCHITECTURES = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}
# A block's products: (output channels, summed ones) for D.
PRODUCTS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}


def products(dim):
    return {name: (width * dim, depth * dim) for name, (width, depth) in PRODUCTS.items()}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 64), (1, 64), (64, 64), (65, 128), (197, 256), (1576, 2048), (2048, 2048), (2049, 4096),
     (50432, 4096), (2**40, 4096)],
)  # fmt: skip
def test_classes(rows, expected):
    assert few_rows.rows_class(rows) == expected


def test_many_rows_have_the_tiles_that_were_timed():
    """On an H100, in bf16: docs/performance.md."""
    for width, block_n, stages in ((2304, 256, 3), (3072, 256, 3), (768, 256, 3), (384, 128, 4)):
        timed = linear_tiles.LinearConfig(128, block_n, 64, 8, True, 8, stages, flatten=True)
        for depth in (384, 768, 3072):
            assert linear_tiles.linear(90, torch.bfloat16, width, depth) == timed
    two = linear_tiles.LinearConfig(128, 64, 64, 8, True, 4, 3, flatten=True, programs=2)
    assert linear_tiles.linear(90, torch.bfloat16, 192, 768) == two
    assert gelu_mlp_tiles.gelu_mlp(90, torch.bfloat16, 192) is not None


@pytest.mark.parametrize(("arch", "multiprocessors"), ARCHITECTURES.items())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [64, 256, 2048])
def test_what_few_rows_get_is_legal_and_counted_faster(arch, multiprocessors, dtype, rows):
    for dim in (192, 384, 768, 1024):
        for width, depth in products(dim).values():
            sizes = {"width": width, "depth": depth, "rows": rows}
            given = {"arch": arch, "dtype": dtype, **sizes, "multiprocessors": multiprocessors}
            config, many = (
                linear_tiles.linear.pinned(**given | change) for change in ({}, {"rows": 4096})
            )
            assert config.illegal(given) == []
            before, after = (linear_tiles.predicted(c, **given) for c in (many, config))
            assert config == many or after < few_rows.WORTH * before


def test_one_image_of_deit_b_on_an_h100():
    """fc2 by 96 programs and the others by 48 to 96, where the tiles for many rows are 6 to 24."""
    found = {}
    for name, (width, depth) in products(768).items():
        config = linear_tiles.linear(90, torch.bfloat16, width, depth, 256, 132)
        found[name] = (config.block_m, config.block_n, config.splits)
    assert found == {
        "qkv": (64, 128, 1), "proj": (64, 64, 1), "fc1": (64, 128, 1), "fc2": (128, 128, 8),
    }  # fmt: skip


def test_parts_only_where_a_second_launch_is_worth_it():
    for depth in (192, 768, 3072):
        splits = linear_tiles.linear(90, torch.bfloat16, 768, depth, 256, 132).splits
        assert (splits > 1) == (depth == 3072)


def test_where_many_tiles_fill_the_gpu_nothing_changes():
    many = linear_tiles.linear(90, torch.bfloat16, 3072, 768)
    for rows in (64, 2048):
        assert linear_tiles.linear(90, torch.bfloat16, 3072, 768, rows, 6) == many


def test_an_mlp_of_few_rows_is_two_products():
    assert gelu_mlp_tiles.gelu_mlp(90, torch.bfloat16, 192, 256, 132) is None
    assert gelu_mlp_tiles.gelu_mlp(90, torch.bfloat16, 192, 256, 1) is not None


def test_candidates_of_few_rows():
    arguments = tuning.TUNABLE["linear"].arguments(90, torch.bfloat16, 768, 3072, 256, 132)
    found = tuning.TUNABLE["linear"].candidates(arguments)
    assert found[0] == linear_tiles.linear.pinned(**arguments)
    assert len(found) > 16
    counted = [linear_tiles.predicted(config, **arguments) for config in found]
    assert counted == sorted(counted)
    assert {config.splits for config in found} == set(linear_tiles.SPLITS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"splits": 2, "flatten": True}, "no next tile"),
        ({"splits": 2, "early": True}, "no residual"),
        ({"splits": 16}, "splits is 16, expected 12 at most"),
        ({"splits": 17}, "splits is 17, expected 1 to 16"),
        ({"programs": 2, "num_stages": 6}, "programs of"),
        ({"programs": 4}, "65536 accumulators"),
    ],
)
def test_illegal(change, why):
    arguments = tuning.TUNABLE["linear"].arguments(90, torch.bfloat16, 768, 768, 256, 132)
    config = linear_tiles.LinearConfig(128, 128, 64, 8, True, 8, 3)
    assert why in "; ".join(replace(config, **change).illegal(arguments))


def test_a_gradients_sum_has_no_parts():
    arguments = tuning.TUNABLE["weight_gradient"].arguments(90, torch.bfloat16, 768, 768)
    config = linear_tiles.LinearConfig(64, 64, 64, 8, True, 4, 4, splits=2)
    assert "splits and early: a gradient" in "; ".join(config.illegal(arguments))
