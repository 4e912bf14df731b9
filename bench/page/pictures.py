"""The report's pictures, each from evidence rows, at any width."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import evidence
from evidence import paper_table, timing
from page.svg import CHARACTER, Plot, Scale, around, number

Row = dict[str, Any]
WIDE, NARROW = 900, 356  # px: a desktop's column, and a phone of 390 px less its margins

FAMILIES = {  # family -> (colour, marker); a fused DeiT is filled, PyTorch's DeiT open
    "DeiT": ("c0", "o"),
    "DeiT⚗": ("c5", "o"),
    "ViT": ("c4", "v"),
    "ResNet": ("c1", "s"),
    "RegNetY": ("c2", "^"),
    "EfficientNet": ("c3", "D"),
}


@dataclass(frozen=True)
class Picture:
    """One picture: `draw(width)` makes it."""

    name: str
    title: str
    caption: str
    draw: Callable[[int], Plot]

    def html(self) -> str:
        """A figure with a drawing for wide windows and one for narrow ones."""
        drawings = self.draw(WIDE).svg("wide") + self.draw(NARROW).svg("narrow")
        return (
            f"<figure><h3>{escape(self.title)}</h3>{drawings}"
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


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


def _accuracy(rows: Sequence[Row], terms: str, width: int) -> Plot:
    known = [row for row in rows if row["quoted_top1"] is not None]
    filled = of_each_network(known, fused=True)
    others = of_each_network(known, fused=False)
    has_fused = {row["network"] for row in filled}
    filled += [row for row in others if row["network"] not in has_fused]
    hollow = [row for row in others if row["network"] in has_fused]
    plot = Plot(width, 470, f"Quoted accuracy against measured images/s, {terms}")
    shown = [each for each in FAMILIES if any(family(row) == each for row in known)]
    top = plot.legend([(f"{FAMILIES[f][0]} fill", FAMILIES[f][1], f) for f in shown], 4, 34)
    x = Scale(*around([speed(r) for r in filled + hollow], log=True), 38, width - 16, log=True)
    y = Scale(*around([r["quoted_top1"] for r in known], log=False), 424, top + 6)
    plot.axes(x, y, "images/s, measured (log scale)", "ImageNet top-1, %, quoted")
    for each, style in ((hollow, "open"), (filled, "fill")):
        for name in shown:
            line = sorted((r for r in each if family(r) == name), key=speed)
            points = [(x(speed(row)), y(row["quoted_top1"])) for row in line]
            colour, shape = FAMILIES[name]
            plot.line(points, f"{colour} curve" + (" dashed" if style == "open" else ""))
            for row, (px, py) in zip(line, points, strict=True):
                tip = f"{row['network']} {row['contender']}: {number(speed(row))} img/s measured, "
                plot.mark(px, py, shape, f"{colour} {style}", f"{tip}{row['quoted_top1']} % quoted")
    for row in filled:
        at = x(speed(row)), y(row["quoted_top1"])
        plot.label(*at, row["network"], FAMILIES[family(row)][0])
    return plot


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

    In the paper's order of networks; of several runs of the same the one with the most rounds.
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
        "difference, and fewer than 6 rounds say nothing. Of several runs of the same the one "
        "with the most rounds."
    )
    name, what = SPEEDUPS[kind]
    draw = functools.partial(_speedups, comparisons(rows))
    return Picture(name, f"Speed-up by variant: {what}, {dtype}", caption, draw)


def _speedups(found: Sequence[Versus], width: int) -> Plot:
    narrow = width < 500
    step, left = (38, 6) if narrow else (22, 270)
    bottom = 20 + step * len(found)
    plot = Plot(width, bottom + 40, "Speed-up of the fused model over each other contender")
    ends = [v for each in found for v in (each.found.low, each.found.high, each.found.ratio) if v]
    x = Scale(*around([1.0, *ends], log=True), left, width - 92, log=True)
    plot.axes(x, Scale(0, 1, bottom, 10), "times as fast (log scale)")
    plot.line([(x(1), 10), (x(1), bottom)], "rule")
    for i, each in enumerate(found):
        y = 28 + step * i + (12 if narrow else 0)
        plot.text(left if narrow else 0, y - 15 if narrow else y + 4, each.label, "over")
        ratio, verdict = each.found.ratio, each.found.verdict
        claimed = verdict in ("faster", "slower")
        if each.found.low is not None and each.found.high is not None:
            plot.line([(x(each.found.low), y), (x(each.found.high), y)], "c0 curve")
        style = "c0 fill" if claimed else "c0 open"
        plot.mark(x(ratio), y, "o", style, f"{each.label}: {each.found}, {verdict}")
        said = f"{ratio:.2f}x" if claimed else verdict
        plot.text(width, y + 4, said, "strong" if claimed else "tick", "end")
    return plot


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


def _stacks(bars: dict[str, list[Row]], operators: Sequence[str], width: int) -> Plot:
    names = sorted(bars, key=lambda n: (n.partition(" ")[0], "backward" in n, "PyTorch" in n))
    narrow = width < 500
    step, left = (46, 4) if narrow else (30, 230)
    plot = Plot(width, 110 + step * len(names), "Time by operator")
    legend = [(f"c{i % 8} fill", "s", name) for i, name in enumerate(operators)]
    top = plot.legend(legend, 4, 14)
    plot.height = int(top + step * len(names) + 44)
    bottom = plot.height - 40
    cost = lambda row: 1e3 * row["seconds"] * row["calls"] / row["batch"]  # ms an image
    total = {name: sum(map(cost, bars[name])) for name in names}
    x = Scale(0, max(total.values()) * 1.02, left, width - 62)
    plot.axes(x, Scale(0, 1, bottom, top), "ms for one image")
    for i, name in enumerate(names):
        y = top + 4 + step * i + (16 if narrow else 0)
        plot.text(left if narrow else 0, y - 4 if narrow else y + 15, name, "over")
        done = 0.0
        for row in sorted(bars[name], key=lambda row: operators.index(row["operator"])):
            tip = f"{row['operator']} by {row['contender']}: {cost(row):.3g} ms, {name}"
            end = done + cost(row)
            colour = f"c{operators.index(row['operator']) % 8} fill"
            plot.rect(x(done), y, x(end) - x(done), 20, colour, tip)
            done = end
        plot.text(x(done) + 4, y + 15, f"{done:.3g} ms", "strong")
    return plot


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


def _roofline(document: Row, width: int) -> Plot:
    rows = [row for row in document["rows"] if row["flops"] and row["bytes"]]
    rows = [row for row in rows if row["contender"] in (row["ours"], row["best"])]
    peak, copy = (document["ceilings"][name] for name in ("flops_per_s", "bytes_per_s"))
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    plot = Plot(width, 470, "Roofline with every kernel placed")
    legend = [(f"c{i % 8} fill", "o", name) for i, name in enumerate(operators)]
    top = plot.legend(legend, 4, 34)
    intensity = lambda row: row["flops"] / row["bytes"]
    rate = lambda row: row["flops"] / row["seconds"] / 1e9
    knee = peak / copy
    ends = around([*map(intensity, rows), knee / 4, knee * 4], log=True)
    x = Scale(*ends, 46, width - 16, log=True)
    y = Scale(*around([*map(rate, rows), peak / 1e9], log=True), 424, top + 6, log=True)
    plot.axes(x, y, "FLOP a byte (log scale)", "GFLOP/s (log scale)")
    start = max(x.low, y.low * 1e9 / copy)
    slope = [(x(start), y(start * copy / 1e9)), (x(knee), y(peak / 1e9)), (x.end, y(peak / 1e9))]
    plot.line(slope, "c6 curve")
    for row in sorted(rows, key=lambda row: row["contender"] == row["ours"]):
        ours = row["contender"] == row["ours"]
        colour = f"c{operators.index(row['operator']) % 8}"
        shape = "s" if row["direction"] == "backward" else "o"
        tip = (
            f"{row['arch']} {row['operator']} {row['direction']} by {row['contender']}: "
            f"{number(rate(row))} GFLOP/s, {100 * row['share']:.0f} % of its ceiling"
        )
        style = f"{colour} {'fill' if ours else 'open'}"
        plot.mark(x(intensity(row)), y(rate(row)), shape, style, tip)
    return plot


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


def _sweep(rows: Sequence[Row], across: str, width: int) -> Plot:
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    plot = Plot(width, 360, f"Images/s against {across}")
    styles = {name: f"c{i}" for i, name in enumerate(contenders)}
    top = plot.legend([(f"{styles[name]} fill", "o", name) for name in contenders], 4, 34)
    values = sorted({float(row["x"]) for row in rows})
    x = Scale(*around(values, log=True), 50, width - 16, log=True, at=tuple(values))
    ends = [v for row in rows for v in (row["img_per_s_low"], row["img_per_s_high"])]
    y = Scale(*around(ends, log=True), 314, top + 6, log=True)
    plot.axes(x, y, f"{across} (log scale)", "images/s (log scale)")
    for name in contenders:
        line = sorted((row for row in rows if row["contender"] == name), key=lambda r: r["x"])
        plot.line([(x(r["x"]), y(r["img_per_s"])) for r in line], f"{styles[name]} curve")
        for r in line:
            whisker = [(x(r["x"]), y(r["img_per_s_low"])), (x(r["x"]), y(r["img_per_s_high"]))]
            plot.line(whisker, f"{styles[name]} curve")
            tip = f"{name}, {r['x']:g} {across}: {number(r['img_per_s'])} img/s"
            plot.mark(x(r["x"]), y(r["img_per_s"]), "o", f"{styles[name]} fill", tip)
    last = {row["contender"]: row for row in sorted(rows, key=lambda r: r["x"])}
    for name, row in last.items():
        if len(name) * CHARACTER < width / 2:
            plot.label(x(row["x"]), y(row["img_per_s"]), name, styles[name])
    return plot
