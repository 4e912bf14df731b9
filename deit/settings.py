"""A run's settings: one line each, with its type, default, help, and what a run may change.

    lr: float = said(5e-4, "learning rate")

The command line makes its flags from these lines (commands/train.py), and a run that is given
again is held to their rules (training/resume.py). No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, field, fields, is_dataclass
from functools import partial
from typing import Any, Literal, get_type_hints

Rule = Literal["refused", "said", "allowed"]


def _setting(
    rule: Rule, default: Any, help: str, *, flag: str | None = None, before: str | None = None
) -> Any:
    """A field of a dataclass.

    Args:
        default: dataclasses.MISSING for a setting that has to be given.
        flag: the flag's name, where it is not the field's.
        before: the flag that it stands before in the help, where the fields' order says otherwise.
    """
    about = {"rule": rule, "help": help, "flag": flag, "before": before}
    return field(default=default, metadata=about)


# By what a run may change when it is given again.
# What was learned so far does not fit a change, or it would have no effect:
refused = partial(_setting, "refused")
# It is taken, with a message: numbers before and after it do not compare:
said = partial(_setting, "said")
# No number depends on it:
allowed = partial(_setting, "allowed")


def lines(kind: type, group: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Every setting of a dataclass: its group, its field and its type.

    A field that is a dataclass itself is the group of its own settings; "" is none.
    """
    hints = get_type_hints(kind)
    for line in fields(kind):
        inside = hints[line.name]
        if is_dataclass(inside):
            assert isinstance(inside, type)
            yield from lines(inside, line.name)
        else:
            yield group, line, inside


def flag(line: Field[Any]) -> str:
    """What the command line calls a setting, with _ for -."""
    return line.metadata["flag"] or line.name
