"""What was measured: for whom it speaks, where it is kept, what "auto" runs by it."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from deit.fused_vit import report
from deit.kernels import attention, explain, layer_norm, linear, measure
from deit.kernels.engine import cache_files, device_key, dispatch, measured, native, verdicts
from deit.kernels.engine.json_files import Fields
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.engine.problems import Problem, TensorSpec
from deit.kernels.engine.verdicts import Refused, Rival, Timed, Verdict
from deit.kernels.vit_block import served

CPU = torch.device("cpu")
KEY = "Acme family 1 model 1, AVX2"
built = pytest.mark.skipif(bool(native.why_not("cpu")), reason="the C++ library is not built")


@pytest.fixture
def unknown(tmp_path, monkeypatch):
    """A machine that nobody has seen, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(device_key.PRETENDED, KEY)
    measured.warn_unmeasured.cache_clear()
    verdicts.forget()
    yield device_key.device_key(CPU)
    monkeypatch.undo()
    verdicts.forget()


def problem(rows=8, dtype=torch.float32, width=64, *, training=False):
    x, w = TensorSpec((rows, width), dtype, training), TensorSpec((width,), dtype, training)
    return Problem("layer_norm", training, (x, w, w, 1e-6))


def verdict(of, winner="cpu", ratio=2.0, **changes):
    key = device_key.device_key(CPU)
    order = () if winner == "reference" else (winner,)
    candidates = {
        "reference": Timed(20.0, 1.0, 1.0, 1.0),
        "cpu": Timed(20.0 / ratio, ratio, ratio * 0.9, ratio * 1.1, 0.5),
        "triton": Refused("ended with SIGSEGV"),
    }
    return dataclasses.replace(
        Verdict(of, winner, candidates, "2026-01-31T10:00:00+00:00", str(key),
                device_key.versions("cpu"), order),
        **changes,
    )  # fmt: skip


def chosen(rows=8, width=64, dtype=torch.float32):
    x, w = torch.randn(rows, width, dtype=dtype), torch.ones(width, dtype=dtype)
    return dispatch.choose(OPERATORS["layer_norm"], (x, w, w, 1e-6), "auto")


# ---- keys


@pytest.mark.parametrize(
    "key",
    [
        device_key.DeviceKey("cpu", "AMD", 26, 2, ("AVX512", "VNNI"), 8),
        device_key.DeviceKey("cpu", "Apple M1", None, None, ("NEON",), 1),
        device_key.DeviceKey("cpu", "Arm", 0xD40, 1, ("NEON", "DOTPROD", "BF16", "I8MM"), 4),
        device_key.DeviceKey("cpu", "Acme", 3, None, (), 2),
    ],
)
def test_a_processors_key_is_read_back_from_its_text(key):
    assert device_key.parse(str(key), 99) == key


def test_a_key_names_the_threads_and_changes_with_them(unknown, threads):
    threads(1)
    assert str(device_key.device_key(CPU)) == f"{KEY}, 1 thread"
    threads(2)
    assert str(device_key.device_key(CPU)) == f"{KEY}, 2 threads"


def test_a_pretended_key_that_is_none_is_named(monkeypatch):
    with pytest.raises(ValueError, match="FUSED_DEIT_DEVICE_KEY: expected a processor as in"):
        device_key.parse(",", 1)


def test_sources_are_hashed_by_what_they_say(tmp_path):
    file = tmp_path / "a.py"

    def of(text, built="abc"):
        file.write_text(text)
        return device_key.sources_hash([file], built)

    said = of('"""What it is."""\ndef f(x):\n    "why"\n    return x + 1  # one\n')
    assert of('"""Else."""\n\n\ndef f(x):\n    "how"\n    return (x + 1)\n') == said
    assert of("def f(x):\n    return x + 2\n") != said
    assert of('"""What it is."""\ndef f(x):\n    "why"\n    return x + 1\n', "def") != said


def test_sources_have_one_hash_under_every_python(tmp_path):
    file = tmp_path / "kernels" / "a.py"
    file.parent.mkdir()
    file.write_text("class A(B):\n    def f(self, x=None):\n        return g(f'{x}', *x)\n")
    assert device_key.sources_hash([file], "abc") == "4105a0741845b95b"


# ---- problems and classes


def test_a_problem_is_read_back_from_json():
    qkv = torch.randn(2, 5, 192, requires_grad=True)
    with dispatch.recording() as found:
        attention(qkv.to("meta"), 1, key_bias=torch.zeros(2, 5, device="meta"))
        attention(qkv, 1)
        with torch.no_grad():
            attention(qkv, 1)
            attention(qkv, 1)
    assert [one.training for one in found] == [True, True, False]
    for one in found:
        read = Problem.revive(Fields(json.loads(json.dumps(one.plain())), "a"))
        assert read == one
        assert read.shape_class == one.shape_class
    sizes = [one.shape_class.sizes for one in found]
    assert sizes == [(64, 1, True), (64, 1, False), (64, 1, False)]
    assert (found[0].shape_class.rows, found[0].shape_class.tokens) == (3, 2)


def test_recording_notes_each_call_once_and_named_ones_too():
    x, weight = torch.randn(4, 64), torch.randn(8, 64)
    with dispatch.recording() as outer:
        linear(x, weight, impl="reference")
        with dispatch.recording() as inner:
            layer_norm(x, torch.ones(64))
        linear(x, weight)
    linear(x, weight)
    assert [one.operator for one in outer] == ["linear"]
    assert [one.operator for one in inner] == ["layer_norm"]


def test_nothing_is_shipped_for_arm_whose_kernels_were_never_timed():
    key = device_key.parse("Arm family 3392 model 1, NEON DOTPROD BF16 I8MM SVE", 4)
    assert measured.prior(key) is None


# ---- what runs


@built
def test_without_verdicts_pytorch_runs_and_a_warning_says_so_once(unknown):
    with pytest.warns(UserWarning, match=rf"nothing has been measured on {KEY}.*deit tune"):
        assert chosen() == "reference"
    assert chosen() == "reference"
    text = str(explain("layer_norm", torch.randn(8, 64), torch.ones(64)))
    assert "auto runs reference (not measured; fuse(model, measure='now') or `deit tune`" in text


@built
def test_a_verdict_speaks_for_its_class_and_the_nearest_rows(unknown):
    verdicts.use([verdict(problem(8)), verdict(problem(1024), "reference")])
    assert [chosen(rows) for rows in (1, 8, 15, 16, 128, 1024, 100_000)] == [
        "cpu", "cpu", "cpu", "cpu", "reference", "reference", "reference",
    ]  # fmt: skip
    assert chosen(8, width=32) == "reference"
    assert chosen(8, dtype=torch.bfloat16) == "reference"
    with torch.enable_grad():
        x = torch.randn(8, 64, requires_grad=True)
        assert explain("layer_norm", x, torch.ones(64)).chosen == "reference"


@built
def test_a_traced_call_takes_the_largest_rows_and_leaves_the_batch_open(unknown):
    verdicts.use([verdict(problem(8)), verdict(problem(1024), "reference")])
    weight = torch.ones(64)
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.code))
        return graph.forward

    def graph_of():
        x = torch.randn(8, 64)
        torch._dynamo.mark_dynamic(x, 0)  # an error where the trace closes it
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: layer_norm(x, weight), backend=backend, fullgraph=True)
        for each in (x, torch.randn(9, 64), torch.randn(600, 64)):
            compiled(each)
        (graph,) = graphs
        graphs.clear()
        return graph

    assert "deit_cpu" not in graph_of()
    verdicts.use([verdict(problem(1024)), verdict(problem(8), "reference")])
    assert "deit_cpu" in graph_of()


@built
def test_a_winner_that_cannot_run_leaves_the_call_to_the_next(unknown):
    verdicts.use([verdict(problem(), "triton", order=("triton", "cpu"))])
    assert chosen() == "cpu"


@built
def test_a_block_runs_whole_only_where_it_beats_its_parts(unknown):
    x, weight = torch.randn(1, 8, 64), torch.randn(192, 64)
    tensors = {
        "norm1_weight": torch.ones(64), "norm1_bias": None, "qkv_weight": weight, "qkv_bias": None,
        "proj_weight": torch.randn(64, 64), "proj_bias": None, "norm2_weight": torch.ones(64),
        "norm2_bias": None, "w1": torch.randn(256, 64), "b1": None, "w2": torch.randn(64, 256),
        "b2": None,
    }  # fmt: skip
    operator = OPERATORS["vit_block"]
    of = Problem.of(operator, operator.prepare(x, **tensors, num_heads=1))
    for wins in (True, False):
        rival = Rival("rival", 30.0, 1.0, 0.9, 1.1, wins)
        verdicts.use([verdict(of, rival=rival)])
        assert served(x, weight, lambda: (256, 1)) is wins
        assert dispatch.expected("vit_block", "auto", CPU) == ("cpu" if wins else "reference")
        assert explain("vit_block", x, **tensors, num_heads=1).chosen == "cpu"
        assert not served(x, weight, lambda: (128, 1))


# ---- what is shipped


def test_what_is_shipped_is_for_a_family_and_its_instruction_sets():
    of = lambda text: measured.prior(device_key.parse(text, 2))
    assert of("AMD family 26 model 2, AVX512 VNNI BF16").label == "AMD family 26, AVX512"
    for other in (
        "AMD family 26 model 2, AVX2",
        "AMD family 23 model 1, AVX2",
        "Intel family 26, AVX512",
    ):
        assert of(other) is None


@built
def test_a_file_of_priors_speaks_for_its_kind_of_processor(unknown, monkeypatch, tmp_path):
    found = [verdict(problem(8)), verdict(problem(1024), "reference")]
    document = measured.document(unknown, [one.plain() for one in found])
    (tmp_path / "acme.json").write_text(json.dumps(document))
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    measured._files.cache_clear()
    verdicts.forget()
    try:
        assert (chosen(8), chosen(1024)) == ("cpu", "reference")
        text = str(explain("layer_norm", torch.randn(8, 64), torch.ones(64)))
        assert "auto runs cpu (shipped for Acme family 1, AVX2 2026-01-31: 2.00 times" in text
        assert measure.missing([problem(8), problem(8, width=32)], CPU) == [problem(8, width=32)]
        said = report.evidence((), CPU, ["layer_norm", "linear"])  # of the second the file has none
        assert said["layer_norm"].source == "shipped for Acme family 1, AVX2"
        assert said["linear"].source == verdicts.NOT_MEASURED
        verdicts.use([verdict(problem(8), "reference")])  # what was measured here stands above
        assert chosen(8) == "reference"
    finally:
        measured._files.cache_clear()


@pytest.mark.parametrize("path", sorted(measured.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_the_shipped_files_are_read(path):
    prior = measured._prior(path)
    found = verdicts.revive_all(*measured.shipped(prior))
    assert found
    for one in found:
        assert one.shape_class.operator in OPERATORS
        assert set(one.order) <= set(one.candidates)


# ---- a simulated GPU


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU as far as is asked about it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Test H100")
    monkeypatch.setattr(device_key, "driver", lambda: "580.1")
    monkeypatch.setattr(device_key, "forget", lambda: device_key._key.cache_clear())
    measured.warn_unmeasured.cache_clear()
    verdicts.forget()
    yield torch.device("cuda", 0)
    monkeypatch.undo()
    verdicts.forget()


def standing(device, operator, dtype, sizes, rows, *, training=False):
    return verdicts.of_rows(operator, device, dtype, training, sizes, rows, None)


def test_a_gpus_verdicts_are_its_own(gpu, monkeypatch):
    key = device_key.device_key(gpu)
    one = verdict(problem(1 << 15, torch.bfloat16, 768), "triton", order=("triton",),
                  device=str(key), versions=device_key.versions("cuda"))  # fmt: skip
    verdicts.store(key, [one])
    verdicts.forget()
    assert standing(gpu, "layer_norm", torch.bfloat16, (768,), 15) == ("triton",)
    monkeypatch.setattr(device_key, "driver", lambda: "590.2")
    verdicts.forget()
    assert standing(gpu, "layer_norm", torch.bfloat16, (768,), 15) == ()


def test_an_unknown_gpu_is_announced_and_left_to_pytorch(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 9))
    verdicts.forget()
    with pytest.warns(UserWarning, match=r"nothing has been measured on Test H100, .* 9\.9"):
        assert verdicts.of_any("attention", gpu, torch.bfloat16, False) == ()


# ---- the files


def test_verdicts_are_kept_and_read_again(unknown):
    path = verdicts.store(unknown, [verdict(problem(8)), verdict(problem(16), "reference")])
    assert path == verdicts.path(unknown)
    before = verdicts.in_force(CPU)
    verdicts.forget()
    assert sorted(map(str, verdicts.in_force(CPU))) == sorted(map(str, before))
    assert len(before) == 2
    assert before[0].plain() == Verdict.revive(Fields(before[0].plain(), "a")).plain()


@pytest.mark.parametrize("name", ["torch", "kernels"])
def test_verdicts_of_other_versions_are_not_used(unknown, monkeypatch, name):
    verdicts.store(unknown, [verdict(problem())])
    now = {**device_key.versions("cpu"), name: "another"}
    verdicts.forget()
    monkeypatch.setattr(device_key, "versions", lambda _: now)
    assert verdicts.in_force(CPU) == []
    assert f"measured with other versions: {name} " in verdicts.table_of(CPU).ignored


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1, "device": "Another", "sets": []}', "[]"])
def test_a_broken_or_foreign_file_is_said_and_set_aside(unknown, text):
    path = verdicts.path(unknown)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="verdicts-.* cannot be read: .*; it is not used"):
        assert verdicts.in_force(CPU) == []
    verdicts.store(unknown, [verdict(problem())])
    assert path.with_suffix(".unreadable").read_text() == text
    verdicts.forget()
    assert len(verdicts.in_force(CPU)) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"winner": "cudnn"}, "winner: expected 'reference' or 'cpu'"),
        ({"order": ["cudnn"]}, "order: expected some of reference, cpu, triton, cuda"),
        ({"order": "cpu"}, "order: expected an array"),
        ({"candidates": {"cpu": {"microseconds": -1}}}, "microseconds: expected a number from 0"),
        ({"candidates": {"cpu": {"refused": 3}}}, "refused: expected a text"),
        (
            {"problem": {"operator": 3, "training": False, "arguments": []}},
            "operator: expected a text",
        ),
        ({"surprise": 1}, "surprise: expected no field but problem, winner"),
    ],
)
def test_an_entry_that_is_none_is_named(unknown, change, why):
    with pytest.raises(ValueError, match=why):
        verdicts.revive_all([{**verdict(problem()).plain(), **change}], "run")


@built
@pytest.mark.parametrize("what", ["a file", "no disk"])
def test_what_cannot_be_kept_holds_in_this_process(unknown, monkeypatch, tmp_path, what):
    if what == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        (tmp_path / "file").write_text("")
    else:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"verdicts-Acme.* cannot be written .*measured again"):
        assert verdicts.store(unknown, [verdict(problem())]) is None
    assert chosen() == "cpu"
    if what == "no disk":
        assert not list(Path(tmp_path / "fused-deit").glob("*.json"))


@built
def test_what_a_process_was_given_stands_above_the_files_or_alone(unknown):
    verdicts.store(unknown, [verdict(problem(8)), verdict(problem(1024))])
    verdicts.forget()
    assert verdicts.use([verdict(problem(8), "reference")]) == []
    assert (chosen(8), chosen(1024)) == ("reference", "cpu")
    verdicts.use([], alone=True)
    assert (chosen(8), chosen(1024)) == ("reference", "reference")
    assert verdicts.in_force(CPU) == []


def test_verdicts_of_another_device_or_versions_are_not_taken(unknown):
    elsewhere = verdict(problem(), device="Other family 2, 2 threads")
    older = verdict(problem(16), versions={"torch": "1.0"})
    why = verdicts.use([elsewhere, older])
    assert "measured on Other family 2, 2 threads, which is not here" in why[0]
    assert "measured with other versions" in why[1]
    assert verdicts.in_force(CPU) == []


def test_an_operator_of_a_package_that_is_not_imported_costs_the_others_nothing(unknown):
    strange = verdict(dataclasses.replace(problem(), operator="conv"))
    path = verdicts.store(unknown, [verdict(problem())])
    document = json.loads(path.read_text())
    document["sets"][0]["entries"]["conv"] = strange.plain()
    path.write_text(json.dumps(document))
    verdicts.forget()
    assert [one.problem.operator for one in verdicts.in_force(CPU)] == ["layer_norm"]
    assert "not known here" in verdicts.use([strange])[0]
    verdicts.store(unknown, [verdict(problem(1024))])
    assert "conv" in path.read_text()


def test_missing_is_what_nothing_speaks_for(unknown):
    verdicts.use([verdict(problem(8))])
    near, far, wide = problem(16), problem(1024), problem(8, width=32)
    assert measure.missing([problem(8), near, far, far, wide], CPU) == [far, wide]


@pytest.mark.parametrize(
    ("interval", "again"), [((0.8, 2.5), True), ((0.98, 1.04), False), ((0.7, 1.01), False)]
)
def test_what_a_busy_machine_left_undecided_is_asked_again_in_an_hour(unknown, interval, again):
    """A near tie of a quiet machine stands, and so does what a run's folder gives."""
    undecided = verdict(problem(8), "reference", 1.1)
    undecided.candidates["cpu"] = Timed(18.0, 1.0, *interval, 0.5)
    verdicts.store(unknown, [undecided])
    assert measure.missing([problem(8)], CPU) == ([problem(8)] if again else [])
    verdicts.store(unknown, [dataclasses.replace(undecided, date=cache_files.now())])
    assert measure.missing([problem(8)], CPU) == []
    verdicts.use([undecided], alone=True)
    assert measure.missing([problem(8)], CPU) == []


def test_missing_is_nothing_where_a_table_speaks():
    assert measure.missing([problem(8), problem(training=True)], CPU) == []
