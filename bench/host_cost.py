"""Host time of a call: what each public operator costs beyond the launch of its kernel.

    python bench/host_cost.py
    python bench/host_cost.py --json bench/results/host-cost.json
    python bench/host_cost.py --gpu

Every operator runs on CPU tensors of one row, so that the host's work is what there is to see. It
runs in three forms, in turns: the public function; the launch alone, which is the implementation
that the public function picks, on the arguments it would hand over (a registered overload, or the
reference's own calls of PyTorch); and the operator in torch.nn.functional (each operator's
reference.py). "training" is the forward with every gradient wanted. The last rows are what `fuse`
asks a block and a model before each forward.

`--gpu` measures the Triton operators instead, in inference: kept calls, as
kernels/device/launching.py has them, beside what they hand to the driver. Where there is no GPU
the driver's launch is stubbed, and the rows say so. "whole forward" is a fused DeiT-Ti of 12
blocks at batch 1, in microseconds too; of what PyTorch computes there a stub makes only the output.

Time is the calling thread's own (CPU time), which a busy machine lengthens little. A figure is the
median of the rounds, and "over" that of the differences within a round.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deit
import deit.kernels
import evidence
from deit.commands import flags
from deit.fused_vit import fuse
from deit.kernels.device import drivers, launching
from deit.kernels.engine import dispatch, registry
from deit.kernels.engine.operator import OPERATORS, operator_names
from deit.kernels.prove import calls
from deit.kernels.prove.calls import Call
from evidence import devices
from evidence.timing import interleave, spread
from studies import stubbed_gpu

LIMIT = 10.0  # microseconds over the launch, in inference
GPU_LIMIT = 12.0  # over the driver's launch


@dataclass(frozen=True)
class Settings:
    """How long to measure, and where to keep the figures."""

    rounds: int = 60
    calls: int = 100
    """calls a round and form"""
    operator: tuple[str, ...] = ()
    """only these operators"""
    gpu: bool = False
    """the Triton operators, on a GPU or with its driver's launch stubbed"""
    json: Path | None = None
    """write every figure here"""


@dataclass(frozen=True)
class Row:
    """Medians in microseconds; over: quartiles of call - launch, round by round.

    launch and torch are None for a question that has neither.
    """

    operator: str
    options: str
    mode: str
    implementation: str
    call: float
    launch: float | None
    torch: float | None
    over_low: float
    over: float
    over_high: float
    n: int
    calls: int


# Words for what is set beside the plain call -> the form that sets it.
FORMS = {
    "add_layer_norm": {"all": "every"},
    "attention": {"key_bias": "every"},
    "linear": {"all": "every"},
    "gelu_mlp": {"residual": "inference", "all": "every"},
    "distillation_loss": {"token": "inference"},
}


def wanted_calls(operators: Sequence[str]) -> list[tuple[str, Call]]:
    """Every public operator on one row of 64 channels (one patch of a pixel), plain and with its
    options, and what these are; `operators`: only those, all where there are none."""
    row = calls.Size(1, 1, 64, patch=1, channels=1, classes=10)
    return [
        (options, calls.build(name, calls.Draw(), row, form))
        for name in calls.operators()
        if not operators or name in operators
        for options, form in ({"": "least"} | FORMS.get(name, {})).items()
        if name != "gelu_mlp" or options
    ]


def trained(call: Call) -> dict[str, Tensor]:
    """The call's inputs with every gradient wanted that kernels have."""
    held = set(OPERATORS[call.operator].constants.values())
    return {
        name: t.clone().requires_grad_() if t.is_floating_point() and name not in held else t
        for name, t in call.inputs.items()
    }


def thread_microseconds(call: Callable[[], object], calls: int) -> float:
    """CPU time of this thread, a call."""
    start = time.thread_time_ns()
    for _ in range(calls):
        call()
    return (time.thread_time_ns() - start) / calls / 1e3


def measure(options: str, call: Call, mode: str, settings: Settings) -> Row:
    """The public call, the launch alone and torch.nn.functional in turns."""
    operator = OPERATORS[call.operator]
    places, names = call.written(trained(call) if mode == "training" else call.inputs)
    public = getattr(deit.kernels, call.operator)
    with torch.set_grad_enabled(mode == "training"):
        arguments = operator.prepare(*places, **names)
        name = dispatch.choose(operator, arguments, "auto")
        launch: Callable[..., Any] = operator.reference
        if name != "reference":
            launch = registry.COMPILED[name][operator.name]
            if mode == "training":
                train = operator.train
                assert train is not None  # or it would not have been chosen
                launch = lambda *given: train(name, *given)
        whole = lambda: public(*places, **names)
        forms = [whole, lambda: launch(*arguments), lambda: operator.reference(*arguments)]
        found = timed(forms, settings)
    return row_of(call.operator, options, mode, name, found, settings)


def row_of(
    operator: str,
    options: str,
    mode: str,
    implementation: str,
    found: Sequence[Sequence[float]],
    settings: Settings,
) -> Row:
    """found: samples of the call, of the launch alone and of torch, as many as there are of these.

    A call without a launch is all over it.
    """
    call, launch, theirs = (*map(statistics.median, found), None, None)[:3]
    bare = [0.0] * settings.rounds if launch is None else found[1]
    over = spread([whole - part for whole, part in zip(found[0], bare, strict=True)])
    return Row(operator, options, mode, implementation, call, launch, theirs,
               over.low, over.median, over.high, over.n, settings.calls)  # fmt: skip


def gpu_rows(wanted: Sequence[tuple[str, Call]], settings: Settings) -> list[Row]:
    """The Triton operators' kept calls beside the launches they make, and a whole forward."""
    if not torch.cuda.is_available():
        with stubbed_gpu.stubbed():
            return _triton_rows(wanted, torch.device("cpu"), "triton, launch stubbed", settings)
    return _triton_rows(wanted, torch.device("cuda"), "triton", settings)


def _triton_rows(
    wanted: Sequence[tuple[str, Call]], device: torch.device, label: str, settings: Settings
) -> list[Row]:
    driver, rows = drivers.active(), list[Row]()
    if driver is None:
        raise SystemExit("this version of Triton has no launcher that is known: no call is kept")
    for options, made in wanted:
        if made.operator not in registry.KERNELS["triton"]:
            continue
        places, names = made.written(made.to(device).inputs)
        names["impl"], public = "triton", getattr(deit.kernels, made.operator)
        call = lambda run=public, places=places, names=names: run(*places, **names)
        with torch.no_grad():
            with stubbed_gpu.handed(driver) as launches:
                outputs = [call(), call()]  # these hold what the launches write to
            launching.forget()  # what was noted is not to be timed
            alone = lambda made=tuple(launches): [start(at, given) for start, at, given in made]
            found = timed([call, alone], settings)
        rows.append(row_of(made.operator, options, "inference", label, found, settings))
        del outputs
    images = torch.randn(1, 3, 224, 224, device=device, dtype=torch.float16)
    models = {}
    for block in ("parts", "whole"):
        models[block] = deit.create("deit_ti").eval().to(device, torch.float16)
        fuse(models[block], "triton", block=block)
    with torch.inference_mode():
        found = timed([lambda m=model: m(images) for model in models.values()], settings)
    rows += [
        row_of("whole forward", f"blocks {block}", "inference", label, [samples], settings)
        for block, samples in zip(("by parts", "whole"), found, strict=True)
    ]
    return rows


def timed(forms: Sequence[Callable[[], object]], settings: Settings) -> list[list[float]]:
    """Samples of each form, taken in turns after one round that is thrown away."""
    steps = [lambda _, form=form: thread_microseconds(form, settings.calls) for form in forms]
    for step in steps:
        step(0)
    return interleave(steps, settings.rounds)


def questions(settings: Settings) -> list[Row]:
    """What a fused block, and a fused model, asks before it takes the fused path."""
    model = deit.create("deit_ti", img_size=32, num_classes=10).eval()
    fuse(model)
    x = torch.randn(1, 5, 192)
    block: Any = model.blocks[0]
    whole: Any = model
    found = timed([lambda: block.runs_fused(x), lambda: whole.runs_fused(x)], settings)
    return [
        row_of(name, "asks", "inference", "", [samples], settings)
        for name, samples in zip(("fused block", "fused model"), found, strict=True)
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/performance.md."""
    figure = lambda value: "" if value is None else f"{value:.1f}"
    lines = [
        "| µs | | `torch.nn.functional` | launch alone | call | over the launch |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"`{row.operator}`" if row.operator in OPERATORS else f"a {row.operator}"
        name += " asks" * (row.options == "asks")
        options = f", {row.options}" if row.options and row.implementation else ""
        by = f"{row.mode}, {row.implementation}" if row.implementation else ""
        lines.append(
            f"| {name}{options} | {by} | {figure(row.torch)} | {figure(row.launch)} "
            f"| {row.call:.1f} | {row.over:.1f} |"
        )
    return "\n".join(lines)


def write(path: Path, rows: Sequence[Row], device: str) -> None:
    """The rows with what a reader must know to repeat them; `device` has the kernels measured."""
    facts = devices.describe(torch.device(device if torch.cuda.is_available() else "cpu"))
    facts["date"] = evidence.now()
    facts["command"] = "python bench/host_cost.py" + " --gpu" * (device == "cuda")
    facts |= evidence.kernels(device)
    evidence.save(path, {**facts, "rows": [asdict(row) for row in rows]})


def main(settings: Settings) -> int:
    """Print the table; 1 where an operator costs more than LIMIT over its launch in inference."""
    if unknown := sorted(set(settings.operator) - set(operator_names(eight_bits=False))):
        known = ", ".join(operator_names(eight_bits=False))
        print(f"--operator: expected among {known}; got {unknown[0]!r}", file=sys.stderr)
        return 2
    if min(settings.rounds, settings.calls) < 1:
        print("--rounds, --calls: expected at least 1", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    wanted = wanted_calls(settings.operator)
    if settings.gpu:
        rows = gpu_rows(wanted, settings)
    else:
        modes = ("inference", "training")
        rows = [measure(*one, mode, settings) for mode in modes for one in wanted]
        rows += questions(settings)
    print(markdown(rows))
    if settings.json is not None:
        write(settings.json, rows, "cuda" if settings.gpu else "cpu")
    limit = GPU_LIMIT if settings.gpu else LIMIT
    above = [row for row in rows if row.mode == "inference" and row.launch and row.over > limit]
    for row in above:
        print(f"above {limit:.0f} us: {row.operator} {row.options}: {row.over:.1f}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main(flags.parse(Settings, None, __doc__)))
