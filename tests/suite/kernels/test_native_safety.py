"""The CPU operators beside threads, forks and themselves: bits, hangs, hidden state.

Addresses and races inside the C++ kernels are `make sanitize`'s business (tests/native).
"""

from __future__ import annotations

import functools
import multiprocessing
import subprocess
import sys
from collections.abc import Callable

import pytest
import schema_calls
import torch
from torch.utils.data import DataLoader, Dataset

import deit
from deit.fused_vit import fuse
from deit.kernels.engine import native, registry
from deit.kernels.prove import calls, oracle

pytestmark = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)
OPS = registry.COMPILED["cpu"]
Call = Callable[[], object]


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return oracle.make("random", shape, seed=seed)


X, W = make(8, 197, 192), make(192, seed=1)
FC1, FC2 = make(768, 192, seed=2) / 14, make(192, 768, seed=3) / 28
NORM = (W, W, 1e-6)
BLOCK = (X, W, W, make(576, 192, seed=7) / 14, None, make(192, 192, seed=8) / 14, W, W, W, W,
         FC1, None, FC2, W, None)  # fmt: skip
THIRDS = tuple(make(192, 192, seed=seed) / 14 for seed in (9, 10, 11))
TABLES = make(196, 64, seed=11).sin(), make(196, 64, seed=11).cos()
BLOCK_THIRDS = (*BLOCK[:3], *THIRDS, *BLOCK[4:])


def by_schema(name: str) -> Call:
    """Of the schema, its arguments drawn once."""
    size = calls.Size(8, 197, 192, width=768, side=4)
    arguments = functools.cache(lambda: schema_calls.arguments(name, "cpu", size=size))
    return lambda: OPS[name](*arguments())


# Schema -> a call large enough to be split among eight threads. Those in 8 bits and those of thirds
# state none of these.
EIGHT_BITS_AND_THIRDS: dict[str, Call] = {
    "int8_linear": lambda: OPS["int8_linear"](X, FC1, None, *NORM, True, None, None),
    "int8_gelu_mlp": lambda: OPS["int8_gelu_mlp"](X, FC1, None, FC2, W, *NORM, X, None),
    # What those run with weights they have packed.
    "int8_linear_packed": lambda: OPS["int8_linear"](X, FC1, None, *NORM, False, None, None),
    "int8_gelu_mlp_packed": lambda: OPS["int8_gelu_mlp"](X, FC1, None, FC2, W, *NORM, X, W),
    "int8_vit_block": lambda: OPS["int8_vit_block"](*BLOCK, None, 3, 0.125, 1e-6),
    "int8_vit_block_packed": lambda: OPS["int8_vit_block"](*BLOCK, X[:, :, 0], 3, 0.125, 1e-6),
    "vit_block_rotary": lambda: OPS["vit_block_rotary"](
        *BLOCK[:4], None, None, *BLOCK[4:], *TABLES, 1, False, 3, 0.125, 1e-6
    ),
    "linear_thirds": lambda: OPS["linear_thirds"](X, *THIRDS, None),
    "vit_block_thirds": lambda: OPS["vit_block_thirds"](*BLOCK_THIRDS, None, 3, 0.125, 1e-6),
    "int8_linear_thirds": lambda: OPS["int8_linear_thirds"](X, *THIRDS, None, *NORM),
    "int8_vit_block_thirds": lambda: OPS["int8_vit_block_thirds"](
        *BLOCK_THIRDS, None, 3, 0.125, 1e-6
    ),
}  # fmt: skip
CALLS = EIGHT_BITS_AND_THIRDS | {
    name: by_schema(name) for name in sorted(registry.KERNELS["cpu"] - EIGHT_BITS_AND_THIRDS.keys())
}


def bits(result: object) -> list[torch.Tensor]:
    return [t.clone() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", CALLS)
def test_threads_change_no_bit(name: str, threads: Callable[[int], None]) -> None:
    threads(1)
    alone = bits(CALLS[name]())
    for count in (2, 8, 8):
        threads(count)
        assert all(map(torch.equal, alone, bits(CALLS[name]())))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = deit.create("deit_ti", img_size=64).eval()
    # The shortened last block asks PyTorch's attention for one query a head. PyTorch splits
    # those sums by the number of threads, and the logits move by 3e-7.
    fuse(made, last_block="full")
    return made


def test_threads_change_no_bit_of_a_fused_models_logits(
    model: torch.nn.Module, threads: Callable[[int], None]
) -> None:
    images = make(4, 3, 64, 64)
    threads(1)
    with torch.inference_mode():
        alone = model(images)
        for count in (2, 8):
            threads(count)
            assert torch.equal(model(images), alone)


class Embedded(Dataset[torch.Tensor]):
    """The loader runs its images through a fused model, as an embedding pipeline does."""

    def __init__(self, model: torch.nn.Module, images: torch.Tensor) -> None:
        self.model, self.images = model, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(self.images[i : i + 1])[0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="fork is the start method on Linux alone")
def test_forked_dataloader_workers_run_a_fused_model(
    model: torch.nn.Module, threads: Callable[[int], None]
) -> None:
    threads(2)  # the parent's thread pool is up before the fork, and does not survive it
    images = make(6, 3, 64, 64, seed=4)
    data = Embedded(model, images)
    expected = torch.stack([data[i] for i in range(len(data))])
    fork = multiprocessing.get_context("fork")
    loader = DataLoader(data, 3, num_workers=2, multiprocessing_context=fork, timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)
    assert torch.equal(data[0], expected[0])  # and the parent's goes on


def test_the_library_keeps_no_state_but_what_was_chosen_and_forks() -> None:
    path = str(native.status("cpu")["path"])
    command = ["objdump", "-t", "-C", path]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no symbols to read: {error}")
    writable = {".bss", ".data", ".tbss", ".tdata"}  # .data.rel.ro is sealed once loaded
    lines = [line.split(maxsplit=5) for line in listed.splitlines() if "deit::" in line]
    assert lines, "objdump listed none of the library's own symbols"
    # Address, flags, section, size, name: an object's line has its section after `O`.
    state = {" ".join(line[line.index("O") + 3 :]) for line in lines
             if "O" in line and writable & set(line)}  # fmt: skip
    own = "deit::(anonymous namespace)::"
    chosen = {f"{own}selected_floats", f"{own}selected_int8", "deit::selected_threads"}
    forks = {f"{own}forks", f"guard variable for {own}forks_so_far()::watched"}  # team.cpp
    assert state - {f"{own}forks_so_far()::watched"} == chosen | forks
