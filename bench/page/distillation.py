"""What bench/distillation.py measured, as pictures.

Every seed's gain over the student untaught, and the losses of two precisions over each other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from page.drawing import COLOURS, Picture, beside, curve, field, look, mark, rows_of

Row = dict[str, Any]
MEAN, SEED = look("c0", "D"), look("c1", filled=False)
QUOTED = look("c6", "s", filled=False)


def drawn(document: Row) -> list[Picture]:
    """A picture of the ways to distil, and one of the fine-tuned students; none of other kinds.

    Each way whose students were trained plainly, too, has one more; a document may have none.
    """
    if document.get("kind") != "distillation":
        return []
    found = [_picture("distillation", "Distillation", document["rows"]["average"], document)]
    if "rows_up" in document:
        found.append(_picture("distillation-up", "Fine-tuned", document["rows_up"], document))
    return [*found, *(_overlay(way, document) for way in document.get("curves", ()))]


def _picture(name: str, what: str, rows: Sequence[Row], document: Row) -> Picture:
    base, seeds = rows[0], len(rows[0]["top1"])
    caption = (
        f"Points of top-1 over the row '{base['row']}' ({base['mean']:.2f} %): each seed's beside "
        "the same seed's, their mean and, where there are several, its 95 % interval by Student's "
        f"t. Averaged weights; the teacher has {document['teacher']:.2f} %. Squares: the paper's "
        "differences on ImageNet, quoted from arXiv 2012.12877, of a network longer trained on "
        "more."
    )
    title = f"{what} on {document['images']:,} images, {document['epochs']} passes, {seeds} seeds"
    return Picture(name, title, caption, functools.partial(_gains, rows))


def _gains(rows: Sequence[Row], width: int) -> Figure:
    base, others = rows[0], rows[1:]
    legend = {"mean, 95 %": MEAN, "a seed": SEED, "the paper's, quoted": QUOTED}
    across = f"points of top-1 over '{base['row']}'"
    figure, axes = rows_of(width, [row["row"] for row in others], 34, across, legend)
    axes.axvline(0, color=COLOURS["ink"], linestyle="--", linewidth=1)
    for i, row in enumerate(others):
        above, below = i - 0.15, i + 0.2
        for seed, gain in enumerate(row["gains"]):
            tip = f"{row['row']}, seed {seed}: {row['top1'][seed]:.2f} %, {gain:+.2f}"
            mark(axes, gain, below, tip, SEED)
        if (theirs := _quoted(row, base)) is not None:
            tip = f"{row['row']}: {row['quoted']} % in the paper, {theirs:+.1f}"
            mark(axes, theirs, below, tip, QUOTED)
        said = f"{row['row']}: {row['gain']:+.2f}"
        if "interval" in row:
            low, high = row["interval"]
            curve(axes, [(low, above), (high, above)], "c0")
            said += f", {low:+.2f} to {high:+.2f}"
        mark(axes, row["gain"], above, said, MEAN)
        beside(axes, i, f"{row['mean']:.2f} %")
    return figure


def _quoted(row: Row, base: Row) -> float | None:
    """The paper's difference of the same rows; None where it has none."""
    if row["quoted"] is None or base["quoted"] is None:
        return None
    return round(row["quoted"] - base["quoted"], 1)


def _overlay(way: str, document: Row) -> Picture:
    """The training losses of one way's students, plain and fused, over each other."""
    curves = document["curves"][way]
    plain, fused = (row for row in document["precision"] if row["row"].startswith(f"{way}: "))
    pairs = zip(curves["plain"], curves["fused"], strict=True)
    apart = [abs(f / p - 1) for ours, theirs in pairs for p, f in zip(ours, theirs, strict=True)]
    low, high = fused.get("interval", (None, None))
    within = f" ({low:+.2f} to {high:+.2f}, 95 % by Student's t)" if low is not None else ""
    caption = (
        f"Mean training loss over spans of {curves['updates'][0]:g} updates, a line a seed: the "
        "same images in the same order, augmented alike. A span's two losses differ by "
        f"{100 * max(apart):.2g} % at most. Top-1 of the averaged weights: {plain['mean']:.2f} % "
        f"in fp32 on PyTorch's own operators, {fused['mean']:.2f} % in {document['dtype']} on the "
        f"fused ones, {fused['gain']:+.2f} points{within}."
    )
    about = f"{document['images']:,} images, {len(curves['plain'])} seeds"
    title = f"{fused['row']} and fp32, plain; {about}"
    draw = functools.partial(_losses, curves, (plain["row"], fused["row"]))
    return Picture(f"precision-{way}", title, caption, draw)


def _losses(curves: Row, names: tuple[str, str], width: int) -> Figure:
    looks = ({"color": COLOURS["c1"]}, {"color": COLOURS["c0"], "linestyle": "--"})
    legend = dict(zip(names, looks, strict=True))
    figure, axes = field(width, 380, "updates", "training loss", legend)
    middles = [end - curves["updates"][0] / 2 for end in curves["updates"]]
    for kind, how in zip(("plain", "fused"), looks, strict=True):
        for run in curves[kind]:
            axes.plot(middles, run, **how)
    return figure
