"""JSON that someone else may have written: read within limits, its fields asked for by kind.

Every error is a ValueError that names the file, the field, what was expected and what came. The
standard library alone, so that all of this package can use it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 16 << 20  # the largest file of ours, a benchmark's rows, has 0.5 MB
DEEPEST = 64  # objects and arrays within one another; ours have 6
LONGEST = 300  # digits of an integer: beyond, it is no float

_REQUIRED: Any = object()


@contextmanager
def opened(path: Path, *, own: bool = False) -> Iterator[BinaryIO]:
    """A regular file to read. Nothing is waited for: a FIFO or a device is a ValueError.

    own: only a file of this user or of root, and no symbolic link, which others might have put
    there (PermissionError, OSError). Raises OSError where there is none.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if own else 0)
    descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb") as file:
        check_kind(descriptor, path, own=own)
        yield file


def check_kind(descriptor: int, path: Path, *, own: bool) -> None:
    """Refuses what is open and is no regular file or, with `own`, another user's."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: expected a regular file; got a FIFO, device or socket")
    if own and found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, f"a file of user {found.st_uid}", str(path))


def regular(path: Path) -> None:
    """Refuses what `opened` does, for a file that a library opens by its name."""
    with opened(path):
        pass


def read(path: Path, *, most: int = MOST_BYTES, finite: bool = True, own: bool = False) -> Any:
    """The value in a JSON file of at most `most` bytes; see `parse` and `opened`."""
    with opened(path, own=own) as file:
        return parse(_within(file, path, most), str(path), finite=finite)


def lines(path: Path, *, most: int = MOST_BYTES, finite: bool = True) -> list[tuple[str, Any]]:
    """A JSON Lines file: for each line its name ("log.jsonl: line 3") and its object.

    What is no object is a ValueError in the object's place, for the caller to raise or pass over.
    """
    with opened(path) as file:
        content = _within(file, path, most)
    found: list[tuple[str, Any]] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        name = f"{path}: line {number}"
        try:
            found.append((name, parse(line, name, finite=finite, kind=dict)))
        except ValueError as error:
            found.append((name, error))
    return found


def _within(file: BinaryIO, path: Path, most: int) -> bytes:
    content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: expected at most {most:,} bytes of JSON; it has more")
    return content


def parse(text: str | bytes, name: str, *, finite: bool = True, kind: type | None = None) -> Any:
    """The value of a JSON text; `name` begins every error.

    kind: dict or list, where nothing else will do. finite: whether NaN and infinities, which
    Python writes and JSON does not have, are refused.

    Raises ValueError: no JSON, nested deeper than DEEPEST, a key twice, a number no float holds.
    """

    def integer(digits: str) -> float:
        return int(digits) if len(digits) <= LONGEST else math.inf

    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_int=integer, object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"{name}: expected JSON; got {shown(text)} ({error})") from None
    except RecursionError:
        raise ValueError(f"{name}: expected at most {DEEPEST} levels of JSON; got more") from None
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"{name}: expected a JSON {_WORDS[kind]}; got {shown(value)}")
    _check(value, name, finite)
    return value


_WORDS: dict[type, str] = {dict: "object", list: "array"}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _check(value: Any, name: str, finite: bool) -> None:
    """Refuses what is nested too deep, and numbers that are none."""
    level = [("", value)]
    for depth in range(DEEPEST + 1):
        below: list[tuple[str, Any]] = []
        for path, one in level:
            if depth == DEEPEST and isinstance(one, (dict, list)):
                raise ValueError(f"{name}: expected at most {DEEPEST} levels of JSON; got more")
            if isinstance(one, dict):
                below += [(f"{path}.{key[:LONGEST]}", v) for key, v in one.items()]
            elif isinstance(one, list):
                below += [(path, v) for v in one]
            elif finite and isinstance(one, float) and not math.isfinite(one):
                at = f"{name}: {path[1:]}" if path else name
                raise ValueError(f"{at}: expected a finite number; got {one}")
        level = below


def shown(value: Any, limit: int = 60) -> str:
    """A value as a message shows it, cut to `limit` characters."""
    if isinstance(value, (str, bytes)):
        if not value:
            return "nothing"
        value = value[: limit + 1]
    text = repr(value).removeprefix("b")
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Fields:
    """A JSON object's fields, each asked for by its kind and range.

    A field that is absent is an error, unless `default` is given; null is a value, which no kind
    but `optional` takes. Names are shown from the file on: "run.json: network.img_size: ...".
    """

    def __init__(self, value: Any, file: str, path: str = "") -> None:
        self.file, self.path = file, path
        if not isinstance(value, dict):
            at = f"{file}: {path}" if path else file
            raise ValueError(f"{at}: expected a JSON object; got {shown(value)}")
        self.values: dict[str, Any] = value

    def wrong(self, name: str, expected: str, got: Any = _REQUIRED) -> ValueError:
        """The error of a field, to be raised."""
        what = "none" if got is _REQUIRED else shown(got)
        return ValueError(f"{self.file}: {self._full(name)}: expected {expected}; got {what}")

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def _one(self, name: str, default: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = self.values.get(name, default)
        if (name in self.values or default is _REQUIRED) and (
            value is _REQUIRED or not fits(value)
        ):
            raise self.wrong(name, expected, value)
        return value

    def integer(self, name: str, least: int, most: int, default: Any = _REQUIRED) -> int:
        """A whole number from `least` to `most`."""
        return self._one(
            name,
            default,
            f"a whole number from {least} to {most}",
            lambda v: type(v) is int and least <= v <= most,
        )

    def number(self, name: str, least: float, most: float, default: Any = _REQUIRED) -> float:
        """A finite number from `least` to `most`, as a float."""
        return self._one(
            name,
            default,
            f"a number from {least:g} to {most:g}",
            lambda v: type(v) in (int, float) and least <= v <= most,
        )

    def real(self, name: str) -> float:
        """Any number; NaN and infinities too, where the file may hold them."""
        return self._one(name, _REQUIRED, "a number", lambda v: type(v) in (int, float))

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        return self._one(name, default, "a text", lambda v: isinstance(v, str))

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        return self._one(name, default, "true or false", lambda v: isinstance(v, bool))

    def choice(self, name: str, known: Sequence[Any], default: Any = _REQUIRED) -> Any:
        """One of `known`, of the same type (true is no 1)."""
        expected = " or ".join(map(repr, known))
        kinds = [(type(one), one) for one in known]
        return self._one(name, default, expected, lambda v: (type(v), v) in kinds)

    def array(
        self, name: str, kind: type | tuple[type, ...], words: str, default: Any = _REQUIRED
    ) -> list[Any]:
        """A list whose items are all of a type; `words` say which, for messages."""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        return self._one(
            name,
            default,
            f"an array of {words}",
            lambda v: isinstance(v, list) and all(type(one) in kinds for one in v),
        )

    def optional(self, name: str, kind: Callable[..., Any], *arguments: Any) -> Any:
        """`kind` of the field, such as `fields.number`; None where it is absent or null."""
        return None if self.values.get(name) is None else kind(name, *arguments)

    def fields(self, name: str, default: Any = _REQUIRED) -> Fields:
        """The object in a field."""
        value = self.values.get(name, default)
        if value is _REQUIRED:
            raise self.wrong(name, "a JSON object")
        return Fields(value, self.file, self._full(name))

    def only(self, known: Sequence[str]) -> None:
        """Refuses fields that are none of `known`."""
        for name, value in self.values.items():
            if name not in known:
                raise self.wrong(name, f"no field but {', '.join(known)}", value)
