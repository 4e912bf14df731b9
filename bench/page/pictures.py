"""The report's pictures, each from evidence rows, at any width."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

import evidence
from evidence import paper_table, timing
from page.drawing import (
    COLOURS,
    PHONE,
    Picture,
    beside,
    by_logarithm,
    curve,
    field,
    label,
    look,
    mark,
    rows_of,
)
from page.html import number

Row = dict[str, Any]

FAMILIES = {  # family -> (colour, marker); a fused DeiT is filled, PyTorch's DeiT open
    "DeiT": ("c0", "o"),
    "DeiT⚗": ("c5", "o"),
    "ViT": ("c4", "v"),
    "ResNet": ("c1", "s"),
    "RegNetY": ("c2", "^"),
    "EfficientNet": ("c3", "D"),
}


def family(row: Row) -> str:
    """The family of a row's network, distilled DeiTs by themselves."""
    name = row["network"].partition("↑")[0]
    return paper_table.family(name.rstrip("⚗")) + ("⚗" if name.endswith("⚗") else "")


def speed(row: Row) -> float:
    """Images/s as the row's protocol defines it: the mean of runs, or the median."""
    return float(row["img_per_s_mean" if row["protocol"] == "deit2021" else "img_per_s"])


def of_each_network(rows: Sequence[Row], *, fused: bool) -> list[Row]:
    """A network's fastest row among its fused ones, or among all others; 8 bits are left out."""
    best: dict[str, Row] = {}
    for row in rows:
        wanted = row["contender"].startswith("fused") == fused
        wanted = wanted and not evidence.eight_bits(row["contender"])
        if wanted and (row["network"] not in best or speed(row) > speed(best[row["network"]])):
            best[row["network"]] = row
    return list(best.values())


# Accuracy against speed -------------------------------------------------------------------------


def accuracy(rows: Sequence[Row], terms: str) -> Picture:
    """Figure 1 of the paper, with this machine's speeds."""
    caption = (
        f"Accuracies are quoted ({paper_table.SOURCE}; of several recipes the first), speeds "
        "measured. Filled: fused, and convnets at their fastest; open: the same DeiT at its "
        "fastest by any other runtime, none in 8 bits."
    )
    draw = functools.partial(_accuracy, rows, terms)
    return Picture("accuracy", f"Accuracy (quoted) against images/s: {terms}", caption, draw)


def _accuracy(rows: Sequence[Row], terms: str, width: int) -> Figure:
    known = [row for row in rows if row["quoted_top1"] is not None]
    filled = of_each_network(known, fused=True)
    others = of_each_network(known, fused=False)
    has_fused = {row["network"] for row in filled}
    filled += [row for row in others if row["network"] not in has_fused]
    hollow = [row for row in others if row["network"] in has_fused]
    shown = [each for each in FAMILIES if any(family(row) == each for row in known)]
    figure, axes = field(
        width, 450, "images/s, measured (log scale)", "ImageNet top-1, %, quoted",
        {name: look(*FAMILIES[name]) for name in shown},
    )  # fmt: skip
    by_logarithm(axes, "x")
    for each, is_filled in ((hollow, False), (filled, True)):
        for name in shown:
            line = sorted((r for r in each if family(r) == name), key=speed)
            points = [(speed(row), row["quoted_top1"]) for row in line]
            colour, shape = FAMILIES[name]
            curve(axes, points, colour, dashed=not is_filled)
            for row, at in zip(line, points, strict=True):
                tip = f"{row['network']} {row['contender']}: {number(at[0])} img/s measured, "
                tip += f"{row['quoted_top1']} % quoted"
                mark(axes, *at, tip, look(colour, shape, filled=is_filled))
    colour_of = lambda row: FAMILIES[family(row)][0]
    label(axes, [(speed(r), r["quoted_top1"], r["network"], colour_of(r)) for r in filled])
    return figure


# Ratios -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Versus:
    """The fused contender of one run beside another of its rounds."""

    fused: Row
    other: Row
    found: timing.Comparison

    @property
    def label(self) -> str:
        batch = self.fused["batch"]
        where = ""
        if self.fused["mode"] == "latency":
            where = ", one image" if batch == 1 else f", {batch} images"
        elif self.fused.get("teacher"):
            where = f", taught by {self.fused['teacher']}"
        graph = self.fused["contender"].partition(", ")[2]  # "one CUDA graph"
        mine = f"{self.fused['network']}{', ' * bool(graph)}{graph}"
        return f"{mine} vs {self.other['contender']}{where}"


def comparisons(rows: Sequence[Row]) -> list[Versus]:
    """Every fused row beside the others of its network and run: 8 bits beside 8 bits alone.

    They stand in the paper's order of networks. Where the same ran several times, the run with the
    most rounds counts.
    """
    run = lambda row: tuple(row[k] for k in ("network", "date", "command", "protocol", "mode"))
    found = []
    ours = [row for row in rows if row["contender"].startswith("fused")]
    for fused in ours:
        for other in (row for row in rows if row not in ours):
            kinds = {evidence.eight_bits(row["contender"]) for row in (fused, other)}
            if len(kinds) == 1 and run(other) == run(fused):
                mine, theirs = ([s / r["batch"] for s in r["seconds"]] for r in (fused, other))
                if len(mine) == len(theirs):
                    found.append(Versus(fused, other, timing.compare(mine, theirs)))
    most: dict[str, Versus] = {}
    for each in sorted(found, key=lambda versus: versus.fused["n"]):
        most[each.label] = each
    names = [paper_table.label(network) for network in paper_table.networks()]
    place = {name: number for number, name in enumerate(names)}
    order = lambda each: (place.get(each.fused["network"], len(place)), each.fused["batch"])
    return sorted(most.values(), key=order)


SPEEDUPS = {  # what was timed -> the picture's name, and of what in words
    "inference": ("speedup", "images/s"),
    "deit2021": ("speedup-deit2021", "images/s by deit2021"),
    "latency": ("speedup-latency", "a call"),
    "training": ("speedup-training", "a training step"),
}


def timed(row: Row) -> str:
    """Which of `SPEEDUPS` a row belongs to."""
    return "deit2021" if row["protocol"] == "deit2021" else str(row["mode"])


def speedups(rows: Sequence[Row], kind: str, dtype: str) -> Picture:
    """How many times faster the fused model is than each other contender of its run.

    rows: of one `timed` kind and one dtype.
    """
    caption = (
        "Median of the ratios within interleaved rounds, and its 95 % interval (sign test). Right "
        "of the dashed line the fused model is faster; where the interval holds 1 there is no "
        "difference, and fewer than 6 rounds say nothing. Where the same ran several times, "
        "the run with the most rounds is drawn."
    )
    name, what = SPEEDUPS[kind]
    draw = functools.partial(_speedups, comparisons(rows))
    return Picture(name, f"Speed-up by variant: {what}, {dtype}", caption, draw)


def _speedups(found: Sequence[Versus], width: int) -> Figure:
    names = [each.label for each in found]
    figure, axes = rows_of(width, names, 22, "times as fast (log scale)")
    by_logarithm(axes, "x")
    axes.axvline(1, color=COLOURS["ink"], linestyle="--", linewidth=1)
    for i, each in enumerate(found):
        ratio, verdict = each.found.ratio, each.found.verdict
        claimed = verdict in ("faster", "slower")
        if each.found.low is not None and each.found.high is not None:
            curve(axes, [(each.found.low, i), (each.found.high, i)], "c0")
        mark(axes, ratio, i, f"{each.label}: {each.found}, {verdict}", look("c0", filled=claimed))
        beside(axes, i, f"{ratio:.2f}x" if claimed else verdict, strong=claimed)
    return figure


# Operators --------------------------------------------------------------------------------------


def by_operator(document: Row) -> Picture:
    """Where a forward's and a backward's time goes, ours beside PyTorch's best."""
    caption = (
        "Each operator's median time, alone and on inputs rotated past the cache, times its calls "
        "in one forward (or backward) of the network; per image."
    )
    operators = list(dict.fromkeys(row["operator"] for row in document["rows"]))
    bars: dict[str, list[Row]] = {}
    for row in document["rows"]:
        for who, name in (("ours", row["ours"]), ("PyTorch's best", row["best"])):
            if row["calls"] and row["contender"] == name:
                bars.setdefault(f"{row['arch']} {row['direction']}, {who}", []).append(row)
    draw = functools.partial(_stacks, bars, operators)
    return Picture("operators", "Time by operator", caption, draw)


def _stacks(bars: dict[str, list[Row]], operators: Sequence[str], width: int) -> Figure:
    names = sorted(bars, key=lambda n: (n.partition(" ")[0], "backward" in n, "PyTorch" in n))
    colours = {name: f"c{i % 8}" for i, name in enumerate(operators)}
    legend = {name: look(colour, "s") for name, colour in colours.items()}
    figure, axes = rows_of(width, names, 30, "ms for one image", legend)
    cost = lambda row: 1e3 * row["seconds"] * row["calls"] / row["batch"]  # ms an image
    for i, name in enumerate(names):
        done = 0.0
        for row in sorted(bars[name], key=lambda row: operators.index(row["operator"])):
            tip = f"{row['operator']} by {row['contender']}: {cost(row):.3g} ms, {name}"
            colour = COLOURS[colours[row["operator"]]]
            bar = axes.barh(i, cost(row), 0.66 if width >= PHONE else 0.42, done, color=colour)
            bar.patches[0].set_gid(f"tip:{tip}")
            done += cost(row)
        beside(axes, i, f"{done:.3g} ms", strong=True)
    return figure


def roofline(document: Row) -> Picture:
    """Every kernel between the two ceilings that this device showed in the same run."""
    top = document["ceilings"]
    caption = (
        f"Ceilings measured in the same run: a copy of {top['copy_bytes'] / 1e6:.0f} MB at "
        f"{top['bytes_per_s'] / 1e9:.3g} GB/s, a product at {top['flops_per_s'] / 1e9:.4g} GFLOP/s "
        f"({top['product']}). Circles: forward; squares: backward. Filled: ours; open: PyTorch's "
        "best. Bytes: every input and output once."
    )
    return Picture("roofline", "Roofline", caption, functools.partial(_roofline, document))


def _roofline(document: Row, width: int) -> Figure:
    rows = [row for row in document["rows"] if row["flops"] and row["bytes"]]
    rows = [row for row in rows if row["contender"] in (row["ours"], row["best"])]
    peak, copy = (document["ceilings"][name] for name in ("flops_per_s", "bytes_per_s"))
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    colours = {name: f"c{i % 8}" for i, name in enumerate(operators)}
    legend = {name: look(colour) for name, colour in colours.items()}
    figure, axes = field(width, 450, "FLOP a byte (log scale)", "GFLOP/s (log scale)", legend)
    by_logarithm(axes, "x")
    by_logarithm(axes, "y")
    intensity = lambda row: row["flops"] / row["bytes"]
    rate = lambda row: row["flops"] / row["seconds"] / 1e9
    knee = peak / copy
    start = max(min(*map(intensity, rows), knee / 4), min(map(rate, rows)) * 1e9 / copy)
    end = max(*map(intensity, rows), knee * 4)
    slope = [(start, start * copy / 1e9), (knee, peak / 1e9), (end, peak / 1e9)]
    curve(axes, slope, "c6")
    for row in sorted(rows, key=lambda row: row["contender"] == row["ours"]):
        tip = (
            f"{row['arch']} {row['operator']} {row['direction']} by {row['contender']}: "
            f"{number(rate(row))} GFLOP/s, {100 * row['share']:.0f} % of its ceiling"
        )
        shape = "s" if row["direction"] == "backward" else "o"
        how = look(colours[row["operator"]], shape, filled=row["contender"] == row["ours"])
        mark(axes, intensity(row), rate(row), tip, how)
    return figure


# Scaling ----------------------------------------------------------------------------------------

SWEEPS = {
    "batch": "images in a batch",
    "resolution": "pixels of a side",
    "depth": "blocks",
    "width": "channels",
    "processes": "processes",
    "ddp": "processes that train together",
}


def sweep(document: Row, name: str) -> Picture:
    """Images/s against what was swept, with the fitted exponents in the caption."""
    fits = [fit for fit in document["fits"] if fit["sweep"] == name]
    said = "; ".join(fit["text"] for fit in fits)
    network = next(row["network"] for row in document["rows"] if row["sweep"] == name)
    caption = f"{network} and its like. Whiskers: quartiles. Fitted: {said or 'nothing'}."
    rows = [row for row in document["rows"] if row["sweep"] == name]
    draw = functools.partial(_sweep, rows, SWEEPS[name])
    across = {"batch": "batch size", "ddp": "processes that train together"}.get(name, name)
    return Picture(f"sweep-{name}", f"Throughput against {across}", caption, draw)


def _sweep(rows: Sequence[Row], across: str, width: int) -> Figure:
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    colours = {name: f"c{i}" for i, name in enumerate(contenders)}
    legend = {name: look(colour) for name, colour in colours.items()}
    figure, axes = field(width, 340, f"{across} (log scale)", "images/s (log scale)", legend)
    by_logarithm(axes, "x", sorted({float(row["x"]) for row in rows}))
    by_logarithm(axes, "y")
    last = []
    for name, colour in colours.items():
        line = sorted((row for row in rows if row["contender"] == name), key=lambda r: r["x"])
        curve(axes, [(r["x"], r["img_per_s"]) for r in line], colour)
        for r in line:
            curve(axes, [(r["x"], r["img_per_s_low"]), (r["x"], r["img_per_s_high"])], colour)
            tip = f"{name}, {r['x']:g} {across}: {number(r['img_per_s'])} img/s"
            mark(axes, r["x"], r["img_per_s"], tip, look(colour))
        last.append((line[-1]["x"], line[-1]["img_per_s"], name, colour))
    label(axes, last)
    return figure
