"""Writes docs/numerics.md's tables of simulated GPUs.

make simulated-figures            # Triton's bf16 and e4m3, by a simulated H100
DEIT_SIMULATED=build/rows-1.json make simulate-all SHARD=1/4    # and so on: of whole runs,
python tests/simulated/figures.py build/rows-*.json             # parts of one in any order
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import shown
import torch

import numerics
from deit.kernels.engine.operator import OPERATORS, operator_names
from deit.kernels.prove import oracle

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"
E4M3 = "fp8 (e4m3)"


def main() -> None:
    """The tables of the files of rows that are named; of none, what is measured here."""
    if files := sys.argv[1:]:
        rows = shown.latest(map(_rows, files))
        numerics.insert(PAGE, shown.markdown(rows))
        print(shown.total(rows))
    else:
        measure()


def _rows(file: str) -> list[shown.Row]:
    try:
        rows: list[shown.Row] = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{file}: expected the rows that DEIT_SIMULATED={file} writes; {error}")
    return rows


def measure() -> None:
    """As `bench/numerics.py --impl triton --dtype bf16 --draws 2 --write`, and in e4m3."""
    import simulator  # nothing but this needs it

    settings = numerics.Settings(impl=("triton",), dtype=("bf16",), draws=2)
    with simulator.device(90) as launched:
        rows, _ = numerics.measure(settings, torch.device("cpu"))
        rows += in_e4m3(settings.draws)
    write(rows)
    print(f"{len(rows)} figures, {sum(row.used > 1 for row in rows)} above the rule, the largest "
          f"{max(row.used for row in rows):.2f} of it; {launched.launches} launches, "
          f"{launched.races_unchecked} not searched for races")  # fmt: skip


def in_e4m3(draws: int) -> list[numerics.Row]:
    """The products in e4m3 of bf16 tensors.

    Both errors are against fp64 without e4m3; PyTorch's is that of the reference, which rounds to
    e4m3 alike.
    """
    rows = []
    for operator in operator_names(eight_bits=True):
        if not operator.startswith("fp8"):
            continue
        for family in oracle.FAMILIES:
            m = oracle.pooled([_measured(operator, family, number) for number in range(draws)])
            rows.append(
                numerics.Row("triton", operator, "out", E4M3, family, m.ours.norm, m.theirs.norm,
                             m.ours.maximum, m.theirs.maximum, m.used)
            )  # fmt: skip
    return rows


def _measured(operator: str, family: str, number: int) -> oracle.Measured:
    call = numerics.draw(operator, family, torch.bfloat16, number)
    out, plain = (call.results(impl, call.inputs)["out"] for impl in ("triton", "reference"))
    arguments = OPERATORS[operator].prepare(**call.inputs, **call.options)
    unrounded = OPERATORS[operator].rival
    assert unrounded is not None
    return oracle.compared(out, plain, unrounded(*oracle.in_fp64(arguments)))


def write(rows: list[numerics.Row]) -> None:
    """Each table in the place of its earlier one, under a heading that says by what it is."""
    settings = numerics.Settings(impl=("triton",), dtype=("bf16", E4M3))
    table = numerics.markdown(rows, settings)
    numerics.insert(PAGE, re.sub(r"^\*\*(.+)\*\*$", r"**\1, simulated sm_90**", table, flags=re.M))


if __name__ == "__main__":
    main()
