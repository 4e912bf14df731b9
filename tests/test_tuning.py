"""Tuned configurations: what is legal, how they are kept, and when they are used."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deit.kernels import tuning
from deit.kernels.triton import candidates, configs

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "attention": {"head_dim": 64, "tokens": 197, "tma": True},
    "attention_bwd": {"head_dim": 64, "tokens": 197, "tma": True},
    "linear": {"width": 768, "depth": 192},
    "norm_panel": {"width": 768, "depth": 192},
    "input_gradient": {"width": 768, "depth": 192, "gelu": True},
    "weight_gradient": {"width": 768, "depth": 192},
    "gelu_mlp": {"dim": 192},
    "fp8_product": {"width": 768, "depth": 256},
    "layer_norm": {"dim": 192},
    "layer_norm_bwd": {"dim": 192},
    "patch_embed": {"dim": 192},
    "patch_embed_bwd": {"dim": 192},
}
LINEAR = {"arch": 90, "dtype": torch.bfloat16, "width": 768, "depth": 768}
ENTRY = "linear(arch=90, dtype=bfloat16, width=768, depth=768)"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and one H100 as far as `tables` can see."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test H100")
    monkeypatch.setattr(tuning, "_driver", lambda: "580.1")
    forget()
    yield tmp_path / "fused-deit"
    monkeypatch.undo()
    forget()


def forget():
    """What a process reads once, it must read again."""
    tuning.tables.cache_clear()
    tuning.versions.cache_clear()
    for factory in tuning.TUNABLE.values():
        factory._chosen.cache_clear()


def entry(config, microseconds=10.0):
    fields = None if config is None else dataclasses.asdict(config)
    return tuning.Entry(fields, microseconds, 12.0, 7, "2026-11-22T10:00:00+00:00")


def tuned(**changes):
    return dataclasses.replace(configs.linear.pinned(**LINEAR), **changes)


@pytest.mark.parametrize("factory", SIZES)
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pinned_defaults_are_legal_and_candidates_distinct(factory, arch, dtype):
    arguments = tuning.TUNABLE[factory].arguments(arch, dtype, **SIZES[factory])
    found = candidates.candidates(factory, arguments)
    assert found[0] == tuning.TUNABLE[factory].pinned(**arguments)
    assert len(set(found)) == len(found)
    for config in found:
        assert config is None or candidates.illegal(factory, config, arguments) == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_warps": 6}, "num_warps is 6, expected a power of two"),
        ({"num_warps": 64}, "num_warps is 64, expected 1 to 32"),
        ({"num_stages": 8}, "bytes of shared memory, sm_90 has 232448"),
        ({"num_warps": 4}, "256 accumulators a thread"),
        ({"tma": False}, "which runs as 128"),
        ({"block_n": 2048, "block_m": 16}, "a tile of 2048 x 64 for 768 x 768"),
    ],
)
def test_illegal(changes, why):
    assert why in "; ".join(candidates.illegal("linear", tuned(**changes), LINEAR))


@pytest.mark.parametrize("factory", ["layer_norm_bwd", "patch_embed_bwd"])
@pytest.mark.parametrize("programs", [0, -1, 33])
def test_no_programs_would_sum_nothing(factory, programs):
    arguments = tuning.TUNABLE[factory].arguments(90, torch.bfloat16, **SIZES[factory])
    config = dataclasses.replace(tuning.TUNABLE[factory].pinned(**arguments), programs=programs)
    found = candidates.illegal(factory, config, arguments)
    assert found == [f"programs is {programs}, expected 1 to 32"]


def test_configurations_hold_ints_and_bools_alone():
    """What `revive` checks an edited file for."""
    for factory in tuning.TUNABLE.values():
        assert {field.type for field in dataclasses.fields(factory.kind)} <= {"int", "bool"}
        assert factory.kind.__dataclass_params__.frozen


def test_tensor_copies_need_an_architecture_that_has_them():
    assert "tma" in candidates.illegal("linear", tuned(), {**LINEAR, "arch": 80})[0]


def test_the_pinned_default_without_a_file(cache):
    assert configs.linear(**LINEAR) == configs.linear.pinned(**LINEAR)
    assert configs.linear.explain(**LINEAR)[1] == "pinned default, never timed on a GPU"
    assert not cache.exists()  # looking for it makes nothing


def test_a_tuned_configuration_is_used_and_says_so(cache):
    better = tuned(block_n=128, num_stages=4)
    tuning.store("Test H100", {ENTRY: entry(better)})
    forget()
    assert configs.linear(**LINEAR) == better
    assert configs.linear(90, torch.bfloat16, 768, depth=768) == better
    assert configs.linear.explain(**LINEAR) == (
        better, "tuned 2026-11-22 on Test H100: 10.0 us, the best of 7"
    )  # fmt: skip
    other = {**LINEAR, "width": 384}
    assert configs.linear(**other) == configs.linear.pinned(**other)


def test_the_other_form_can_be_the_best(cache):
    arguments = {"arch": 90, "dtype": torch.bfloat16, "dim": 192}
    assert configs.gelu_mlp(**arguments) is not None
    tuning.store("Test H100", {tuning.entry_name("gelu_mlp", arguments): entry(None)})
    forget()
    assert configs.gelu_mlp(**arguments) is None


@pytest.mark.parametrize("name", ["torch", "triton", "driver", "kernels"])
def test_other_versions_are_ignored_with_the_reason(cache, monkeypatch, name):
    tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    now = {**tuning.versions(), name: "another"}
    forget()
    monkeypatch.setattr(tuning, "versions", lambda: now)
    config, evidence = configs.linear.explain(**LINEAR)
    assert config == configs.linear.pinned(**LINEAR)
    assert f"tuned with other versions: {name} " in evidence
    assert "now another" in evidence
    monkeypatch.undo()


def test_sets_of_other_versions_are_kept(cache, monkeypatch):
    real = tuning.versions()
    for number in range(6):
        monkeypatch.setattr(tuning, "versions", lambda n=number: {**real, "torch": f"3.{n}"})
        tuning.store("Test H100", {ENTRY: entry(tuned(), number)})
    sets = json.loads(tuning.path("Test H100").read_text())["sets"]
    assert [s["versions"]["torch"] for s in sets] == ["3.5", "3.4", "3.3", "3.2"]
    monkeypatch.setattr(tuning, "versions", lambda: real)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"num_warps": 6}, "num_warps is 6"),
        ({"num_stages": "3"}, "illegal"),
        ({"block_m": 0}, "block_m is 0, expected a power of two"),
        ({"tma": 1}, "illegal"),
        ({"num_warps": True}, "illegal"),
        ({"surprise": 1}, "illegal"),
    ],
)
def test_an_edited_entry_that_cannot_run_is_not_used(cache, config, why):
    fields = dataclasses.asdict(tuned()) | config
    tuning.store("Test H100", {ENTRY: tuning.Entry(fields, 1.0, 2.0, 3, "2026-11-22")})
    forget()
    found, evidence = configs.linear.explain(**LINEAR)
    assert found == configs.linear.pinned(**LINEAR)
    assert why in evidence


@pytest.mark.parametrize("text", ["", "{", '{"schema": 2}', '{"schema": 1, "sets": [1]}', "[]"])
def test_a_broken_file_is_ignored_and_set_aside(cache, text):
    file = tuning.path("Test H100")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"Test_H100.json cannot be read: .*; the pinned defaults"):
        assert configs.linear(**LINEAR) == configs.linear.pinned(**LINEAR)
    assert "cannot be read" in configs.linear.explain(**LINEAR)[1]
    assert len(list(tuning.reasons())) == 1
    tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    assert file.with_suffix(".unreadable").read_text() == text
    forget()
    assert configs.linear(**LINEAR) == tuned(block_n=128)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"microseconds": "fast"}, "expected microseconds, candidates and a date"),
        ({"date": None}, "expected microseconds, candidates and a date"),
        ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
    ],
)
def test_an_entry_that_is_none_is_reported_and_not_used(cache, change, why):
    file = tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    document = json.loads(file.read_text())
    document["sets"][0]["entries"][ENTRY] |= change
    file.write_text(json.dumps(document))
    forget()
    with pytest.warns(UserWarning, match="cannot be read"):
        found, evidence = configs.linear.explain(**LINEAR)
    assert found == configs.linear.pinned(**LINEAR)
    assert why in evidence


def test_a_file_that_may_not_be_read_is_reported(cache, monkeypatch):
    file = tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    forget()

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(UserWarning, match="Permission denied"):
        assert "Permission denied" in configs.linear.explain(**LINEAR)[1]
    assert file.exists()


def test_switched_off(cache, monkeypatch):
    tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    forget()
    monkeypatch.setenv("FUSED_DEIT_TUNED", "0")
    assert configs.linear(**LINEAR) == configs.linear.pinned(**LINEAR)


def test_concurrent_processes_lose_nothing(cache):
    """Three processes of ten stores each, readers between them: every entry is there at the end."""
    code = (
        "import sys; from deit.kernels import tuning\n"
        "for i in range(10):\n"
        "    tuning.store('Busy', {f'{sys.argv[1]}-{i}': tuning.Entry(None, 1.0, None, 1, '')})\n"
        "    assert not tuning.load('Busy').ignored\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(n)], cwd=ROOT) for n in range(3)]
    assert [process.wait(120) for process in running] == [0] * 3
    (only,) = json.loads(tuning.path("Busy").read_text())["sets"]
    assert set(only["entries"]) == {f"{n}-{i}" for n in range(3) for i in range(10)}
    assert {p.suffix for p in cache.iterdir()} == {".json", ".lock"}  # no leftovers
