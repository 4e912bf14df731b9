"""Curves of runs side by side, and their last scores as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit.kernels.engine.json_files import Fields
from deit.training.runs import LAST, RunFolder


@dataclass(frozen=True)
class History:
    """What a run's log holds, by update."""

    name: str
    losses: list[tuple[int, float]]
    rates: list[tuple[int, float, float]]  # images/s, percent waited for the loader
    scores: dict[str, list[tuple[int, float]]]  # "model, class" -> top-1
    teacher: float | None
    unreadable: int

    @property
    def last(self) -> dict[str, float]:
        """The last top-1 of each head."""
        return {name: curve[-1][1] for name, curve in self.scores.items() if curve}


def history(run: Path) -> History:
    """Read a run's log. Raises ValueError for a folder without one."""
    entries = RunFolder(run).entries()
    if not entries:
        raise ValueError(f"runs: no log.jsonl with entries in {run}")
    log = str(run / "log.jsonl")
    # By update: older versions could log one twice, where a run was killed.
    scores: dict[str, dict[int, float]] = {}
    losses: dict[int, float] = {}
    rates: dict[int, tuple[float, float]] = {}
    teacher = None
    for values in entries:
        entry = Fields(values, log)
        for which in ("model", "average"):
            for head, top1 in _top1(entry, which).items():
                curve = scores.setdefault(f"{which}, {head}", {})
                curve[entry.integer("update", 0, LAST)] = top1
        if "loss" in values:
            update = entry.integer("update", 0, LAST)
            losses[update] = entry.real("loss")
            rates[update] = entry.real("images_per_s"), entry.real("waited_percent")
        if "teacher" in values:
            teacher = entry.fields("teacher").fields("top1").number("class", 0, 100)
    unreadable = sum("unreadable" in entry for entry in entries)
    return History(
        run.name,
        sorted(losses.items()),
        [(update, *rates[update]) for update in sorted(rates)],
        {name: sorted(curve.items()) for name, curve in scores.items()},
        teacher,
        unreadable,
    )


def _top1(entry: Fields, which: str) -> dict[str, float]:
    """Head -> percent, of one evaluation."""
    if which not in entry.values:
        return {}
    found = entry.fields(which).fields("top1", {})
    return {head: found.number(head, 0, 100) for head in found.values}


def table(histories: list[History]) -> Any:
    """A rich table: runs, and what each keeps (model, average), by heads; last top-1 in percent."""
    from rich import box
    from rich.table import Table

    names = [tuple(name.split(", ")) for h in histories for name in h.last]
    heads = list(dict.fromkeys(head for _, head in names))
    title = "held-out top-1, %, last evaluation"
    columns = ("run", "weights", *heads, "teacher", "unreadable")
    shown = Table(*columns, title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for h in histories:
        teacher = "" if h.teacher is None else f"{h.teacher:.2f}"
        about = [h.name, teacher, str(h.unreadable)]
        for which in ("model", "average"):
            found = [h.last.get(f"{which}, {head}") for head in heads]
            if any(value is not None for value in found) or which == "model":
                cells = ["" if value is None else f"{value:.2f}" for value in found]
                shown.add_row(about[0], which, *cells, *about[1:])
                about = ["", "", ""]
    return shown


def draw(histories: list[History], out: Path) -> None:
    """Loss, top-1 by head and pace over the updates, one colour a run, to `out` (.svg, .png, .pdf).

    Raises ValueError where matplotlib is missing or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("out: pictures need matplotlib (pip install matplotlib)") from None
    figure = Figure(figsize=(11, 8), layout="constrained")
    loss, score, pace, wait = figure.subplots(2, 2).flat
    styles = ["-", "--", ":", "-.", (0, (3, 1, 1, 1)), (0, (1, 3))]
    for i, h in enumerate(histories):
        colour = f"C{i}"
        loss.plot(*zip(*h.losses, strict=True), color=colour, label=h.name, linewidth=1)
        for (head, curve), style in zip(sorted(h.scores.items()), styles, strict=False):
            name = f"{h.name}: {head}"
            marker = "o" if len(curve) == 1 else None
            x, y = zip(*curve, strict=True)
            score.plot(x, y, color=colour, linestyle=style, marker=marker, label=name)
        if h.teacher is not None:
            score.axhline(h.teacher, color=colour, linewidth=0.5)
        updates, rates, waits = zip(*h.rates, strict=True)
        pace.plot(updates, rates, color=colour, linewidth=1)
        wait.plot(updates, waits, color=colour, linewidth=1)
    titles = {
        loss: "training loss",
        score: "held-out top-1, % (thin line: the teacher)",
        pace: "images/s",
        wait: "time waited for the loader, %",
    }
    for axes, title in titles.items():
        axes.set_title(title)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    pace.set_ylim(bottom=0)
    loss.legend(fontsize="small")
    score.legend(fontsize="x-small")
    try:
        figure.savefig(out)
    except ValueError as error:
        raise ValueError(f"out: {error}") from error
