"""The examples that need no cluster; Ray's and Spark's are in tests/clusters."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import collection
import numpy as np
import pytest

from deit.batch import Inputs, Model, run

ROOT = Path(__file__).resolve().parents[4]
IMAGES = collection.encoded(5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return collection.weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


def loaded(path):
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_triton_backend_answers_each_request_of_a_batch(weights, monkeypatch):
    """Under a stand-in for the server's module: its tensors are [requests' images, 1] of bytes."""
    pb = types.ModuleType("triton_python_backend_utils")
    pb.get_input_tensor_by_name = lambda request, name: request[name]
    pb.Tensor = lambda name, array: (name, array)
    pb.TritonError = lambda message: message
    pb.InferenceResponse = lambda outputs, error=None: (dict(outputs), error)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb)
    model = loaded("triton/deit/1/model.py").TritonPythonModel()
    model.initialize({
        "model_config": json.dumps(
            {"max_batch_size": 4, "parameters": {"weights": {"string_value": str(weights)}}}
        ),
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    })  # fmt: skip

    def request(*images):
        array = np.array(images, dtype=object)[:, None]
        return {"IMAGE": types.SimpleNamespace(as_numpy=lambda: array)}

    answers = model.execute([request(*IMAGES[:2]), request(b"none"), request(*IMAGES[2:])])
    assert [error is None for _, error in answers] == [True, False, True]
    assert "not an image" in answers[1][1]
    wanted = Model(weights, output="probabilities")(IMAGES)
    best = np.concatenate([answers[0][0]["CLASS"], answers[2][0]["CLASS"]])
    assert best.dtype == np.int32
    np.testing.assert_array_equal(best, np.argsort(-wanted, axis=1)[:, :5])
    assert answers[2][0]["SCORE"].shape == (3, 5)


def test_litserve_answers(weights, monkeypatch):
    """The API by itself; `bench/serving.py` runs the server."""
    pytest.importorskip("litserve", reason="litserve is not installed (make clusters)")
    from fastapi import HTTPException

    monkeypatch.setenv("DEIT_WEIGHTS", str(weights))
    api = loaded("litserve_server.py").Classify(max_batch_size=8)
    api.setup("cpu")
    read = [api.decode_request({"image": base64.b64encode(image)}) for image in IMAGES]
    assert read == IMAGES
    answers = [api.encode_response(each) for each in api.unbatch(api.predict(api.batch(read)))]
    wanted = Model(weights, output="probabilities")(IMAGES)
    assert [answer["class"][0] for answer in answers] == list(wanted.argmax(1))
    alone = api.encode_response(api.predict(IMAGES[0]))
    assert alone["class"] == answers[0]["class"]
    assert alone["score"] == pytest.approx(answers[0]["score"], rel=1e-3)
    assert "not an image" in api.encode_response(api.predict(b"none"))["error"]
    for bad in ({}, {"image": "%"}, {"image": 7}):
        with pytest.raises(HTTPException, match="image: expected base64"):
            api.decode_request(bad)


def test_torchrun_over_shards(weights, tmp_path, threads):
    """Two processes, then one with as many threads as each had: the same files."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    for number in range(3):
        collection.shard(tmp_path / f"{number}.tar", IMAGES[number : number + 2])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(ROOT / "examples" / "torchrun_shards.py"), f"{tmp_path}/{{0..2}}.tar",
               str(tmp_path / "out"), str(weights)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=300, capture_output=True)
    threads(max(1, len(os.sched_getaffinity(0)) // 2))
    model = Model(weights, output="embedding")
    for number in range(3):
        given = Inputs([f"{tmp_path}/{number}.tar"])
        assert run(model, given, tmp_path / "out" / f"{number}").made == 0  # all there already
        assert len(collection.rows(tmp_path / "out" / f"{number}")) == 2
