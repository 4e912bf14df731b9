"""`deit report RUN...`: curves of runs side by side, and their last scores as a table."""

from __future__ import annotations

from dataclasses import dataclass

from deit.commands import flags


@dataclass(frozen=True)
class Report:
    """Compare runs: a table of their last scores, and curves."""

    runs: flags.Paths
    """Runs' folders."""
    out: flags.OptionalPath = None
    """Draw loss, top-1 by head and pace into this file, too (.svg, .png or .pdf)."""

    def run(self) -> int:
        """Print the table and draw the picture; returns 0. Raises ValueError for no run at all."""
        from rich.console import Console

        from deit.training.report import draw, history, table

        if not self.runs:
            raise ValueError("runs: expected the folder of at least one run; got none")
        histories = [history(path) for path in self.runs]
        Console().print(table(histories))
        if self.out is not None:
            draw(histories, self.out)
            print(f"picture in {self.out}")
        return 0
