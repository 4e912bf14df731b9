"""bench/peers: what is left out and why, what is refused, and each adapter on a small network."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import deit
import evidence
import peers
import throughput
from deit.model import DeiT
from evidence import timing
from peers import PEERS, calibration
from race import checks, contenders, planning, progress, race, selection
from race import settings as terms

CPU = torch.device("cpu")
SMALL = deit.Config("deit_small", embed_dim=128, num_heads=2, depth=2, img_size=64)


def network() -> contenders.Network:
    build = functools.partial(DeiT, SMALL)
    return contenders.Network("deit_small", "DeiT", 64, SMALL.flops, build, None, SMALL)


@pytest.fixture(scope="module")
def base() -> contenders.Contender:
    torch.manual_seed(0)
    return contenders.eager(network(), CPU, torch.float32, train=False)


# Who runs ---------------------------------------------------------------------------------------


def names(*asked: str, device: str = "cpu") -> list[str]:
    return [peer.name for peer in peers.chosen(asked, device)]


def test_peers_by_name() -> None:
    assert names("default") == ["compile"]
    assert names("default", device="cuda") == ["compile-max", "fused-graph"]
    assert names("none") == names("eager") == names() == []
    assert names("all") == list(PEERS)
    assert names("openvino,compile", "timm") == ["compile", "timm", "openvino"]


def test_an_unknown_peer_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--peers", "tensorflow", "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "peers: unknown name 'tensorflow'; known: default, all, none, eager, compile," in error


def test_what_is_not_installed_is_left_out_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = throughput.Options(arch="deit_ti", against=("none",), peers=("all",), device="cpu")
    settings = throughput.settle(options)
    usual = ["compile", "compile-max", "compile-max-math"]
    assert [peer.name for peer in settings.peers] == usual
    left_out = "\n".join(settings.left_out)
    assert "onnxruntime: left out: onnxruntime, onnx, onnxscript not installed" in left_out
    assert "pip install onnxruntime onnx onnxscript" in left_out
    assert "openvino-int8: left out: openvino, nncf" in left_out
    assert "jax: left out: jax not installed: pip install jax" in left_out
    assert "flash-attn: left out: flash_attn not installed: pip install flash-attn" in left_out
    assert "tensorrt: left out: torch_tensorrt not installed: pip install" in left_out


@pytest.mark.parametrize(
    ("device", "dtype", "train", "reason"),
    [
        ("cpu", torch.float32, True, "inference"),
        ("cuda", torch.float32, False, "not on cuda"),
        ("cpu", torch.bfloat16, False, "no bfloat16"),
    ],
)
def test_a_peer_says_on_which_terms_it_cannot_run(
    device: str, dtype: torch.dtype, train: bool, reason: str
) -> None:
    peer = replace(PEERS["openvino"], packages=())
    assert reason in peer.why_not(device, dtype, train)
    assert peer.why_not("cpu", torch.float32, False) == ""
    assert PEERS["compile"].why_not("cuda", torch.bfloat16, True) == ""


# What is refused --------------------------------------------------------------------------------


def run_with(peer: peers.Peer) -> race.Race:
    settings = terms.Settings([network()], 2, torch.float32, CPU, peers=[peer])
    run = race.Race(settings, progress.Progress(time.perf_counter()))
    run.prepare()
    run.warm_up()
    selection.Selection(run).run()
    return run


def wrong(change: Callable[[torch.Tensor], torch.Tensor], **fields: object) -> peers.Peer:
    """A peer that computes the logits and then something else."""

    def build(problem: peers.Problem) -> peers.Built:
        return peers.Built(lambda images: change(problem.module(images)), "made for this test")

    return peers.Peer("wrong", "wrong peer", build, **fields)  # type: ignore[arg-type]


def test_a_peer_with_wrong_logits_is_refused() -> None:
    run = run_with(wrong(lambda logits: logits * 1.0001))
    assert run.refused
    assert [c.how for c in run.finalists] == ["fused", "eager"]
    assert run.entries[0].base.tried == {"wrong peer": "refused: wrong outputs"}
    assert any("wrong peer is refused: its logits are off by 1.0e-04" in n for n in run.notes)


def test_a_peer_with_right_logits_runs() -> None:
    run = run_with(wrong(lambda logits: logits))
    assert not run.refused
    assert [c.how for c in run.finalists] == ["fused", "eager", "wrong peer"]
    assert run.finalists[-1].about == "made for this test"


def test_a_peer_that_cannot_be_built_is_out_and_the_run_goes_on() -> None:
    def build(problem: peers.Problem) -> peers.Built:
        raise RuntimeError("no such operator\nand a long trace")

    run = run_with(peers.Peer("broken", "broken", build))
    assert not run.refused
    assert run.entries[0].base.tried == {"broken": "failed: RuntimeError: no such operator"}


def test_int8_logits_must_tell_the_same_images_apart(base: contenders.Contender) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    agreement = checks.Agreement(base, torch.empty(5))  # 16 photographs in batches of 5: 20
    int8 = contenders.Contender(network(), "int8", "contiguous", base.module, base.module)

    @torch.inference_mode()
    def noisy(images: torch.Tensor, part: float) -> torch.Tensor:
        logits = base.module(images)
        return logits + part * (logits - logits.mean(0)).std() * torch.randn(logits.shape)

    assert agreement.verify(int8, functools.partial(noisy, part=0.05)) < 0.1
    assert "top-1 equal on" in str(int8.about)
    # The logits' mean over the images is most of them: only what is left of it is compared.
    constant = agreement.truth.mean(0)
    with pytest.raises(checks.WrongOutputs, match="int8 is refused: what tells images apart"):
        agreement.verify(int8, lambda images: constant.expand(len(images), -1))
    torch.manual_seed(1)
    other = contenders.eager(network(), CPU, torch.float32, train=False).module
    kept = {k: v for k, v in base.module.state_dict().items() if "blocks.1" not in k}
    other.load_state_dict(kept, strict=False)
    with pytest.raises(checks.WrongOutputs):  # another network's second block
        agreement.verify(int8, torch.inference_mode()(other))


# Calibration ------------------------------------------------------------------------------------


def test_photographs_are_photographs() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    crops, about = calibration.photographs(64, 9)
    assert (crops.shape, crops.dtype) == ((9, 3, 64, 64), torch.float32)
    assert "9 crops of 7 photographs" in about
    assert torch.equal(crops, calibration.photographs(64, 9)[0])
    assert not torch.equal(crops, calibration.photographs(64, 9, seed=1)[0])
    # Neighbours in a photograph are alike; in noise they are not.
    beside = (crops[..., 1:] - crops[..., :-1]).pow(2).mean() / (2 * crops.var())
    assert beside < 0.25


# Latency ----------------------------------------------------------------------------------------


def test_percentile() -> None:
    samples = [float(i) for i in range(101)][::-1]
    assert timing.percentile(samples, 99) == 99.0
    assert timing.percentile([1.0, 2.0], 50) == 1.5
    assert timing.percentile([3.0], 99) == 3.0
    for bad in ([], 50.0), ([1.0], 101.0):
        with pytest.raises(ValueError, match="percent"):
            timing.percentile(*bad)


def test_latency_plan() -> None:
    plan = planning.plan_latency([0.01, 0.1], 20.0)
    assert (plan.rounds, plan.calls) == (200, (1, 1))
    assert planning.plan_latency([1e-5], 20.0).rounds == planning.MOST_LATENCIES
    assert planning.plan_latency([0.01, 0.1], 20.0, left=2.2).rounds == 10


@pytest.mark.parametrize("batch", [1, 2])
def test_latency_from_the_command_line(
    batch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.json"
    options = ["--arch", "deit_ti", "--img-size", "32", "--against", "none", "--device", "cpu"]
    options += ["--latency", "--peers", "timm", "--seconds", "0.3", "--threads", "1"]
    options += ["--bs", "2"] if batch == 2 else []  # not given: one image
    threads = torch.get_num_threads()
    try:
        assert throughput.main([*options, "--json", str(rows)]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "single calls" in out
    assert "p50, ms" in out
    assert "p99, ms" in out
    found = evidence.read([rows])
    assert [row["contender"] for row in found] == ["fused", "eager", "timm eager"]
    for row in found:
        assert (row["mode"], row["batch"], row["calls_per_sample"]) == ("latency", batch, 1)
    assert found[2]["peer"].startswith("timm ")
    assert found[0]["peer"] is None


@pytest.mark.parametrize("extra", [["--train"], ["--protocol", "deit2021"], ["--images", "x"]])
def test_latency_is_for_inference(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--latency", "--arch", "deit_ti", "--device", "cpu", *extra]) == 2
    assert "latency: for inference" in capsys.readouterr().err
