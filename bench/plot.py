"""The picture of a results file: measured speeds, and quoted accuracy against them.

python bench/plot.py bench/results/cpu.json --out docs/throughput.svg
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence
import paper_table
import tyro

INK, PAPER, GRID = "#1f2328", "#ffffff", "#d0d7de"
# Okabe and Ito's palette, which colour-blind readers tell apart too.
COLOURS = {
    "DeiT": "#d55e00",
    "ViT": "#8a6d00",
    "ResNet": "#0072b2",
    "RegNetY": "#009e73",
    "EfficientNet": "#7b4f9d",
}
MARKERS = {"DeiT": "o", "ViT": "v", "ResNet": "s", "RegNetY": "^", "EfficientNet": "D"}


@dataclass(frozen=True)
class Options:
    """Draw results of bench/throughput.py."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files written by --json; their rows must be of one device, mode and dtype."""
    out: Path
    """Where the picture goes: a name ending in .svg or .png."""


def family(row: dict[str, Any]) -> str:
    """The family of a row's network."""
    return paper_table.family(row["network"].partition("↑")[0])


def comparable(rows: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where rows were not measured on like terms, naming the difference."""
    if not rows:
        raise ValueError("results: expected at least one row; got none")
    for name in ("device", "mode", "dtype", "protocol"):
        values = sorted({str(row[name]) for row in rows})
        if len(values) > 1:
            raise ValueError(f"results: rows differ in {name}: {', '.join(values)}")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture; its format follows from the suffix."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 9,
        "font.family": "DejaVu Sans",
        "svg.hashsalt": "deit",  # the same rows give the same file
        "axes.edgecolor": GRID,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with plt.rc_context(style):
        height = max(3.6, 1.6 + 0.36 * len(rows))
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10.4, height), width_ratios=(1.25, 1), layout="constrained"
        )
        figure.set_facecolor(PAPER)
        bars(left, rows)
        scatter(right, rows)
        left.set_title(_title(rows), fontsize=9)
        source = f"accuracy quoted ({paper_table.SOURCE})"
        right.set_title(f"{source}\nagainst speed measured", fontsize=9)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata=metadata)
        plt.close(figure)


def _title(rows: Sequence[dict[str, Any]]) -> str:
    row = rows[0]
    batches = " and ".join(str(batch) for batch in sorted({row["batch"] for row in rows}))
    threads = f", {row['threads']} threads" if row["driver"] is None else ""
    return (
        f"measured on {row['device']}{threads}, torch {row['torch'].partition('+')[0]}, "
        f"{row['date'][:10]}\n{row['mode']}, {row['dtype']}, batch {batches}"
    )


def bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Images/s, one bar a contender, whiskers from quartile to quartile, fused ones filled."""
    places = range(len(rows) - 1, -1, -1)
    for place, row in zip(places, rows, strict=True):
        colour, speed = COLOURS[family(row)], row["img_per_s"]
        whisker = [[speed - row["img_per_s_low"]], [row["img_per_s_high"] - speed]]
        fused = row["contender"] == "fused"
        axes.barh(
            place,
            speed,
            height=0.68,
            xerr=whisker,
            color=colour if fused else PAPER,
            edgecolor=colour,
            hatch=None if fused else "////",
            linewidth=1.2,
            error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1.1},
        )
        axes.annotate(
            f"{speed:.3g}" if speed < 1000 else f"{speed:.0f}",
            (row["img_per_s_high"], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            weight="bold" if fused else "normal",
        )
    axes.set_yticks(list(places), [f"{row['network']}  {row['contender']}" for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_weight("bold" if row["contender"] == "fused" else "normal")
    axes.set_xlim(0, 1.14 * max(row["img_per_s_high"] for row in rows))
    axes.set_xlabel("images/s, measured (median; whiskers: quartiles)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def scatter(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Quoted top-1 against measured images/s; a DeiT's fused contender, where it ran."""
    shown: dict[str, dict[str, Any]] = {}
    for row in rows:
        fused = row["contender"] == "fused"
        if row["quoted_top1"] is not None and (fused or row["network"] not in shown):
            shown[row["network"]] = row
    axes.set_xscale("log")
    for name in COLOURS:
        points = [row for row in shown.values() if family(row) == name]
        if points:
            axes.scatter(
                [row["img_per_s"] for row in points],
                [row["quoted_top1"] for row in points],
                s=46,
                color=COLOURS[name],
                marker=MARKERS[name],
                label=name,
                zorder=3,
            )
    place_labels(axes, list(shown.values()))
    axes.set_xlabel("images/s, measured (log scale)")
    axes.set_ylabel("ImageNet top-1, % (quoted)")
    axes.grid(color=GRID, linewidth=0.6, which="both", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def place_labels(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Name every point beside it, on a plain tick scale, where names do not cover each other."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    speeds = [row["img_per_s"] for row in rows] or [1.0]
    tops = [row["quoted_top1"] for row in rows] or [80.0]
    axes.set_xlim(min(speeds) / 1.45, max(speeds) * 1.45)
    margin = max(0.8, 0.12 * (max(tops) - min(tops)))
    axes.set_ylim(min(tops) - margin, max(tops) + margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    # Alternate above and below: of two points at one height, as names are wide, names collide.
    order = sorted(rows, key=lambda row: (row["quoted_top1"], row["img_per_s"]))
    for i, row in enumerate(order):
        axes.annotate(
            row["network"] + (" fused" if row["contender"] == "fused" else ""),
            (row["img_per_s"], row["quoted_top1"]),
            xytext=(0, 8 if i % 2 == 0 else -8),
            textcoords="offset points",
            ha="center",
            va="bottom" if i % 2 == 0 else "top",
            fontsize=8,
            color=COLOURS[family(row)],
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 2 for files that cannot be drawn."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        if options.out.suffix not in (".svg", ".png"):
            raise ValueError(f"out: expected a name in .svg or .png; got {options.out.name}")
        rows = evidence.read(options.results)
        comparable(rows)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        if evidence.is_stale(row):
            print(f"stale: {row['network']} {row['contender']}: kernels have changed since")
    draw(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
