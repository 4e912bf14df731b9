"""The C++ kernels on the CPU, every instruction set this processor runs, against fp64."""

import ctypes
import itertools
import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from instruction_sets import SETS

from deit.kernels import attention, layer_norm
from deit.kernels.engine import build_record, native, registry
from deit.kernels.prove import oracle, reference

pytestmark = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)

OPS = registry.COMPILED["cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def parameters(channels, dtype, seed=1):
    return [oracle.make("random", (channels,), dtype, seed=seed + i) for i in range(3)]


# 768 and 192 are DeiT's widths; 100 leaves a tail of 4 in 16 lanes and of 4 in 8; 1 is less than
# a vector and 33 one more than two; 2000 is several blocks and a tail for any set.
@pytest.mark.parametrize("channels", [1, 33, 100, 192, 768, 2000])
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_layer_norm(isa, family, channels):
    for dtype in DTYPES:
        x = oracle.make(family, (3, 17, channels), dtype)
        weight, bias, _ = parameters(channels, dtype)
        for w, b in ((weight, bias), (weight.float(), bias.float()), (weight, None)):
            arguments = (x, w, b, 1e-5)
            oracle.check(OPS["layer_norm"](*arguments), reference.layer_norm, arguments)


@pytest.mark.parametrize("channels", [33, 100, 192, 768])
def test_add_layer_norm(isa, channels):
    for dtype, family in itertools.product(DTYPES, oracle.FAMILIES):
        x = oracle.make("random", (3, 17, channels), dtype, seed=5)
        residual = oracle.make(family, (3, 17, channels), torch.float32, seed=6)
        weight, bias, gamma = parameters(channels, dtype)
        keep = torch.tensor([0.0, 1.25, 1.25])
        for r, g, k in (
            (residual, None, None),
            (residual.to(dtype), gamma, None),
            (residual, gamma.float(), keep.to(dtype)),
            (residual.to(dtype), None, keep),
        ):
            arguments = (x, r, weight, bias, 1e-6, g, k)
            oracle.check(OPS["add_layer_norm"](*arguments), reference.add_layer_norm, arguments)


def test_large_mean_keeps_precision(isa):
    # Mean 1000, deviation 1: E[x^2] - E[x]^2 in fp32 would leave no correct digit, a rounded
    # mean alone an error of 4e-5.
    x = oracle.make("large_mean", (64, 768))
    exact = reference.layer_norm(x.double(), torch.ones(768).double(), None, 1e-6)
    out = OPS["layer_norm"](x, torch.ones(768), None, 1e-6)
    assert (out - exact).abs().max() < 2e-6


ATTENTION_FAMILIES = (*oracle.FAMILIES, "one_hot")


def attention_draws(family, dtype, tokens, draws, batches, heads=1, head_dim=64):
    """Arguments of `draws` calls, half of them with a key_bias that hides every fifth key."""
    for draw in range(draws):
        batch, bias = batches[draw % len(batches)], None
        qkv = oracle.packed(family, batch, tokens, heads, head_dim, dtype, seed=100 * draw + 1)
        if draw % 2:
            bias = oracle.make("random", (batch, tokens), seed=3)
            bias[:, 1::5] = -torch.inf
            bias = bias.to(dtype) if draw % 4 == 1 else bias
        yield qkv, heads, head_dim**-0.5, bias


# 1 and 17 are less than a tile; 64 is whole panels; 197, 198, 577 and 578 are DeiT's; 256 and 257
# straddle the block of the second product's sum.
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
@pytest.mark.parametrize("tokens", [1, 17, 64, 197, 198, 256, 257, 577, 578, 1025])
def test_attention(isa, tokens, family):
    for dtype in DTYPES:
        # Two draws are enough where luck cannot matter: in half precision, which rounds coarsely,
        # and with many tokens, which are many rows.
        draws = 2 if tokens > 64 or dtype != torch.float32 else 24
        batches, heads = ((1,), 1) if tokens > 300 else ((3, 1), 2 if tokens == 197 else 1)
        arguments = attention_draws(family, dtype, tokens, draws, batches, heads)
        oracle.check_draws(OPS["attention"], reference.attention, arguments)


def test_attention_of_few_tokens(isa):
    """One head of a few tokens, where PyTorch's own error is smallest, over 30 draws each."""
    for tokens in range(1, 21):
        draws = attention_draws("random", torch.float32, tokens, 30, batches=(1,))
        oracle.check_draws(OPS["attention"], reference.attention, draws, name=f"{tokens} tokens")


# 16 and 48 are whole vectors of every set, 8 and 24 not of AVX-512, 20 and 33 of none.
@pytest.mark.parametrize("head_dim", [8, 16, 20, 24, 32, 33, 48, 80, 128])
def test_attention_of_any_head_dimension(isa, head_dim):
    for dtype in DTYPES:
        qkv = oracle.make("random", (2, 50, 3 * 2 * head_dim), dtype)
        arguments = (qkv, 2, head_dim**-0.5, None)
        oracle.check(OPS["attention"](*arguments), reference.attention, arguments)


def test_attention_over_thousands_of_tokens(isa):
    qkv = oracle.make("random", (1, 3000, 3 * 64))
    arguments = (qkv, 1, 0.125, None)
    oracle.check(OPS["attention"](*arguments), reference.attention, arguments)


def test_extreme_scores(isa):
    # exp must neither overflow nor lose the small terms. Scores spread over +-400, and their
    # error is in the few rows where two keys are nearly equal.
    draws = [oracle.make("random", (1, 40, 3 * 64), scale=7.0, seed=seed) for seed in range(40)]
    arguments = [(qkv, 1, 1.0, None) for qkv in draws]
    oracle.check_draws(OPS["attention"], reference.attention, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment(isa, dtype):
    storage = oracle.make("random", (5, 9, 7, 2 * 100 + 3), dtype)
    weight, bias, gamma = parameters(100, dtype)
    views = [
        storage[:, :, :, 1:101],  # an odd offset: no vector is aligned
        storage.transpose(0, 2)[:, 2:, :, 3:103],  # leading axes that do not merge
        storage[::2, :, :, :200:2],  # last axis strided: copied
        storage[:1, :1, :1, :100].expand(5, 9, 7, 100),  # stride 0
    ]
    for x in views:
        arguments = (x, weight, bias, 1e-6)
        oracle.check(OPS["layer_norm"](*arguments), reference.layer_norm, arguments)
        keep = torch.linspace(0.5, 1.5, x.shape[0], dtype=dtype)
        added = (x, x.flip(1), weight, bias, 1e-6, gamma, keep[:1].expand(x.shape[0]))
        oracle.check(OPS["add_layer_norm"](*added), reference.add_layer_norm, added)
    wide = oracle.make("random", (3, 40, 3 * 128 + 5), dtype)
    for qkv in (wide[:, :, 5:], wide[:, 1::2, 1:385], wide.transpose(0, 1)[:, :, :384]):
        contiguous = OPS["attention"](qkv.contiguous(), 2, 0.125, None)
        assert torch.equal(OPS["attention"](qkv, 2, 0.125, None), contiguous)


def test_more_leading_axes_than_the_launcher_describes(isa):
    # Every second element of six axes: none merge, so the input is copied.
    x = torch.randn(4, 4, 4, 4, 4, 4, 8)[::2, ::2, ::2, ::2, ::2, ::2]
    arguments = (x, torch.ones(8), None, 1e-6)
    oracle.check(OPS["layer_norm"](*arguments), reference.layer_norm, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(isa, dtype):
    weight = torch.ones(64, dtype=dtype)
    for shape in ((0, 5, 64), (3, 0, 64), (0, 64)):
        x = torch.empty(shape, dtype=dtype)
        assert OPS["layer_norm"](x, weight, None, 1e-6).shape == shape
        out, total = OPS["add_layer_norm"](x, x, weight, None, 1e-6, None, None)
        assert out.shape == total.shape == shape
    for batch, tokens in ((0, 5), (3, 0)):
        qkv = torch.empty(batch, tokens, 192, dtype=dtype)
        assert OPS["attention"](qkv, 1, 0.125, None).shape == (batch, tokens, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_is(isa, dtype):
    x = oracle.make("random", (4, 192), dtype)
    x[1, 190] = torch.nan
    x[2, 0] = torch.inf
    arguments = (x, torch.ones(192, dtype=dtype), None, 1e-6)
    oracle.check(OPS["layer_norm"](*arguments), reference.layer_norm, arguments)
    total = OPS["add_layer_norm"](x, x, *arguments[1:], None, None)[1]
    assert total[1, 190].isnan()
    assert total[2, 0].isinf()
    qkv = oracle.make("random", (3, 37, 192), dtype)
    qkv[0, 5, 3] = torch.nan  # a query: its row only
    qkv[1, 5, 64 + 3] = torch.nan  # a key: every row
    out = OPS["attention"](qkv, 1, 0.125, None)
    assert out[0].isnan().any(-1).nonzero().flatten().tolist() == [5]
    assert out[1].isnan().all()
    assert out[2].isfinite().all()


def test_masked_keys(isa):
    qkv = oracle.make("random", (3, 50, 3 * 64))
    bias = torch.zeros(3, 50)
    bias[0] = -torch.inf  # nothing to attend to: as the reference, zeros
    bias[1, 20:] = -torch.inf
    arguments = (qkv, 1, 0.125, bias)
    out = OPS["attention"](*arguments)
    oracle.check(out, reference.attention, arguments)
    alone = OPS["attention"](qkv[1:2, :20], 1, 0.125, None)
    torch.testing.assert_close(out[1:2, :20], alone, rtol=1e-6, atol=1e-6)
    qkv[0, 7, 64:128] = torch.nan  # a NaN score is not a masked one
    assert OPS["attention"](qkv, 1, 0.125, bias)[0].isnan().all()


def test_denormals_and_the_edges_of_half(isa):
    tiny = torch.full((2, 64), 1e-40)
    tiny[:, ::2] = -3e-41
    arguments = (tiny, torch.ones(64), None, 0.0)
    total = OPS["add_layer_norm"](tiny, tiny, *arguments[1:], None, None)[1]
    assert torch.equal(total, tiny + tiny)
    # Every half-precision value is widened, and rounded back by adding zero.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(128, 512)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        weight = torch.ones(512, dtype=dtype)
        total = OPS["add_layer_norm"](x, torch.zeros_like(x), weight, None, 1e-6, None, None)[1]
        assert torch.equal(total.nan_to_num(7.0), x.nan_to_num(7.0))
        # fp32 sums between two halves round as torch rounds them.
        near = oracle.make("random", (128, 512), seed=4) * 10.0 ** torch.linspace(-9, 6, 512)
        one = torch.ones(512)
        _, rounded = OPS["add_layer_norm"](near.to(dtype), near.to(dtype), one, None, 1e-6,
                                           torch.full((512,), 1 / 3), None)  # fmt: skip
        exact = near.to(dtype).float()
        torch.testing.assert_close(
            rounded, (exact + exact * torch.tensor(1 / 3)).to(dtype), rtol=0, atol=0
        )


def test_threads_change_no_bit(isa, threads):
    x = oracle.make("random", (8, 197, 192))
    qkv = oracle.make("random", (3, 197, 3 * 192))
    weight, bias, gamma = parameters(192, torch.float32)
    calls = [
        lambda: OPS["layer_norm"](x, weight, bias, 1e-6),
        lambda: torch.stack(OPS["add_layer_norm"](x, x, weight, bias, 1e-6, gamma, None)),
        lambda: OPS["attention"](qkv, 3, 0.125, None),
        lambda: OPS["attention"](qkv[:1, :, :192].contiguous(), 1, 0.125, None),
    ]
    threads(1)
    alone = [call() for call in calls]
    try:
        for whose in ("own", "torch"):
            native.select_cpu_threads(whose)
            for count in (2, 8):
                threads(count)
                assert all(torch.equal(a, call()) for a, call in zip(alone, calls, strict=True))
    finally:
        native.select_cpu_threads("auto")


def test_whose_threads_is_one_of_three_names():
    with pytest.raises(ValueError, match=r"name: expected auto, own or torch; got 'mine'"):
        native.select_cpu_threads("mine")
    run = subprocess.run(
        [sys.executable, "-c", "from deit.kernels.engine import native; native.why_not('cpu')"],
        env=os.environ | {"FUSED_DEIT_THREADS": "gomp"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    last = run.stderr.splitlines()[-1]
    assert last == "ValueError: FUSED_DEIT_THREADS: expected auto, own or torch; got 'gomp'"


def _child(expected, x, qkv):
    torch.set_num_threads(1)
    results = layer_norm(x, torch.ones(192), impl="cpu"), attention(qkv, 3, impl="cpu")
    sys.exit(0 if all(map(torch.equal, results, expected)) else 3)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="fork is the start method on Linux alone")
def test_works_after_fork():
    x, qkv = torch.randn(8, 197, 192), torch.randn(2, 197, 3 * 192)
    expected = layer_norm(x, torch.ones(192), impl="cpu"), attention(qkv, 3, impl="cpu")
    child = multiprocessing.get_context("fork").Process(target=_child, args=(expected, x, qkv))
    child.start()
    child.join(60)
    assert child.exitcode == 0  # None: it hangs


@pytest.mark.skipif(sys.platform != "linux", reason="fork is the start method on Linux alone")
def test_own_threads_after_fork():
    """The child has none of its parent's: it starts its own, and ends without waiting."""
    code = """
        import os, signal, torch
        from deit.kernels import layer_norm
        from deit.kernels.engine import native
        native.select_cpu_threads("own")
        torch.set_num_threads(2)
        x = torch.randn(8, 197, 192)
        expected = layer_norm(x, torch.ones(192), impl="cpu")
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            found = layer_norm(x, torch.ones(192), impl="cpu")
            assert len(os.listdir("/proc/self/task")) == 2
            torch.set_num_threads(1)  # torch.equal's threads are OpenMP's, and gone
            assert torch.equal(found, expected)
        else:
            assert os.waitpid(child, 0)[1] == 0
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = torch.randn(2, 5, 64, dtype=dtype)
    weight, bias, gamma = parameters(64, dtype)
    keep = torch.tensor([0.0, 2.0], dtype=dtype)
    torch.library.opcheck(OPS["layer_norm"], (x, weight, bias, 1e-6))
    torch.library.opcheck(OPS["layer_norm"], (x.transpose(0, 1), weight, None, 1e-6))
    added = (x, x.float(), weight, bias, 1e-6, gamma, keep)
    torch.library.opcheck(OPS["add_layer_norm"], added)
    qkv = torch.randn(2, 5, 192, dtype=dtype)
    torch.library.opcheck(OPS["attention"], (qkv, 1, 0.125, torch.randn(2, 5)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS["layer_norm"](torch.ones(2, 8), torch.ones(7), None, 1e-6), "weight"),
        (lambda: OPS["layer_norm"](torch.ones(2, 8).double(), torch.ones(8), None, 1e-6), "x"),
        (lambda: OPS["attention"](torch.ones(1, 2, 192), 5, 1.0, None), "qkv"),
        (lambda: OPS["attention"](torch.ones(1, 2, 192), 1, 1.0, torch.ones(1, 3)), "key_bias"),
    ],
)
def test_a_raw_call_with_wrong_shapes_raises(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_residual_of_another_shape_raises():
    x, weight = torch.ones(2, 3, 8), torch.ones(8)
    with pytest.raises(RuntimeError, match="residual"):
        OPS["add_layer_norm"](x, x[:, :2], weight, None, 1e-6, None, None)


def test_selecting_an_instruction_set():
    best = native.cpu_isa()
    assert best in SETS
    with pytest.raises(ValueError, match="neon9"):
        native.select_cpu_isa("neon9")
    native.select_cpu_isa("portable")
    assert native.cpu_isa() == "portable"
    native.select_cpu_isa(None)
    assert native.cpu_isa() == best


def test_runs_on():
    library = ["sm_80", "sm_90a", "sm_100", "compute_100"]
    runs = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert all(native.runs_on(library, capability) for capability in runs)
    assert not any(native.runs_on(library, capability) for capability in [(7, 5), (6, 0)])
    assert not native.runs_on(["sm_90a"], (9, 1))  # "a" code runs on its own version alone
    assert not native.runs_on(["sm_86"], (8, 0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """native looking at an empty folder, with nothing remembered."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.why_not.cache_clear()
    yield tmp_path
    native.why_not.cache_clear()


def test_reasons_quote_the_build_record(folder):
    (reason,) = native.why_not("cpu")
    assert "no build is on record" in reason
    for entry, expected in (
        ({"built": False, "reason": "no C++ compiler: none"}, "was not built: no C++ compiler"),
        ({"built": True}, "is gone"),
    ):
        build_record.write(folder, {"sources": "0", "libraries": {"cpu": entry}})
        native.why_not.cache_clear()
        assert expected in native.why_not("cpu")[0]
    (folder / build_record.FILE).write_text("{")
    native.why_not.cache_clear()
    assert "no build is on record" in native.why_not("cpu")[0]


def test_a_broken_library_is_reported_with_the_loaders_words(folder):
    (folder / native.LIBRARIES["cpu"]).write_bytes(b"not a library")
    (reason,) = native.why_not("cpu")
    assert "does not load" in reason
    assert native.LIBRARIES["cpu"] in reason


def test_a_changed_source_makes_the_library_stale(tmp_path, monkeypatch):
    before = native.status("cpu")
    assert before["usable"]
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "a.cpp").write_text("int a;")
    monkeypatch.setattr(native, "CSRC", sources)
    assert native.status("cpu")["stale"] is True
    first = build_record.sources_hash(sources)
    (sources / "a.cpp").rename(sources / "b.cpp")
    assert build_record.sources_hash(sources) != first
    monkeypatch.setattr(native, "CSRC", tmp_path / "absent")
    assert native.status("cpu")["stale"] is None


def test_no_cuda_library_is_loaded_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    native.why_not.cache_clear()
    try:
        (reason,) = native.why_not("cuda")
    finally:
        native.why_not.cache_clear()
    assert "without CUDA" in reason


def test_a_library_of_older_sources_is_a_reason(monkeypatch):
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: object())
    native.why_not.cache_clear()
    try:
        (reason,) = native.why_not("cpu")
    finally:
        native.why_not.cache_clear()
    assert reason == f"the cpu library is of older sources: {native.AGAIN}"


def test_the_library_names_no_path_of_the_build():
    path = native.status("cpu")["path"]
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=False)
    if dynamic.returncode != 0:
        pytest.skip("no readelf")
    assert "libtorch_cpu.so" in dynamic.stdout
    assert "RPATH" not in dynamic.stdout
    assert "RUNPATH" not in dynamic.stdout
    assert ctypes.CDLL(path).deit_cpu_select_isa(b"") == 0


def test_loading_touches_no_device():
    code = """
        import torch
        from deit.kernels.engine import native
        native.why_not("cpu")
        assert not torch.cuda.is_initialized()
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True,
                         text=True, timeout=120, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
