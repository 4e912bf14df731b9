"""bench/gpu_kernels.py: the kernels that a GPU will launch are listed, compiled and found there."""

import json
import shutil

import pytest
import torch
from triton import knobs

import gpu_kernels
import qualify
from deit.kernels import layer_norm, linear
from deit.kernels.prove import aot, launches, recorded
from qualification import compiled, kernels

META = torch.device("meta")


def rows(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device=META)


def noted_of(function, arch=90):
    with recorded.recording(arch) as noted:
        function()
    return noted


def test_a_call_is_noted_as_the_launch_that_ships():
    """By strides and addresses too: what no descriptor takes is another kernel."""
    weight, bias = rows(192, 192), rows(192)
    wide, longer = rows(256, 197, 193), rows(256 * 197 * 192 + 1)
    noted = noted_of(lambda: linear(rows(256, 197, 192), weight, bias, impl="triton"))
    for x, variant in (
        (rows(256, 197, 192), "bias"),
        (wide[..., :192], "unaligned"),
        (longer[1:].view(256, 197, 192), None),
    ):
        (key,) = noted_of(lambda x=x: linear(x, weight, bias, impl="triton")).cases
        same = variant and aot.kernel_of(launches.Shipped("linear", variant, "bf16", 192, 90))
        assert (key == same) if variant else key not in noted.cases
    assert noted.launches == 1


def test_a_backward_is_noted_and_nothing_stays_behind():
    def train():
        x = rows(2, 5, 64).requires_grad_()
        layer_norm(x, rows(64), rows(64), impl="triton").sum().backward()
        assert x.grad.shape == x.shape

    noted = noted_of(train)
    names = {case.build().kernel.fn.__name__ for case in noted.cases.values()}
    assert len(names) >= 2
    with pytest.raises(NotImplementedError, match="these are on meta"):
        train()


def test_every_stage_that_launches_is_listed():
    without = {"environment", "build"}
    assert set(kernels.LISTS) == {stage.name for stage in qualify.STAGES} - without


def test_a_stages_operators_and_layouts_are_listed():
    noted = kernels.of_stages(("robustness", "throughput"), 90, 132)
    found = {(case.operator, case.variant) for case in noted.cases.values()}
    assert {operator for operator, _ in found} >= set(
        kernels.calls.operators(implementation="triton")
    )
    assert ("linear", "bf16, rows off 16 bytes") in found
    assert any(operator == "deit_b" for operator, _ in found)
    assert noted.launches > 3 * len(noted.cases) > 100


def one_call(noted):
    layer_norm(rows(2, 5, 64), rows(64), rows(64), impl="triton")


def test_compiled_kernels_are_found_where_they_arrive(tmp_path, monkeypatch, capsys):
    """By Triton itself, in another folder, without what they were compiled in."""
    monkeypatch.setattr(kernels, "LISTS", {"speed": one_call})
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    settings = gpu_kernels.Settings(out=tmp_path / "kernels", only="speed", jobs=1)
    assert gpu_kernels.main(settings) == 0
    assert "1 of 1 kernels" in capsys.readouterr().out
    about = json.loads((settings.out / compiled.ABOUT).read_text())
    assert (about["arch"], about["kernels"], about["stages"]) == (90, 1, ["speed"])
    assert {path.suffix for path in settings.out.glob("*/*")} == {".json", ".cubin"}
    assert gpu_kernels.main(settings) == 0  # given again, it is there

    arrived = shutil.move(settings.out, tmp_path / "arrived")
    shutil.rmtree(tmp_path / "kernels.cache")
    assert compiled.why_not(arrived, 90) == ""
    assert [compiled.unpack(arrived, tmp_path / "cache") for _ in range(2)] == [1, 0]
    shutil.rmtree(arrived)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    hits = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit)
    )
    (case,) = noted_of(lambda: one_call(None)).cases.values()
    with aot.target(90, device=-190):  # has no kernel in memory
        assert case.build().compile().asm["cubin"]
    assert hits == [True]


def test_kernels_for_another_gpu_or_triton_are_not_taken(tmp_path, monkeypatch):
    compiled.pack(tmp_path / "none", (), tmp_path / "kernels", {"arch": 90})
    assert compiled.why_not(tmp_path / "kernels", 90) == ""
    assert compiled.why_not(tmp_path / "kernels", 80) == "they are for sm_90, this is sm_80"
    monkeypatch.setattr(compiled, "triton_id", lambda: "another")
    assert "another Triton" in compiled.why_not(tmp_path / "kernels", 90)
    (tmp_path / "kernels" / compiled.ABOUT).write_text("{")
    assert "JSONDecodeError" in compiled.why_not(tmp_path / "kernels", 90)


def test_what_is_not_compiled_yet_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "LISTS", {"speed": one_call})
    settings = gpu_kernels.Settings(out=tmp_path / "k", only="speed", jobs=1, seconds=1e-9)
    assert gpu_kernels.main(settings) == 1
    assert "0 of 1 kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (gpu_kernels.Settings(arch=70), "--arch: expected one of 80, 89, 90, 100, 120; got 70"),
        (gpu_kernels.Settings(jobs=0), "--jobs: expected a positive number; got 0"),
        (gpu_kernels.Settings(only="sped"), "--only: expected stages among environment, build"),
    ],
)
def test_bad_options(settings, why, capsys):
    assert gpu_kernels.main(settings) == 2
    assert why in capsys.readouterr().err
