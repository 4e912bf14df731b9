"""A run's settings: one line each, with its type, default, help, and what a run may change.

    lr: float = said(5e-4, "learning rate")

The command line makes its flags from these lines (commands/train.py), and a run that is given
again is held to their rules (training/resume.py). No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

Rule = Literal["refused", "said", "allowed"]


def refused(default: Any, help: str, **about: str) -> Any:
    """May not change: what was learned so far does not fit it, or it would have no effect.

    Args:
        default: dataclasses.MISSING for a setting that has to be given.
        about: `flag`, the flag's name where it is not the field's; `before`, the flag that it
            stands before in the help where the order of the fields says otherwise.
    """
    return _setting("refused", default, help, about)


def said(default: Any, help: str, **about: str) -> Any:
    """May change, with a message: numbers before and after it do not compare. See `refused`."""
    return _setting("said", default, help, about)


def allowed(default: Any, help: str, **about: str) -> Any:
    """May change: no number depends on it. See `refused`."""
    return _setting("allowed", default, help, about)


def _setting(rule: Rule, default: Any, help: str, about: dict[str, str]) -> Any:
    return field(default=default, metadata={"rule": rule, "help": help, **about})


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
    return line.metadata.get("flag", line.name)
