"""Pictures by matplotlib, as SVG that takes the colours of the paper it stands on.

A drawing is made in theme.css's colours for light paper, and their names are put in their place. So
one drawing serves light and dark paper. Lengths are CSS pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from page.html import THEME, number

# Name -> colour on light paper: c0 to c7, paper, ink, faint, grid.
COLOURS = dict(re.findall(r"--(\w+): (#\w{6});", THEME.partition("@media")[0]))
WIDE, NARROW = 900, 356  # px: a desktop's column, and a phone of 390 px less its margins
PHONE = 500  # px: a narrower drawing has its rows' names above them
FONT, MARK, LINE = 12, 9, 18  # px
CHARACTER = 0.62 * FONT  # px: the mean width
STYLE = Path(__file__).with_name("picture.mplstyle")
Looks = Mapping[str, dict[str, Any]]  # name -> how matplotlib draws a line


@dataclass(frozen=True)
class Picture:
    """One picture: `draw(width)` makes it."""

    name: str
    title: str
    caption: str
    draw: Callable[[int], Figure]

    def svg(self, width: int, kind: str = "") -> str:
        """The drawing. kind: its class in the page; without one it brings its own colours."""
        # The same rows give the same text. Two drawings of a page share no ids.
        with style.context([STYLE, {"svg.hashsalt": f"{self.title} {width}"}]):
            out = io.StringIO()
            about = {"Title": self.title, "Date": None}
            self.draw(width).savefig(out, format="svg", metadata=about)
        text = out.getvalue()
        text = text[text.index("<svg") :].replace("<svg", f'<svg class="{kind}" role="img"', 1)
        text = re.sub(r'="(\d+)pt"', r'="\1"', text)
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' clip-path="[^"]*"', "", text)  # nothing lies outside the field
        text = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", text)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        for name, colour in COLOURS.items():
            text = text.replace(colour, f"var(--{name})")
        return text if kind else text.replace("</title>", f"</title><style>{THEME}</style>", 1)

    def html(self) -> str:
        """A figure with a drawing for wide windows and one for narrow ones."""
        return (
            f"<figure><h3>{escape(self.title)}</h3>{self.svg(WIDE, 'wide')}"
            f"{self.svg(NARROW, 'narrow')}<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


def look(colour: str, marker: str = "o", *, filled: bool = True) -> dict[str, Any]:
    """How a mark looks: a colour's name, a marker of matplotlib's."""
    ink, paper = COLOURS[colour], COLOURS["paper"]
    face, edge, width = (ink, paper, 0.6) if filled else (paper, ink, 1.8)
    return {"color": ink, "linestyle": "", "marker": marker, "markerfacecolor": face,
            "markeredgecolor": edge, "markeredgewidth": width}  # fmt: skip


def field(
    width: int, height: int, across: str, up: str = "", legend: Looks | None = None
) -> tuple[Figure, Axes]:
    """An empty field with its axes' titles, as high as asked for, and a legend above it."""
    legend = legend or {}
    wide = 34 + CHARACTER * max(map(len, legend), default=0)
    columns = max(1, int(width / wide))
    height += LINE * -(-len(legend) // columns)
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_title(up)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    if legend:
        lines = [Line2D([], [], label=name, **options) for name, options in legend.items()]
        figure.legend(handles=lines, loc="outside upper left", ncols=columns)
    return figure, axes


def rows_of(
    width: int, names: list[str], step: int, across: str, legend: Looks | None = None
) -> tuple[Figure, Axes]:
    """A field with a row for every name, of `step` px; row i is at y = i, from the top."""
    narrow = width < PHONE
    figure, axes = field(width, 60 + (step + LINE * narrow) * len(names), across, "", legend)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(names) - 0.4, -0.6 - 0.2 * narrow)
    axes.set_yticks(range(len(names)), [] if narrow else names, color=COLOURS["ink"])
    for i, name in enumerate(names if narrow else ()):
        _at_row(axes, (0, i), name, (2, step / 2 + 4), in_layout=False)
    return figure, axes


def beside(axes: Axes, row: float, text: str, *, strong: bool = False) -> None:
    """Text on the right of a row, in ink and bold if `strong`."""
    colour, weight = ("ink", "bold") if strong else ("faint", "normal")
    _at_row(axes, (1, row), text, (6, 0), color=COLOURS[colour], weight=weight)


def _at_row(axes: Axes, at: tuple[float, float], text: str, *offset: Any, **options: Any) -> None:
    """Text at a share of the field's width and a row, moved by px."""
    across = axes.get_yaxis_transform()
    options |= {"xycoords": across, "textcoords": "offset points", "va": "center"}
    axes.annotate(text, at, *offset, **options)


def curve(
    axes: Axes, points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False
) -> None:
    """A line through points."""
    x, y = zip(*points, strict=True) if points else ((), ())
    axes.plot(x, y, color=COLOURS[colour], linestyle="--" if dashed else "-")


def mark(axes: Axes, x: float, y: float, tip: str, options: dict[str, Any]) -> None:
    """A mark of a `look` with a tooltip."""
    axes.plot([x], [y], gid=f"tip:{tip}", zorder=3, **options)


def by_logarithm(axes: Axes, which: str, at: Iterable[float] = ()) -> None:
    """Make "x" or "y" logarithmic, with ticks at round values or at as many of `at` as fit."""
    at = list(at)
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    width = _figure(axes).get_size_inches()[0] * 72
    if at:
        axis.set_major_locator(FixedLocator(at[:: -(-len(at) // int(width / 60))]))
    else:
        narrow = which == "x" and width < PHONE
        axis.set_major_locator(LogLocator(subs=(1, 3) if narrow else (1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: number(value))


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


PLACES = ((8, 0, "left"), (-8, 0, "right"), (0, 13, "center"), (0, -13, "center"),
          (7, 11, "left"), (7, -11, "left"), (-7, 11, "right"), (-7, -11, "right"))  # fmt: skip


def label(axes: Axes, names: Iterable[tuple[float, float, str, str]]) -> list[Bbox]:
    """Name marks (x, y, name, colour) beside them, where nothing else stands; else not at all.

    Returns the boxes of what stands there afterwards: numbers of the axes, marks, names.
    """
    figure = _figure(axes)
    figure.draw_without_rendering()  # settles the layout
    figure.set_layout_engine("none")
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    taken = [tick.get_window_extent() for tick in ticks]
    points = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    taken += [Bbox.from_bounds(x - MARK / 2, y - MARK / 2, MARK, MARK)
              for line, each in zip(axes.lines, points, strict=True) for x, y in each
              if line.get_linestyle() == "None"]  # fmt: skip
    for x, y, text, colour in names:
        for across, up, side in PLACES:
            name = axes.annotate(
                text, (x, y), (across, up), textcoords="offset points", ha=side, va="center",
                color=COLOURS[colour],
            )  # fmt: skip
            box = name.get_window_extent()
            inside = box.x0 >= 0 and box.x1 <= figure.bbox.x1
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            name.remove()
    return taken
