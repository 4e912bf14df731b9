"""Triton Inference Server's Python backend: encoded images in, classes and scores out.

    tritonserver --model-repository examples/triton      # ../config.pbtxt names the weights

The server forms batches (`dynamic_batching`); a batch of requests is one call of the model.
"""

import json

import numpy as np
import triton_python_backend_utils as pb

from deit.batch import Model


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        config = json.loads(args["model_config"])
        gpu = args["model_instance_kind"] == "GPU"
        self.model = Model(
            config["parameters"]["weights"]["string_value"],
            output="probabilities",
            device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
            batch_size=config["max_batch_size"],
        )

    def execute(self, requests: list) -> list:
        columns = [pb.get_input_tensor_by_name(r, "IMAGE").as_numpy()[:, 0] for r in requests]
        values, errors = self.model.read(np.concatenate(columns))
        ends = np.cumsum([len(column) for column in columns])
        responses = []
        for part, why in zip(np.split(values, ends[:-1]), np.split(errors, ends[:-1]), strict=True):
            if any(why):
                error = pb.TritonError("; ".join(filter(None, why)))
                responses.append(pb.InferenceResponse([], error))
                continue
            best = np.argsort(-part, axis=1)[:, :5].astype(np.int32)
            score = np.take_along_axis(part, best, axis=1)
            outputs = [pb.Tensor("CLASS", best), pb.Tensor("SCORE", score)]
            responses.append(pb.InferenceResponse(outputs))
        return responses
