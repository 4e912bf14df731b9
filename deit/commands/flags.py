"""Command lines from typed dataclasses: by tyro, or plainer ones by argparse where it is missing.

A field is a flag; its docstring, or `help` in its metadata, is the flag's help. Without tyro,
`deit` itself with its subcommands says that it needs it; the scripts of bench/ run all the same.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union

T = TypeVar("T")

if TYPE_CHECKING:
    import tyro
    from tyro.conf import Positional
else:
    try:
        tyro = importlib.import_module("tyro")
        Positional = tyro.conf.Positional
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
        tyro = None

        class Positional:
            """Marks a field that is given without a flag."""

            def __class_getitem__(cls, kind: Any) -> Any:
                return Annotated[kind, cls]


def arg(**how: Any) -> Any:
    """tyro.conf.arg, for use in Annotated."""
    return tyro.conf.arg(**how) if tyro else None


def _may_be_left_out(metavar: str) -> Any:
    """For a flag whose own help says what happens without it."""
    return arg(metavar=metavar, help_behavior_hint="")


OptionalPath = Annotated[Path | None, _may_be_left_out("PATH")]
OptionalName = Annotated[str | None, _may_be_left_out("NAME")]
OptionalInt = Annotated[int | None, _may_be_left_out("INT")]
Paths = Annotated[tuple[Path, ...], Positional, _may_be_left_out("PATH ...")]


def cli(kind: Any, arguments: Sequence[str] | None, **how: Any) -> Any:
    """tyro.cli, with its prefixes left out. Raises ValueError where tyro is missing."""
    if tyro is None:
        raise ValueError("this command line needs the package tyro (pip install tyro)")
    return tyro.cli(kind, args=arguments, config=(tyro.conf.OmitArgPrefixes,), **how)


def parse(kind: type[T], arguments: Sequence[str] | None, description: str | None) -> T:
    """A dataclass from a command line; exits with 2 and a message where the line is wrong.

    Fields of str, int, float, bool, Path, Literal, of those or None, and tuples of those; fields
    that are dataclasses are their own fields' flags.
    """
    if tyro is not None:
        return tyro.cli(kind, args=arguments, description=description)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_all(parser, kind)
    return _made(kind, vars(parser.parse_args(arguments)))


def _fields(kind: Any) -> list[tuple[Any, Any, bool]]:
    """Fields with their types, and whether they are positional."""
    found = []
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        marked = typing.get_origin(hint) is Annotated
        kind, *marks = typing.get_args(hint) if marked else (hint,)
        found.append((field, kind, Positional in marks))
    return found


def _add_all(parser: argparse.ArgumentParser, kind: Any) -> None:
    notes = _docstrings(kind)
    for field, hint, positional in _fields(kind):
        if dataclasses.is_dataclass(hint):
            _add_all(parser, hint)
        else:
            note = field.metadata.get("help", notes.get(field.name, ""))
            _add(parser, field, hint, positional, note.replace("%", "%%"))


def _made(kind: Any, values: dict[str, Any]) -> Any:
    made = {}
    for field, hint, _ in _fields(kind):
        nested = dataclasses.is_dataclass(hint)
        value = _made(hint, values) if nested else values[field.name]
        made[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def _add(
    parser: argparse.ArgumentParser, field: Any, hint: Any, positional: bool, note: str
) -> None:
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    how: dict[str, Any] = {"help": note}
    if not required:
        empty = field.default is dataclasses.MISSING
        how["default"] = field.default_factory() if empty else field.default
    if typing.get_origin(hint) in (Union, types.UnionType):  # something or None
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    if hint is bool:
        how["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is Literal:
        how["choices"] = typing.get_args(hint)
    else:
        how |= {"type": hint, "metavar": {Path: "PATH"}.get(hint, hint.__name__.upper())}
    if many:
        how["nargs"] = "*"
    elif positional and not required:
        how["nargs"] = "?"
    if positional:
        parser.add_argument(field.name, **how)
    else:
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, dest=field.name, required=required, **how)


def _docstrings(kind: type) -> dict[str, str]:
    """The text under each field, which Python does not keep."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):  # typed in, say: there is no file
        return {}
    return {
        one.target.id: " ".join(inspect.cleandoc(after.value.value).split())
        for one, after in itertools.pairwise(tree.body[0].body)  # type: ignore[attr-defined]
        if isinstance(one, ast.AnnAssign)
        and isinstance(one.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }
