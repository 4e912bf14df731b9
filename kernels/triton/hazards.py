"""Products of Hopper that may still read registers when a loop overwrites them.

wgmma is asynchronous, and its first factor may be in registers. Triton 3.6 leaves products of one
step of a loop in flight while the next step loads that factor anew: nothing holds the write back
until the read is done, and the result is wrong now and then (triton-lang/triton#9433). So a
product whose first factor is in registers must have been waited for before the factor's next
definition, round the loop. Read out of Triton's GPU IR (ttgir); values are not looked at.
"""

from __future__ import annotations

import re

_DEFINED = re.compile(r"^(%[\w.$-]+)(?::\d+)? = ")
_CARRIED = re.compile(r"(%[\w.$-]+) = %[\w.$#-]+")
_NAME = re.compile(r"%[\w.$-]+")
_DOT = re.compile(r" = ttng\.warp_group_dot (%[\w.$-]+)")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")
_IN_REGISTERS = re.compile(r" : tensor<[^*]*dot_op<\{opIdx = 0\b[^*]* \* ")
# Names for the registers of their operand.
_RENAMED = re.compile(r" = (?:ttg\.convert_layout|tt\.reshape|tt\.trans|tt\.split) (%[\w.$-]+)")


def faults(ttgir: str) -> list[str]:
    """Each product of a loop whose first factor can be overwritten while it is read."""
    lines = [re.sub(r" loc\(.*$", "", line).strip() for line in ttgir.splitlines()]
    inside = _regions(lines)
    at = {found[1]: index for index, line in enumerate(lines) if (found := _DEFINED.match(line))}
    found = []
    for index, line in enumerate(lines):
        dot = _DOT.search(line)
        if dot is None or "isAsync = true" not in line or not _IN_REGISTERS.search(line):
            continue
        path = _until_defined(lines, inside, at, index, dot[1])
        if path and not _waited(lines, inside, index, path):
            found.append(f"its next turn may overwrite {dot[1]} while it is read: {line[:90]}")
    return found


def _regions(lines: list[str]) -> list[tuple[int, ...]]:
    """By line, the lines that open the regions around it, outermost first."""
    inside, around = [], []  # type: list[tuple[int, ...]], list[int]
    for index, line in enumerate(lines):
        if line.startswith("}"):
            around.pop()
        inside.append(tuple(around))
        if line.endswith("{"):
            around.append(index)
    return inside


def _until_defined(
    lines: list[str], inside: list[tuple[int, ...]], at: dict[str, int], dot: int, name: str
) -> list[int]:
    """The lines from a product round the loop to the next definition of its factor, or none.

    The loop is the innermost one around the definition. A factor that the loop carries is defined
    where the value is that it hands to its next turn.
    """
    while name in at and (renamed := _RENAMED.search(lines[at[name]])):
        name = renamed[1]
    loops = [opened for opened in inside[dot] if "scf.for" in lines[opened]]
    for opened in reversed(loops):
        body = [i for i in range(opened + 1, len(lines)) if opened in inside[i]]
        carried = _CARRIED.findall(lines[opened].partition("iter_args(")[2].partition(") ->")[0])
        if name in carried:
            handed = _NAME.findall(lines[body[-1]])[carried.index(name)]
            end = at[handed] if at.get(handed) in body else body[-1]
        elif at.get(name) in body:
            end = at[name]
        else:
            continue
        after, before = [i for i in body if i > dot], [i for i in body if i < dot]
        return [i for i in after if i < end] if end > dot else after + [i for i in before if i < end]
    return []


def _waited(
    lines: list[str], inside: list[tuple[int, ...]], dot: int, path: list[int]
) -> bool:
    """Whether every way along the path waits until the product is done.

    A wait with `pendings = n` leaves the newest n products in flight. One within a branch or a
    loop that the product is not in may never run.
    """
    later = 0
    for index in path:
        if inside[index] != inside[dot][: len(inside[index])]:
            continue
        line = lines[index]
        wait = _WAIT.search(line)
        if wait is not None and int(wait[1]) <= later:
            return True
        if _DOT.search(line):
            if "isAsync = true" not in line:
                return True
            later += 1
    return False
