"""The launches that calls make on a GPU that is not here, noted on tensors of the meta device.

    with recording(90) as noted:
        linear(x, weight, impl="triton")
    noted.cases  # one for each kernel

`launches` lists what ships. This lists what a program launches, whatever it calls: on strides that
no descriptor takes, at few rows, by candidates of `deit tune`.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

from torch import Tensor

from deit.kernels.device import common, drivers
from deit.kernels.engine import dispatch, registry
from deit.kernels.prove import aot, launches, offsets

MULTIPROCESSORS = 132  # of an H100: persistent grids and sums in parts are counted by them


@dataclass(frozen=True)
class Called(launches.Shipped):
    """A kernel by the first call that launched it: `operator` made it, `variant` says how.

    Which units it is meant for is not known. launch: its tensors on the meta device; None in what a
    process that compiled it hands back.
    """

    launch: common.Launch | None = field(default=None, compare=False, repr=False)

    @property
    def tensor_cores(self) -> bool:
        return False

    @property
    def tma(self) -> bool:
        return False

    def build(self) -> common.Launch:
        assert self.launch is not None
        return self.launch


class Noted:
    """What was launched. cases: by kernel (`aot.key_of`); launches: how many there were.

    operator, variant: what the calls that come next are of.
    """

    def __init__(self, arch: int) -> None:
        self.arch, self.launches = arch, 0
        self.operator = self.variant = ""
        self.cases: dict[tuple[object, ...], Called] = {}

    def add(self, launch: common.Launch) -> None:
        self.launches += 1
        key = aot.key_of(launch, self.arch)
        if key not in self.cases:
            self.cases[key] = Called(self.operator, self.variant, "", 0, self.arch, launch=launch)


@contextlib.contextmanager
def recording(arch: int, multiprocessors: int = MULTIPROCESSORS) -> Iterator[Noted]:
    """impl="triton" takes tensors of the meta device inside, as those of a GPU, and runs nothing.

    arch: a key of chips.CHIPS. Autograd works as ever, so a backward's launches are noted too.
    """
    noted, real = Noted(arch), dispatch.environment

    def environment(implementation: str, device: str, index: int | None) -> tuple[str, ...]:
        if (implementation, device) == ("triton", "meta"):
            return ()
        return real(implementation, device, index)

    def run(launch: common.Launch, like: Tensor) -> None:
        noted.add(launch)

    # torch gives a call on the meta device to a schema's fake, so that the kernels' own functions
    # stand in for the schemas.
    functions = {
        name: getattr(importlib.import_module(module), name)
        for name, module in registry.MODULES["triton"].items()
    }
    with (
        mock.patch.object(dispatch, "environment", environment),
        mock.patch.object(common.Launch, "run", run),
        mock.patch.object(common, "architecture", return_value=arch),
        mock.patch.object(common, "multiprocessors", return_value=multiprocessors),
        mock.patch.object(drivers, "active", return_value=None),
        mock.patch.dict(registry.COMPILED["triton"], functions),
    ):
        yield noted


@dataclass(frozen=True)
class Compiled:
    """What became of a case. hash: by which Triton's cache finds it; "" where it is in none."""

    result: aot.Result
    hash: str


def compile_all(
    cases: Sequence[Called], cache: Path, jobs: int, seconds: float = float("inf")
) -> Iterator[Compiled]:
    """Compile each into a cache of Triton's, which may have some already; none begun too late.

    A process that is forked has the launches in its memory, which none could be sent.
    """
    global _cases, _end
    cache.mkdir(parents=True, exist_ok=True)
    _cases, _end = list(cases), time.monotonic() + seconds
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    try:
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            found = pool.imap(_compile, range(len(_cases)))
            yield from (each for each in found if each is not None)
    finally:
        _cases = []
        os.environ.pop("TRITON_CACHE_DIR")
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before


_cases: list[Called] = []
_end = 0.0


def _compile(index: int) -> Compiled | None:
    case = _cases[index]
    if time.monotonic() > _end:
        return None
    launch = case.build()
    result, compiled = aot.compile_launch(case, launch)
    if compiled is not None:
        try:
            read = offsets.read(compiled.asm["ttir"], launch.arguments, launch.grid)
            overflows = read.faults(launch.arguments)
        except NotImplementedError as error:
            overflows = [f"offsets not understood: {error}"]
        result = replace(result, overflows=tuple(overflows))
    result = replace(result, case=replace(case, launch=None))
    return Compiled(result, "" if compiled is None else compiled.hash)
