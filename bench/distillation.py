"""The paper's claim on real data: what a small DeiT learns from a convnet teacher (Table 3).

    python bench/distillation.py --out runs/distillation --json bench/results/distillation.json

Trains a ResNet-18 on a part of Fashion-MNIST, then the same small DeiT without it, with soft and
hard distillation, and with the distillation token, some seeds each: the same images, passes and
recipe. Then each seed's plain and token-distilled student is fine-tuned at a higher resolution,
the teacher brought there by FixRes. Every run is a `deit train` of its own that goes on where it
was stopped, so this program does, too. About two hours on two cores by default.

A GPU takes all images, in bf16. The students of two ways are trained there once more in fp32 on
PyTorch's own operators, to lay their losses over each other and compare scores seed by seed:

    python bench/distillation.py --images 60000 --epochs 24 --dtype bf16 --plain none token \\
        --jobs 1 --workers 8 --json bench/results/distillation-gpu.json

The result's picture: python bench/report.py --pictures docs --named distillation
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch

import evidence
from deit.commands import flags
from deit.training.progress import human
from evidence import devices
from studies.outcomes import STUDENT_T, curves, difference, score

SIZE, HIGHER = 28, 40  # pixels: 7 x 7 and 10 x 10 patches
STUDENT = (
    *("--arch", "deit_ti", "--embed-dim", "96"),
    *("--depth", "4", "--num-heads", "3", "--patch-size", "4"),
)
TEACHER = ("--arch", "timm:resnet18")
GENTLE = ("--lr", "1e-4", "--min-lr", "1e-6", "--warmup-epochs", "0")

# Arm -> flags. Soft: lambda = 0.1 and tau = 3; hard: a half each (section 5.2).
ARMS: dict[str, tuple[str, ...]] = {
    "none": (),
    "soft": ("--distill", "soft"),
    "hard": ("--distill", "hard"),
    "token": ("--distill", "hard", "--distilled"),
}
# The rows of Table 3: the arm, its head, and the paper's top-1 of DeiT-Ti on ImageNet (quoted).
ROWS = {
    "no distillation": ("none", "class", 72.2),
    "usual (soft)": ("soft", "class", 72.2),
    "hard label": ("hard", "class", 74.3),
    "token: class embedding": ("token", "class", 73.9),
    "token: distillation embedding": ("token", "distillation", 74.6),
    "token: class + distillation": ("token", "softmax-sum", 74.5),
}
# Fine-tuned at the higher resolution: from which arm, with which flags; Table 3's DeiT-B↑384.
HIGHER_ARMS = {
    "none-up": ("none", ()),
    "token-up-labels": ("token", ("--distilled",)),
    "token-up": ("token", ARMS["token"]),
}
HIGHER_ROWS = {
    "labels, no token": ("none-up", "class", 83.1),
    "token, fine-tuned on labels": ("token-up-labels", "softmax-sum", None),
    "token, fine-tuned with the teacher": ("token-up", "softmax-sum", 84.5),
}
# An arm's students once more: fp32, and not fused, so eager and on PyTorch's operators alone.
PLAIN = "-plain"
STRICT = {"NVIDIA_TF32_OVERRIDE": "0"}  # cuDNN's convolutions take TF32 for fp32 by default


@dataclass(frozen=True)
class Options:
    """Measure what distillation gives a small DeiT on Fashion-MNIST."""

    out: Path = Path("runs/distillation")
    """Where the runs are kept; finished ones are not repeated."""
    json: Path | None = None
    """Where to write the result."""
    data: str = "fashion-mnist"
    """fashion-mnist[:FOLDER]."""
    images: int = 10_000
    """Training images, evenly spread over the 60,000."""
    epochs: int = 20
    """Passes of every run, the teacher's too."""
    finetune_epochs: int = 5
    """Passes at the higher resolution; 0 leaves that part out."""
    seeds: int = 3
    """Runs of each kind."""
    jobs: int = 2
    """Runs at a time, one CPU thread each; 1 on a GPU."""
    workers: int = 1
    """Processes that read and augment images, of each run."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the students' products are computed in; the teacher is trained in fp32."""
    plain: tuple[Literal["none", "soft", "hard", "token"], ...] = ()
    """Ways to learn whose students are also trained in fp32 on PyTorch's own operators."""


@dataclass(frozen=True)
class Run:
    """A `deit` command, by the name of the folder it fills, and the runs that it builds on."""

    name: str
    verb: str
    flags: tuple[str, ...]
    after: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def name_of(arm: str, seed: int, options: Options) -> str:
    """The folder of an arm's student: its dtype is in it, where that is not fp32."""
    mark = "" if options.dtype == "fp32" or arm.endswith(PLAIN) else f"-{options.dtype}"
    return f"{arm}{mark}-{seed}"


def plan(options: Options) -> list[Run]:
    """Every run, each after those that it builds on."""
    folder = lambda name: str(options.out / name)

    def run(name: str, verb: str, size: int, epochs: int, *flags: str, after: str = "") -> Run:
        common = ("--data", options.data, "--limit-train", str(options.images))
        common += ("--workers", str(options.workers))
        last = ("--epochs", str(epochs), "--eval-every", str(epochs), "--img-size", str(size))
        return Run(name, verb, (*common, *last, *flags), tuple(after.split()))

    recipe, dtype = ("--recipe", "fashion-mnist"), ("--dtype", options.dtype)
    runs = [run("teacher", "train", SIZE, options.epochs, *TEACHER, *recipe)]
    for seed in range(options.seeds):
        for arm, its in ARMS.items():
            taught = (*its, "--teacher", folder("teacher")) if its else ()
            own = (*STUDENT, *recipe, "--seed", str(seed), *taught)
            student = run("", "train", SIZE, options.epochs, *own, after="teacher")
            fused, plain = (name_of(name, seed, options) for name in (arm, arm + PLAIN))
            runs.append(replace(student, name=fused, flags=(*student.flags, *dtype)))
            if arm in options.plain:
                flags = (*student.flags, "--no-fuse")
                runs.append(replace(student, name=plain, flags=flags, environment=STRICT))
    if not options.finetune_epochs:
        return runs
    adapted = ("--weights", folder("teacher"), "--eval-crop", "1.0")
    runs.append(run("teacher-up", "fixres", HIGHER, 2, *TEACHER, *adapted, after="teacher"))
    for seed in range(options.seeds):
        for name, (arm, flags) in HIGHER_ARMS.items():
            taught = ("--teacher", folder("teacher-up")) if "--distill" in flags else ()
            before = name_of(arm, seed, options)
            own = (*STUDENT, *recipe, *GENTLE, "--seed", str(seed), "--weights", folder(before))
            own += (*flags, *taught, *dtype)
            name, after = name_of(name, seed, options), f"teacher-up {before}"
            epochs = options.finetune_epochs
            runs.append(run(name, "finetune", HIGHER, epochs, *own, after=after))
    return runs


def perform(run: Run, out: Path, threads: int) -> float:
    """Run it to its end, or find it ended; returns seconds. Its words go to `<name>.txt`.

    Raises RuntimeError with the last of them if the command fails.
    """
    folder, started = out / run.name, time.perf_counter()
    if (folder / "model.safetensors").exists():
        return 0.0
    command = [sys.executable, "-m", "deit", run.verb, *run.flags, "--out", str(folder)]
    words = out / f"{run.name}.txt"
    with words.open("a") as file:
        ended = subprocess.run(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(run.environment),
        )
    if ended.returncode:
        tail = "\n".join(words.read_text().splitlines()[-5:])
        raise RuntimeError(f"{' '.join(command)}\nexited with {ended.returncode}:\n{tail}")
    return time.perf_counter() - started


def perform_all(runs: list[Run], options: Options) -> None:
    """Every run, `options.jobs` at a time, each after those that it builds on."""
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    pending: dict[str, Future[float]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for run in runs:
            wait = [pending[name] for name in run.after]

            def work(run: Run = run, wait: list[Future[float]] = wait) -> float:
                for earlier in wait:
                    earlier.result()
                return perform(run, options.out, threads)

            pending[run.name] = pool.submit(work)
        for count, (name, future) in enumerate(pending.items(), 1):
            took = future.result()
            said = f"in {human(took)}" if took else "found"
            print(f"{count} of {len(runs)}: {name} {said}", flush=True)


def table(
    rows: Mapping[str, tuple[str, str, float | None]], base: str, options: Options, weights: str
) -> list[dict[str, Any]]:
    """A result a row: top-1 of every seed, mean, spread, and what it has over row `base`."""
    results = []
    scores = {
        name: [
            score(options.out / name_of(arm, seed, options), weights)[head]
            for seed in range(options.seeds)
        ]
        for name, (arm, head, _) in rows.items()
    }
    for name, (_, _, quoted) in rows.items():
        own = scores[name]
        result = {"row": name, "top1": own, "mean": round(mean(own), 3), "quoted": quoted}
        if len(own) > 1:
            result["deviation"] = round(stdev(own), 3)
        if name != base:
            result |= difference(own, scores[base])
        results.append(result)
    return results


def precision(options: Options) -> list[dict[str, Any]]:
    """For each way of `options.plain` its students on PyTorch's operators, and the fused ones."""
    results = []
    heads = {arm: head for arm, head, _ in ROWS.values()}  # of several the last: the sum
    for way in options.plain:
        plain, fused = f"{way}: fp32, plain", f"{way}: {options.dtype}, fused"
        rows = {plain: (way + PLAIN, heads[way], None), fused: (way, heads[way], None)}
        results += table(rows, plain, options, "average")
    return results


def show(title: str, results: list[dict[str, Any]], quoted: str = "") -> None:
    """Print a table of results; `quoted`: whose figures stand beside them, if any do."""
    from rich.console import Console
    from rich.table import Table

    heads = ["", "top-1, %", "by seed", "over the first row (95 %)"] + [quoted] * bool(quoted)
    shown = Table(*heads, title=title)
    for r in results:
        spread = f" ± {r['deviation']:.2f}" if "deviation" in r else ""
        low, high = r.get("interval", (None, None))
        interval = f" ({low:+.2f} … {high:+.2f})" if low is not None else ""
        gain = f"{r['gain']:+.2f}{interval}" if "gain" in r else ""
        quoted_as = "" if r["quoted"] is None else f"{r['quoted']:.1f}"
        seeds = " ".join(f"{value:.2f}" for value in r["top1"])
        cells = [r["row"], f"{r['mean']:.2f}{spread}", seeds, gain, quoted_as]
        shown.add_row(*cells[: len(heads)])
    Console().print(shown)


def summarise(options: Options) -> dict[str, Any]:
    """What the runs say, printed and returned."""
    teacher = score(options.out / "teacher", "average")["class"]
    print(f"teacher (ResNet-18, {SIZE} px): {teacher:.2f} %")
    result: dict[str, Any] = {"teacher": teacher, "rows": {}}
    for weights in ("average", "model"):
        result["rows"][weights] = table(ROWS, "no distillation", options, weights)
    show(f"{SIZE} px, averaged weights", result["rows"]["average"], "DeiT-Ti, quoted")
    if options.finetune_epochs:
        result["teacher_up"] = score(options.out / "teacher-up", "model")["class"]
        result["rows_up"] = table(HIGHER_ROWS, "labels, no token", options, "average")
        print(f"teacher by FixRes ({HIGHER} px): {result['teacher_up']:.2f} %")
        show(f"fine-tuned at {HIGHER} px", result["rows_up"], "DeiT-B↑384, quoted")
    if options.plain:
        result["precision"] = precision(options)
        folders = lambda arm: [options.out / name_of(arm, s, options) for s in range(options.seeds)]
        result["curves"] = {
            way: curves({"plain": folders(way + PLAIN), "fused": folders(way)})
            for way in options.plain
        }
        show(f"{options.dtype} fused beside fp32 plain", result["precision"])
    return result


def describe(options: Options, given: Sequence[str] | None) -> dict[str, Any]:
    """What was trained where, and by which kernels, where these are compared with PyTorch's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {
        "kind": "distillation",
        "title": "Distillation on Fashion-MNIST",
        "date": evidence.now(),
        "command": evidence.command_line(given, "distillation.py"),
        **devices.describe(device),
        "student": " ".join(STUDENT),
        "images": options.images,
        "epochs": options.epochs,
        "finetune_epochs": options.finetune_epochs,
        "dtype": options.dtype,
    }
    if options.plain:
        about |= evidence.kernels(device.type)
    return about


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 0."""
    options = flags.parse(Options, arguments, __doc__)
    if options.seeds < 1 or options.seeds > max(STUDENT_T) + 1:
        raise SystemExit(f"seeds: expected 1 to {max(STUDENT_T) + 1}; got {options.seeds}")
    options.out.mkdir(parents=True, exist_ok=True)
    perform_all(plan(options), options)
    result = summarise(options)
    if options.json:
        evidence.save(options.json, describe(options, arguments) | result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
