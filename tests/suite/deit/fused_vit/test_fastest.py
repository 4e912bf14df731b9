"""fastest(): every way raced, held to the eager model, and the fastest handed back."""

import fusing
import pytest
import torch
from fusing import IMAGES, make

from deit.fused_vit import Fastest, fastest, fuse, racing, ways
from deit.fused_vit.modules import Fused
from deit.fused_vit.racing import Lap, Race


@pytest.mark.parametrize("family", fusing.FAMILIES)
@pytest.mark.parametrize("before", [False, True])
def test_it_returns_the_models_outputs_and_leaves_it_alone(family, before):
    model = make(family).train()
    if before:
        fuse(model)
    classes = [type(module) for module in model.modules()]
    found = fastest(model, IMAGES, compile=False, budget=30)
    assert isinstance(found, Fastest)
    assert [lap.name for lap in found.race.laps] == ["eager", "fused"]
    assert found.name in ("eager", "fused")
    assert [type(module) for module in model.modules()] == classes
    assert model.training
    out = found(IMAGES)
    assert not getattr(out, "logits", out).requires_grad
    want = fusing.logits(model.eval())
    fusing.same(getattr(out, "logits", out), want)
    text = str(found)
    assert text.endswith(f"fastest: {found.name}")
    assert "against eager, 95 % interval" in text
    with torch.no_grad():  # the same weights, not a copy
        for parameter in model.parameters():
            parameter.mul_(0.5)
    out = found(IMAGES)
    fusing.same(getattr(out, "logits", out), fusing.logits(model))


def ladder(**milliseconds):
    """A race in which each way takes so long in every round."""
    samples = {name: [value / 1e3] * 8 for name, value in milliseconds.items()}
    base = next(iter(samples.values()))
    laps = tuple(racing._lap(name, each, base) for name, each in samples.items())
    return Race(laps, 8, 8, samples)


def test_a_later_way_displaces_an_earlier_one_by_the_margin_alone():
    assert ladder(eager=10.0, compiled=9.9, fused=9.85).best() == "eager"
    assert ladder(eager=10.0, compiled=9.0, fused=8.95).best() == "compiled"
    assert ladder(eager=10.0, compiled=9.0, fused=5.0).best() == "fused"
    lap = ladder(eager=10.0, fused=8.0).lap("fused")
    assert (lap.verdict, lap.words()) == ("faster", "1.25 (1.25 to 1.25) times as fast")
    assert ladder(eager=10.0, fused=12.0).lap("fused").verdict == "slower"
    assert Lap("fused", refused="wrong").verdict == "refused"


def test_ways_that_are_wrong_or_raise_are_refused_by_name():
    def raising(x):
        raise RuntimeError("no such kernel\nat line 3")

    found = racing.run(
        {
            "eager": lambda x: x * 2,
            "right": lambda x: x + x,
            "wrong": lambda x: x * 2.1,
            "not a number": lambda x: x * float("nan"),
            "another shape": lambda x: x[:1] * 2,
            "raising": raising,
        },
        lambda: torch.randn(4, 8),
        torch.device("cpu"),
        images=4,
        budget=30.0,
        dtype=torch.float32,
    )
    refused = {lap.name: lap.refused for lap in found.laps if lap.refused}
    assert refused.keys() == {"wrong", "not a number", "another shape", "raising"}
    assert refused["raising"] == "RuntimeError: no such kernel"
    assert "of the largest number off" in refused["wrong"]
    assert found.best() in ("eager", "right")
    assert "raising        refused: RuntimeError: no such kernel" in str(found)


def test_a_way_that_cannot_be_made_is_refused_alone(monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ways.torch, "compile", failing)
    found = fastest(make("ours"), IMAGES, budget=30)
    refused = {lap.name: lap.refused for lap in found.race.laps if lap.refused}
    assert refused == dict.fromkeys(("compiled", "fused and compiled"), "RuntimeError: no compiler")


def test_what_is_compiled_is_handed_back(monkeypatch):
    made = []

    def compiled(model):
        made.append(model)
        return lambda images: model(images)

    monkeypatch.setattr(ways.torch, "compile", compiled)
    monkeypatch.setattr(Race, "best", lambda self: "fused and compiled")
    found = fastest(make("ours"), IMAGES, budget=30)
    assert len(made) == 2
    assert any(isinstance(module, Fused) for module in made[1].modules())
    fusing.same(found(IMAGES), fusing.logits(make("ours")))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3, IMAGES), TypeError, "model: expected"),
        ((None, [1]), TypeError, "images: expected a tensor"),
        ((None, torch.zeros(2, 3, 40, 40)), ValueError, "images: the model does not take"),
        ((None, torch.zeros(2, 1, 32, 32)), ValueError, "images: expected images"),
        ((None, torch.zeros(2, 3, 32, 32, device="meta")), ValueError, "images: expected on cpu"),
    ],
)
def test_bad_input(arguments, kind, message):
    model, images = arguments
    with pytest.raises(kind, match=message):
        fastest(make("ours") if model is None else model, images)


@pytest.mark.parametrize("budget", [0, -1, float("nan"), 1e-6])
def test_a_budget_must_hold_a_race(budget):
    with pytest.raises(ValueError, match="budget: expected"):
        fastest(make("ours"), IMAGES, compile=False, budget=budget)
