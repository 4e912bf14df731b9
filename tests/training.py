"""A run small enough to be killed and repeated: 48 images of 16 pixels, two blocks of 64 channels.

As a program (`python tests/training.py OUT [key=value ...]`) it is what the fault tests start in a
process of its own, alone or under torchrun.
"""

from __future__ import annotations

import faulthandler
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deit.recipes import recipe
from deit.training.options import Distillation, Options, Shape

PROGRAM = [sys.executable, str(Path(__file__))]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
]
LIMIT = 150  # seconds: a process that trains longer says where it hangs, and ends
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


def run(
    command: list[str],
    *,
    status: int = 0,
    send: int | None = None,
    at: str = "",
    **environment: str,
) -> tuple[str, str]:
    """Run a command to its end, and return what it printed on stdout and on stderr.

    `send`: a signal, at the first line of stdout in which `at` is found, where `main` waits for it;
    a group in `at` is the process it goes to. Raises AssertionError with the ends of both where
    the exit status is not `status`, or the command does not end.
    """
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "WAIT": at} | environment,
        )
        watchdog = threading.Timer(2 * LIMIT, running.kill)
        watchdog.start()
        try:
            assert running.stdout is not None
            for line in running.stdout:
                lines.append(line)
                if send is not None and (found := re.search(at, line)):
                    os.kill(int(found[1]) if found.lastindex else running.pid, send)
                    send = None
            ended, in_time = running.wait(), watchdog.is_alive()
        finally:
            watchdog.cancel()
        errors.seek(0)
        out, err = "".join(lines), errors.read()
    if ended != status or not in_time:
        outcome = f"exit status {ended}, not {status}" if in_time else f"killed: {2 * LIMIT} s"
        raise AssertionError(f"{outcome}\nstdout: ...{out[-2000:]}\nstderr: ...{err[-8000:]}")
    return out, err


def main() -> None:
    """Train as the command line says, and be drilled as the environment does."""
    from deit.training.trainer import train

    faulthandler.dump_traceback_later(LIMIT, exit=True)  # where it hangs, if it does
    torch.set_num_threads(1)
    data, out, *pairs = sys.argv[1:]
    rank = int(os.environ.get("RANK", "0"))
    changes: dict[str, Any] = {}
    for key, value in (pair.split("=") for pair in pairs):
        changes[key] = int(value) if value.isdigit() else value
    drill(rank)
    own = Path(out.replace("RANK", str(rank)))  # a folder of each process's own
    train(options(Path(data), own, **changes))


def drill(rank: int) -> None:
    """Have this process say every update and every batch of an evaluation, and by the environment

    WAIT: wait for a signal at a line in which this pattern is found;
    KILL: "rank,update", where that process of torchrun kills itself, before any restart;
    LATE: the rank of the process that starts a second after the others, after a restart.
    """
    from deit.training import evaluation
    from deit.training.trainer import Trainer

    wait, (heard, wake) = os.environ.get("WAIT"), os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    victim = tuple(map(int, os.environ.get("KILL", "-1,-1").split(",")))
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    step, judge = Trainer.step, evaluation.heads_of

    def say(line: str) -> None:
        os.write(1, f"{line}\n".encode())  # one write: several processes share the pipe
        if wait and re.search(wait, line):
            select.select([heard], [], [])

    def stepped(self: Trainer, *arguments: Any) -> Any:
        if first and victim == (rank, self.update):
            os.kill(os.getpid(), signal.SIGKILL)
        result = step(self, *arguments)
        say(f"update {self.update} loss {result[0]!r}")
        return result

    def judged(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
        say(f"evaluating, process {rank} is {os.getpid()}")
        return judge(model, images)

    Trainer.step = stepped  # type: ignore[method-assign]
    evaluation.heads_of = judged
    if not first and os.environ.get("LATE") == str(rank):
        time.sleep(1)


if __name__ == "__main__":
    main()
