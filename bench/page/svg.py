"""Small pictures as SVG text: scales with round ticks, axes, marks, labels that avoid each other.

Colours are classes (c0 to c7, defined in style.css for light and dark paper), so that a picture
follows the page it stands in. Lengths are CSS pixels at the picture's natural width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

FONT = 12  # px; style.css sets the same
CHARACTER = 0.56 * FONT  # mean width in a sans-serif


@dataclass(frozen=True)
class Scale:
    """Values low..high to pixels start..end, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    at: tuple[float, ...] = ()  # where the ticks stand; not given: at round values

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values within the scale, as many as have 60 px (x) or 24 px (y) each."""
        most = max(2, int(abs(self.end - self.start) / (60 if self.end > self.start else 24)))
        if self.at:
            return list(self.at[:: -(-len(self.at) // most)])
        if not self.log:
            return _linear_ticks(self.low, self.high, most)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        found: list[float] = []
        for steps in ((1, 2, 5), (1, 3), (1,)):
            values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            found = [v for v in values if self.low <= v * 1.0001 and v <= self.high * 1.0001]
            if len(found) <= most:
                break
        return found[:: max(1, -(-len(found) // most))]


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * s for s in (1, 2, 5, 10) if power * s >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def around(values: Sequence[float], *, log: bool, margin: float = 0.08) -> tuple[float, float]:
    """The range of the values with a margin at both ends; wide enough where all are one."""
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** margin, 1.3)
        return low / factor, high * factor
    room = margin * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def number(value: float) -> str:
    """Three significant digits; thousands and beyond by k, M, G."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass
class Plot:
    """One picture under construction; `svg` gives its text."""

    width: int
    height: int
    title: str  # for those who do not see it
    parts: list[str] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A polyline through pixels."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline class="{style}" points="{path}"/>')

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        """Text whose baseline is at y."""
        at = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="{style}" {at}>{escape(text)}</text>')

    def rect(self, x: float, y: float, width: float, height: float, style: str, tip: str) -> None:
        """A rectangle with a tooltip."""
        self.parts.append(
            f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{max(width, 0):.1f}" '
            f'height="{height:g}"><title>{escape(tip)}</title></rect>'
        )

    def mark(self, x: float, y: float, shape: str, style: str, tip: str) -> None:
        """A marker of about 9 px: "o", "s", "^", "v" or "D"."""
        r = 4.5
        corners = {
            "s": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            "^": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
            "v": ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
            "D": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        }
        if shape == "o":
            body = f'<circle class="{style}" cx="{x:g}" cy="{y:g}" r="{r}">'
            end = "</circle>"
        else:
            at = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners[shape])
            body, end = f'<polygon class="{style}" points="{at}">', "</polygon>"
        self.parts.append(f"{body}<title>{escape(tip)}</title>{end}")
        self.taken.append((x - r, y - r, x + r, y + r))

    def _tick(self, x: float, y: float, text: str, anchor: str) -> None:
        """A number of an axis: no label may cover it."""
        self.text(x, y, text, "tick", anchor)
        self.taken.append(_box(x, y, text, anchor))

    def label(self, x: float, y: float, text: str, style: str) -> None:
        """Name a mark beside it, where no other name or mark stands; nowhere if all is taken."""
        places = [
            (x + 8, y + 4, "start"), (x - 8, y + 4, "end"), (x, y - 9, "middle"),
            (x, y + 18, "middle"), (x + 7, y - 7, "start"), (x + 7, y + 15, "start"),
            (x - 7, y - 7, "end"), (x - 7, y + 15, "end"),
        ]  # fmt: skip
        for left, base, anchor in places:
            box = _box(left, base, text, anchor)
            inside = box[0] >= 2 and box[2] <= self.width - 2 and box[1] >= 2
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                self.text(left, base, text, f"{style} name", anchor)
                return

    def axes(self, x: Scale, y: Scale, across: str, up: str = "") -> None:
        """Grid, ticks and titles; x.start..x.end and y.end..y.start is the field.

        Without a title for y there are categories: no lines and numbers for it.
        """
        for value in x.ticks():
            at = x(value)
            self.line([(at, y.start), (at, y.end)], "grid")
            self._tick(at, y.start + 16, number(value), "middle")
        for value in y.ticks() if up else ():
            at = y(value)
            self.line([(x.start, at), (x.end, at)], "grid")
            self._tick(x.start - 6, at + 4, number(value), "end")
        self.line([(x.start, y.end), (x.start, y.start), (x.end, y.start)], "axis")
        self.text((x.start + x.end) / 2, y.start + 34, across, "tick", "middle")
        self.text(4, 14, up, "tick")

    def legend(self, entries: Sequence[tuple[str, str, str]], left: float, top: float) -> float:
        """(style, shape, name) in rows; shape "-" is a line. Returns the y below the legend."""
        x, y = left, top
        for style, shape, name in entries:
            wide = 22 + CHARACTER * len(name)
            if x + wide > self.width and x > left:
                x, y = left, y + 18
            if shape == "-":
                self.line([(x, y - 4), (x + 12, y - 4)], style)
            else:
                self.mark(x + 6, y - 4, shape, style, name)
                self.taken.pop()  # a legend stands outside the field
            self.text(x + 16, y, name, "tick")
            x += wide + 8
        return y + 14

    def svg(self, style: str = "") -> str:
        """The whole picture."""
        return (
            f'<svg class="{style}" xmlns="http://www.w3.org/2000/svg" role="img" '
            f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}"><title>{escape(self.title)}</title>'
            + "".join(self.parts)
            + "</svg>"
        )


def _box(x: float, base: float, text: str, anchor: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a text whose baseline is at `base`."""
    wide = CHARACTER * len(text)
    left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return left, base - FONT + 2, left + wide, base + 2


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
