"""`deit tune` on a CPU: which calls it measures, what it keeps, what it writes to ship."""

import dataclasses
import json

import pytest
import torch

from deit import tune
from deit.commands.cli import Tune
from deit.kernels.engine import device_key, measured, native, verdicts

CPU = torch.device("cpu")
OPTIONS = Tune(
    arch=("deit_ti",), dtype=("fp32",), batch_size=2, img_size=32, device="cpu", seconds=20.0
)


def test_the_calls_are_those_of_the_fused_networks():
    found = tune.calls_to_measure(dataclasses.replace(OPTIONS, dtype=("bf16", "int8")), CPU)
    shapes = [one.shape_class for one in found]
    assert len(set(shapes)) == len(shapes)
    of = lambda name: {(s.dtype, s.training) for s in shapes if s.operator == name}
    fp32, bf16 = torch.float32, torch.bfloat16
    every = {(fp32, False), (fp32, True), (bf16, False), (bf16, True)}
    assert of("linear") == of("attention") == of("gelu_mlp") == every
    assert of("layer_norm") == every - {(bf16, True)}  # autocast leaves the stream in fp32
    assert of("vit_block") == {(fp32, False), (bf16, False)}
    assert of("int8_linear") == of("int8_vit_block") == {(fp32, False)}
    assert {s.rows for s in shapes if s.operator == "attention"} == {2, 3}  # 5 and 10 tokens


def test_without_training_there_is_none_and_only_is_only():
    options = dataclasses.replace(OPTIONS, train=False, only=("attention",))
    found = tune.calls_to_measure(options, CPU)
    assert {(one.operator, one.training) for one in found} == {("attention", False)}


@pytest.mark.skipif(bool(native.why_not("cpu")), reason="the C++ library is not built")
def test_the_command_keeps_verdicts_and_writes_a_prior(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(device_key.PRETENDED, "Acme family 1 model 1, AVX2")
    verdicts.forget()
    try:
        prior = tmp_path / "acme.json"
        assert (
            dataclasses.replace(OPTIONS, only=("attention",), train=False, prior=prior).run() == 0
        )
        kept = verdicts.in_force(CPU)
        assert [one.problem.operator for one in kept] == ["attention"] * 2
        assert f"kept in {verdicts.path(device_key.device_key(CPU))}" in capsys.readouterr().out
        read = measured._prior(prior)
        assert read.label == "Acme family 1, AVX2"
        found = verdicts.revive_all(*measured.shipped(read))
        kept = [one for one in kept if not one.undecided]
        pairs = [sorted(each, key=lambda one: str(one.problem)) for each in (found, kept)]
        for one, other in zip(*pairs, strict=True):  # to four digits
            assert (one.problem, one.order, one.date) == (other.problem, other.order, other.date)
            figures = [each.candidates["reference"].microseconds for each in (one, other)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-3)
        assert json.loads(prior.read_text())["schema"] == 1
    finally:
        monkeypatch.undo()
        verdicts.forget()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"only": ("convolution",)}, "only: expected kernels among .*attention.* 'convolution'"),
        ({"device": "abacus"}, "device: expected auto or a torch device; got 'abacus'"),
        ({"device": "meta"}, "device: expected a CPU or a GPU that is here; got meta"),
        ({"batch_size": 0}, "batch_size: expected a positive number; got 0"),
        ({"seconds": float("nan")}, "seconds: expected a positive number; got nan"),
        ({"arch": ("vgg",)}, "arch: unknown name 'vgg'"),
    ],
)
def test_bad_options_are_named_before_anything_runs(change, why, monkeypatch):
    monkeypatch.setattr(tune.measure, "measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ValueError, match=why):
        dataclasses.replace(OPTIONS, **change).run()


def test_a_priors_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="prior: expected a file in a folder that is there"):
        dataclasses.replace(OPTIONS, prior=tmp_path / "none" / "a.json").run()
