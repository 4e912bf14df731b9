"""What the emulator and its sanitizers find: faults put in on purpose."""

from __future__ import annotations

import subprocess

import pytest

from native import sanitize

TSAN = {"TSAN_OPTIONS": "halt_on_error=1"}


@pytest.fixture(scope="module")
def driver():
    """The driver as `make sanitize` builds it, under ThreadSanitizer."""
    build = next(each for each in sanitize.BUILDS if each.name == "cuda-thread")
    return sanitize.compile_driver(sanitize.load_setup(), build, sanitize.FOLDER / build.name)


def fuzz(driver, *arguments):
    return subprocess.run(
        [driver, *map(str, arguments)], env=TSAN, capture_output=True, text=True, check=False
    )


# A case of each kernel in which every barrier orders something: several steps, tiles of keys.
SEEDS = {"linear": 1, "attention": 1}


@pytest.mark.parametrize("kernel", SEEDS)
def test_every_barrier_is_missed(driver, kernel):
    seed = SEEDS[kernel]
    assert fuzz(driver, 1, seed, kernel).returncode == 0
    places = fuzz(driver, "--barriers", seed, kernel).stdout.split()
    assert len(places) == {"linear": 1, "attention": 2}[kernel]
    for place in places:
        run = fuzz(driver, "--drop", place, 1, seed, kernel)
        assert run.returncode != 0, f"nobody misses {place}"
        assert "data race" in run.stderr


@pytest.mark.parametrize(
    ("fault", "kernel"),
    [("--transpose", "linear"), ("--transpose", "attention"), ("--unmask", "linear")],
)
def test_a_fault_is_found(driver, fault, kernel):
    run = fuzz(driver, fault, 8, 1, kernel)
    assert run.returncode != 0
    assert "FAIL" in run.stderr or "SEGV" in run.stderr
