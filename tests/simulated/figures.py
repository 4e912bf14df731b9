"""Writes docs/numerics.md's table of Triton's bf16: by a simulated H100.

make simulated-figures
"""

from __future__ import annotations

from pathlib import Path

import simulator
import torch

import numerics

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"


def main() -> None:
    """As `bench/numerics.py --impl triton --dtype bf16 --draws 2 --write`."""
    settings = numerics.Settings(impl=("triton",), dtype=("bf16",), draws=2)
    with simulator.device(90) as launched:
        rows, _ = numerics.measure(settings, torch.device("cpu"))
    table = numerics.markdown(rows, settings)
    numerics.insert(PAGE, table.replace("**triton, bf16**", "**triton, bf16, simulated sm_90**"))
    print(f"{len(rows)} figures, {sum(row.used > 1 for row in rows)} above the rule, the largest "
          f"{max(row.used for row in rows):.2f} of it; {launched.launches} launches, "
          f"{launched.races_unchecked} not searched for races")  # fmt: skip


if __name__ == "__main__":
    main()
