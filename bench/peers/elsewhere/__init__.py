"""A peer in a process of its own, under a Python of its own: for packages that pin another torch.

The network goes there as its configuration and its weights. Images and logits go through memory
that both processes map, so a call copies them (0.6 MB an image) and passes a byte each way. Linux
only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import mmap
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from peers.peer import Built, Problem

ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).with_name("program.py")


def variable(package: str) -> str:
    """The environment variable that names the Python which has `package`."""
    return f"FUSED_DEIT_{package.upper()}_PYTHON"


def python(package: str) -> str | None:
    """The Python that has `package`: what its variable names, else this one where it has it."""
    found = os.environ.get(variable(package))
    return found or (sys.executable if importlib.util.find_spec(package) is not None else None)


def why_not(package: str) -> str:
    """Why there is no such Python, with what makes one; "" where there is."""
    named = python(package)
    if named is None:
        how = f"python -m venv ENV && ENV/bin/pip install {package}, and {variable(package)}="
        return f"{package} not installed: {how}ENV/bin/python"
    if not Path(named).is_file():
        return f"{variable(package)}: expected a Python's path; got {named!r}"
    return ""


def built(problem: Problem, package: str) -> Built:
    """The network of `problem` as program.py makes it with `package`.

    Raises ValueError for a convnet, whose code the other Python may lack, and RuntimeError with
    what went wrong over there.
    """
    if problem.config is None:
        raise ValueError("network: expected a DeiT: this adapter has no convnets")
    other = _Other(problem, package)
    return Built(other, other.about)


class _Other:
    """The other process: images -> logits."""

    def __init__(self, problem: Problem, package: str) -> None:
        self.package = package
        with torch.inference_mode():
            logits = problem.module(problem.images)
        self.images, self.logits = _Shared(problem.images), _Shared(logits)
        with tempfile.TemporaryDirectory() as folder:
            network = Path(folder) / "network.pt"
            config = dataclasses.asdict(problem.config)  # type: ignore[arg-type]
            state = problem.module.state_dict()
            torch.save(
                {"config": config, "head": problem.module.test_head, "state": state}, network
            )
            self.process = self._start(problem, network)
            try:
                self.about = self._introduced()
            except BaseException:  # of the time limit, too
                self.process.kill()
                raise

    def _start(self, problem: Problem, network: Path) -> subprocess.Popen[bytes]:
        shared = [self.images, self.logits]
        terms = {
            "package": self.package,
            "network": str(network),
            "threads": problem.threads,
            "memory": [[each.file, list(each.tensor.shape)] for each in shared],
            "dtype": str(problem.images.dtype).removeprefix("torch."),
        }
        found = python(self.package)
        assert found is not None  # `why_not` was asked
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        changed = {
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": str(problem.threads),
            "TORCHINDUCTOR_FREEZING": "1",
        }
        process = subprocess.Popen(
            [found, str(PROGRAM), json.dumps(terms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | changed,
            pass_fds=[each.file for each in shared],
        )
        weakref.finalize(self, process.kill)
        return process

    def _introduced(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.package}: its process ended while it built the network")
        said = json.loads(line)
        if "error" in said:
            raise RuntimeError(f"{self.package}, in its process: {said['error']}")
        return str(said["about"])

    def __call__(self, images: Tensor) -> Tensor:
        to, back = self.process.stdin, self.process.stdout
        assert to is not None
        assert back is not None
        self.images.tensor.copy_(images)
        with contextlib.suppress(BrokenPipeError):
            to.write(b"\n")
        if back.read(1) != b"\n":
            raise RuntimeError(f"{self.package}: its process ended")
        return self.logits.tensor.clone()


class _Shared:
    """A tensor like `like` in memory that another process may map by its `file`."""

    def __init__(self, like: Tensor) -> None:
        self.file = os.memfd_create("peer")
        os.ftruncate(self.file, like.nbytes)
        memory = mmap.mmap(self.file, like.nbytes)
        self.tensor = torch.frombuffer(memory, dtype=like.dtype).view(like.shape)
        weakref.finalize(self, os.close, self.file)
