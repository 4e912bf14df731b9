"""Embeddings of WebDataset shards by as many processes as there are GPUs, on any number of nodes.

    torchrun --nproc-per-node 8 examples/torchrun_shards.py 'shards/{000..146}.tar' out/ WEIGHTS

Each process takes every n-th shard. A shard has a folder of its own, so a restart
(`--max-restarts`) changes no row, and on GPUs nor does the number of processes; what is there is
not made again.
"""

import os
import sys
from pathlib import Path

import torch

from deit.batch import Inputs, Model, run
from deit.data.shards import expand

if __name__ == "__main__":
    pattern, out, weights = sys.argv[1:]
    rank, processes, local = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))
    model = Model(weights, output="embedding", device=device, threads=cores)
    for shard in expand(pattern)[rank::processes]:
        done = run(model, Inputs([shard]), Path(out) / Path(shard).stem, workers=cores)
        print(f"{rank}: {shard}: {done.rows} rows, {done.unreadable} unreadable", flush=True)
