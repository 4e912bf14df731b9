"""Where else a run's numbers go, when asked: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Takes an update's numbers by name; ends.
Sink = tuple[Callable[[dict[str, float], int], None], Callable[[], object]]


class Trackers:
    """Passes the numbers of a log entry on, by their update."""

    def __init__(self, names: Sequence[str], out: Path, update: int | None = None) -> None:
        """`names`: of "tensorboard", "wandb", "mlflow". `update`: that the run goes on after; None
        where it begins, be it once more.

        A run that goes on is the same one there, too, and shows each update once.

        Raises ValueError for another name, or a package that is not installed.
        """
        known = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
        self.sinks: list[Sink] = []
        for name in names:
            if name not in known:
                raise ValueError(f"track: expected one of {', '.join(known)}; got {name!r}")
            try:
                self.sinks.append(known[name](out, update))
            except ImportError as error:
                raise ValueError(
                    f"track: {name} needs its package (pip install {name}): {error}"
                ) from None

    def add(self, entry: dict[str, Any]) -> None:
        """Nested names are joined: model/top1/class."""
        numbers = dict(_numbers(entry, ""))
        update = int(numbers.pop("update", 0))
        for add, _ in self.sinks:
            add(numbers, update)

    def close(self) -> None:
        """Hand over what is still held back; the run ends there, too."""
        for _, end in self.sinks:
            end()


def _numbers(entry: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, float(value)


def _tensorboard(out: Path, update: int | None) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard does not show what a killed run wrote of later updates, or of all.
    purge = 0 if update is None else update + 1
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge)

    def add(numbers: dict[str, float], update: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, update)
        writer.flush()

    return add, writer.close


def _wandb(out: Path, update: int | None) -> Sink:
    import wandb

    own = hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:16]
    run = wandb.init(project="fused-deit", name=out.name, dir=str(out), id=own, resume="allow")
    # It takes each step once, and none before its last.
    return lambda numbers, update: run.log(numbers, step=update), run.finish


def _mlflow(out: Path, update: int | None) -> Sink:
    import mlflow

    kept = out / "mlflow-run.txt"
    before = kept.read_text().strip() if update is not None and kept.exists() else None
    run = mlflow.start_run(run_id=before, run_name=out.name)
    kept.write_text(run.info.run_id + "\n")
    client, shown = mlflow.MlflowClient(), dict[str, set[int]]()

    def add(numbers: dict[str, float], update: int) -> None:
        for name in numbers.keys() - shown.keys():  # MLflow would keep a step twice
            past = client.get_metric_history(before, name) if before else ()
            shown[name] = {metric.step for metric in past}
        new = {name: value for name, value in numbers.items() if update not in shown[name]}
        if new:
            mlflow.log_metrics(new, step=update)

    return add, mlflow.end_run
