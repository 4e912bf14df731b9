"""TensorRT by Torch-TensorRT: the exported network as one engine, CUDA only.

Strongly typed, so that every layer runs in the dtype of the comparison, with TF32 off; shapes are
the batch's own. It has not run on a GPU yet.
"""

from __future__ import annotations

import torch

from peers.peer import ALL, Built, Problem, on_cuda, quietly


def _build(problem: Problem) -> Built:
    import torch_tensorrt

    with quietly(), torch.no_grad():
        program = torch.export.export(problem.module, (problem.images,))
        engine = torch_tensorrt.dynamo.compile(
            program,
            inputs=[problem.images],
            use_explicit_typing=True,
            disable_tf32=True,
            min_block_size=1,
        )
    return Built(engine, f"torch_tensorrt {torch_tensorrt.__version__}, strongly typed, TF32 off")


_PACKAGE, _INSTALL = ("torch_tensorrt",), "pip install torch-tensorrt"
PEERS = (on_cuda("tensorrt", "TensorRT", _build, _PACKAGE, _INSTALL, dtypes=ALL, counted=False),)
