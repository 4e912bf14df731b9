"""What C++ and CUDA say: tokens without comments and layout, declaration by declaration."""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping

_TOKEN = re.compile(
    r"""(?P<comment>//(?:\\\n|[^\n])*|/\*.*?\*/)
    |(?P<directive>^[^\S\n]*\#(?:\\\n|/\*.*?\*/|[^\n])*)
    |(?P<text>(?:u8|[uUL])?R"(?P<mark>[^(\s]*)\(.*?\)(?P=mark)"
        |(?:u8|[uUL])?"(?:\\.|[^"\\\n])*"|(?:u8|[uUL])?'(?:\\.|[^'\\\n])+')
    |(?P<word>[A-Za-z_]\w*|\.?\d(?:[eEpP][+-]|'\w|[\w.])*)
    |(?P<sign><=>|<<=|>>=|->\*|\.\.\.|::|->|\+\+|--|&&|\|\||[-+*/%&|^<>=!]=|<<|>>|\#\#|[^\s\\])""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_QUOTED = re.compile(r'^[^\S\n]*#[^\S\n]*include[^\S\n]*"([^"]+)"', re.MULTILINE)
_NAMESPACE = re.compile(r'(?:inline )?namespace(?: [\w: ]+)?|extern "C(?:\+\+)?"')


def tokens(text: str) -> Iterator[tuple[str, str]]:
    """(kind, token) of C++, without comments and layout; a directive is one token."""
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup if match.lastgroup != "mark" else "text"
        if kind == "directive":
            words = [token for _, token in tokens(match[0].replace("\\\n", " ").strip()[1:])]
            yield kind, " ".join(["#", *words])
        elif kind != "comment":
            yield str(kind), match[0]


@functools.lru_cache(maxsize=256)
def chunks(text: str) -> list[str]:
    """C++'s top-level declarations, each a line: its namespaces, conditions and macros, tokens.

    A file whose conditions part a declaration is one chunk.
    """
    said = [(k, t) for k, t in tokens(text) if not re.match(r'# (include "|pragma once)', t)]
    found: list[str] = []
    nest: list[str] = []  # of namespaces
    conditions: list[str] = []
    settings: list[str] = []  # macros and pragmas of this file so far
    chunk: list[str] = []
    depth = 0

    def close() -> None:
        found.append(repr((nest, conditions, settings, chunk)))
        chunk.clear()

    for i, (kind, token) in enumerate(said):
        if kind == "directive" and not chunk:
            word = token.split()[1] if " " in token else ""
            if word.startswith("if"):
                conditions.append(token)
            elif word in ("else", "elif", "endif"):
                if not conditions:
                    return [repr(said)]
                past = conditions.pop()
                if word != "endif":
                    conditions.append(f"{past} {token}")
            elif word == "include":
                found.append(repr((conditions, token)))
            else:
                settings.append(token)
            continue
        if kind == "sign" and token == "}" and not chunk and nest:
            nest.pop()
            continue
        if kind == "sign" and token == "{" and not depth:
            name = " ".join(chunk)
            if _NAMESPACE.fullmatch(name):
                nest.append(name)
                chunk.clear()
                continue
        chunk.append(token)
        if kind == "sign" and token in "([{":
            depth += 1
        elif kind == "sign" and token in ")]}":
            depth -= 1
        if depth < 0:
            return [repr(said)]
        ended = token == ";" or (token == "}" and (*said, ("", ""))[i + 1][1] != ";")
        if kind == "sign" and not depth and ended:
            close()
    return found if not (nest or conditions or chunk or depth) else [repr(said)]


def included(texts: Mapping[str, str], units: Iterable[str]) -> set[str]:
    """These translation units and all of `texts` that they include, by paths in quotes."""
    todo = list(units)
    seen = set(todo)
    while todo:
        path = todo.pop()
        beside = posixpath.dirname(path)
        named = {posixpath.normpath(f"{beside}/{n}") for n in _QUOTED.findall(texts[path])}
        new = (named & texts.keys()) - seen
        seen |= new
        todo += new
    return seen
