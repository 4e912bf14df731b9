"""A run small enough to be killed and repeated: 48 images of 16 pixels, two blocks of 64 channels.

As a program (`python tests/training.py OUT [key=value ...]`) it is what the fault tests start in a
process of its own, alone or under torchrun.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from deit.options import Distillation, Options, Shape
from deit.recipes import recipe

PROGRAM = [sys.executable, str(Path(__file__))]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
]
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def images(root: Path, train: int = 16, val: int = 8) -> Path:
    """Three classes of coloured noise below root/train and root/val."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            inside = root / split / name
            inside.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noise = rng.normal(colour, 60, (20, 20, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(inside / f"{i}.png")
    return root


def options(data: Path, out: Path, **changes: Any) -> Options:
    """Options of the small run; `recipe_*` keys change its recipe."""
    settings = {
        "epochs": 3,
        "batch_size": 16,
        "warmup_epochs": 1.0,
        "drop_path": 0.2,
        "lr": 2e-3,
        "lr_batch": 0,
        "ema": 0.9,
    }
    for key in [k for k in changes if k.startswith("recipe_")]:
        settings[key.removeprefix("recipe_")] = changes.pop(key)
    kind = changes.pop("distill", "none")
    given: dict[str, Any] = {
        "arch": "deit_ti",
        "img_size": 16,
        "shape": Shape(embed_dim=64, depth=2, patch_size=8),
        "workers": 0,
        "device": "cpu",
        "distillation": Distillation(kind),
    } | changes
    return Options(str(data), out, recipe=recipe("deit", **settings), **given)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """A finished run's final weights and their average."""
    from safetensors.torch import load_file

    found = {f"model.{k}": v for k, v in load_file(out / "model.safetensors").items()}
    if (out / "average.safetensors").exists():
        average = load_file(out / "average.safetensors")
        found |= {f"average.{k}": v for k, v in average.items()}
    return found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that differ in a bit."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def losses(text: str) -> dict[int, float]:
    """Update -> loss, from what `main` prints."""
    return {int(u): float(x) for u, x in re.findall(r"update (\d+) loss (\S+)", text)}


def signalled(command: list[str], number: int, at: str, **environment: str) -> tuple[int, str, str]:
    """Run a command that gets a signal at the first line it prints in which `at` is found.

    A group in `at` is the process it goes to. Returns the exit status, what was printed after that
    line, and stderr.
    """
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert running.stdout is not None
    for line in running.stdout:
        if found := re.search(at, line):
            os.kill(int(found[1]) if found.lastindex else running.pid, number)
            break
    after, errors = running.communicate(timeout=300)
    return running.returncode, after, errors


def main() -> None:
    """Train; DELAY seconds are slept after each update, so that a signal arrives within the run.

    EVALUATION seconds are slept before each batch of an evaluation, and a line says so.
    """
    from deit import evaluate, train

    data, out, *pairs = sys.argv[1:]
    out = out.replace("RANK", os.environ.get("RANK", "0"))  # a folder of each process's own
    changes: dict[str, Any] = {}
    for key, value in (pair.split("=") for pair in pairs):
        changes[key] = int(value) if value.isdigit() else value
    delay, step = float(os.environ.get("DELAY", "0")), train.Trainer.step

    # "rank,update": that process of torchrun kills itself there, the first time it gets there.
    victim = tuple(map(int, os.environ.get("KILL", "-1,-1").split(",")))
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def slow(self: train.Trainer, *arguments: Any) -> Any:
        if first and victim == (self.world.rank, self.update):
            os.kill(os.getpid(), signal.SIGKILL)
        result = step(self, *arguments)
        # One write a line: several processes share the pipe.
        os.write(1, f"update {self.update} loss {result[0]!r}\n".encode())
        time.sleep(delay)
        return result

    pause, judge = float(os.environ.get("EVALUATION", "0")), evaluate.heads_of

    def slowly(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
        os.write(1, f"evaluating in process {os.getpid()}\n".encode())
        time.sleep(pause)
        return judge(model, images)

    if pause:
        evaluate.heads_of = slowly
    train.Trainer.step = slow  # type: ignore[method-assign]
    torch.set_num_threads(1)
    # Two processes that torchrun started again wait for each other by gloo, now and then for ever:
    # after its time they fail, and are started once more.
    dist.init_process_group = functools.partial(
        dist.init_process_group, timeout=timedelta(seconds=60)
    )
    train.train(options(Path(data), Path(out), **changes))


if __name__ == "__main__":
    main()
