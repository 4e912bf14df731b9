"""When fuse() measures, and what comes of it."""

import copy
import dataclasses
import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import fusing
import pytest
import standing
import torch
from fusing import make
from standing import CPU, outcome
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deit.fused_vit import calls, fuse, fused, measuring, records, requests, whole_models
from deit.fused_vit.modules import Fused
from deit.kernels.engine import device_key, native, verdicts

needs_library = pytest.mark.skipif(bool(native.why_not("cpu")), reason="no C++ library")


@pytest.fixture
def unknown(tmp_path):
    with standing.unknown_machine(tmp_path) as patch:
        yield patch


@pytest.fixture
def asked(unknown):
    """What is asked of the operators' measuring, which finds C++ fastest; races find 1.5."""
    unknown.setattr(whole_models, "race", lambda *_, **__: outcome(1.5))
    return standing.stand_in(unknown, measuring)


def is_fused(model):
    return any(isinstance(module, Fused) for module in model.modules())


BAD = {
    "an unknown measure": ({"measure": "later"}, ValueError, "measure: expected one of .*'later'"),
    "no seconds": ({"budget": 0}, ValueError, "budget: expected a positive number.*got 0"),
    "NaN": ({"budget": float("nan")}, ValueError, "budget: expected a positive.*got nan"),
    "for ever": ({"budget": float("inf")}, ValueError, "budget: expected a positive.*got inf"),
    "a flag": ({"budget": True}, TypeError, "budget: expected seconds; got bool"),
    "no tensor": ({"example": [1]}, TypeError, "example: expected a tensor.*got list"),
    "no image": ({"example": torch.zeros(0, 3, 32, 32)}, ValueError, "example: .*at least one"),
    "one axis less": ({"example": torch.zeros(3, 32, 32)}, ValueError, r"images \[B, 3, 32, 32\]"),
    "channels": ({"example": torch.zeros(1, 4, 32, 32)}, ValueError, r"example: .*\[1, 4, 32, 32"),
    "pixels": ({"example": torch.zeros(1, 3, 40, 40)}, ValueError, r"example: .*\[1, 3, 40, 40"),
    "dtype": ({"example": torch.zeros(1, 3, 32, 32).half()}, ValueError, "example: .*float16"),
    "device": ({"example": torch.zeros(1, 3, 32, 32, device="meta")}, ValueError, "on cpu.*meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_fused(case, asked):
    options, kind, message = BAD[case]
    for call in (fuse, lambda model, **o: fused(model, **o).__enter__()):
        model = make("ours")
        with pytest.raises(kind, match=message):
            call(model, **options)
        assert not is_fused(model)
    assert asked == []


def test_a_variable_that_says_something_else_is_named(unknown):
    unknown.setenv("FUSED_DEIT_MEASURE", "sometimes")
    with pytest.raises(ValueError, match=r"FUSED_DEIT_MEASURE: expected .*'sometimes'"):
        fuse(make("ours"))
    assert fuse(make("ours"), measure="never").fused


def test_a_model_is_measured_once_at_one_image_and_at_several(asked):
    report = fuse(make("ours"))
    assert len(asked) == 1
    assert {p.arguments[0].shape[0] for p in asked[0]} == {1, 8}
    assert not any(problem.training for problem in asked[0])
    assert report.operators["linear"] == report.operators["vit_block"] == "cpu"
    assert str(report.evidence["linear"]).startswith("2.00 times PyTorch's speed, measured here 20")
    assert re.search(r"^  linear +2\.00 times PyTorch's speed, measured here 20", str(report), re.M)
    assert "1.50 (1.50 to 1.50) times as fast, measured here 20" in str(report)
    standing.forget()  # another process
    again = fuse(make("ours"))
    assert len(asked) == 1
    assert (again.operators, again.evidence, again.races) == (
        report.operators,
        report.evidence,
        report.races,
    )
    fuse(make("ours"), measure="now")
    assert len(asked) == 2


@pytest.mark.parametrize("family", fusing.FAMILIES)
def test_every_family_is_measured_in_training_too_where_it_trains(family, asked):
    model = make(family).train()
    with torch.no_grad():
        fuse(model)
    assert {problem.training for problem in asked[0]} == {False}
    fuse(model)
    assert {problem.training for problem in asked[1]} == {True}


def test_an_example_says_what_to_measure_at(asked):
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 10)).eval()
    note = "not measured: its images' size is not known: give example=images"
    assert note in fuse(model).notes
    assert asked == []
    fuse(model, example=torch.zeros(5, 7, 64))
    assert {p.arguments[0].shape for p in asked[0]} == {(5, 7, 64), (1, 7, 64)}


def test_what_is_named_is_not_measured(asked):
    for impl in ("reference", "triton"):
        assert fuse(make("ours"), impl=impl).fused
    assert fuse(make("ours"), measure="never").fused
    assert asked == []


def in_backward(model):
    class Fusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            reports.append(fuse(model))
            return gradient

    reports = []
    Fusing.apply(torch.ones(1, requires_grad=True)).backward()
    return reports[0]


def in_function(model):
    reports = []

    def function(x):
        reports.append(fuse(model))
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    return reports[0]


def in_fakes(model):
    with FakeTensorMode():
        return fuse(model)


def in_compilation(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        return fuse(model)


def in_capture(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        return fuse(model)


PLACES = {
    "torch.compile": in_compilation,
    "CUDA graph's capture": in_capture,
    "backward": in_backward,
    "torch.func": in_function,
    "dispatch mode": in_fakes,
    "forked child": fuse,
    "on meta": lambda model: fuse(model.to("meta")),
    "on cpu and meta": lambda model: fuse(model.append(nn.LayerNorm(3, device="meta"))),
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_measured_where_it_may_not_be(place, asked, monkeypatch):
    if place == "forked child":
        monkeypatch.setattr(requests, "_forked", True)
    report = PLACES[place](nn.Sequential(make("ours")))
    assert asked == []
    assert report.fused
    assert [note for note in report.notes if note.startswith("not measured:") and place in note]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_knows_that_it_is_one():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"yes" if requests.obstacle() == "within a forked child" else b"no")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 9) == b"yes"
    assert requests.obstacle() == ""


def test_8_bits_are_shown_against_their_own_dtype(asked, unknown):
    rival = verdicts.Rival("fp32", 10.0, 1.25, 1.2, 1.3, wins=True)
    found = standing.found
    unknown.setattr(
        standing, "found", lambda problem, winner: replace(found(problem, winner), rival=rival)
    )
    report = fuse(make("ours"), dtype="int8")
    assert "1.25 times the speed of its own dtype, measured here" in str(
        report.evidence["int8_linear"]
    )
    assert "2.00 times PyTorch's speed, measured here" in str(report.evidence["layer_norm"])


# ---- the whole model


def test_a_model_that_is_not_faster_stays_as_it_was(asked, unknown):
    unknown.setattr(whole_models, "race", lambda *_, **__: outcome(1.01))
    model = nn.Sequential(nn.Identity(), make("ours"))
    classes = [type(module) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert report.fused == []
    assert "fused it is not faster by 2 % (1.01 (1.01 to 1.01)" in report.left["1.blocks.0.norm1"]
    unknown.setattr(whole_models, "race", None)  # it was kept
    standing.forget()
    assert fuse(model).fused == []
    assert fuse(model, impl="cpu").fused  # by name it is asked for
    assert fuse(copy.deepcopy(model), measure="never").fused


def test_a_race_that_a_busy_machine_left_undecided_is_run_again_in_an_hour(asked, unknown):
    found = outcome(1.01)
    lap = dataclasses.replace(found.fused, low=0.8, high=2.5)
    wide = dataclasses.replace(found, laps=(found.laps[0], lap))
    old = dataclasses.replace(wide, date="2026-01-01T00:00:00+00:00")
    for first, second in ((old, True), (wide, False)):
        race = iter((first, outcome(1.5)))
        unknown.setattr(whole_models, "race", lambda *_, race=race, **__: next(race))
        model = make("ours")
        assert fuse(model, measure="now").fused == []
        standing.forget()
        assert bool(fuse(model).fused) == second


def test_a_race_of_other_choices_counts_no_more(asked, unknown):
    speeds = iter((1.01, 1.5))
    unknown.setattr(whole_models, "race", lambda *_, **__: outcome(next(speeds)))
    assert fuse(make("ours")).fused == []
    model = make("ours")
    fuse(model, measure="never")
    key, problems = device_key.device_key(CPU), [v.problem for v in verdicts.in_force(CPU)]
    verdicts.store(key, [standing.found(problem, "reference") for problem in problems])
    assert fuse(model).fused


def test_a_model_whose_calls_are_not_all_measured_is_not_raced_yet(asked, unknown, caplog):
    unknown.setattr(whole_models, "race", None)
    measure = measuring.operators.measure

    def some(problems, *arguments, **options):
        return measure(problems[::2], *arguments, **options)

    unknown.setattr(measuring.operators, "measure", some)
    with caplog.at_level(logging.INFO, "deit.fused_vit"):
        report = fuse(make("ours"))
    assert "is raced once all its calls are measured" in caplog.text
    assert report.fused
    assert any(note.startswith("not measured yet: ") for note in report.notes)
    unknown.setattr(whole_models, "race", lambda *_, **__: outcome(1.5))
    unknown.setattr(measuring.operators, "measure", measure)
    again = fuse(make("ours"))
    assert again.races
    assert again.notes == []


def test_8_bits_that_are_slower_say_so_and_run(asked, unknown):
    unknown.setattr(whole_models, "race", lambda *_, **__: outcome(1.3, own=0.85))
    with pytest.warns(UserWarning, match=r"8 bits run at 0.85 of the speed of its own dtype"):
        report = fuse(make("ours"), dtype="int8")
    assert "int8_vit_block" in report.operators
    assert "8 bits run at 0.85 of the speed" in str(report)
    unknown.setattr(whole_models, "race", lambda *_, **__: outcome(2.0, own=1.4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse(make("ours"), dtype="int8", measure="now").slower_8_bits() == []


@pytest.mark.parametrize(("training", "dtype"), [(False, None), (True, None), (False, "int8")])
def test_a_race_runs_what_it_says_and_touches_nothing(training, dtype):
    model = make("ours").train(training)
    fuse(model, dtype=dtype)
    seen, generator = [], torch.random.get_rng_state()
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    before = copy.deepcopy(model.state_dict())
    own = None if dtype is None else {**fuse(make("ours")).operators}
    found = whole_models.race(
        model, own, fusing.IMAGES.shape, torch.float32, training=training, budget=30.0
    )
    names = [whole_models.WAS, whole_models.FUSED, whole_models.OWN][: 2 if own is None else 3]
    assert [lap.name for lap in found.laps] == names
    assert not any(lap.refused for lap in found.laps)
    assert 0 < found.fused.apart < (1e-4 if dtype is None else 0.2)
    assert (found.own is None) == (own is None)
    assert seen == []
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training is training
    assert whole_models.Outcome.revive(measuring_fields(found.plain())) == found
    none = whole_models.race(
        model, own, fusing.IMAGES.shape, torch.float32, training=training, budget=1e-6
    )
    assert none is None


def measuring_fields(plain):
    from deit.kernels.engine.json_files import Fields

    return Fields(json.loads(json.dumps(plain)), "outcome")


def test_a_model_that_cannot_be_raced_is_fused_and_says_so(asked, unknown, caplog):
    def failing(*_, **__):
        raise RuntimeError("out of memory")

    unknown.setattr(whole_models, "race", failing)
    with caplog.at_level(logging.INFO, "deit.fused_vit"):
        assert fuse(make("ours")).fused
    assert "DeiT was not raced: RuntimeError: out of memory" in caplog.text
    assert "measuring" in caplog.text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_told_what_is_done_on_a_line_that_goes(asked, unknown):
    unknown.setattr(sys, "stderr", Terminal())
    fuse(make("ours"))
    said = sys.stderr.getvalue()
    assert re.search(r"fuse: measuring \d+ calls of DeiT on Acme .*, at most 20 s", said)
    assert "fuse: racing DeiT, inference, 8 x 3 x 32 x 32 float32 against what it was" in said
    assert said.endswith("\r\x1b[K")
    fuse(make("ours"))
    assert sys.stderr.getvalue() == said


# ---- caches


def test_a_damaged_file_is_named_and_kept(asked):
    fuse(make("ours"))
    path = next(whole_models._file(CPU).path.parent.glob("networks-*.json"))
    path.write_text('{"schema": 1')
    standing.forget()
    with pytest.warns(UserWarning, match=f"{path.name} cannot be read"):
        assert fuse(make("ours")).races
    assert path.with_suffix(".unreadable").read_text() == '{"schema": 1'


def test_a_cache_that_is_a_file_is_named(asked, unknown, tmp_path):
    (tmp_path / "file").write_text("")
    unknown.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="fused-deit.*cannot be written") as said:
        report = fuse(make("ours"))
    assert len(said) == 2  # the verdicts' file and the networks'
    assert report.operators["linear"] == "cpu"
    assert report.races
    fuse(make("ours"))
    assert len(asked) == 1  # in this process they hold


def test_other_versions_are_not_used(asked, unknown):
    fuse(make("ours"))
    standing.forget()
    before = device_key.versions("cpu")
    unknown.setattr(device_key, "versions", lambda _: before | {"kernels": "others"})
    assert whole_models.known(CPU) == {}
    fuse(make("ours"))
    assert len(asked) == 2


def test_a_record_is_taken_up_alone_and_given_back(asked):
    fuse(make("ours"))
    record = json.loads(json.dumps(records.record(CPU)))
    assert records.why_not(record, CPU, "it") == ""
    with records.scoped():
        assert records.adopt(record, "it") == []
        assert json.loads(json.dumps(records.record(CPU))) == record
        fuse(make("ours", dim=32))  # stored, and in force here
    assert len(records.record(CPU)["verdicts"]) > len(record["verdicts"])
    with records.scoped():
        records.adopt(record, "it")
        assert json.loads(json.dumps(records.record(CPU))) == record
    assert "this is Acme" in records.why_not(record | {"device": "another"}, CPU, "it")
    for one in record["verdicts"]:
        one["versions"]["torch"] = "1.0"
    assert "another version of torch" in records.why_not(record, CPU, "it")
    with pytest.raises(ValueError, match=r"^it: verdicts"):
        records.why_not(record | {"verdicts": 3}, CPU, "it")


# ---- the whole way

PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
import fusing, standing
from deit.fused_vit import fuse, measuring
torch.set_num_threads(1)
if {known}:
    measuring.operators.measure = measuring.whole_models.race = None
model = fusing.make("ours")
report = fuse(model, block="parts", example=fusing.IMAGES[:1], budget={budget})
print(sorted((name, str(why)) for name, why in report.evidence.items()))
print([str(each) for each in report.races], len(report.fused))
print(fusing.logits(model).double().sum().item())
"""


@needs_library
def test_a_second_process_starts_at_once_and_computes_the_same_bits(tmp_path):
    """The machine is unknown; measured for real, by a small budget."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "FUSED_DEIT_DEVICE_KEY": standing.UNKNOWN,
        "FUSED_DEIT_MEASURE": "auto",
    }
    said = []
    for known in (False, True):
        program = PROGRAM.format(tests=os.path.dirname(fusing.__file__), known=known, budget=120)
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout)
    assert said[0] == said[1]
    assert "measured here" in said[0]
    assert "not measured" not in said[0]
    assert "times as fast" in said[0]


def test_calls_are_found_while_a_model_is_prepared_for_measuring(asked):
    """The plan's problems are those of calls_of, the larger batch first."""
    model = make("ours")
    fuse(model)
    first = calls.calls_of(model, (8, 3, 32, 32), torch.float32, training=False)
    assert [p for p in asked[0] if p.arguments[0].shape[0] == 8] == [
        p for p in first if p in asked[0]
    ]
    assert verdicts.in_force(CPU)
