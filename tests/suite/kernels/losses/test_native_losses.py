"""cross_entropy and distillation_loss in C++: every instruction set under the error rule."""

from __future__ import annotations

import functools
import itertools

import logits as given
import pytest
import torch
from logits import INF, MANY, NON_FINITE, OPTIONS, STRIDES, ce, distil, targets

from deit.kernels import cross_entropy, explain
from deit.kernels.engine import native, registry
from deit.kernels.prove import oracle

pytestmark = pytest.mark.skipif(
    bool(native.why_not("cpu")), reason="; ".join(native.why_not("cpu"))
)

OPS = registry.COMPILED["cpu"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
check_ce = functools.partial(given.check_ce, "cpu")
check_distil = functools.partial(given.check_distil, "cpu")


# 1: no sum at all. 10: less than a vector with AVX-512. 1003: blocks, whole vectors and a tail.
@pytest.mark.parametrize("classes", [1, 10, 1003, MANY])
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_cross_entropy(base_isa, family, classes):
    for dtype, soft, smoothing in itertools.product(DTYPES, (False, True), (0.0, 0.1)):
        logits = oracle.make(family, (16, classes), dtype, scale=3.0)
        check_ce(logits, targets(soft, 16, classes, dtype), smoothing)


@pytest.mark.parametrize(("kind", "token", "kl"), OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [10, 1003])
def test_distillation(base_isa, classes, kind, token, kl):
    """Every option away from its default; numel KL of 1003 classes needs a large alpha to show."""
    rows = 16 if classes == 10 else 8
    for family, dtype in itertools.product(oracle.FAMILIES, DTYPES[:2]):
        logits = oracle.make(family, (rows, classes), dtype, scale=2.0)
        teacher = oracle.make(family, (rows, classes), dtype, seed=3, scale=2.0)
        student = oracle.make("random", (rows, classes), dtype, seed=4) if token else None
        alpha = 0.9 if kl == "numel" else 0.3
        target = targets(dtype == torch.float32, rows, classes)
        check_distil(logits, target, teacher, student, kind, alpha, 1.7, 0.05, kl)


def test_each_tensor_in_its_own_dtype(base_isa):
    logits = oracle.make("random", (12, 50), torch.float16)
    teacher = oracle.make("random", (12, 50), torch.bfloat16, seed=3)
    student = oracle.make("random", (12, 50), seed=4)
    for kind, target in (("hard", False), ("soft", True)):
        soft = targets(target, 12, 50, torch.bfloat16)
        check_distil(logits, soft, teacher, student, kind, 0.4, 2.0, 0.1, "batchmean")


def test_a_student_as_good_as_its_teacher(base_isa):
    """KL = 0 is a difference of equal sums; the gradient vanishes with it."""
    logits = oracle.make("large_mean", (2, 1000)).requires_grad_()
    loss = distil(logits, targets(False, 2, 1000), logits.detach(), None, "soft", 1.0, 3.0, 0.0,
                  "batchmean", impl="cpu")  # fmt: skip
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert abs(float(loss.detach())) < 1e-5
    assert float(dlogits.abs().max()) < 1e-7


@pytest.mark.parametrize("name", NON_FINITE)
def test_infinities_as_in_pytorch(base_isa, name):
    """oracle.check wants NaN and infinities in the reference's places."""
    logits = oracle.make("random", (4, MANY))
    NON_FINITE[name](logits)
    plain = oracle.make("random", (4, MANY), seed=3)
    for soft, smoothing in itertools.product((False, True), (0.0, 0.1)):
        check_ce(logits, targets(soft, 4, MANY), smoothing)
    target = targets(False, 4, MANY)
    check_distil(plain, target, logits, None, "soft", 0.5, 2.0, 0.0, "batchmean")
    for kind in ("hard", "soft"):
        check_distil(plain, target, plain, logits, kind, 0.5, 2.0, 0.0, "batchmean")


def test_the_teachers_first_largest_logit_counts(base_isa):
    teacher = torch.zeros(6, MANY)
    teacher[0, [4500, 10]] = 1.0
    teacher[1, [20, 30]] = 1.0
    teacher[2, 4999] = float("nan")  # argmax takes NaN for the largest, before any infinity
    teacher[2, 7] = INF
    teacher[3] = -INF
    teacher[4, [300, 70]] = float("nan")
    teacher[5, :] = -2.0
    teacher[5, 4998] = -1.0
    logits = oracle.make("random", (6, MANY))
    found, dlogits = check_distil(
        logits, targets(False, 6, MANY), teacher, None, "hard", 1.0, 1.0, 0.0, "batchmean"
    )
    assert (dlogits < 0).nonzero()[:, 1].tolist() == [10, 20, 4999, 0, 70, 4998]
    assert found.isfinite().all()


@pytest.mark.parametrize("index", [-100, -1, 50, 2**40])
def test_an_index_out_of_range_is_named(index):
    logits = oracle.make("random", (3, 50)).requires_grad_()
    target = torch.tensor([3, index, 4])
    with pytest.raises(RuntimeError, match=rf"target: expected classes in \[0, 50\); got {index}"):
        cross_entropy(logits, target, impl="cpu")
    statistics = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="in row 1"):
        OPS["cross_entropy_bwd"](torch.ones(()), logits.detach(), target, statistics, 0.0)


def test_statistics_of_no_forward_touch_no_other_memory():
    """A label beyond the classes, as a caller of the raw kernel may hand over."""
    logits, target = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    for label in (-3.0, 5.0, 1e30, float("nan")):
        statistics = torch.ones(7, 2)
        statistics[5] = label
        found, _ = OPS["distillation_loss_bwd"](
            torch.ones(()), logits, target, logits, None, statistics, "hard", 1.0, 1.0, 0.0,
            "batchmean",
        )  # fmt: skip
        assert (found >= 0).all()


def test_empty_batch():
    empty, index = torch.empty(0, 10), torch.empty(0, dtype=torch.int64)
    logits = empty.clone().requires_grad_()
    found = [ce(logits, index, 0.1, "cpu"), ce(logits, empty, 0.1, "cpu")]
    for kind in ("hard", "soft"):
        found.append(distil(logits, index, empty, logits, kind, 0.5, 2.0, 0.1, "batchmean", "cpu"))
    assert all(loss.isnan() for loss in found)
    (dlogits,) = torch.autograd.grad(sum(found), logits)
    assert dlogits.shape == (0, 10)


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    logits, soft, teacher, student = (
        STRIDES[name](oracle.make("random", (20, 200), seed=seed)) for seed in range(4)
    )
    rows, classes = logits.shape
    check_ce(logits, soft, 0.1)
    indices = (torch.arange(2 * rows) % classes)[::2]
    check_distil(logits, indices, teacher, student, "soft", 0.5, 2.0, 0.1, "numel")
    check_distil(logits, indices, teacher, student, "hard", 0.5, 2.0, 0.1, "numel")


def test_the_mean_of_many_rows_is_rounded_once(base_isa):
    """8192 rows of the same loss: a sum in fp32 would be off by a hundred ulp."""
    logits, target = oracle.make("random", (1, 10)).expand(8192, 10), torch.zeros(1).long()
    exact = torch.nn.functional.cross_entropy(logits[:1].double(), target)
    found = cross_entropy(logits, target.expand(8192), impl="cpu")
    assert abs(float(found) / float(exact) - 1) < 1e-7


def schema_arguments(name):
    """Of a schema, rows enough for several threads."""
    logits, teacher, student = (oracle.make("random", (203, 1003), seed=s) for s in range(3))
    if name.startswith("cross_entropy"):
        first, rest = (logits, targets(True, 203, 1003)), (0.1,)
    else:
        first = (logits, targets(False, 203, 1003), teacher, student)
        rest = ("soft", 0.3, 2.0, 0.1, "numel")
    if not name.endswith("_bwd"):
        return (*first, *rest)
    forward = name.replace("_bwd", "_fwd")
    return (torch.tensor(1.7), *first, OPS[forward](*first, *rest)[1], *rest)


KERNELS = [f"{n}{s}" for n in ("cross_entropy", "distillation_loss") for s in ("", "_fwd", "_bwd")]


@pytest.mark.parametrize("name", KERNELS)
def test_threads_change_no_bit(base_isa, threads, name):
    arguments = schema_arguments(name)
    each = lambda found: found if isinstance(found, tuple) else (found,)
    threads(1)
    alone = each(OPS[name](*arguments))
    for count in (2, 8):
        threads(count)
        for one, many in zip(alone, each(OPS[name](*arguments)), strict=True):
            assert torch.equal(one, many)


def test_inference_gives_the_same_losses():
    """Without the statistics that training saves."""
    for name in ("cross_entropy", "distillation_loss"):
        arguments = schema_arguments(name)
        assert torch.equal(OPS[name](*arguments), OPS[f"{name}_fwd"](*arguments)[0])


def test_targets_get_no_gradient():
    logits, soft = oracle.make("random", (3, 10)), targets(True, 3, 10).requires_grad_()
    why_not = explain("cross_entropy", logits, soft).reasons["cpu"]
    assert why_not == ["target requires grad and the kernel has no gradient for it"]
    assert explain("cross_entropy", logits.requires_grad_(), soft.detach()).reasons["cpu"] == []


def test_auto_leaves_them_to_pytorch_where_nothing_was_measured():
    found = explain("cross_entropy", oracle.make("random", (3, 10)), targets(False, 3, 10))
    assert found.chosen == "reference"
    assert found.basis is not None
    assert not found.basis.known
