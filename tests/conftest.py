"""Fixtures that several files of tests share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from instruction_sets import INT8_SETS, SETS

# A Zen 5 of a model that there is not: nobody's cache has measurements of it.
PRETENDED = "AMD family 26 model 99999, AVX512 VNNI BF16"


def _limited(select: Callable[[str | None], None], sets: tuple[str, ...], limit: str):
    def select_within(name: str | None) -> None:
        if name in sets[: sets.index(limit)]:
            raise RuntimeError(f"this processor does not run {name}")
        select(name or limit)

    select_within(None)
    return select_within


def pytest_configure() -> None:
    """Every machine is taken for one whose measurements are shipped, and none is measured unasked.

    DEIT_TEST_ISA=avx2 makes the C++ library's best set one that more processors run.

    `make avx2` limits PyTorch's too, and so shows what a processor without AVX-512 shows.
    """
    os.environ["FUSED_DEIT_DEVICE_KEY"] = PRETENDED
    os.environ["FUSED_DEIT_MEASURE"] = "never"
    if importlib.util.find_spec("tyro") is None:
        _without_tyro()
    limit = os.environ.get("DEIT_TEST_ISA")
    if limit is None:
        return
    from deit.kernels.engine import native

    native.select_cpu_isa = _limited(native.select_cpu_isa, SETS, limit)
    native.select_cpu_int8_isa = _limited(native.select_cpu_int8_isa, INT8_SETS, limit)


def _without_tyro() -> None:
    """A test that calls the command `deit` is skipped where it needs tyro."""
    from deit.commands import flags

    flags.cli = lambda *_, **__: pytest.skip("tyro is not installed")


def _selected(name: str) -> Iterator[str]:
    from deit.kernels.engine import limits, native

    try:
        limits.cpu_isa()  # cached now: the processor's own, not a test's choice
        native.select_cpu_isa(name)
    except (ValueError, RuntimeError) as error:
        pytest.skip(str(error))
    yield name
    native.select_cpu_isa(None)


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the C++ kernels in turn; the best one again afterwards."""
    yield from _selected(request.param)


@pytest.fixture(params=SETS[1:])
def base_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same where nothing is a bf16 product: AVX512-BF16 differs from AVX-512 in those alone."""
    yield from _selected(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads; the number is as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of coloured images."""
    import training

    return training.images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """A run that nothing interrupts: its folder and its result."""
    import training

    from deit.training.trainer import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training.py: sums in another order would be other bits
    out = tmp_path_factory.mktemp("whole")
    try:
        return out, train(training.options(data, out))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """The bits of a run depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
