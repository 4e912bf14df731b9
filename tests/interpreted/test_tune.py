"""`deit tune`: every kernel is checked against PyTorch, and only what is clearly faster is kept."""

import dataclasses
import json

import pytest
import torch

from deit import tune as command
from deit.commands.cli import Tune
from deit.configs import Config
from deit.kernels.device import tuning
from deit.kernels.device.tiles import Configuration
from deit.kernels.prove import tune
from deit.kernels.prove.calls import Size
from deit.kernels.prove.tuned import Terms, tuned

TINY = Size.of(Config("tiny", 64, 1, img_size=16), 2)
AT = Terms(TINY, torch.float16, torch.device("cpu"))
NOTHING = Configuration.space.__func__
PROBLEMS = {problem.name: problem for problem in tuned(AT, training=True)}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_pinned_default_computes_what_pytorch_does(name):
    problem = PROBLEMS[name]
    configs = tune.candidates_of(problem, 1)
    sound, dropped = tune.check(problem, problem.make(), configs, float("inf"))
    assert (sound, dropped) == (configs, {})


def test_every_kernel_that_has_candidates_has_a_problem():
    tried = {n for n, t in tuning.TUNABLE.items() if t.kind.space.__func__ is not NOTHING}
    pinned = {"rotary_attention", "rotary_attention_bwd"}  # no DeiT calls them
    assert {problem.factory for problem in PROBLEMS.values()} == tried - pinned


def test_a_wrong_candidate_is_dropped_and_a_wrong_default_reported():
    problem = next(p for p in PROBLEMS.values() if p.factory == "layer_norm")
    pinned, other = tune.candidates_of(problem, 2)

    def wrong_for(bad):
        def run(config, tensors):
            (out,) = problem.run(config, tensors)
            return [out * (1.01 if config == bad else 1.0)]

        return dataclasses.replace(problem, run=run)

    tensors = problem.make()
    sound, dropped = tune.check(wrong_for(other), tensors, [pinned, other], float("inf"))
    assert sound == [pinned]
    assert "error" in dropped[str(other)]
    said: list[str] = []
    outcomes, wrong = tune.measure(
        [wrong_for(pinned)], 2, float("inf"), torch.device("cpu"), said.append
    )
    assert len(wrong) == 1
    assert f"pinned {pinned}: error" in wrong[0]
    assert outcomes[0].config == other


def test_the_fastest_is_kept_only_if_clearly_faster():
    problem = next(p for p in PROBLEMS.values() if p.factory == "layer_norm")
    configs = tune.candidates_of(problem, 3)

    class Scripted:
        """A timer that gives each configuration the times it is told."""

        rounds = (1, 4)

        def __init__(self, microseconds):
            self.microseconds, self.calls = microseconds, 0

        def __call__(self, call):
            self.calls += 1
            call()
            return self.microseconds[current[0]] * 1e-6 * (1 + 1e-4 * self.calls)

    current = [0]

    def run(config, tensors):
        current[0] = configs.index(config)
        return []

    scripted = dataclasses.replace(problem, run=run)
    for times, best in (((10.0, 9.0, 8.0), 2), ((10.0, 9.9, 9.95), 0), ((10.0, 12.0, 30.0), 0)):
        found = tune.choose(scripted, [], configs, configs[0], Scripted(times), {})
        assert found.config == configs[best]
        assert found.entry.pinned_microseconds == pytest.approx(10.0, rel=0.01)
        assert found.entry.candidates == 3
        assert tuning.revive(type(found.config), found.entry.config) == found.config


def test_nothing_is_begun_when_time_is_up():
    """A problem not yet begun is left with its default; one begun tries its first candidate."""
    problem = next(p for p in PROBLEMS.values() if p.factory == "layer_norm")
    said: list[str] = []
    found = tune.measure([problem] * 2, 3, 0.0, torch.device("cpu"), said.append)
    assert found == ([], [])
    assert said == ["no time left for 2 of 2 kernels"]
    configs = tune.candidates_of(problem, 3)
    sound, dropped = tune.check(problem, problem.make(), configs, 0.0)
    assert sound == configs[:1]
    assert dropped == dict.fromkeys(map(str, configs[1:]), "no time left")
    ran: list[object] = []
    recorded = dataclasses.replace(problem, run=lambda config, _: ran.append(config))
    tune.warm([recorded], 3, end=0.0)
    assert ran == []


OPTIONS = Tune(
    arch=("deit_ti",), dtype=("fp16",), batch_size=1, img_size=32,
    only=("layer_norm", "layer_norm_bwd"), candidates=2, seconds=240, jobs=2, device="cpu",
)  # fmt: skip


def test_the_parts_cover_every_problem_once(monkeypatch):
    """What the processes of `precompile` are told is what the one that measures will run."""
    seen = []
    monkeypatch.setattr(tune, "warm", lambda problems, count: seen.append((problems, count)))
    options = dataclasses.replace(OPTIONS, only=())
    text = json.dumps(dataclasses.asdict(options))
    for part in range(3):
        command.compile_part([text, str(part), "3"])
    assert {count for _, count in seen} == {options.candidates}
    names = [problem.name for problems, _ in seen for problem in problems]
    wanted = [p.name for p in command.problems_of(options, torch.device("cpu"))]
    assert sorted(names) == sorted(wanted)
    assert len(names) == len(set(names)) > 10


def test_warming_runs_every_candidate_and_survives_one_that_cannot():
    problem = next(p for p in PROBLEMS.values() if p.factory == "layer_norm")
    ran = []

    def run(config, tensors):
        ran.append(config)
        if len(ran) == 1:
            raise RuntimeError("out of registers")
        return problem.run(config, tensors)

    tune.warm([dataclasses.replace(problem, run=run)], 3)
    assert ran == tune.candidates_of(problem, 3)


def test_the_command(tmp_path, monkeypatch, capsys):
    """Two processes compile, this one measures, and what it found is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert OPTIONS.run() == 0
    out = capsys.readouterr().out
    assert "compiling part" not in out, out
    (file,) = (tmp_path / "fused-deit").glob("*.json")
    assert f"kept in {file}" in out
    (only,) = json.loads(file.read_text())["sets"]
    assert sorted(only["entries"]) == [
        "layer_norm(arch=90, dtype=float16, dim=192)",
        "layer_norm_bwd(arch=90, dtype=float16, dim=192)",
    ]


def test_compiling_that_fails_or_takes_too_long_is_said(monkeypatch):
    broken = dataclasses.replace(OPTIONS, arch=("nothing",))
    assert command.precompile(broken, 60.0) == [
        "compiling part 1 of 2 ended with exit status 1",
        "compiling part 2 of 2 ended with exit status 1",
    ]
    assert command.precompile(OPTIONS, 0.0) == [
        "compiling part 1 of 2 stopped after 0 s",
        "compiling part 2 of 2 stopped after 0 s",
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"only": ("convolution",)},
            "only: expected kernels among .*attention, .*convolution",
        ),
        ({"only": ("attention_bwd",), "train": False}, "only: expected kernels among"),
        ({"device": "abacus"}, "device: expected auto or a torch device; got 'abacus'"),
        ({"device": "meta"}, "device: expected a CPU or a GPU that is here; got meta"),
        ({"batch_size": 0}, "batch_size: expected a positive number; got 0"),
        ({"candidates": -1}, "candidates: expected a positive number; got -1"),
        ({"seconds": 0.0}, "seconds: expected a positive number"),
        ({"jobs": 0}, "jobs: expected a positive number; got 0"),
        ({"arch": ("vgg",)}, "arch: unknown name 'vgg'"),
    ],
)
def test_bad_options_are_named_before_anything_runs(change, why, monkeypatch):
    monkeypatch.setattr(command, "precompile", lambda *_: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=why):
        dataclasses.replace(OPTIONS, **change).run()
