"""OpenVINO on the CPU, in fp32 and quantised to int8 by NNCF's recipe for transformers.

One stream over torch's number of threads, called synchronously, as every other contender is.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor

from peers import calibration
from peers.peer import Built, Peer, Problem, quietly

CALIBRATION_IMAGES = 128  # or the next multiple of the batch, which the graph has in it


def _convert(problem: Problem) -> Any:
    import openvino

    images = problem.images
    with quietly():
        return openvino.convert_model(
            problem.module, example_input=images, input=[list(images.shape)]
        )


def _compile(model: Any, problem: Problem, about: str) -> Built:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": problem.threads,
        "INFERENCE_PRECISION_HINT": "f32",  # or it would run bf16 where the processor has it
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0])

    version = openvino.__version__.partition("-")[0]
    return Built(call, f"openvino {version}, one stream, {problem.threads} threads{about}")


def _fp32(problem: Problem) -> Built:
    return _compile(_convert(problem), problem, "")


def _int8(problem: Problem) -> Built:
    os.environ.setdefault("NNCF_CI", "1")  # read on import: a benchmark reports to nobody
    import nncf

    nncf.set_log_level(logging.ERROR)
    batch, _, size, _ = problem.images.shape
    count = -(-CALIBRATION_IMAGES // batch) * batch
    photographs, what = calibration.photographs(size, count)
    batches = [images.numpy() for images in photographs.split(batch)]
    model = _convert(problem)
    with quietly():
        model = nncf.quantize(
            model,
            nncf.Dataset(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
        )
    about = f", int8 by nncf {nncf.__version__}, transformer preset, calibrated on {what}"
    return _compile(model, problem, about)


PEERS = (
    Peer("openvino", "OpenVINO", _fp32, ("openvino",), counted=False),
    Peer(
        "openvino-int8",
        "OpenVINO int8",
        _int8,
        ("openvino", "nncf", "skimage", "sklearn"),
        "pip install openvino nncf scikit-image scikit-learn",
        precision="int8",
        counted=False,
    ),
)
