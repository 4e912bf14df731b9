"""`deit tune`: every kernel is checked against PyTorch, and only what is clearly faster is kept."""

import dataclasses

import pytest
import torch

from deit import tune
from deit.configs import Config
from deit.kernels import tuning
from deit.tune_problems import Size, problems

SIZE = Size(2, Config("tiny", 64, 1, img_size=16), torch.float16, torch.device("cpu"))
PROBLEMS = {problem.name: problem for problem in problems(SIZE, training=True)}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_pinned_default_computes_what_pytorch_does(name):
    problem = PROBLEMS[name]
    configs = tune.candidates_of(problem, 1)
    sound, dropped = tune.check(problem, problem.make(), configs, float("inf"))
    assert (sound, dropped) == (configs, {})


def test_every_kernel_that_has_candidates_has_a_problem():
    from deit.kernels.triton import candidates

    assert {problem.factory for problem in PROBLEMS.values()} == set(candidates._SPACES)


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
