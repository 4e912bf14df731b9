"""Each adapter of bench/peers on a small network: its logits, and what it refuses.

What runs on a GPU alone is tried against stand-ins with the documented signatures.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import deit
import peers
from deit.model import DeiT
from peers import PEERS, zentorch
from race import checks, contenders

CPU = torch.device("cpu")
SMALL = deit.Config("deit_small", embed_dim=128, num_heads=2, depth=2, img_size=64)
RUNNABLE = [name for name, peer in PEERS.items() if "cpu" in peer.devices]


def eager(dtype: torch.dtype = torch.float32) -> contenders.Contender:
    torch.manual_seed(0)
    build = functools.partial(DeiT, SMALL)
    network = contenders.Network("deit_small", "DeiT", 64, SMALL.flops, build, None, SMALL)
    return contenders.eager(network, CPU, dtype, train=False)


@pytest.fixture(scope="module")
def base() -> contenders.Contender:
    return eager()


def problem(base: contenders.Contender) -> peers.Problem:
    return peers.Problem(base.module, SMALL, torch.randn(2, 3, 64, 64), 1)


# On this machine --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNABLE)
def test_adapter_gives_the_eager_models_logits(name: str, base: contenders.Contender) -> None:
    peer = PEERS[name]
    reason = peer.why_not("cpu", torch.float32, train=False)
    if reason:
        pytest.skip(f"{name}: {reason}")
    given = problem(base)
    before = {key: value.clone() for key, value in base.module.state_dict().items()}
    with torch.inference_mode():
        made = contenders.by_peer(peer, base, given.images, train=False)
        if peer.precision != "dtype":
            assert (
                checks.Agreement(base, given.images).verify(made, made.call)
                < checks.Agreement.ALLOWED
            )
        else:
            oracle = checks.Oracle(base, given.images)
            assert oracle.verify(made, made.call(given.images)) < 2e-5
        again = made.call(given.images + 1)  # not one answer for all
        assert not torch.equal(again, made.call(given.images))
    for key, value in base.module.state_dict().items():
        assert torch.equal(value, before[key])  # the shared weights stay as they were


def test_fused_fp8_tells_the_same_photographs_apart(base: contenders.Contender) -> None:
    """Its adapter is for GPUs; what it builds runs here by the reference."""
    peer, given = PEERS["fused-fp8"], replace(problem(base), impl="reference")
    assert peer.why_not("cpu", torch.float32, train=False).startswith("it runs on cuda here")
    for package in peer.packages:
        pytest.importorskip(package)
    built = peer.build(given)
    assert built.about == "fuse(model, dtype='fp8')"
    made = contenders.Contender(base.network, "fused fp8", "contiguous", base.module, base.module)
    agreement = checks.Agreement(base, given.images)
    assert 1e-3 < agreement.verify(made, torch.inference_mode()(built.call)) < agreement.ALLOWED


VARIANTS = {
    "one head": (replace(SMALL, layer_scale=0.3), "class"),
    "class": (replace(SMALL, distilled=True), "class"),
    "distillation": (replace(SMALL, distilled=True), "distillation"),
    "softmax-sum": (replace(SMALL, distilled=True), "softmax-sum"),
    "logit-mean": (replace(SMALL, distilled=True), "logit-mean"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_jax_runs_every_variant(variant: str) -> None:
    pytest.importorskip("jax")
    config, head = VARIANTS[variant]
    torch.manual_seed(0)
    module = DeiT(config, test_head=head).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        built = PEERS["jax"].build(peers.Problem(module, config, images, 1))
        expected = module(images)
        assert checks.distance(built.call(images), expected) < 2e-6
        assert checks.distance(built.call(images.flip(0)), expected.flip(0)) < 2e-6


def test_jax_refuses_what_it_cannot_give(
    base: contenders.Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax")
    monkeypatch.setenv("NPROC", "3")
    with pytest.raises(RuntimeError, match="XLA has 3 threads in this process, not the 1 asked"):
        PEERS["jax"].build(problem(base))
    with pytest.raises(ValueError, match="no convnets"):
        PEERS["jax"].build(replace(problem(base), config=None))


# In a process of its own ------------------------------------------------------------------------

ZENTORCH = """
import torch
__version__ = "0"
torch._dynamo.register_backend(lambda graph, _: graph, name="zentorch")
"""


def zentorch_is(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for zentorch that this Python finds, in another process."""
    (folder / "zentorch.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("FUSED_DEIT_ZENTORCH_PYTHON", sys.executable)


def test_zentorch_runs_the_same_weights_in_its_process(
    base: contenders.Contender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zentorch_is(ZENTORCH, tmp_path, monkeypatch)
    given = problem(base)
    built = PEERS["zentorch"].build(given)
    frozen = f"zentorch 0 (torch {torch.__version__}), frozen, 1 threads"
    assert built.about == f"{frozen}, in its own process"
    with torch.inference_mode():
        first = built.call(given.images)
        assert checks.distance(first, base.module(given.images)) < 1e-6
        second = built.call(given.images + 1)
        assert checks.distance(second, base.module(given.images + 1)) < 1e-6
        assert checks.distance(first, base.module(given.images)) < 1e-6  # not written over
    process = built.call.process  # type: ignore[attr-defined]
    process.kill()
    process.wait()
    with pytest.raises(RuntimeError, match="zentorch: its process ended"):
        built.call(given.images)


def test_what_goes_wrong_in_its_process_is_told(
    base: contenders.Contender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zentorch_is("raise ImportError('made for\\nanother torch')", tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=r"zentorch, in its process: ImportError: made for$"):
        PEERS["zentorch"].build(problem(base))
    with pytest.raises(ValueError, match="no convnets"):
        PEERS["zentorch"].build(replace(problem(base), config=None))


def test_zentorch_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = functools.partial(PEERS["zentorch"].why_not, "cpu", torch.float32, False)
    has = {"instruction_sets": ["avx2", "avx512_bf16"]}
    monkeypatch.setattr(zentorch, "processor", lambda: {"instruction_sets": ["avx2"]})
    assert why_not() == "it is for processors with AVX512-BF16"
    monkeypatch.setattr(zentorch, "processor", lambda: has)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("FUSED_DEIT_ZENTORCH_PYTHON", raising=False)
    assert why_not().startswith("zentorch not installed: python -m venv ENV && ENV/bin/pip install")
    monkeypatch.setenv("FUSED_DEIT_ZENTORCH_PYTHON", "/no/python")
    assert why_not() == "FUSED_DEIT_ZENTORCH_PYTHON: expected a Python's path; got '/no/python'"
    monkeypatch.setenv("FUSED_DEIT_ZENTORCH_PYTHON", sys.executable)
    assert why_not() == ""


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
def test_their_own_networks_take_half_precision(name: str, base: contenders.Contender) -> None:
    pytest.importorskip(name)
    half = eager(torch.bfloat16)
    images = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        built = PEERS[name].build(peers.Problem(half.module, SMALL, images, 1))
        logits = built.call(images)
    assert logits.dtype == torch.bfloat16
    assert checks.Oracle(half, images).verify(replace(half, call=built.call), logits) > 0
    distilled = replace(problem(base), config=replace(SMALL, distilled=True))
    with pytest.raises(ValueError, match="one head"):
        PEERS[name].build(distilled)


# What needs a GPU, against stand-ins with the documented signatures -------------------------------


def stand_ins(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Modules in the places of xFormers and flash-attn: their signatures, PyTorch's arithmetic."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any) -> torch.Tensor:
        heads_first = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, scale=scale)
        return out.transpose(1, 2).contiguous()

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):  # type: ignore[no-untyped-def]
        calls.append("xformers")
        return attend(query, key, value, scale)

    def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False):  # type: ignore[no-untyped-def]
        calls.append("flash-attn")
        assert qkv.shape[2:] == (3, 2, 64)
        return attend(*qkv.unbind(2), softmax_scale)

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):  # type: ignore[no-untyped-def]
        calls.append("flash-attn-3")
        return attend(q, k, v, softmax_scale), None

    modules = {
        "xformers.ops": memory_efficient_attention,
        "flash_attn": flash_attn_qkvpacked_func,
        "flash_attn_interface": flash_attn_func,
    }
    for name, function in modules.items():
        module = types.ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"of {name}")


@pytest.mark.parametrize("name", ["xformers", "flash-attn", "flash-attn-3"])
def test_replaced_attention(
    name: str, base: contenders.Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    stand_ins(monkeypatch, calls)
    given = problem(base)
    built = PEERS[name].build(given)
    with torch.inference_mode():
        assert checks.distance(built.call(given.images), base.module(given.images)) < 1e-6
    assert calls == [name] * SMALL.depth  # eager has none of it
    package = {"flash-attn-3": "flash_attn_3"}.get(name, name)
    assert built.about == f"{package} of {package}, eager"
    ours, theirs = base.module.state_dict(), built.call.state_dict()
    assert all(ours[key].data_ptr() == theirs[key].data_ptr() for key in ours)
    installed = replace(PEERS[name], packages=())
    assert "on cuda here, not on cpu" in installed.why_not("cpu", torch.bfloat16, False)
    assert "no float32" in installed.why_not("cuda", torch.float32, False)
    assert installed.why_not("cuda", torch.bfloat16, False) == ""


def test_tensorrt_gets_an_exported_program_in_the_dtype_of_the_comparison(
    base: contenders.Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def compile(exported_program: Any, inputs: Any, **settings: Any) -> Any:
        asked.update(settings, shape=inputs[0].shape)
        return exported_program.module()

    stand_in: Any = types.ModuleType("torch_tensorrt")
    stand_in.dynamo, stand_in.__version__ = types.SimpleNamespace(compile=compile), "0"
    monkeypatch.setitem(sys.modules, "torch_tensorrt", stand_in)
    given = problem(base)
    built = PEERS["tensorrt"].build(given)
    with torch.inference_mode():
        assert checks.distance(built.call(given.images), base.module(given.images)) < 1e-6
    assert asked["use_explicit_typing"]
    assert asked["disable_tf32"]
    assert asked["shape"] == given.images.shape


@pytest.mark.parametrize("kind", ["math", "flash", "efficient", "cudnn"])
def test_compiled_calls_run_under_the_pinned_attention(
    kind: str, base: contenders.Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled = {
        "math": torch.backends.cuda.math_sdp_enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    }
    before = {name: ask() for name, ask in enabled.items()}
    seen: list[list[str]] = []

    def watched(module: torch.nn.Module, **_: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(images: torch.Tensor) -> torch.Tensor:
            seen.append([name for name, ask in enabled.items() if ask()])
            return images

        return call

    monkeypatch.setattr(torch, "compile", watched)
    given = problem(base)
    built = PEERS[f"compile-max-{kind}"].build(given)
    built.call(given.images)
    assert seen == [[kind]]
    assert {name: ask() for name, ask in enabled.items()} == before
    assert f"SDPA {kind.upper()}" in built.about


def test_flash_attention_of_transformers_asks_for_its_package(base: contenders.Contender) -> None:
    pytest.importorskip("transformers")
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("it is installed")
    with pytest.raises(ImportError, match=r"(?i)flash.?attention"):
        PEERS["transformers-flash2"].build(problem(base))
