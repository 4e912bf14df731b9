"""Proof that no kernel's index arithmetic overflows, read out of its compiled Triton IR.

Interval arithmetic (Moore, Interval Analysis, 1966) over the IR that Triton makes of a kernel,
before it is lowered to a GPU: every integer of a launch gets the interval of the values it can
take, program ids those of the grid, and each addition, subtraction, product, shift and narrowing
must fit its own width. So a launch on tensors of more than 2**31 elements (`Shipped.batch`) shows
each product that 32 bits cannot hold, with no such tensor in memory.

Integers read from memory (also those kept there as floats) are class indices: the kernels never
read at one that is out of range, so here they are in [0, 2**31). An operation that is not known
raises NotImplementedError: nothing passes unread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product
from typing import Any

# Images enough for every activation, and lse [B, H, N], to have more than 2**31 elements.
LARGE_BATCH = 2**22

Interval = tuple[int, int]

_RESULT = re.compile(r"^(?:(%[\w.$-]+)(?::\d+)? = )?\"?([a-z_]+\.[a-z_0-9.]+)\"?(.*)$")
_NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
_PARAMETER = re.compile(r"(%[\w.$-]+): (!tt\.ptr<|!tt\.tensordesc<|[if]\d+)")
_INTEGER = re.compile(r"(?:tensor<(?:\d+x)*)?(i\d+|index)>?$")
# What keeps an integer, or a pointer, as it is.
_SAME = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi",
         "arith.index_cast", "arith.trunci", "tt.unsplat"}  # fmt: skip


@dataclass
class Reading:
    """overflows: operations that can exceed their width. reach: the last element, counted from
    the address of each pointer argument, that the kernel can touch."""

    overflows: list[str] = field(default_factory=list)
    reach: dict[str, int] = field(default_factory=dict)

    def faults(self, arguments: dict[str, Any]) -> list[str]:
        """What is wrong with a launch on these arguments.

        A tensor whose end the reading does not arrive at was misread: whatever an operator
        touches, it touches to the end.
        """
        found = [f"overflows: {line}" for line in self.overflows]
        for name, last in self.reach.items():
            elements = arguments[name].numel()
            if elements > 2**31 and last < elements - 1:
                found.append(f"{name} is read as far as {last} of {elements} elements")
        return found


@dataclass(frozen=True)
class _Pointer:
    """An address: which argument it starts from, and by how many elements it is off."""

    base: str
    offset: Interval


def read(ir: str, arguments: dict[str, Any], grid: tuple[int, ...]) -> Reading:
    """What the kernel of this Triton IR can compute when launched with these arguments.

    arguments: by name, as in `common.Launch`; tensors only lend their names.
    """
    return _Reader(ir, arguments, grid).reading


class _Reader:
    def __init__(self, ir: str, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
        self.reading = Reading()
        self.grid = (*grid, 1, 1)
        self.values: dict[str, Any] = {}
        self.made: dict[str, tuple[str, ...]] = {}  # by which operation, from what
        self.lines = [re.sub(r" loc\(.*$", "", line).strip() for line in ir.splitlines()]
        start = next(i for i, line in enumerate(self.lines) if line.startswith("tt.func public"))
        signature = next(line for line in ir.splitlines() if "tt.func public" in line)
        for name, kind in _PARAMETER.findall(signature):
            value = arguments.get(name[1:])
            if kind == "!tt.ptr<":
                self.values[name] = _Pointer(name[1:], (0, 0))
            elif kind[0] == "i" and isinstance(value, int):
                self.values[name] = (value, value)
        self.run(start + 1)

    def run(self, at: int) -> tuple[int, list[str]]:
        """Read the lines of one region; (the index of the line that ends it, what it yields)."""
        yielded: list[str] = []
        while not self.lines[at].startswith("}"):
            line = self.lines[at]
            if line.startswith("scf.yield"):
                yielded = _NAME.findall(line)
            elif re.match(r"(%\S+ = )?scf\.for", line):
                at = self.loop(at)
            elif re.match(r"(%\S+ = )?scf\.if", line):
                at = self.branch(at)
            elif '"tt.reduce"' in line or '"tt.scan"' in line:
                at = self.reduce(at)
            elif line and not line.startswith(("tt.return", "^", "llvm.intr.assume")):
                self.operation(line)
            at += 1
        return at, yielded

    def loop(self, at: int) -> int:
        """A counted loop. What it carries moves by the same step each turn, or keeps its value."""
        line = self.lines[at]
        names = _NAME.findall(line.split(" -> ")[0])
        result = names.pop(0) if line.startswith("%") else None
        counter, *bounds = names[:4]
        low, high, step = (self.integer(name) for name in bounds)
        carried = list(zip(names[4::2], names[5::2], strict=True))
        turns = max(0, -(-(high[1] - low[0]) // step[0]))
        last = max(high[1] - 1, low[0])
        if low[0] == low[1] and step[0] == step[1]:
            last = low[0] + max(turns - 1, 0) * step[0]
        self.check(line, (low[0], last + step[1]), 32)  # it counts once beyond the last turn
        self.values[counter] = (low[0], last)
        start = {inside: self.values.get(outside) for inside, outside in carried}
        self.values |= start
        end, yielded = self.run(at + 1)
        moved = self.moves(start, yielded)
        if any(moved.values()):
            for name, (down, up) in moved.items():
                self.values[name] = _shifted(start[name], turns * min(down, 0), turns * max(up, 0))
            wide = {name: self.values[name] for name in start}
            end, yielded = self.run(at + 1)
            again = self.moves(wide, yielded)
            if any(not _within(again.get(n, (0, 0)), moved.get(n, (0, 0))) for n in start):
                raise NotImplementedError(f"a loop that does not count evenly: {line}")
        for number, name in enumerate(start):
            self.define(result, number, len(start), self.values.get(name))
        return end

    def moves(self, start: dict[str, Any], yielded: list[str]) -> dict[str, Interval]:
        """By how much a turn of a loop moves each integer and pointer that it carries."""
        found = {}
        for (name, before), after_name in zip(start.items(), yielded, strict=True):
            after = self.values.get(after_name)
            if before is None:
                continue
            a, b = _offset(before), _offset(after)
            found[name] = (b[0] - a[0], b[1] - a[1])
        return {name: move for name, move in found.items() if move != (0, 0)}

    def branch(self, at: int) -> int:
        """Both sides are read; a value that comes out is one of the two."""
        match = _RESULT.match(self.lines[at])
        assert match is not None
        end, then = self.run(at + 1)
        first = [self.values.get(name) for name in then]
        second = first
        if "else" in self.lines[end]:
            end, otherwise = self.run(end + 1)
            second = [self.values.get(name) for name in otherwise]
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            self.define(match[1], number, len(first), None if a is None else _hull(a, b))
        return end

    def reduce(self, at: int) -> int:
        """Integers are only reduced to minima, maxima and their places: to one of the operands."""
        line = self.lines[at]
        names = _NAME.findall(line.split("<{")[0])
        end = next(i for i in range(at, len(self.lines)) if self.lines[i].startswith("})"))
        body = " ".join(self.lines[at:end])
        types = self.lines[end].split(" -> ")[-1].strip("()").split(", ")
        for number, (name, kind) in enumerate(zip(names[1:], types, strict=True)):
            if _INTEGER.search(kind) and "arith.addi" in body:
                raise NotImplementedError(f"a sum of integers: {line}")
            self.define(names[0], number, len(types), self.values.get(name))
        return end

    def define(self, result: str | None, number: int, count: int, value: Any) -> None:
        """Name one of `count` results; several are %result#0, %result#1, ..."""
        if result is not None:
            self.values[result if count == 1 else f"{result.split(':')[0]}#{number}"] = value

    def operation(self, line: str) -> None:
        """One operation outside control flow."""
        match = _RESULT.match(line)
        if line.startswith("%") and " = tt.split " in line:  # "%a, %b = ", halves of floats
            return
        if match is None:
            raise NotImplementedError(line)
        result, name, rest = match.groups()
        operands = _NAME.findall(rest)
        if name in ("tt.load", "tt.store"):
            self.touch(operands[0])
        kind = line.rsplit(" -> ", 1)[-1].rsplit(" to ", 1)[-1].rsplit(" : ", 1)[-1].strip()
        if result is None:
            if name not in ("tt.store", "tt.descriptor_store"):
                raise NotImplementedError(line)
            return
        if name == "tt.load":  # printed with its address's type
            kind = kind.split("!tt.ptr<")[1].split(">")[0].split(",")[0]
        integer = _INTEGER.search(kind)
        if "!tt.ptr" in kind:
            self.values[result] = self.address(name, operands)
        elif integer is None:
            self.values[result] = None
        else:
            bits = 64 if integer[1] == "index" else int(integer[1][1:])
            self.values[result] = self.value(result, name, operands, line, bits)

    def address(self, name: str, operands: list[str]) -> _Pointer:
        pointer = self.values[operands[0]]
        if name == "tt.addptr":
            return _shifted(pointer, *self.integer(operands[1]))
        if name in _SAME:
            return pointer
        raise NotImplementedError(f"{name} of a pointer")

    def touch(self, name: str) -> None:
        pointer = self.values[name]
        known = self.reading.reach.get(pointer.base, 0)
        self.reading.reach[pointer.base] = max(known, pointer.offset[1])

    def integer(self, name: str) -> Interval:
        value = self.values[name]
        if not isinstance(value, tuple):
            raise NotImplementedError(f"{name} is no integer known here")
        return value

    def value(self, result: str, name: str, operands: list[str], line: str, bits: int) -> Interval:
        """The interval of an operation's result, which must fit `bits`."""
        if name == "arith.constant":
            return _constant(line)
        if name == "tt.make_range":
            first, last = (int(re.search(rf"{side} = (\d+)", line)[1]) for side in ("start", "end"))  # type: ignore[index]
            return first, last - 1
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            programs = self.grid["xyz".index(re.search(rf"{name} ([xyz])", line)[1])]  # type: ignore[index]
            return (0, programs - 1) if name == "tt.get_program_id" else (programs, programs)
        if bits == 1 or name == "arith.cmpi":  # printed with its operands' type
            return 0, 1
        if name == "arith.select":
            return _hull(self.integer(operands[1]), self.integer(operands[2]))
        if name in ("tt.load", "arith.fptosi"):
            return 0, 2**31 - 1
        if name == "tt.bitcast" and self.values[operands[0]] is None:  # a float's bits
            return -(1 << bits - 1), (1 << bits - 1) - 1
        if name in _SAME:
            return self.check(line, self.integer(operands[0]), bits)
        if name in _ARITHMETIC:
            self.made[result] = (name, *operands)
            a, b = (self.integer(operand) for operand in operands)
            if name == "arith.subi" and self.is_remainder(*operands):
                return _remainder(a, self.integer(self.made[operands[1]][2]))
            return self.check(line, _ARITHMETIC[name](a, b), bits)
        raise NotImplementedError(line)

    def is_remainder(self, a: str, b: str) -> bool:
        """Whether b is a // d * d, so that a - b is a % d."""
        times = self.made.get(b, ("",))
        if times[0] != "arith.muli":
            return False
        return self.made.get(times[1]) == ("arith.divsi", a, times[2])

    def check(self, line: str, interval: Interval, bits: int) -> Interval:
        """The interval, noted where `bits` cannot hold it, and cut to what they hold."""
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1
        if low <= interval[0] and interval[1] <= high:
            return interval
        if line not in self.reading.overflows:
            self.reading.overflows.append(line)
        return max(low, interval[0]), min(high, interval[1])


def _offset(value: Any) -> Interval:
    return value.offset if isinstance(value, _Pointer) else value


def _shifted(value: Any, low: int, high: int) -> Any:
    """An integer or a pointer, moved by an interval."""
    start = _offset(value)
    moved = (start[0] + low, start[1] + high)
    return _Pointer(value.base, moved) if isinstance(value, _Pointer) else moved


def _hull(a: Any, b: Any) -> Any:
    """The least interval that holds both."""
    first, second = _offset(a), _offset(b)
    both = (min(first[0], second[0]), max(first[1], second[1]))
    if not isinstance(a, _Pointer):
        return both
    if a.base != b.base:
        raise NotImplementedError(f"an address in {a.base} or in {b.base}")
    return _Pointer(a.base, both)


def _within(inner: Interval, outer: Interval) -> bool:
    """Whether a turn moved no further; an end that moved the other way did not move."""
    return min(outer[0], 0) <= inner[0] and inner[1] <= max(outer[1], 0)


def _constant(line: str) -> Interval:
    text = re.search(r"arith\.constant (?:dense<)?(-?\d+|true|false)", line)
    if text is None:
        raise NotImplementedError(line)
    value = {"true": 1, "false": 0}.get(text[1])
    value = int(text[1]) if value is None else value
    return value, value


def _corners(operation: Any) -> Any:
    """An operation that is monotonic in each operand: extremes lie at the operands' ends."""

    def apply(a: Interval, b: Interval) -> Interval:
        results = [operation(x, y) for x, y in product(a, b)]
        return min(results), max(results)

    return apply


def _divide(a: Interval, b: Interval) -> Interval:
    """Truncated division; by zero it is undefined, so the divisor is never zero."""
    divisors = {d for d in (*b, -1, 1) if d != 0 and b[0] <= d <= b[1]}
    results = [abs(x) // abs(d) * (1 if (x < 0) == (d < 0) else -1) for x in a for d in divisors]
    results += [0] if a[0] <= 0 <= a[1] else []
    return min(results), max(results)


def _remainder(a: Interval, b: Interval) -> Interval:
    """Takes the dividend's sign, and is smaller than dividend and divisor."""
    most = max(abs(b[0]), abs(b[1])) - 1
    return max(-most, min(a[0], 0)), min(most, max(a[1], 0))


def _and(a: Interval, b: Interval) -> Interval:
    """By a mask without its sign bit: no more than the mask."""
    masks = [high for low, high in (a, b) if low >= 0]
    if not masks:
        raise NotImplementedError(f"the common bits of {a} and {b}")
    return 0, min(masks)


_ARITHMETIC = {
    "arith.andi": _and,
    "arith.addi": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "arith.subi": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "arith.muli": _corners(lambda x, y: x * y),
    "arith.shli": _corners(lambda x, y: x << y),
    "arith.shrsi": _corners(lambda x, y: x >> y),
    "arith.divsi": _divide,
    "arith.remsi": _remainder,
    "arith.minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "arith.maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
}
