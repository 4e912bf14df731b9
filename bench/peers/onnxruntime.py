"""ONNX Runtime on the CPU: torch's exporter, every graph optimisation, torch's thread count."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from peers.peer import Built, Peer, Problem, quietly


def _export(problem: Problem, path: Path) -> None:
    """The network as ONNX for exactly this batch: constant shapes let more be folded."""
    with quietly():
        program = torch.onnx.export(problem.module, (problem.images,), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)


def _build(problem: Problem) -> Built:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.inter_op_num_threads = 1
    # Its threads spin while it runs, as they do by default, and not into the next contender's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        _export(problem, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()

    def call(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {source.name: images.numpy()})
        return torch.from_numpy(logits)

    about = f"onnxruntime {onnxruntime.__version__}, all optimisations, {problem.threads} threads"
    return Built(call, about)


_PACKAGES = ("onnxruntime", "onnx", "onnxscript")
PEERS = (Peer("onnxruntime", "ONNX Runtime", _build, _PACKAGES, counted=False),)
