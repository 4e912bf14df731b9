"""What importing costs, and that a broken or absent dependency is met only where it is used."""

import subprocess
import sys
import textwrap

import pytest


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light_and_touches_no_device():
    run(
        """
        import sys
        import torch
        before = set(sys.modules)
        import deit, deit.kernels
        heavy = {"triton", "timm", "torchvision", "torch._dynamo", "transformers", "PIL"}
        loaded = {name.split(".")[0] for name in set(sys.modules) - before} | (
            {"torch._dynamo"} & (set(sys.modules) - before))
        assert not heavy & loaded, heavy & loaded
        assert not torch.cuda.is_initialized()
        assert not any("_cpu" in p for p in torch.ops.loaded_libraries)
        """
    )


def test_without_triton_the_rest_works_and_says_so():
    run(
        """
        import sys, importlib.abc
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(name, name=name)
        sys.modules.pop("triton", None)
        sys.meta_path.insert(0, Block())
        import importlib.util
        original = importlib.util.find_spec
        importlib.util.find_spec = lambda n, *a: None if n == "triton" else original(n, *a)
        import torch
        from deit.kernels import explain, layer_norm
        x, w = torch.randn(2, 8), torch.ones(8)
        assert layer_norm(x, w).shape == (2, 8)
        assert "not installed" in explain("layer_norm", x, w).reasons["triton"][0]
        """
    )


def test_the_first_call_of_a_process_may_be_compiled():
    """Operators must be registered before tracing, not by the first eager call."""
    run(
        """
        import torch
        from deit.kernels import layer_norm, attention
        def both(x, w, qkv):
            return layer_norm(x, w), attention(qkv, 1)
        f = torch.compile(both, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            a, b = f(torch.randn(2, 8), torch.ones(8), torch.randn(1, 3, 192))
        assert a.shape == (2, 8) and b.shape == (1, 3, 64)
        """
    )


def test_documented_names_stay_where_users_import_them_from():
    run(
        """
        from deit import create, load
        from deit.checkpoint import load_into, save
        from deit.data.sources import open_source
        from deit.export import load_package
        from deit.fused_vit import compile_graph, fuse, refresh, register_hf, unfuse
        from deit.train import Trainer, train
        """
    )


def test_torchrun_finds_the_training():
    """docs/training.md: `torchrun ... -m deit.train`."""
    pytest.importorskip("tyro", reason="tyro is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "deit.train", "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "--augment-on" in result.stdout
