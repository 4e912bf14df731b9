"""Marks of a weight: a write to it is seen, at once or in its turn, and nothing else is."""

import pytest
import torch

from deit.kernels.engine import marks, native

pytestmark = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)

SHAPES = [(1, 1), (3, 5), (64, 64), (100, 37), (192, 768), (7, 3072)]


def each_line_is_looked_at(weight):
    """Calls until every line was looked at by the least work."""
    lines = -(-weight.numel() * weight.element_size() // marks.LINE)
    return marks.GROUPS * max(1, lines // len(weight) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_unwritten_keeps_its_marks(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    made = marks.Marks(weight)
    for _ in range(2 * each_line_is_looked_at(weight)):
        assert made.still_there(0)
        assert made.still_there()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_write_to_any_row_is_seen_at_once(shape):
    weight = torch.randn(shape)
    made = marks.Marks(weight)
    for row in range(0, shape[0], max(1, shape[0] // 7)):
        before = weight[row].clone()
        weight[row] *= 1 + 2e-7  # the next number: one bit
        weight[row] += 1e-30 if (weight[row] == before).all() else 0
        if torch.equal(weight[row], before):
            weight[row] = before + 1
        assert not made.still_there()
        weight[row] = before
        assert made.still_there()


@pytest.mark.parametrize("write", ["negated", "sorted", "rolled", "halved", "zeroed"])
def test_a_write_to_all_is_seen_by_the_least_look(write):
    weight = torch.randn(192, 192)
    made = marks.Marks(weight)
    weight.copy_(
        {
            "negated": -weight,
            "sorted": weight.flatten().sort().values.view_as(weight),
            "rolled": weight.roll(1, 0),
            "halved": 0.5 * weight,
            "zeroed": torch.zeros_like(weight),
        }[write]
    )
    assert not made.still_there(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.99999])
def test_one_number_is_seen_in_its_turn(shape, place):
    weight = torch.randn(shape)
    made = marks.Marks(weight)
    weight.view(-1)[int(place * weight.numel())] += 1.0
    calls = each_line_is_looked_at(weight)
    assert not all(made.still_there(0) for _ in range(calls))


def test_views_and_what_lies_between():
    base = torch.randn(8, 6)
    made = {"columns": marks.Marks(base[:, :3]), "turned": marks.Marks(base.T)}
    base[3, 1] += 1.0
    assert not any(each.still_there() for each in made.values())
    assert marks.Marks(torch.empty(0, 4)).still_there()


def test_the_share_that_is_looked_at():
    weight = torch.randn(640, 64)
    made = marks.Marks(weight)
    looked = []
    for work in (0, 197 * 192, 197 * 768, 16 * 197 * 768, marks.ALL):  # DeiT-Ti, -B, a batch of 16
        before = made._record.turn
        assert made.still_there(work)
        looked.append(made._record.turn - before)
    assert looked == [1, 1, 4, 64, 64]
    for rows, groups in ((64, 8), (8, 64), (1, 64)):  # eight lines at least, or all there are
        weight = torch.randn(rows, 64)
        made = marks.Marks(weight)
        assert made.still_there(0)
        assert made._record.turn == groups
