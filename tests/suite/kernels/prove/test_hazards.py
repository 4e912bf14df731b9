"""Registers that a product may still read when a loop overwrites them, found in Triton's GPU IR."""

from __future__ import annotations

import pytest

from deit.kernels.prove import hazards

FACTOR = "tensor<128x16xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>>"
SHARED = "!ttg.memdesc<128x16xbf16, #shared, #smem>"


def dot(result, factor, kind=FACTOR, how="isAsync = true"):
    options = f"inputPrecision = 0 : i32, {how}"
    return f"%{result} = ttng.warp_group_dot %{factor}, %b, %acc {{{options}}} : {kind} * {SHARED}"


def wait(*names, pendings):
    operands = ", ".join(f"%{name}" for name in names)
    result = f"%done:{len(names)}" if len(names) > 1 else "%done"
    return f"{result} = ttng.warp_group_dot_wait {operands} {{pendings = {pendings} : i32}} : x"


def loop(*body, carried="%acc = %zero", handed="%y"):
    lines = [f"%out = scf.for %k = %c0 to %depth step %c64 iter_args({carried}) -> (t) : i32 {{",
             *body, f"scf.yield {handed} : t", "}"]  # fmt: skip
    located = "\n".join(f"    {line} loc(#loc7)" for line in lines)
    signature = '%x: !ttg.ptr loc("x"(#loc)), %k: i32 loc("k"(#loc))'
    return f"tt.func public @kernel({signature}) attributes {{noinline = false}} {{\n{located}\n}}"


LOAD = "%a = ttg.local_load %shared : m -> t"
TWO = ("%a0 = ttg.local_load %m : t", "%a1 = ttg.local_load %n : t", dot("p", "a0"), dot("y", "a1"))
BRANCH = ("scf.if %last {", wait("y", pendings=0), "}")

FAULTY = {
    "never waited for": loop(LOAD, dot("y", "a")),
    "left in flight by its wait": loop(LOAD, dot("y", "a"), wait("y", pendings=1)),
    "waited for after the next definition": loop(LOAD, wait("acc", pendings=0), dot("y", "a")),
    "waited for in a branch": loop(LOAD, dot("y", "a"), *BRANCH),
    "waited for in a loop": loop(
        LOAD, dot("y", "a"), "scf.for %i = %c0 to %n step %c1  : i32 {", wait("y", pendings=0), "}"
    ),
    "waited for behind the loop": loop(LOAD, dot("y", "a")) + wait("out", pendings=0),
    "under another name": loop(
        "%r = arith.truncf %s : t", wait("acc", pendings=0),
        "%a = ttg.convert_layout %r : t -> t", dot("y", "a"),
    ),
    "through a wait": loop(LOAD, wait("acc", "a", pendings=0), dot("y", "done#1")),
    "carried by the loop": loop(
        wait("acc", pendings=0), dot("y", "a"), "%next = ttg.local_load %m : t",
        carried="%acc = %zero, %a = %first", handed="%y, %next",
    ),
    "the second of two": loop(*TWO, wait("y", pendings=1)),
    "in a loop within the definition's": loop(
        LOAD, "scf.for %i = %c0 to %n step %c1  : i32 {", dot("y", "a"), "}"
    ),
}  # fmt: skip

SOUND = {
    "waited for at once": loop(LOAD, dot("y", "a"), wait("y", pendings=0)),
    "waited for before the next definition": loop(
        wait("acc", pendings=0), LOAD, dot("y", "a")
    ),
    "waited for by another product": loop(
        dot("s", "q", SHARED), wait("s", pendings=0), "%p = arith.truncf %s : t",
        "%a = ttg.convert_layout %p : t -> t", dot("y", "a"),
    ),
    "all but the newest": loop(LOAD, dot("p", "a"), dot("y", "s", SHARED), wait("y", pendings=1)),
    "not asynchronous": loop(LOAD, dot("y", "a", how="other = 1")),
    "in shared memory": loop(LOAD, dot("y", "a", SHARED)),
    "defined by no loop": loop(dot("y", "a")),
    "in no loop": f"{LOAD}\n{dot('y', 'a')}",
    "waited for behind the inner loop": loop(
        LOAD, "scf.for %i = %c0 to %n step %c1  : i32 {", dot("y", "a"), "}", wait("y", pendings=0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("ir", FAULTY.values(), ids=FAULTY)
def test_found(ir):
    (fault,) = hazards.faults(ir)
    assert "may be overwritten while it is read" in fault


@pytest.mark.parametrize("ir", SOUND.values(), ids=SOUND)
def test_sound(ir):
    assert hazards.faults(ir) == []
