"""Products of Hopper that may still read registers when a loop overwrites them.

wgmma is asynchronous, and its first factor may be in registers. Triton 3.6 can leave products of
one step of a loop in flight while the next step loads that factor anew: nothing holds the write
back until the read is done, and now and then the result is wrong (triton-lang/triton#9433). So
such a product must have been waited for before its factor is next defined, round the loop. Read
out of Triton's GPU IR (ttgir), whose registers are its tensors.
"""

from __future__ import annotations

import re

_NAME = re.compile(r"%[\w.$-]+")
_DOT = re.compile(r" = ttng\.warp_group_dot (%[\w.$-]+(?:#\d+)?)")
_WAIT = re.compile(r" = ttng\.warp_group_dot_wait (.*) \{pendings = (\d+)")
_IN_REGISTERS = re.compile(r" : tensor<[^*]*dot_op<\{opIdx = 0\b[^*]* \* ")
# Names for registers that another operation wrote.
_RENAMED = re.compile(r" = (?:ttg\.convert_layout|tt\.reshape|tt\.trans|tt\.split) (%[\w.$-]+)")


def faults(ttgir: str) -> list[str]:
    """Each product of a loop whose first factor can be overwritten while it is read."""
    return _Reader(ttgir).faults()


class _Reader:
    def __init__(self, ttgir: str) -> None:
        self.lines = [re.sub(r" loc\(#\w+\)$", "", line).strip() for line in ttgir.splitlines()]
        self.defined: dict[str, int] = {}  # by name, in which line
        self.inside: list[tuple[int, ...]] = []  # by line, those that open the regions around it
        around: list[int] = []
        for index, line in enumerate(self.lines):
            if line.startswith("%"):
                names = _NAME.findall(line.partition(" = ")[0])
                self.defined |= dict.fromkeys(names, index)
            if line.startswith("}"):
                around.pop()
            self.inside.append(tuple(around))
            if line.endswith("{"):
                around.append(index)

    def faults(self) -> list[str]:
        found = []
        for index, line in enumerate(self.lines):
            dot = _DOT.search(line)
            if dot and "isAsync = true" in line and _IN_REGISTERS.search(line):
                path = self.until_defined(index, dot[1])
                if path is not None and not self.waited(index, path):
                    found.append(f"{dot[1]} may be overwritten while it is read: {line[:90]}")
        return found

    def until_defined(self, dot: int, factor: str) -> list[int] | None:
        """The lines from a product round its loop to the next definition of its factor.

        None where no loop defines it. The loop is the innermost one around the definition. A value
        that a loop carries is defined where the value for its next turn is.
        """
        name = self.source(factor)
        for opened in reversed(self.inside[dot]):
            body = [i for i in range(opened, len(self.lines)) if opened in self.inside[i]]
            end = self.defined.get(name, -1)
            header, _, carried = self.lines[opened].partition("iter_args(")
            names = _NAME.findall(carried.partition(") ->")[0])[::2]  # each, and its first value
            if "scf.for" in header and name in names:
                handed = self.source(_NAME.findall(self.lines[body[-1]])[names.index(name)])
                end = self.defined.get(handed, -1)
                end = end if end in body else body[-1]
            if "scf.for" in header and end in body:
                if end > dot:
                    return [i for i in body if dot < i < end]
                return [i for i in body if i > dot] + [i for i in body if i < end]
        return None

    def source(self, name: str) -> str:
        """The first name of the registers that `name` stands for."""
        while True:
            name, _, result = name.partition("#")
            line = self.lines[self.defined[name]] if name in self.defined else ""
            if renamed := _RENAMED.search(line):
                name = renamed[1]
            elif wait := _WAIT.search(line):
                name = wait[1].split(", ")[int(result or 0)]
            else:
                return name

    def waited(self, dot: int, path: list[int]) -> bool:
        """Whether the path always waits until the product is done.

        A wait with `pendings = n` leaves the newest n products in flight. One in a branch or loop
        that the product is not in may never run.
        """
        later = 0
        for index in path:
            line, around = self.lines[index], self.inside[index]
            if around != self.inside[dot][: len(around)]:
                continue
            wait = _WAIT.search(line)
            if wait and int(wait[2]) <= later:
                return True
            if _DOT.search(line):
                if "isAsync = true" not in line:
                    return True
                later += 1
        return False
