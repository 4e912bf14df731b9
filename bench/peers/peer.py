"""What a peer is: another way to run the very same weights, and what it needs to run here."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import deit
from deit.weights.layouts import LAYOUTS

Call = Callable[[Tensor], Tensor]
FP32 = (torch.float32,)
HALVES = (torch.float16, torch.bfloat16)
ALL = (*FP32, *HALVES)
# FlashAttention's packages by its version, and the commands that install them.
FLASH = {
    2: ("flash_attn", "pip install flash-attn --no-build-isolation"),
    3: (
        "flash_attn_interface",
        "pip install 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
    ),
}


@dataclass(frozen=True)
class Problem:
    """What a peer is asked to run: a network in evaluation mode and the batch it will be given.

    module: the eager model, which the others share and nobody may change; images: [B, 3, S, S].
    impl: which implementation of the fused operators was asked for.
    """

    module: nn.Module
    config: deit.Config | None  # None for convnets
    images: Tensor
    threads: int
    impl: str = "auto"


@dataclass(frozen=True)
class Built:
    """A peer ready to run: images -> logits, and the versions and settings it runs with."""

    call: Call
    about: str


def one_headed(problem: Problem) -> deit.Config:
    """The configuration, for libraries whose network has one classifier.

    Raises ValueError for a convnet and for a distilled network, whose two heads others join by
    another rule or not at all.
    """
    config = problem.config
    if config is None or config.distilled:
        raise ValueError("network: expected a DeiT with one head: theirs joins two otherwise")
    return config


def twin(module: nn.Module) -> nn.Module:
    """A copy whose modules may be changed, and whose weights are the same tensors."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def renamed(theirs: nn.Module, ours: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Our tensors under their names: the rules that read their checkpoints, backwards."""
    rules = next(each.rules for each in LAYOUTS if each.name == layout)
    state = {}
    for key in theirs.state_dict():
        matches = ((re.fullmatch(pattern, key), name) for pattern, name in rules)
        name = next(match.expand(name) for match, name in matches if match)
        name, _, part = name.partition("@")  # "...qkv.weight@0/3": the first of three stacked
        state[key] = ours[name].chunk(3)[int(part[0])] if part else ours[name]
    return state


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence the progress bars and warnings of exporters; what they raise still comes through."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Peer:
    """One peer's adapter.

    name: on the command line; how: in tables and evidence.
    build: makes it for a problem, apart from timing; what it raises is reported.
    packages: what must be installed; install: the command that does so, where it is not pip's with
    these very names.
    precision: "dtype" where logits may differ by that dtype's rounding; more by "int8" and "fp8".
    devices, dtypes: where it runs, and at what dtype of the whole comparison.
    compile_mode: of torch.compile, for those peers that are it.
    """

    name: str
    how: str
    build: Callable[[Problem], Built]
    packages: tuple[str, ...] = ()
    install: str = ""
    precision: str = "dtype"
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[torch.dtype, ...] = FP32
    trains: bool = False
    compile_mode: str | None = None
    counted: bool = True  # is its memory torch's, so that it can be told from the others'?
    also: Callable[[], str] = lambda: ""  # a further reason, "" for none

    def why_not(self, device: str, dtype: torch.dtype, train: bool) -> str:
        """Why it cannot run here on these terms, with what would help; "" where it can."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            install = self.install or f"pip install {' '.join(self.packages)}"
            return f"{', '.join(missing)} not installed: {install}"
        if train and not self.trains:
            return "it is for inference"
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)} here, not on {device}"
        if dtype not in self.dtypes:
            return f"its adapter has no {str(dtype).removeprefix('torch.')}"
        return self.also()


everywhere = functools.partial(Peer, devices=("cpu", "cuda"), dtypes=ALL)
on_cuda = functools.partial(Peer, devices=("cuda",))
