"""bench/numerics.py: it covers every operator, and finds an error that the rule does not allow."""

import pytest
import torch

import deit.kernels
import numerics
from deit.kernels.engine.operator import operator_names
from deit.kernels.prove import calls


def _call(operator):
    return numerics.draw(operator, "random", torch.float32)


def test_every_operator_is_there():
    assert set(calls.operators()) == set(operator_names(eight_bits=False))
    assert set(calls.operators(softmax=True)) == {
        "attention", "rotary_attention", "cross_attention", "cross_entropy", "distillation_loss"
    }  # fmt: skip


@pytest.mark.parametrize("family", calls.FAMILIES)
def test_pytorch_is_as_accurate_as_itself(family):
    for operator in calls.operators(softmax=family == "one_hot"):
        call = numerics.draw(operator, family, torch.float32)
        backward = bool(call.gradients)
        rows = numerics.compare([call], "reference", "fp32", family, backward)
        gradients = [row.quantity for row in rows if row.quantity.startswith("d ")]
        assert gradients == [f"d {name}" for name in call.gradients]
        assert all(row.norm == row.torch_norm and row.used <= 0.8 for row in rows)


@pytest.mark.parametrize("quantity", ["out", "d x"])
def test_an_error_is_found(quantity, monkeypatch):
    """One part in a thousand, in the output or in one gradient, is far above the rule in fp32."""
    right = deit.kernels.layer_norm

    def wrong(x, *args, impl, **kwargs):
        if impl == "reference":
            return right(x, *args, impl=impl, **kwargs)
        if quantity == "out":
            return right(x, *args, impl="reference", **kwargs) * 1.001
        x = x + 0.001 * (x - x.detach())  # the same value, another gradient
        return right(x, *args, impl="reference", **kwargs)

    monkeypatch.setattr(deit.kernels, "layer_norm", wrong)
    rows = numerics.compare([_call("layer_norm")], "triton", "fp32", "random", backward=True)
    above = [row.quantity for row in rows if row.used > 1]
    assert quantity in above
    if quantity == "d x":
        assert above == ["d x"]
        assert "[red]" in numerics.figure(next(r for r in rows if r.quantity == "d x"))


def test_the_table_has_a_line_for_every_quantity():
    rows = numerics.compare([_call("add_layer_norm")], "reference", "fp32", "random", True)
    shown = numerics.table(rows, "reference", "fp32")
    assert shown.row_count == len(rows) == 2 + 5
    assert list(shown.columns[2].cells) == ["1.00 1.00"] * 7


def test_tables_of_what_was_not_measured_stay(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures -->\n<!-- end -->\nafter\n")
    numerics.insert(page, "\n**triton, fp32**\n\n| 1 |\n\n**cpu, fp32**\n\n| **2** |")
    numerics.insert(page, "\n**cpu, fp16**\n\n| 3 |\n\n**triton, fp32**\n\n| 4 |")
    figures = "**triton, fp32**\n\n| 4 |\n\n**cpu, fp32**\n\n| **2** |\n\n**cpu, fp16**\n\n| 3 |"
    expected = f"before\n<!-- figures -->\n\n{figures}\n\n<!-- end -->\nafter\n"
    assert page.read_text() == expected
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="figures"):
        numerics.insert(page, "")


def test_lines_of_other_operators_stay_where_some_are_named(tmp_path):
    def rows(*figures):
        made = (numerics.Row("cpu", o, "out", "fp32", "random", n, 1, n, 1, 0) for o, n in figures)
        return numerics.markdown([*made], numerics.Settings(impl=("cpu",), dtype=("fp32",)))

    page = tmp_path / "page.md"
    page.write_text("<!-- figures -->\n<!-- end -->\n")
    numerics.insert(page, rows(("linear", 0.5), ("attention", 0.6)), keep=True)
    numerics.insert(page, rows(("linear", 0.25), ("rms_norm", 1)), keep=True)
    expected = rows(("attention", 0.6), ("linear", 0.25), ("rms_norm", 1))
    assert page.read_text() == f"<!-- figures -->\n{expected}\n\n<!-- end -->\n"
    numerics.insert(page, rows(("linear", 0.5)))
    assert page.read_text() == f"<!-- figures -->\n{rows(('linear', 0.5))}\n\n<!-- end -->\n"
