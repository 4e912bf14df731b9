"""A server that forms batches from single requests, by LitServe.

    DEIT_WEIGHTS=deit_small_patch16_224-cd65a155.pth python examples/litserve_server.py
    curl -d "{\"image\": \"$(base64 -w0 photo.jpg)\"}" -H 'Content-Type: application/json' \
        127.0.0.1:8000/predict
"""

import base64
import os

import litserve
from fastapi import HTTPException

from deit.batch import Model


class Classify(litserve.LitAPI):
    def setup(self, device: str) -> None:  # once in each worker process
        threads = int(os.environ.get("DEIT_THREADS", "0")) or None
        self.model = Model(
            os.environ["DEIT_WEIGHTS"], None, "probabilities", "fp32", device, threads
        )

    def decode_request(self, request: dict) -> bytes:
        try:
            return base64.b64decode(request["image"], validate=True)
        except (KeyError, TypeError, ValueError):
            raise HTTPException(400, "image: expected base64 of an image file") from None

    def batch(self, images: list[bytes]) -> list[bytes]:
        return images

    def predict(self, images: list[bytes] | bytes) -> list:
        values, errors = self.model.read(images if isinstance(images, list) else [images])
        return list(zip(values, errors, strict=True))

    def unbatch(self, found: list) -> list:
        return found

    def encode_response(self, found) -> dict:
        values, error = found if isinstance(found, tuple) else found[0]
        if error is not None:
            return {"error": error}
        best = (-values).argsort()[:5]
        return {"class": best.tolist(), "score": values[best].tolist()}


def server(most: int = 8, wait: float = 0.005) -> litserve.LitServer:
    """`most` images of a batch, `wait` seconds for them; one at a time for most=1."""
    return litserve.LitServer(Classify(max_batch_size=most, batch_timeout=wait), accelerator="auto")


if __name__ == "__main__":
    server().run(host="127.0.0.1", port=8000, generate_client_file=False)
