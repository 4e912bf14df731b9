"""Tuned configurations: what is legal, how they are kept, and when they are used."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deit.kernels.device import tuning
from deit.kernels.engine import cache_files
from deit.kernels.gelu_mlp import tiles as gelu_mlp_tiles
from deit.kernels.linear import tiles as linear_tiles
from deit.kernels.prove import calls
from deit.kernels.prove import tuned as tuned_problems

ROOT = Path(__file__).resolve().parents[4]
# Factory -> the sizes that it chooses by: those that `deit tune` measures, and of some others.
_TERMS = tuned_problems.Terms(calls.Size(2, 197, 192), torch.bfloat16, torch.device("meta"))
SIZES = {
    problem.factory: {k: v for k, v in problem.arguments.items() if k not in ("arch", "dtype")}
    for problem in tuned_problems.tuned(_TERMS, training=True)
} | {
    "input_gradient": {"width": 768, "depth": 192, "gelu": True},
    "fp8_product": {"width": 768, "depth": 256},
    "patch_embed_bwd": {"dim": 192},
    "rotary_attention": {"head_dim": 64},
    "rotary_attention_bwd": {"head_dim": 64},
}
LINEAR = {"arch": 90, "dtype": torch.bfloat16, "width": 768, "depth": 768}
ENTRY = "linear(arch=90, dtype=bfloat16, width=768, depth=768, rows=4096, multiprocessors=132)"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and one H100 as far as `tables` can see."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test H100")
    monkeypatch.setattr(tuning, "driver", lambda: "580.1")
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
    return dataclasses.replace(linear_tiles.linear.pinned(**LINEAR), **changes)


@pytest.mark.parametrize("factory", SIZES)
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pinned_defaults_are_legal_and_candidates_distinct(factory, arch, dtype):
    arguments = tuning.TUNABLE[factory].arguments(arch, dtype, **SIZES[factory])
    found = tuning.TUNABLE[factory].candidates(arguments)
    assert found[0] == tuning.TUNABLE[factory].pinned(**arguments)
    assert len(set(found)) == len(found)
    for config in found:
        assert config is None or config.illegal(arguments) == []


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
    assert why in "; ".join(tuned(**changes).illegal(LINEAR))


@pytest.mark.parametrize(
    ("factory", "sizes", "changes", "why"),
    [
        ("patch_embed", {"dim": 768}, {"num_warps": 4}, "128 accumulators a thread"),
        ("layer_norm", {"dim": 768}, {"rows": 16, "num_warps": 2}, "256 elements a thread"),
        ("fp8_product", {"width": 768, "depth": 768}, {"block_n": 256}, "192 sums a thread"),
        ("attention_bwd", {"head_dim": 64, "tokens": 197, "tma": True},
         {"whole_head": False, "resident": 128, "num_warps": 4}, "192 sums a thread"),
        ("gelu_mlp", {"dim": 192}, {"block_h": 128}, "bytes of shared memory"),
    ],
)  # fmt: skip
def test_what_spills_is_no_candidate(factory, sizes, changes, why):
    """Each was compiled for sm_90 and spilled, or found no shared memory."""
    arguments = tuning.TUNABLE[factory].arguments(90, torch.bfloat16, **sizes)
    wrong = dataclasses.replace(tuning.TUNABLE[factory].pinned(**arguments), **changes)
    assert why in "; ".join(wrong.illegal(arguments))


@pytest.mark.parametrize("factory", SIZES)
def test_absurd_numbers_are_illegal_everywhere(factory):
    arguments = tuning.TUNABLE[factory].arguments(90, torch.bfloat16, **SIZES[factory])
    config = next(c for c in tuning.TUNABLE[factory].candidates(arguments) if c is not None)
    for field in dataclasses.fields(config):
        for value in (0, -1, 2**13, 2**40, 2**70) if field.type == "int" else ():
            changed = dataclasses.replace(config, **{field.name: value})
            assert changed.illegal(arguments), (field.name, value)


@pytest.mark.parametrize("factory", ["layer_norm_bwd", "patch_embed_bwd"])
@pytest.mark.parametrize("programs", [0, -1, 33])
def test_no_programs_would_sum_nothing(factory, programs):
    arguments = tuning.TUNABLE[factory].arguments(90, torch.bfloat16, **SIZES[factory])
    config = dataclasses.replace(tuning.TUNABLE[factory].pinned(**arguments), programs=programs)
    found = config.illegal(arguments)
    assert found == [f"programs is {programs}, expected 1 to 32"]


def test_configurations_hold_ints_and_bools_alone():
    """`revive` checks an edited file for ints and bools. No field is of another type."""
    for factory in tuning.TUNABLE.values():
        assert {field.type for field in dataclasses.fields(factory.kind)} <= {"int", "bool"}
        assert factory.kind.__dataclass_params__.frozen


def test_tensor_copies_need_an_architecture_that_has_them():
    assert "tma" in tuned().illegal({**LINEAR, "arch": 80})[0]


def test_the_pinned_default_without_a_file(cache):
    assert linear_tiles.linear(**LINEAR) == linear_tiles.linear.pinned(**LINEAR)
    assert linear_tiles.linear.explain(**LINEAR)[1] == "pinned default, not tuned on this GPU"
    assert not cache.exists()  # looking for it makes nothing


def test_a_tuned_configuration_is_used_and_says_so(cache):
    better = tuned(block_n=128, num_stages=4)
    tuning.store("Test H100", {ENTRY: entry(better)})
    forget()
    assert linear_tiles.linear(**LINEAR) == better
    assert linear_tiles.linear(90, torch.bfloat16, 768, depth=768) == better
    assert linear_tiles.linear.explain(**LINEAR) == (
        better, "tuned 2026-11-22 on Test H100: 10.0 us, the best of 7"
    )  # fmt: skip
    other = {**LINEAR, "width": 384}
    assert linear_tiles.linear(**other) == linear_tiles.linear.pinned(**other)


def test_the_other_form_can_be_the_best(cache):
    arguments = tuning.TUNABLE["gelu_mlp"].arguments(90, torch.bfloat16, 192)
    assert gelu_mlp_tiles.gelu_mlp(**arguments) is not None
    tuning.store("Test H100", {tuning.entry_name("gelu_mlp", arguments): entry(None)})
    forget()
    assert gelu_mlp_tiles.gelu_mlp(**arguments) is None


@pytest.mark.parametrize("name", ["torch", "triton", "driver", "kernels"])
def test_other_versions_are_ignored_with_the_reason(cache, monkeypatch, name):
    tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    now = {**tuning.versions(), name: "another"}
    forget()
    monkeypatch.setattr(tuning, "versions", lambda: now)
    config, evidence = linear_tiles.linear.explain(**LINEAR)
    assert config == linear_tiles.linear.pinned(**LINEAR)
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
        ({"block_m": 8}, "block_m is 8, expected 16 to 4096"),
        ({"block_k": 2**40}, "block_k is 1099511627776, expected 16 to 4096"),
        ({"group": 2**40}, "group is 1099511627776, expected 1 to 64"),
        ({"tma": 1}, "illegal"),
        ({"num_warps": True}, "illegal"),
        ({"surprise": 1}, "illegal"),
    ],
)
def test_an_edited_entry_that_cannot_run_is_not_used(cache, config, why):
    fields = dataclasses.asdict(tuned()) | config
    tuning.store("Test H100", {ENTRY: tuning.Entry(fields, 1.0, 2.0, 3, "2026-11-22")})
    forget()
    found, evidence = linear_tiles.linear.explain(**LINEAR)
    assert found == linear_tiles.linear.pinned(**LINEAR)
    assert why in evidence


SETS = '{"schema": 1, "device": "Test H100", "sets": '
BROKEN = [
    "", "{", "[]", "null", "[" * 100_000, '{"schema": 2}', '{"schema": true, "sets": []}',
    '{"schema": 1, "device": "Another", "sets": []}',
    *(f"{SETS}{sets}}}" for sets in (
        "{}", "null", "[1]", "[{}]", '[{"versions": {}}]',
        '[{"versions": [], "entries": {}}]', '[{"versions": {"torch": 2}, "entries": {}}]',
        '[{"versions": {}, "entries": []}]', '[{"versions": {}, "entries": {"a": 1}}]',
        '[{"versions": {}, "entries": {"a": {"config": []}}}]', "[" * 500 + "]" * 500,
    )),
    SETS + '[], "sets": []}',
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_ignored_and_set_aside(cache, text):
    file = tuning.path("Test H100")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"Test_H100.json cannot be read: .*; the pinned defaults"):
        assert linear_tiles.linear(**LINEAR) == linear_tiles.linear.pinned(**LINEAR)
    assert "cannot be read" in linear_tiles.linear.explain(**LINEAR)[1]
    assert len(list(tuning.reasons())) == 1
    tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    assert file.with_suffix(".unreadable").read_text() == text
    forget()
    assert linear_tiles.linear(**LINEAR) == tuned(block_n=128)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"microseconds": "fast"}, ").microseconds: expected a number from 0 to 1e+09; got 'fast'"),
        ({"microseconds": True}, "microseconds: expected a number from 0 to 1e+09; got True"),
        ({"microseconds": -1.0}, "microseconds: expected a number from 0 to 1e+09; got -1.0"),
        ({"microseconds": 1e300}, "microseconds: expected a number from 0 to 1e+09; got 1e+300"),
        ({"microseconds": float("inf")}, "microseconds: expected a finite number; got inf"),
        ({"pinned_microseconds": "a"}, "pinned_microseconds: expected a number"),
        ({"candidates": 0}, "candidates: expected a whole number from 1 to 1048576; got 0"),
        ({"candidates": 10**400}, "candidates: expected a finite number"),
        ({"date": None}, "date: expected a text; got None"),
        ({"config": [1]}, "config: expected a JSON object; got [1]"),
        ({"surprise": 1}, "surprise: expected no field but config, microseconds"),
    ],
)
def test_an_entry_that_is_none_is_reported_and_not_used(cache, change, why):
    file = tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    document = json.loads(file.read_text())
    document["sets"][0]["entries"][ENTRY] |= change
    file.write_text(json.dumps(document))
    forget()
    with pytest.warns(UserWarning, match="cannot be read"):
        found, evidence = linear_tiles.linear.explain(**LINEAR)
    assert found == linear_tiles.linear.pinned(**LINEAR)
    assert why in evidence


def test_a_file_that_may_not_be_read_is_reported(cache, monkeypatch):
    file = tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    forget()

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache_files.json_files, "read", refuse)
    with pytest.warns(UserWarning, match="Permission denied"):
        assert "Permission denied" in linear_tiles.linear.explain(**LINEAR)[1]
    assert file.exists()


# ---- a folder that others may write


def test_a_link_by_the_locks_name_empties_nothing(cache):
    cache.mkdir()
    treasure = cache.parent / "treasure"
    treasure.write_text("years of work")
    tuning.path("Test H100").with_suffix(".lock").symlink_to(treasure)
    with pytest.raises(OSError, match=r"Test_H100\.lock"):
        tuning.store("Test H100", {ENTRY: entry(tuned())})
    assert treasure.read_text() == "years of work"
    assert not tuning.path("Test H100").exists()


def test_a_link_to_nowhere_makes_no_file(cache):
    cache.mkdir()
    tuning.path("Test H100").with_suffix(".lock").symlink_to(cache.parent / "made")
    with pytest.raises(OSError, match=r"Test_H100\.lock"):
        tuning.store("Test H100", {ENTRY: entry(tuned())})
    assert not (cache.parent / "made").exists()


def test_a_fifo_by_the_locks_name_is_not_waited_for(cache):
    cache.mkdir()
    os.mkfifo(tuning.path("Test H100").with_suffix(".lock"))
    with pytest.raises(OSError, match="expected a regular file; got a FIFO"):
        tuning.store("Test H100", {ENTRY: entry(tuned())})


def test_a_link_by_the_files_name_is_set_aside_and_its_target_left(cache):
    elsewhere = cache.parent / "elsewhere.json"
    stored = tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    stored.rename(elsewhere)
    stored.symlink_to(elsewhere)
    before = elsewhere.read_text()
    forget()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert linear_tiles.linear(**LINEAR) == linear_tiles.linear.pinned(**LINEAR)
    tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128, num_stages=4))})
    assert elsewhere.read_text() == before
    assert not stored.is_symlink()
    forget()
    assert linear_tiles.linear(**LINEAR) == tuned(block_n=128, num_stages=4)


def test_another_users_files_are_not_taken(cache, monkeypatch):
    tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    forget()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    real = os.fstat

    def another(descriptor):  # of a user that is neither this one nor root
        found = real(descriptor)
        return os.stat_result((*found[:4], owner + 2, *found[5:10]))

    monkeypatch.setattr(os, "fstat", another)
    with pytest.warns(UserWarning, match=rf"cannot be read: .*a file of user {owner + 2}"):
        assert linear_tiles.linear(**LINEAR) == linear_tiles.linear.pinned(**LINEAR)
    with pytest.raises(PermissionError, match=rf"a file of user {owner + 2}.*lock"):
        tuning.store("Test H100", {ENTRY: entry(tuned())})


def test_the_folder_and_its_files_are_this_users_alone(cache):
    stored = tuning.store("Test H100", {ENTRY: entry(tuned())})
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in (stored, stored.with_suffix(".lock"))} == {0o600}


def test_switched_off(cache, monkeypatch):
    tuning.store("Test H100", {ENTRY: entry(tuned(block_n=128))})
    forget()
    monkeypatch.setenv("FUSED_DEIT_TUNED", "0")
    assert linear_tiles.linear(**LINEAR) == linear_tiles.linear.pinned(**LINEAR)


def test_concurrent_processes_lose_nothing(cache):
    """Three processes of ten stores each, readers between them: every entry is there at the end."""
    code = (
        "import sys; from deit.kernels.device import tuning\n"
        "for i in range(10):\n"
        "    tuning.store('Busy', {f'{sys.argv[1]}-{i}': tuning.Entry(None, 1.0, None, 1, '')})\n"
        "    assert not tuning.load('Busy').ignored\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(n)], cwd=ROOT) for n in range(3)]
    assert [process.wait(120) for process in running] == [0] * 3
    (only,) = json.loads(tuning.path("Busy").read_text())["sets"]
    assert set(only["entries"]) == {f"{n}-{i}" for n in range(3) for i in range(10)}
    assert {p.suffix for p in cache.iterdir()} == {".json", ".lock"}  # no leftovers
