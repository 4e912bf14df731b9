"""What bench/distillation.py measured, as pictures.

Every seed's gain over the student untaught, and the losses of two precisions over each other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from page.pictures import Picture
from page.svg import Plot, Scale, around

Row = dict[str, Any]
PLAIN, FUSED = "c1 curve", "c0 curve dashed"
MEAN, SEED, QUOTED = ("c0 fill", "D"), ("c1 open", "o"), ("c6 open", "s")


def drawn(document: Row) -> list[Picture]:
    """A picture of the ways to distil, and one of the fine-tuned students; none of other kinds.

    Where students were trained plainly, too, one of each such way: a document may have none.
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
    return Picture(name, title, caption, functools.partial(_gains, rows, title))


def _gains(rows: Sequence[Row], title: str, width: int) -> Plot:
    base, others = rows[0], rows[1:]
    narrow = width < 500
    step, left = (50, 6) if narrow else (34, 232)
    plot = Plot(width, 0, title)
    marks = ((*MEAN, "mean, 95 %"), (*SEED, "a seed"), (*QUOTED, "the paper's, quoted"))
    top = plot.legend(marks, left, 14)
    bottom = int(top) + 8 + step * len(others)
    plot.height = bottom + 40
    ends = [v for row in others for v in (*row["gains"], *row.get("interval", ()))]
    quoted = [_quoted(row, base) for row in others]
    x = Scale(*around([0.0, *ends, *(q for q in quoted if q is not None)], log=False),
              left, width - 62)  # fmt: skip
    plot.axes(x, Scale(0, 1, bottom, top), f"points of top-1 over '{base['row']}'")
    plot.line([(x(0), top), (x(0), bottom)], "rule")
    for i, (row, theirs) in enumerate(zip(others, quoted, strict=True)):
        y = top + 16 + step * i + (16 if narrow else 0)
        plot.text(left if narrow else 0, y - 16 if narrow else y + 5, row["row"], "over")
        for seed, gain in enumerate(row["gains"]):
            tip = f"{row['row']}, seed {seed}: {row['top1'][seed]:.2f} %, {gain:+.2f}"
            plot.mark(x(gain), y + 7, "o", SEED[0], tip)
        if theirs is not None:
            tip = f"{row['row']}: {row['quoted']} % in the paper, {theirs:+.1f}"
            plot.mark(x(theirs), y + 7, "s", QUOTED[0], tip)
        said = f"{row['row']}: {row['gain']:+.2f}"
        if "interval" in row:
            low, high = row["interval"]
            plot.line([(x(low), y - 5), (x(high), y - 5)], "c0 curve")
            said += f", {low:+.2f} to {high:+.2f}"
        plot.mark(x(row["gain"]), y - 5, "D", MEAN[0], said)
        plot.text(width, y + 5, f"{row['mean']:.2f} %", "tick", "end")
    return plot


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
    draw = functools.partial(_losses, curves, (plain["row"], fused["row"]), title)
    return Picture(f"precision-{way}", title, caption, draw)


def _losses(curves: Row, names: tuple[str, str], title: str, width: int) -> Plot:
    plot = Plot(width, 400, title)
    top = plot.legend(
        [(s, "-", name) for s, name in zip((PLAIN, FUSED), names, strict=True)], 46, 34
    )
    span = curves["updates"][0]
    ends = [loss for kind in ("plain", "fused") for run in curves[kind] for loss in run]
    x = Scale(0, curves["updates"][-1], 46, width - 16)
    y = Scale(*around(ends, log=False), 354, top + 6)
    plot.axes(x, y, "updates", "training loss")
    for kind, style in (("plain", PLAIN), ("fused", FUSED)):
        for run in curves[kind]:
            middles = [x(end - span / 2) for end in curves["updates"]]
            plot.line([(at, y(loss)) for at, loss in zip(middles, run, strict=True)], style)
    return plot
