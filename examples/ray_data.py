"""Embeddings of images on a Ray cluster: `map_batches` with the class, one model an actor.

    python examples/ray_data.py photos/ embeddings/ --weights deit_small_patch16_224-cd65a155.pth

Ray starts the actors, retries the blocks of one that died and writes Parquet.
"""

import argparse

import ray

from deit.batch import Model


class Embed:
    def __init__(self, weights: str, threads: int) -> None:
        self.model = Model(weights, output="embedding", threads=threads)

    def __call__(self, batch: dict) -> dict:
        embedding, error = self.model.read(batch["bytes"])
        return {"path": batch["path"], "embedding": embedding, "error": error}  # NaN, and why


def embed(images, out, weights, actors=2, cores=1, blocks=None) -> None:
    # Reading takes cores, too: the actors must leave some. A block is what a dead actor repeats.
    files = ray.data.read_binary_files(images, include_paths=True, override_num_blocks=blocks)
    rows = files.map_batches(
        Embed,
        fn_constructor_kwargs={"weights": weights, "threads": cores},
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cores,
        batch_size=32,
        # num_gpus=1,  # of an actor
    )
    rows.write_parquet(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images")
    parser.add_argument("out")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--cores", type=int, default=1, help="of an actor")
    given = parser.parse_args()
    embed(given.images, given.out, given.weights, given.actors, given.cores)
