"""What the emulator and its sanitizers find: faults put in on purpose."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
from native import sanitize


@pytest.fixture(scope="module")
def driver():
    """The driver as `make sanitize` builds it, under ThreadSanitizer."""
    build = next(each for each in sanitize.BUILDS if each.name == "cuda-thread")
    return sanitize.compile_driver(sanitize.load_setup(), build, sanitize.FOLDER / build.name)


def fuzz(driver, *arguments):
    return sanitize.run([str(driver), *map(str, arguments)])


@pytest.mark.parametrize(("kernel", "barriers"), [("linear", 1), ("attention", 2)])
def test_every_barrier_is_missed(driver, kernel, barriers):
    """By ThreadSanitizer: most of these cases give the right result all the same."""
    assert fuzz(driver, 1, 1, kernel).returncode == 0
    places = fuzz(driver, "--barriers", 1, kernel).stdout.split()
    assert len(places) == barriers
    for place in places:
        run = fuzz(driver, "--drop", place, 1, 1, kernel)
        assert run.returncode != 0, f"nobody misses {place}"
        assert "data race" in run.stderr


# Unmasked copies are harmless to attention: they add the same to all scores of a query.
@pytest.mark.parametrize(
    ("fault", "kernel"),
    [("--transpose", "linear"), ("--transpose", "attention"), ("--unmask", "linear")],
)
def test_a_wrong_fragment_and_an_unmasked_copy_are_found(driver, fault, kernel):
    run = fuzz(driver, fault, 20, 1, kernel)
    assert run.returncode != 0
    assert f"FAIL {kernel}" in run.stderr


def test_an_unmasked_key_is_found(driver, tmp_path):
    """Keys behind the last are zeros in shared memory, whose scores would count."""
    setup = sanitize.load_setup()
    build = next(each for each in sanitize.BUILDS if each.name == "cuda-thread")
    source = (sanitize.CUDA / "attention.cu").read_text()
    masked = "key < args.tokens ? 0.0f : -INFINITY"
    assert source.count(masked) == 1
    (tmp_path / "attention.cu").write_text(source.replace(masked, "0.0f"))
    flags = f"{setup.CXXFLAGS} {build.flags} -O0 {sanitize.EMULATION} -I{sanitize.CUDA}"
    compiler = setup.find_compiler(os.environ)
    made = tmp_path / "attention.o"
    compile_it = f"{compiler} {flags} -x c++ -c {tmp_path / 'attention.cu'} -o {made}"
    subprocess.run(shlex.split(compile_it), check=True)
    others = [o for o in driver.parent.glob("*.o") if o.name != "attention.cu.o"]
    link = f"{compiler} {build.flags} -o {tmp_path / 'fuzz'} {made} {shlex.join(map(str, others))}"
    subprocess.run([*shlex.split(link), "-pthread"], check=True)
    run = fuzz(tmp_path / "fuzz", 3, 1, "attention")
    assert run.returncode != 0
    assert "FAIL attention" in run.stderr
