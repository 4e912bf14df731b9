"""Every operator on the simulated GPUs against fp64, by the rule of docs/design.md."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import chains
import pytest
import simulator
import torch

import numerics
from deit.kernels.attention import TRITON_ROTARY_HEAD_DIMS
from deit.kernels.attention import tiles as attention_tiles
from deit.kernels.attention import triton as attention_triton
from deit.kernels.prove import calls, oracle, reference
from qualification import correctness

Size = calls.Size
# Of D = 64, a weight's gradient has fewer tiles than there are programs, and its rows are split.
DIMS = (Size(3, 197, 192), Size(2, 198, 384), Size(1, 197, 768), Size(3, 197, 64))
RAGGED = Size(2, 61, 192)  # neither tokens nor rows fill a tile
# So few rows for so long a sum that it is cut into parts.
FEW = Size(1, 61, 3072, width=64)
# Channels of a head: 32, 80, 96 and 128. Then more keys than one block has, as at 384 pixels.
HEADS = (Size(2, 197, 192, heads=6), Size(2, 61, 160, heads=2), Size(2, 61, 192, heads=2),
         Size(2, 197, 256, heads=2), Size(1, 300, 128, heads=2))  # fmt: skip
LOGITS = Size(7, 0, 0)


@dataclass(frozen=True)
class Case:
    """One call on one GPU. unaligned: no tensor's rows suit a descriptor."""

    operator: str
    arch: int
    dtype: str
    size: Size
    form: str = "training"
    family: str = "random"
    unaligned: bool = False

    def __str__(self) -> str:
        size = self.size
        shape = f"{size.batch}x{size.tokens}x{size.dim}" + f"h{size.heads}" * (size in HEADS)
        words = (self.form, self.family) + ("unaligned",) * self.unaligned
        return "-".join((self.operator, f"sm_{self.arch}", self.dtype, shape, *words))

    def call(self, number: int) -> calls.Call:
        draw = calls.Draw(self.family, numerics.DTYPES[self.dtype], number=number)
        call = calls.build(self.operator, draw, self.size, self.form)
        if self.unaligned:
            call = replace(call, inputs={n: _off(t) for n, t in call.inputs.items()})
        return call


def _off(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in rows that are one element longer."""
    if tensor.dim() < 2:
        return tensor
    longer = torch.cat([tensor, tensor[..., :1]], -1).contiguous()
    return longer[..., : tensor.shape[-1]]


def _served(operator: str, size: Size) -> bool:
    """Whether a size of HEADS says something of an operator, and its kernels take it."""
    if operator == "rotary_attention":
        return size.dim // size.heads in TRITON_ROTARY_HEAD_DIMS
    return operator == "attention"


def _cases() -> Iterator[tuple[Case, bool]]:
    """Every case, and whether CI's slice has it: Hopper's in bf16, and of the rest the least."""
    for arch in simulator.ARCHITECTURES:
        for dtype in ("bf16", "fp16", "fp32"):
            first = arch == 90 and dtype == "bf16"
            for operator in calls.operators(implementation="triton"):
                stated = calls.stated()[operator]
                sizes = (LOGITS,) if stated.loss else DIMS
                case = Case(operator, arch, dtype, sizes[0])
                yield case, arch == 90 or dtype == "bf16"
                yield from ((replace(case, size=size), first) for size in sizes[1:])
                heads = [size for size in HEADS if _served(operator, size)]
                yield from ((replace(case, size=size), first) for size in heads)
                small = case if stated.loss else replace(case, size=RAGGED)
                yield replace(small, unaligned=True), arch == 90
                for form in ("least", "inference", "every"):
                    yield replace(small, form=form), first
                if operator == "linear":
                    yield replace(case, size=FEW), arch == 90 or dtype == "bf16"
                    yield replace(case, size=FEW, form="least", unaligned=True), first
                for family in calls.FAMILIES[1:] if stated.softmax else oracle.FAMILIES[1:]:
                    yield replace(small, family=family), first


@dataclass(frozen=True)
class Found:
    """What a case showed, by output and gradient.

    used: the share of what the rule allows. lean: by how much more of its numbers are off to one
    side, away from zero (1) or towards it (-1). unchecked: launches not searched for races.
    """

    used: dict[str, float]
    lean: dict[str, float]
    launches: int
    unchecked: int


# Rounding to nearest leans by 0.02 at most here, a cut by 1.0, which uses 0.55 of the rule.
LEAN, ENOUGH = 0.15, 1000

# What is above the rule on few draws is held to it over more, as on a GPU. gelu_mlp's largest error
# of 192 d gamma in fp32 is 1.16 of what is allowed on one draw, and 0.73 to 0.76 on five.
FEW_DRAWS = {"one_hot": 3}


def measure(case: Case, draws: int = 0) -> Found:
    """Run a case, forward and backward, on draws of its inputs: as few as are mostly enough."""
    count = draws or FEW_DRAWS.get(case.family, 1)
    drawn = [case.call(number) for number in range(count)]
    chain = chains.one_chain() if case.dtype == "fp32" else contextlib.nullcontext()
    with simulator.device(case.arch) as launched, chain:
        backward = drawn[0].differentiable("triton")
        three = [numerics.three(call, "triton", backward) for call in drawn]
    errors = [{name: oracle.compared(*of) for name, of in draw.items()} for draw in three]
    used = {name: oracle.pooled([draw[name] for draw in errors]).used for name in errors[0]}
    lean = dict.fromkeys(used, 0.0)
    if case.family == "random" and not calls.stated()[case.operator].loss:  # many unlike numbers
        lean = {name: _lean(got, exact) for name, (got, _, exact) in three[0].items()}
    return Found(used, lean, launched.launches, launched.races_unchecked)


def _lean(got: torch.Tensor, exact: torch.Tensor) -> float:
    """0 where it cannot be told: an fp32 result, whose error is its sums', or few errors."""
    sides = ((got.double() - exact) * exact).sign()
    errors = int(sides.count_nonzero())
    if got.dtype == torch.float32 or errors < ENOUGH:
        return 0.0
    return float(sides.sum()) / errors


CASES = [case for case, least in _cases() if least or simulator.ASKED == "all"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rule_holds(case, note):
    found = measure(case)
    if max(found.used.values()) > 1:
        found = measure(case, correctness.MORE)
    used, lean = max(found.used.values()), max(map(abs, found.lean.values()))
    note(what=case.operator, dtype=case.dtype, arch=case.arch, case=str(case), used=used, lean=lean,
         launches=found.launches, unchecked=found.unchecked)  # fmt: skip
    assert found.launches
    assert not found.unchecked
    assert used <= 1, found.used
    assert lean <= LEAN, found.lean


@pytest.mark.parametrize(
    ("arch", "keys", "pointed"),
    [(90, 64, True), (90, None, False), (100, None, False), (80, 64, False)],
)
def test_a_lean_attention_holds_it_too(arch, keys, pointed, note):
    """Its configurations are no default: `deit tune` tries them."""
    qkv = calls.build("attention", calls.Draw(dtype=torch.bfloat16), DIMS[0]).inputs["qkv"]
    with simulator.device(arch) as launched:
        pinned = attention_tiles.attention(arch, qkv.dtype, 64, 197)
        config = attention_tiles.persistent(197)
        if keys:
            config = attention_tiles.lean(pinned, 64, keys, 2, pointed=pointed)
        out = attention_triton.attention(qkv, 3, 0.125, None, config=config)
    (measured,) = oracle.measure(out, reference.attention, (qkv, 3, 0.125, None))
    note(what="attention, lean", dtype="bf16", arch=arch, case=f"{keys} {pointed}",
         used=measured.used, launches=launched.launches,
         unchecked=launched.races_unchecked)  # fmt: skip
    assert launched.launches == 1
    assert not launched.races_unchecked
    assert measured.used <= 1
