"""Predictions and embeddings of whole collections: folders, lists, globs and WebDataset shards.

    model = Model("deit_base_patch16_224-b5f2ef4d.pth", output="embedding")
    model([jpeg_bytes, "photo.jpg", array])         # numpy, [3, 768], fp32
    run(model, Inputs(["photos/", "shards/{000..099}.tar"]), "embeddings/")

`Model` is what a scheduler's worker calls (docs/scale.md: Ray, Spark, torchrun, Triton, LitServe).
`run` writes Parquet in pieces, and goes on where it was killed; it needs pyarrow (`[scale]`).
"""

from __future__ import annotations

from deit.batch.inputs import Inputs
from deit.batch.model import Model, Rows
from deit.batch.run import Summary, run

__all__ = ["Inputs", "Model", "Rows", "Summary", "run"]
