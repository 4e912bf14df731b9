"""`deit tune`: what its flags ask for, and the processes that compile for it.

Two things are measured: which implementation runs each operator of a network fastest on this
device (`deit.kernels.measure`), and on a GPU before that the configurations of Triton's kernels.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import deit
from deit.fused_vit import fuse
from deit.fused_vit.calls import calls_of
from deit.kernels import measure
from deit.kernels.device import tuning
from deit.kernels.engine import device_key, dispatch, measured, verdicts
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.engine.problems import Problem
from deit.tune_options import Options

if TYPE_CHECKING:
    from deit.kernels.engine.verdicts import Verdict
    from deit.kernels.prove.tuned import Tuned

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OWN = {"int8": "fp32", "fp8": "bf16"}  # what a network in 8 bits has for its own dtype
USUAL = {"cpu": (("fp32", "bf16"), 8), "cuda": (("bf16",), 256)}  # dtypes, and images in a batch
FOR_CONFIGURATIONS = 0.5  # of the time, on a device that Triton runs on


def run(options: Options) -> int:
    """The command; 1 where a pinned default is wrong or does not run.

    Raises ValueError for an option that makes no sense, before anything is compiled.
    """
    for name in ("batch_size", "candidates", "seconds", "jobs"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number; got {value}")
    if options.prior is not None and not options.prior.parent.is_dir():
        raise ValueError(f"prior: expected a file in a folder that is there; got {options.prior}")
    device = _device(options.device)
    triton = not dispatch.environment("triton", device.type, device.index)
    _check_only(options, device, triton)
    end, wrong = time.monotonic() + options.seconds, []
    if triton:
        until = FOR_CONFIGURATIONS if device.type == "cuda" else 1.0
        wrong = _configurations(options, device, time.monotonic() + until * options.seconds)
    if not triton or device.type == "cuda":  # the interpreter's times mean nothing
        _verdicts(options, device, max(1.0, end - time.monotonic()))
    return 1 if wrong else 0


def _device(name: str) -> torch.device:
    """Raises ValueError for what is no device, and for one that nothing is measured on."""
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
    except RuntimeError:
        raise ValueError(f"device: expected auto or a torch device; got {name!r}") from None
    if device.type not in USUAL or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected a CPU or a GPU that is here; got {device}")
    return device


def _dtypes(options: Options, device: torch.device) -> tuple[str, ...]:
    """Those asked for; before one of 8 bits the one that it is compared with."""
    wanted = options.dtype or USUAL[device.type][0]
    both = itertools.chain.from_iterable((OWN.get(each, each), each) for each in wanted)
    return tuple(dict.fromkeys(both))


def _batch(options: Options, device: torch.device) -> int:
    return options.batch_size or USUAL[device.type][1]


def _check_only(options: Options, device: torch.device, triton: bool) -> None:
    """Raises ValueError for a name in `only` that nothing has."""
    if not options.only:
        return
    known = set(OPERATORS) | ({one.factory for one in _tuned(options, device)} if triton else set())
    if unknown := sorted(set(options.only) - known):
        raise ValueError(
            f"only: expected kernels among {', '.join(sorted(known))}; got {unknown[0]!r}"
        )


# ---- which implementation


def _verdicts(options: Options, device: torch.device, seconds: float) -> None:
    problems = calls_to_measure(options, device)
    key = device_key.device_key(device)
    print(f"{len(problems)} calls on {key}")
    found = measure.measure(problems, device, budget=seconds, report=print)
    if found:
        print(f"kept in {verdicts.path(key)}")
    if options.prior is not None:
        write_prior(options.prior, key, found)
        undecided = sum(one.undecided for one in found)
        print(
            f"a prior of {len(found) - undecided} calls in {options.prior}; {undecided} undecided"
        )


def calls_to_measure(options: Options, device: torch.device) -> list[Problem]:
    """The calls that the networks make on a device, fused, one a class.

    Raises ValueError for an unknown network.
    """
    found: dict[Any, Problem] = {}
    for name in options.arch:
        network = deit.config(name, img_size=options.img_size)
        for dtype in _dtypes(options, device):
            for problem in _calls(name, network.img_size, dtype, options, device):
                found.setdefault(problem.shape_class, problem)
    wanted = found.values()
    return [p for p in wanted if not options.only or p.operator in options.only]


def _calls(
    name: str, size: int, dtype: str, options: Options, device: torch.device
) -> Iterator[Problem]:
    """A network's, in one dtype: in inference its weights have that, in training autocast does."""
    own = DTYPES[OWN.get(dtype, dtype)]
    with torch.device("meta"):
        model = deit.create(name, img_size=size)
    model = model.to_empty(device=device).to(own).eval()  # the calls depend on no weight
    eight = dtype if dtype in OWN else None
    fuse(model, dtype=eight, measure="never")
    for batch in dict.fromkeys((_batch(options, device), 1)):
        shape = (batch, model.config.in_chans, size, size)
        yield from calls_of(model, shape, own, training=False)
    if options.train and eight is None:
        model = model.float().train()
        shape = (_batch(options, device), model.config.in_chans, size, size)
        with torch.autocast(device.type, own, enabled=own != torch.float32):
            yield from calls_of(model, shape, torch.float32, training=True)


def write_prior(path: Path, key: device_key.DeviceKey, found: Sequence[Verdict]) -> None:
    """Verdicts as a file that ships: one of kernels/engine/priors/ is read by every process on a
    device of its kind. What a busy machine left undecided is left out."""
    document = measured.document(key, [])
    lines = [_line(one) for one in found if not one.undecided]
    head = json.dumps(document).removesuffix("]}")  # an entry a line: a change of one is read
    path.write_text(head + "\n" + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def _line(verdict: Verdict) -> str:
    """As JSON, its figures to four digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: rounded(each) for name, each in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    plain = verdict.plain()
    figures = {name: rounded(plain[name]) for name in ("candidates", "rival")}
    return json.dumps(plain | figures, allow_nan=False, separators=(",", ":"))


# ---- which configuration of Triton's kernels


def _configurations(options: Options, device: torch.device, end: float) -> list[str]:
    """Measure and keep them; what is wrong with pinned defaults."""
    from deit.kernels.prove import tune  # imports triton

    problems = problems_of(options, device)
    if not problems:
        return []
    if options.jobs != 1:
        for complaint in precompile(options, 0.6 * (end - time.monotonic())):
            print(complaint)
    outcomes, wrong = tune.measure(problems, options.candidates, end, device, report=print)
    if outcomes:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        print(f"kept in {tuning.store(name, {o.name: o.entry for o in outcomes})}")
        tuning.tables.cache_clear()  # what is measured next runs by them
    return wrong


def problems_of(options: Options, device: torch.device) -> list[Tuned]:
    """The configurations that `options` ask for, each entry of the table once."""
    return [p for p in _tuned(options, device) if not options.only or p.factory in options.only]


def _tuned(options: Options, device: torch.device) -> list[Tuned]:
    """Raises ValueError for an unknown network."""
    from deit.kernels.prove.calls import Size
    from deit.kernels.prove.tuned import Terms, tuned

    found: dict[str, Tuned] = {}
    dtypes = [DTYPES[dtype] for dtype in _dtypes(options, device) if dtype in DTYPES]
    for batch in dict.fromkeys((_batch(options, device), 1)):  # few rows have their own tiles
        for name, dtype in itertools.product(options.arch, dtypes):
            network = deit.config(name, img_size=options.img_size)
            for problem in tuned(Terms(Size.of(network, batch), dtype, device), options.train):
                found.setdefault(problem.name, problem)
    return list(found.values())


def precompile(options: Options, seconds: float) -> list[str]:
    """Compile in several processes: Triton's cache on disk hands the kernels over.

    Returns a sentence for each process that did not come to its end within `seconds`. What it
    left is compiled when it is measured, one kernel after another.
    """
    parts = options.jobs or max(1, min(8, (os.cpu_count() or 2) // 2))
    plan = json.dumps({**asdict(options), "prior": None})
    command = [sys.executable, "-m", "deit.tune", plan]
    running = [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]
    end = time.monotonic() + seconds
    complaints = []
    try:
        for part, process in enumerate(running):
            why = f"stopped after {seconds:.0f} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(max(0.0, end - time.monotonic()))
                why = f"ended with exit status {status}" if status else ""
            if why:
                complaints.append(f"compiling part {part + 1} of {parts} {why}")
    finally:
        for process in running:
            process.kill()  # nothing where it has ended
            process.wait()
    return complaints


def compile_part(arguments: Sequence[str]) -> None:
    """One process of `precompile`: the options as JSON, the part's number, the number of parts."""
    from deit.kernels.prove import tune

    text, part, parts = arguments
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(text).items()
    }
    options = Options(**fields)
    problems = problems_of(options, _device(options.device))
    tune.warm(problems[int(part) :: int(parts)], options.candidates)


if __name__ == "__main__":
    compile_part(sys.argv[1:])
