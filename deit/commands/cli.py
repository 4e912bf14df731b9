"""The command `deit`: its subcommands as typed dataclasses, one field a flag.

This file imports no torch, so that `deit --help` answers at once; a subcommand imports what it
needs when it runs.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from deit.commands import flags
from deit.commands.train import (
    Eval,
    ExplainImage,
    Export,
    Finetune,
    Fixres,
    OptionalInt,
    OptionalName,
    OptionalPath,
    Paths,
    Report,
    Train,
)

BAD_INPUT = 2


@dataclass(frozen=True)
class Info:
    """Print versions, devices, what was built, and which kernels can run here."""

    def run(self) -> int:
        from deit.info import info

        info()
        return 0


@dataclass(frozen=True)
class Predict:
    """Name what photographs show: the likeliest classes of each, with their probabilities.

    Exits with 1 if an image could not be read (the others are still printed), with 2 for bad
    input.
    """

    images: Paths
    """Photographs, or folders of them."""
    weights: OptionalPath = None
    """The trained weights: a run's folder, an official .pth, a .safetensors, or a Hugging Face
    model folder."""
    arch: OptionalName = None
    """The network, such as deit_b or deit_tiny_distilled_patch16_224; left out: the weights'."""
    img_size: OptionalInt = None
    """Pixels along a side, a multiple of 16; the weights' own if left out."""
    test_head: Literal["class", "distillation", "softmax-sum", "logit-mean"] = "softmax-sum"
    """Of a distilled network: one head, the softmaxes' sum (the paper's) or the logits' mean."""
    topk: int = 5
    """Classes to print for each photograph."""
    classes: OptionalPath = None
    """A text file with one class name a line; a run's own classes or ImageNet's if left out."""
    device: str = "auto"
    """A torch device; auto is the first GPU, or the CPU where there is none."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the network computes in."""
    batch_size: int = 16
    """Photographs at a time."""
    fuse: bool = True
    """Run on the fused operators."""
    json: bool = False
    """Print one JSON document instead of text."""

    def run(self) -> int:
        from deit.predict import run

        return run(self)


@dataclass(frozen=True)
class Tune:
    """Measure configurations of the Triton kernels on this GPU and keep the best for later runs.

    The user's cache directory keeps them, by GPU model, driver, torch, Triton and kernels.

    Exits with 1 if a default configuration is found wrong.
    """

    arch: tuple[str, ...] = ("deit_ti", "deit_s", "deit_b")
    """The networks whose shapes are measured."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """What the networks compute in."""
    batch_size: int = 256
    """Images in a batch."""
    img_size: OptionalInt = None
    """Pixels along a side; the networks' own if left out."""
    train: bool = True
    """Also the kernels of the backward."""
    only: Annotated[tuple[str, ...], flags.arg(help_behavior_hint="")] = ()
    """Kernels to measure, such as linear; all if left out."""
    candidates: int = 40
    """Configurations to try for each kernel and shape."""
    seconds: float = 300.0
    """After this time no other kernel is begun."""
    jobs: OptionalInt = None
    """Processes that compile at once; half the cores, 8 at most, if left out."""
    device: str = "auto"
    """A torch device; auto is the first GPU."""

    def run(self) -> int:
        from deit.tune import run

        return run(self)


Command = (
    Annotated[Info, flags.subcommand("info")]
    | Annotated[Predict, flags.subcommand("predict")]
    | Annotated[Train, flags.subcommand("train")]
    | Annotated[Finetune, flags.subcommand("finetune")]
    | Annotated[Fixres, flags.subcommand("fixres")]
    | Annotated[Eval, flags.subcommand("eval")]
    | Annotated[Report, flags.subcommand("report")]
    | Annotated[Export, flags.subcommand("export")]
    | Annotated[ExplainImage, flags.subcommand("explain-image")]
    | Annotated[Tune, flags.subcommand("tune")]
)


def _any_name(error: UnicodeError) -> tuple[bytes, int]:
    """Encodes what a stream's encoding has no character for, which a file's name may hold.

    A byte that is no UTF-8 in a name is that byte again, anything else its escape.
    """
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return b"".join(
        bytes([ord(c) - 0xDC00])
        if "\udc80" <= c <= "\udcff"
        else c.encode("ascii", "backslashreplace")
        for c in characters
    ), error.end


def _print_any_name() -> None:
    codecs.register_error("deit-any-name", _any_name)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="deit-any-name")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (the process's own if None) and return its exit code.

    Bad input, a ValueError, TypeError or OSError, becomes one line on stderr and exit code 2;
    with DEIT_TRACEBACK=1 in the environment it stays a traceback.
    """
    _print_any_name()
    try:
        command = flags.cli(
            Command,
            arguments,
            prog="deit",
            description="DeiT vision transformers on fused kernels.",
        )
        return command.run()
    except BrokenPipeError:
        # The reader of our output has gone (`deit train --help | head`): nothing is wrong here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("deit: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("DEIT_TRACEBACK") == "1":
            raise
        print(f"deit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
