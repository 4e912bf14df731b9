"""What fuse() did: one row a module, readable as a table, and why each operator runs as it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from deit.fused_vit.modules import Fused
from deit.fused_vit.whole_models import Outcome
from deit.kernels.engine import dispatch, verdicts
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.engine.problems import Problem

if TYPE_CHECKING:
    from deit.fused_vit.measuring import Measured


@dataclass(frozen=True)
class Row:
    """One module: its name in the model, its class, and what became of it."""

    name: str
    kind: str
    fused: bool
    note: str = ""


@dataclass(frozen=True)
class Evidence:
    """Why an operator runs as it does here.

    source: "measured here", "shipped for ..." or "not measured"; several where calls differ.
    ratios: the chosen implementation's speed in that of `other`, PyTorch's or for 8 bits the same
    operators in their own dtype, the lowest and the highest over the model's calls; None where
    there is no figure. date: of the oldest measurement, "" for none.
    """

    source: str
    ratios: tuple[float, float] | None = None
    date: str = ""
    other: str = "PyTorch's speed"

    def __str__(self) -> str:
        source = self.source.replace(verdicts.HERE, f"{verdicts.HERE} {self.date}".rstrip())
        if self.ratios is None:
            return source
        low, high = (f"{each:.2f}" for each in self.ratios)
        return f"{low if low == high else f'{low} to {high}'} times {self.other}, {source}"


@dataclass(frozen=True)
class Report:
    """The result of `fuse`. Printing it gives a table with like modules grouped.

    rows: every module that was fused, and every one that holds parameters and was not, with why.
    operators: operator -> the implementation that runs it in inference on the model's device.
    evidence: operator -> on what evidence, where "auto" chooses.
    races: the model, or networks in it, against what they were, with the figures.
    notes: sentences on what was not measured, and why.
    """

    rows: list[Row] = field(default_factory=list)
    operators: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    races: list[Outcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fused(self) -> list[str]:
        """Names of the modules that run fused."""
        return [row.name for row in self.rows if row.fused]

    @property
    def left(self) -> dict[str, str]:
        """Names of the modules left as they were, with the reason."""
        return {row.name: row.note for row in self.rows if not row.fused}

    def slower_8_bits(self) -> list[str]:
        """A sentence for each network that 8 bits make slower than its own dtype, fused."""
        return [
            f"{each.network}: 8 bits run at {each.own.speed:.2f} of the speed of its own dtype "
            f"fused here ({each.own.low:.2f} to {each.own.high:.2f}); without dtype= it is faster"
            for each in self.races
            if each.own is not None and each.own.verdict == "slower"
        ]

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
        width = max((len(name) for name in self.evidence), default=0)
        lines += [f"  {name:{width}}  {why}" for name, why in self.evidence.items()]
        lines += [str(each) for each in self.races]
        return "\n".join([*lines, *self.slower_8_bits(), *self.notes])


def of(
    model: nn.Module, impls: dict[str, str], notes: dict[str, str], measured: Measured
) -> Report:
    """The report on a model as it is now.

    impls: operator -> the implementation asked for. notes: module -> why it was left.
    """
    rows = []
    operators: set[str] = set()
    absorbed: set[nn.Module] = set()
    left = {
        module: f"as it was: fused it is not faster by 2 % ({outcome.fused.words()})"
        for network, outcome in measured.outcomes
        if not any(isinstance(module, Fused) for module in network.modules())
        for module in network.modules()
    }
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, Fused):
            operators.update(module.operators())
            absorbed.update(module.absorbed())
            waiting = module.waiting()
            note = f"plain for now: {waiting}" if waiting else module.remark()
            rows.append(Row(name, kind, True, note))
        elif module not in absorbed and (name in notes or _owns_parameters(module)):
            note = notes.get(name) or left.get(module) or _why_left(module)
            rows.append(Row(name, kind, False, note))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ordered = [operator for operator in impls if operator in operators]
    return Report(
        rows,
        {op: dispatch.expected(op, impls[op], device) for op in ordered},
        evidence(measured.problems, device, [op for op in ordered if impls[op] == "auto"]),
        [outcome for _, outcome in measured.outcomes],
        list(measured.notes),
    )


def evidence(
    problems: Sequence[Problem], device: torch.device, operators: Sequence[str]
) -> dict[str, Evidence]:
    """Of each operator, for its calls among `problems`, or for any where there are none."""
    found = {}
    for operator in operators:
        bases = [dispatch.basis_of(each, device) for each in problems if each.operator == operator]
        measured = [basis.verdict for basis in bases if basis.verdict is not None]
        sources = [basis.evidence for basis in bases]
        if not bases:
            measured = [v for v in verdicts.in_force(device) if v.problem.operator == operator]
            sources = [verdicts.HERE if measured else _shipped(verdicts.table_of(device), operator)]
        ratios, other = [one.ratio for one in measured], "PyTorch's speed"
        if OPERATORS[operator].eight_bits:  # PyTorch has none: its own dtype is what it replaces
            ratios = [one.rival.ratio for one in measured if one.rival is not None]
            other = "the speed of its own dtype"
        found[operator] = Evidence(
            ", ".join(dict.fromkeys(sources)),
            (min(ratios), max(ratios)) if ratios else None,
            min((one.date[:10] for one in measured), default=""),
            other,
        )
    return found


def _shipped(table: verdicts.Table, operator: str) -> str:
    return f"shipped for {table.label}" if table.ships(operator) else verdicts.NOT_MEASURED


def _owns_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _why_left(module: nn.Module) -> str:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return f"a {type(module).__name__} alone: PyTorch's own is used"
    names = ", ".join(name for name, value in module._parameters.items() if value is not None)
    return f"its own {names}: no fused form of this class"
