"""What fuse() did: one row a module, readable as a table."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One module: its name in the model, its class, and what became of it."""

    name: str
    kind: str
    fused: bool
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The result of `fuse`. Printing it gives a table with like modules grouped.

    rows: every module that was fused, and every one that holds parameters and was not, with why.
    operators: operator -> the implementation that runs it in inference on the model's device.
    """

    rows: list[Row] = field(default_factory=list)
    operators: dict[str, str] = field(default_factory=dict)

    @property
    def fused(self) -> list[str]:
        """Names of the modules that run fused."""
        return [row.name for row in self.rows if row.fused]

    @property
    def left(self) -> dict[str, str]:
        """Names of the modules left as they were, with the reason."""
        return {row.name: row.note for row in self.rows if not row.fused}

    def __str__(self) -> str:
        groups: dict[tuple[str, str, bool, str], list[str]] = {}
        for row in self.rows:
            pattern = re.sub(r"\d+", "*", row.name)
            groups.setdefault((pattern, row.kind, row.fused, row.note), []).append(row.name)
        cells = []
        for (pattern, kind, fused, note), names in groups.items():
            name = names[0] if len(names) == 1 else f"{pattern} (x{len(names)})"
            cells.append((name or "(model)", kind, "fused" if fused else "left", note))
        widths = [max((len(c[i]) for c in cells), default=0) for i in range(3)]
        lines = [
            "  ".join(t.ljust(w) for t, w in zip(c[:3], widths, strict=True)) + "  " + c[3]
            for c in cells
        ]
        lines = [line.rstrip() for line in lines]
        lines.append("runs: " + ", ".join(f"{op} on {impl}" for op, impl in self.operators.items()))
        return "\n".join(lines)
