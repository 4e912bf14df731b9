"""A representative subset of the shipped Triton kernels, compiled for GPUs that are not here.

The whole set: `python -m deit.kernels.prove.aot`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter has no compiler", allow_module_level=True)

from deit.kernels.device import chips
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.prove import aot, hazards, launches

# For every architecture: each kernel in bf16 with its longest epilogue, the widest tile
# (D = 768) for its registers and shared memory, and both forms of attention.
SUBSET = [
    # sm_80's widest tile is that of D = 384.
    launches.Shipped(
        operator,
        variant,
        dtype,
        384 if arch == 80 and size == 768 and "linear" in operator else size,
        arch,
    )
    for arch in (80, 90, 100)
    for operator, variant, dtype, size in (
        ("layer_norm", "plain", "bf16", 768),
        ("add_layer_norm", "gamma keep fp32", "bf16", 192),
        ("attention", "197 bias", "bf16", 64),
        ("attention", "577", "fp16", 64),
        ("rotary_attention_bwd", "197 interleaved", "bf16", 64),
        ("linear", "gelu", "bf16", 768),
        ("linear", "fp32 residual", "bf16", 768),
        ("linear", "residual gamma keep", "fp16", 192),
        ("linear", "gelu", "fp32", 192),
        ("linear", "quick_gelu", "bf16", 768),
        ("linear", "silu", "fp32", 192),
        ("linear_fwd", "gelu residual gamma keep all unaligned", "bf16", 384),
        ("linear_few", "64x128 1 gelu training", "bf16", 384),
        ("linear_parts", "128x64 4", "bf16", 384),
        ("linear_sum", "64x64 12 fp32 residual gamma keep", "bf16", 384),
        ("gelu_mlp", "residual gamma keep", "bf16", 192),
        ("layer_norm_bwd", "plain", "bf16", 768),
        ("add_layer_norm_bwd", "gamma keep fp32", "bf16", 768),
        ("partial_sums", "one", "fp32", 768),
        ("distillation_loss", "soft smoothed student kl", "bf16", 21841),
        ("distillation_loss_bwd", "index hard", "bf16", 1000),
        ("patch_embed", "channels last", "bf16", 768),
        ("layer_norm", "fp32 rows", "bf16", 768),
        ("linear_stats", "fp32 gamma", "bf16", 768),
        ("linear_stats", "plain", "fp32", 192),
        ("norm_panel", "fp32 gelu", "bf16", 192),
        ("norm_mlp", "fp32 gamma", "bf16", 192),
        ("patch_embed_bwd", "channels first", "bf16", 768),
        ("fp8_rows", "norm", "bf16", 768),
        # A tile's kernel serves every width: the first stands for all.
        ("fp8_product", "hidden", "bf16", 192),
        ("fp8_product", "unaligned residual gamma", "fp32", 192),
    )
    if arch != 80
    or operator not in ("gelu_mlp", "norm_panel", "norm_mlp", "fp8_rows", "fp8_product")
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What compiles here is really compiled, and leaves nothing behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


def _name(case: launches.Shipped) -> str:
    return f"sm_{case.arch}-{case.operator}-{case.size}-{case.dtype}-{case.variant}"


@pytest.mark.parametrize("case", SUBSET, ids=_name)
def test_compiles_without_fault(case):
    result = aot.compile_case(case)
    assert result.faults == []
    assert result.registers > 0


def test_subset_is_part_of_the_whole():
    assert set(SUBSET) <= set(launches.shipped())


def test_every_shipped_configuration_is_a_case():
    """Each (operator, architecture, dtype) has a case, and linear one for each tile width."""
    found = {(c.operator, c.arch, c.dtype) for c in launches.shipped()}
    for arch in launches.ARCHITECTURES:
        for dtype in launches.DTYPES:
            for operator in ("layer_norm", "add_layer_norm", "attention", "linear"):
                assert (operator, arch, dtype) in found
            single = gelu_mlp_tiles.gelu_mlp(arch, launches.DTYPES[dtype], 192) is not None
            assert (("gelu_mlp", arch, dtype) in found) == single
    tiles = {
        linear_tiles.linear(90, launches.DTYPES["bf16"], c.size, c.size).block_n
        for c in launches.shipped((90,), ("bf16",))
        if c.operator == "linear"
    }
    assert tiles == {64, 128, 256}


def test_products_in_e4m3_start_with_ada():
    """sm_80 has none; of sm_89's kernels they alone are compiled by `make aot`."""
    operators = {arch: {c.operator for c in launches.shipped((arch,))} for arch in (80, 89)}
    assert not any(name.startswith("fp8") for name in operators[80])
    assert {"fp8_rows", "fp8_product"} <= operators[89]
    ada = launches.Shipped("fp8_product", "hidden", "bf16", 192, 89)
    widest = launches.Shipped("fp8_product", "hidden", "bf16", 768, 90)
    for case in (ada, widest):
        assert case in set(launches.shipped((case.arch,), ("bf16",)))
        assert aot.compile_case(case).faults == []


def test_a_spill_is_found():
    """Four warps cannot hold a 128 x 256 accumulator and its epilogue."""
    case = launches.Shipped("linear", "fp32 residual", "bf16", 768, 90)
    launch = dataclasses.replace(case.build(), num_warps=4)
    with aot.target(90):
        registers, spills = aot.resource_usage(launch.compile().asm["cubin"])
    assert registers == 255
    assert spills > 0


@pytest.mark.parametrize(
    ("operator", "size"), [("attention_bwd", 64), ("attention_bwd", 32), ("rotary_attention", 64)]
)
def test_products_that_ptxas_cannot_leave_in_flight_are_said(operator, size):
    """Of a whole head's gradient it left none in flight while dq was its last product; of the
    others while there was a way around the loop."""
    result = aot.compile_case(launches.Shipped(operator, "197", "bf16", size, 90))
    assert not result.serialised
    assert ", one by one" not in aot.row(result)
    one_by_one = dataclasses.replace(result, serialised=True)
    assert ", one by one" in aot.row(one_by_one)
    assert not one_by_one.faults


def test_faults_are_named():
    result = aot.Result(
        case=launches.Shipped("linear", "bias", "bf16", 192, 90),
        kernel="k",
        registers=255,
        spills=16,
        shared=chips.SHARED_MEMORY[90] + 1,
        instructions=("mma.sync",),
        overflows=("overflows: %at",),
        overwrites=("%a may be overwritten",),
    )
    text = " ".join(result.faults)
    for part in ("spills 16 bytes", "shared memory", "no wgmma", "no cp.async.bulk.tensor",
                 "overflows: %at", "%a may be overwritten"):  # fmt: skip
        assert part in text
    assert "FAULT" in aot.row(result)


@pytest.mark.parametrize(
    ("arch", "change", "fault"),
    [
        (90, {"num_warps": 4}, "spills"),
        (90, {"num_stages": 6}, "bytes of shared memory"),
        (90, {"block_m": 32}, "no wgmma"),
        (100, {"block_m": 32}, "no tcgen05"),
        (90, {"tma": False, "block_n": 128}, "no cp.async.bulk.tensor"),
    ],
)
def test_each_fault_is_found_in_a_real_kernel(arch, change, fault, monkeypatch):
    """DeiT-B's linear layer, made wrong in one way at a time."""
    case = launches.Shipped("linear", "fp32 residual", "bf16", 768, arch)
    wrong = dataclasses.replace(linear_tiles.linear(arch, case.torch_dtype, 768, 768), **change)
    monkeypatch.setattr(linear_tiles, "linear", lambda *_: wrong)
    assert fault in " ".join(aot.compile_case(case).faults)


def test_a_product_that_is_not_waited_for_is_a_fault(monkeypatch):
    """Attention's second product, by the compiler's own IR with its waits taken out."""
    case = launches.Shipped("attention", "577", "bf16", 64, 90)
    read = hazards.faults
    assert aot.compile_case(case).faults == []
    monkeypatch.setattr(
        hazards, "faults", lambda ir: read(re.sub("pendings = [0-9]+", "pendings = 9", ir))
    )
    assert "may be overwritten while it is read" in " ".join(aot.compile_case(case).faults)


def test_a_kernel_that_does_not_compile_is_a_fault(monkeypatch):
    case = launches.Shipped("linear", "bias", "bf16", 192, 90)
    launch = case.build()
    launch.arguments["BLOCK_M"] = 96  # not a power of two
    monkeypatch.setattr(launches.Shipped, "build", lambda self: launch)
    assert "does not compile" in aot.compile_case(case).faults[0]


def test_another_triton_than_named_is_refused(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--triton", "0.1"])
    assert "--triton is 0.1" in capsys.readouterr().err


def test_launches_of_one_kernel_are_compiled_once(monkeypatch):
    """577 tokens of fp32 run what 197 do; a key bias is another kernel, as another head is."""
    one = launches.Shipped("attention", "197", "fp32", 64, 90)
    same = dataclasses.replace(one, variant="577")
    assert aot.kernel_of(one) == aot.kernel_of(same)
    for other in ({"variant": "197 bias"}, {"size": 32}, {"arch": 80}, {"dtype": "bf16"}):
        assert aot.kernel_of(dataclasses.replace(one, **other)) != aot.kernel_of(one)
    built = []
    build = launches.Shipped.build
    monkeypatch.setattr(launches.Shipped, "build", lambda self: built.append(self) or build(self))
    results = aot.compile_group([one, same])
    assert [r.case for r in results] == [one, same]
    assert [c.variant for c in built] == ["197", "197", "577"]  # compiled, then both read
    assert all(r.faults == [] and r.occupancy > 0 for r in results)


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "columns", "blocks"),
    [
        # The limit is, in turn, registers, shared memory, warps, blocks and tensor memory, by
        # CUDA's occupancy calculator (cuda_occupancy.h).
        (90, 4, 255, 0, 0, 2),
        (90, 8, 128, 0, 0, 2),
        (90, 8, 96, 0, 0, 2),
        (90, 4, 96, 0, 0, 5),
        (80, 4, 32, 82 * 1024, 0, 1),
        (80, 4, 32, 40 * 1024, 0, 4),
        (90, 4, 16, 0, 0, 16),
        (120, 4, 16, 0, 0, 12),
        (90, 1, 16, 0, 0, 32),
        (100, 4, 64, 0, 256, 2),
        (120, 8, 64, 100 * 1024, 0, 0),
    ],
)
def test_resident_blocks(arch, warps, registers, shared, columns, blocks):
    assert chips.resident_blocks(arch, warps, registers, shared, columns) == blocks


def test_command_line_reports_and_exits_with_zero():
    done = subprocess.run(
        [sys.executable, "-m", "deit.kernels.prove.aot", "--arch", "90", "--dtype", "bf16",
         "--operator", "gelu_mlp", "--jobs", "1"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 launches of 6 kernels compiled" in done.stdout
    assert ", 0 with a fault" in done.stdout
    assert " 1 x 8    12%" in done.stdout  # blocks of a multiprocessor, warps, occupancy
    assert "wgmma, cp.async.bulk.tensor" in done.stdout


def test_importing_and_planning_touch_no_device():
    code = (
        "import torch\n"
        "from deit.kernels.prove import aot, launches\n"
        "[case.build() for case in launches.shipped((90,), ('bf16',))]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
