"""How accurate the kernels are beside PyTorch: error over error, for every operator.

    python bench/numerics.py                            # on a GPU, or in Triton's interpreter
    python bench/numerics.py --impl cpu --dtype fp32
    python bench/numerics.py --json build/numerics.json
    python bench/numerics.py --impl cpu --write docs/numerics.md   # the CPU's tables there

Each public operator runs forward and, where its kernels have a gradient, backward: by a kernel,
by PyTorch at the same dtype, and by PyTorch in fp64. A figure is the kernel's error over
PyTorch's, both against fp64 and pooled over several draws (`oracle.pooled`): 1.0 is as accurate as
PyTorch, less is more accurate. The rule (kernels/prove/oracle.py) allows 1.25 and an ulp-sized
floor; figures above it are marked, and the exit status is then 1.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import evidence
from deit.commands import flags
from deit.kernels.prove import calls, oracle
from deit.kernels.prove.calls import FAMILIES, Call
from evidence import devices

if TYPE_CHECKING:
    from rich.table import Table

SIZE = calls.Size(2, 70, 192, side=4)
LOGITS = calls.Size(70, 1, 1)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """Which kernels, on what."""

    device: str = "auto"
    """auto, cpu (Triton in its interpreter) or cuda"""
    impl: tuple[str, ...] = ("triton", "cpu", "cuda")
    dtype: tuple[str, ...] = tuple(DTYPES)
    operator: tuple[str, ...] = ()
    """only these operators"""
    draws: int = 8
    """independent draws of the inputs that each figure is pooled over"""
    json: Path | None = None
    """write every figure here"""
    write: Path | None = None
    """a Markdown file that gets the tables, between the lines <!-- figures --> and <!-- end -->,
    each in the place of an earlier one of its implementation and dtype; with `operator`, the
    earlier one's lines of other operators stay"""


@dataclass(frozen=True)
class Row:
    """One output ("out", "out 1") or gradient ("d x") of one call.

    norm: ||result - exact|| / ||exact||; max: max|result - exact|. used: the larger share of what
    the rule allows, 1 at its limit.
    """

    impl: str
    operator: str
    quantity: str
    dtype: str
    family: str
    norm: float
    torch_norm: float
    max: float
    torch_max: float
    used: float


def draw(operator: str, family: str, dtype: torch.dtype, number: int = 0) -> Call:
    """What is measured of an operator, drawn on the CPU, whose numbers are the same everywhere."""
    made = calls.Draw(family, dtype, number=number)
    return calls.build(operator, made, LOGITS if calls.stated()[operator].loss else SIZE)


def results(call: Call, impl: str, dtype: torch.dtype | None, backward: bool) -> dict:
    """Outputs and gradients by name; every tensor in `dtype`, or as it is for None.

    The gradient is that of a fixed random cotangent of each output.
    """
    inputs = {
        name: t.to(dtype) if dtype is not None and t.is_floating_point() else t
        for name, t in call.inputs.items()
    }

    def cotangent(index: int, output: Tensor) -> Tensor:
        drawn = oracle.make("random", output.shape, seed=31 + index)
        # Rounded to the call's dtype first, so that fp64 sees the cotangent the kernel sees.
        return drawn.to(call.inputs[call.gradients[0]].dtype).to(output)

    return call.results(impl, inputs, cotangent if backward else None)


def three(call: Call, impl: str, backward: bool) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Every output and gradient by name: the implementation's, PyTorch's, and in fp64."""
    kernel = results(call, impl, None, backward)
    plain = results(call, "reference", None, backward)
    exact = results(call, "reference", torch.float64, backward)
    return {name: (got, plain[name], exact[name]) for name, got in kernel.items()}


def measured(call: Call, impl: str, backward: bool) -> dict[str, oracle.Measured]:
    """Every output's and gradient's errors by name."""
    return {name: oracle.compared(*of) for name, of in three(call, impl, backward).items()}


def compare(draws: Sequence[Call], impl: str, dtype: str, family: str, backward: bool) -> list[Row]:
    """A row for every output and gradient of one call, pooled over its draws."""
    found = [measured(call, impl, backward) for call in draws]
    rows = []
    for quantity in found[0]:
        m = oracle.pooled([draw[quantity] for draw in found])
        rows.append(
            Row(impl, draws[0].operator, quantity, dtype, family, m.ours.norm, m.theirs.norm,
                m.ours.maximum, m.theirs.maximum, m.used)
        )  # fmt: skip
    return rows


def measure(
    settings: Settings, device: torch.device
) -> tuple[list[Row], dict[tuple[str, str, str], str]]:
    """All rows, and why an implementation has none, by (implementation, dtype, operator)."""
    rows: list[Row] = []
    left_out: dict[tuple[str, str, str], str] = {}
    for dtype in settings.dtype:
        for family in FAMILIES:
            for operator in calls.operators(softmax=family == "one_hot"):
                if settings.operator and operator not in settings.operator:
                    continue
                numbers = range(settings.draws)
                draws = [draw(operator, family, DTYPES[dtype], n).to(device) for n in numbers]
                for impl in settings.impl:
                    if reasons := draws[0].reasons(impl):
                        left_out[impl, dtype, operator] = "; ".join(reasons)
                        continue
                    backward = draws[0].differentiable(impl)
                    rows += compare(draws, impl, dtype, family, backward)
    return rows, left_out


Cells = dict[tuple[str, str], dict[str, Row]]


def grid(rows: Sequence[Row], impl: str, dtype: str) -> Cells:
    """The rows by (operator, quantity), then by family."""
    found: Cells = {}
    for row in rows:
        if (row.impl, row.dtype) == (impl, dtype):
            found.setdefault((row.operator, row.quantity), {})[row.family] = row
    return found


def table(rows: Sequence[Row], impl: str, dtype: str) -> Table:
    """Error over PyTorch's error, "norm max" a family; in red what the rule does not allow."""
    from rich import box
    from rich.table import Table

    shown = Table(title=f"{impl}, {dtype}", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("operator", "", *FAMILIES):
        shown.add_column(head, justify="left" if head in ("operator", "") else "right")
    for (operator, quantity), cells in grid(rows, impl, dtype).items():
        figures = [figure(cells[f]) if f in cells else "" for f in FAMILIES]
        shown.add_row(operator, quantity, *figures)
    return shown


def markdown(rows: Sequence[Row], settings: Settings) -> str:
    """One table for every implementation and dtype; in bold what the rule does not allow."""
    lines = []
    for impl in settings.impl:
        for dtype in settings.dtype:
            cells = grid(rows, impl, dtype)
            if not cells:
                continue
            lines += ["", f"**{impl}, {dtype}**", ""]
            lines += ["| operator | | " + " | ".join(FAMILIES) + " |"]
            lines += ["|---|---|" + "---|" * len(FAMILIES)]
            for (operator, quantity), found in cells.items():
                figures = [_plain(found[f]) if f in found else "" for f in FAMILIES]
                lines.append(f"| {operator} | {quantity} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _plain(row: Row) -> str:
    """`figure` as Markdown."""
    text = figure(row).replace(" ", " / ")
    return text.replace("[red]", "**").replace("[/red]", "**")


def insert(path: Path, text: str, *, keep: bool = False) -> None:
    """Put `text`'s tables between the two marks of a file, where others that are there stay.

    keep: of an earlier table with the same heading, the lines of other operators stay, too.
    ValueError: the marks are not there.
    """
    before, mark, rest = path.read_text().partition("<!-- figures -->")
    old, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise ValueError(f"{path}: expected the lines <!-- figures --> and <!-- end -->")
    tables = _by_heading(old)
    for heading, made in _by_heading(text).items():
        tables[heading] = _joined(tables.get(heading, ""), made) if keep else made
    written = "\n\n".join(tables.values())
    path.write_text(f"{before}{mark}\n\n{written}\n\n{end}{after}")


def _joined(old: str, new: str) -> str:
    """`new`, and before its own lines those of `old` that are of other operators."""

    def operator(line: str) -> str:
        return line.split("|")[1] if line.startswith("|") else ""

    lines = new.splitlines()
    made = {"", *map(operator, lines)}
    stay = [line for line in old.splitlines() if operator(line) not in made]
    first = next(i for i, line in enumerate(lines) if line.startswith("|---")) + 1
    return "\n".join([*lines[:first], *stay, *lines[first:]])


def _by_heading(text: str) -> dict[str, str]:
    """The tables of `markdown`, each with its line "**impl, dtype**" before it, by that line."""
    found = re.findall(r"^(\*\*.+\*\*)$((?:\n(?!\*\*).*)*)", text, re.MULTILINE)
    return {heading: heading + table.rstrip() for heading, table in found}


def figure(row: Row) -> str:
    """ "0.98 1.02": the ratios of the norms and of the maxima; "=" where PyTorch is exact too."""
    pairs = ((row.norm, row.torch_norm), (row.max, row.torch_max))
    text = " ".join(
        f"{ours / theirs:.2f}" if theirs else ("=" if not ours else "floor")
        for ours, theirs in pairs
    )
    return f"[red]{text}[/red]" if row.used > 1 else text


def main(settings: Settings) -> int:
    """Print the tables; 1 if a figure is above the rule."""
    from rich.console import Console

    device = devices.resolve(settings.device)
    torch.set_num_threads(1)  # PyTorch's sums over rows, and their error, depend on the number
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    rows, left_out = measure(settings, device)
    console = Console()
    for impl in settings.impl:
        for dtype in settings.dtype:
            if any((row.impl, row.dtype) == (impl, dtype) for row in rows):
                console.print(table(rows, impl, dtype))
    for (impl, dtype, operator), why in left_out.items():
        console.print(f"[dim]left out: {impl} {operator} {dtype}: {why}[/dim]", soft_wrap=True)
    if settings.json is not None:
        write(settings.json, rows, device)
    if settings.write is not None:
        insert(settings.write, markdown(rows, settings), keep=bool(settings.operator))
    above = [row for row in rows if row.used > 1]
    console.print(f"{len(rows)} figures, {len(above)} above the rule")
    return 1 if above else 0


def write(path: Path, rows: Sequence[Row], device: torch.device) -> None:
    """The rows with what a reader must know to repeat them."""
    facts: dict[str, Any] = devices.describe(device)
    facts["interpreted"] = os.environ.get("TRITON_INTERPRET", "0") == "1"
    facts["kernels_sha256"] = evidence.kernels_sha256()
    evidence.save(path, {**facts, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    sys.exit(main(flags.parse(Settings, None, __doc__)))
