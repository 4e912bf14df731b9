"""cross_entropy and distillation_loss on Triton, values and gradients, in the interpreter."""

from __future__ import annotations

import functools
import itertools

import gradients
import logits as given
import pytest
import torch
from logits import INF, NON_FINITE, OPTIONS, STRIDES
from logits import MANY as BLOCKS
from logits import ce as _ce
from logits import distil as _distil
from logits import targets as _target

from deit.kernels import cross_entropy, explain
from deit.kernels.engine import registry
from deit.kernels.losses import triton as losses
from deit.kernels.prove import oracle, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # no product here: bf16 is right too
ONE = 1000  # classes in one block; BLOCKS: in two blocks of 2048 and a part of the next

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # inf - inf


_check_ce = functools.partial(given.check_ce, "triton")
_check_distil = functools.partial(given.check_distil, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_cross_entropy(family, dtype):
    for soft, smoothing in itertools.product((False, True), (0.0, 0.1)):
        logits = oracle.make(family, (16, 10), dtype, scale=3.0)
        _check_ce(logits, _target(soft, 16, 10, dtype), smoothing)


@pytest.mark.parametrize("classes", [1, ONE, BLOCKS])
def test_numbers_of_classes(classes):
    for family, dtype, soft, smoothing in (
        ("random", torch.float16, False, 0.1),
        ("large_mean", torch.float32, True, 0.1),
        ("outlier", torch.float32, False, 0.0),
        ("large_mean", torch.float32, False, 0.0),
    ):
        logits = oracle.make(family, (12, classes), dtype)
        _check_ce(logits, _target(soft, 12, classes, dtype), smoothing)


@pytest.mark.parametrize(("kind", "token", "kl"), OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [10, ONE, BLOCKS])
def test_distillation(classes, kind, token, kl):
    """Every option away from its default; numel KL of 5,000 classes needs a large alpha to show."""
    rows = 16 if classes == 10 else 8
    families = oracle.FAMILIES if classes == 10 else ["large_mean"]
    for family, dtype in itertools.product(families, (torch.float32, torch.float16)):
        logits = oracle.make(family, (rows, classes), dtype, scale=2.0)
        teacher = oracle.make(family, (rows, classes), dtype, seed=3, scale=2.0)
        student = oracle.make("random", (rows, classes), dtype, seed=4) if token else None
        alpha = 0.9 if kl == "numel" else 0.3
        target = _target(dtype == torch.float32, rows, classes)
        _check_distil(logits, target, teacher, student, kind, alpha, 1.7, 0.05, kl)


def test_inference_gives_the_same_losses():
    """Without the statistics that training saves."""
    logits, teacher, student = (oracle.make("random", (4, 50), seed=s) for s in range(3))
    soft = _target(True, 4, 50)
    rest = ("soft", 0.3, 2.0, 0.1, "numel")
    for name, arguments in (
        ("cross_entropy", (logits, soft, 0.1)),
        ("distillation_loss", (logits, soft, teacher, student, *rest)),
    ):
        triton = registry.COMPILED["triton"]
        assert torch.equal(triton[name](*arguments), triton[f"{name}_fwd"](*arguments)[0])


def test_each_tensor_in_its_own_dtype():
    logits = oracle.make("random", (12, 50), torch.float16)
    teacher = oracle.make("random", (12, 50), torch.bfloat16, seed=3)
    student = oracle.make("random", (12, 50), seed=4)
    for kind in ("hard", "soft"):
        _check_distil(logits, _target(False, 12, 50), teacher, student, kind, 0.4, 2.0, 0.1,
                      "batchmean")  # fmt: skip


def test_a_student_as_good_as_its_teacher():
    """KL = 0 is a difference of equal sums; the gradient vanishes with it."""
    logits = oracle.make("large_mean", (2, ONE)).requires_grad_()
    loss = _distil(logits, _target(False, 2, ONE), logits.detach(), None, "soft", 1.0, 3.0, 0.0,
                   "batchmean", impl="triton")  # fmt: skip
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert abs(float(loss.detach())) < 1e-5
    assert float(dlogits.abs().max()) < 1e-7


@pytest.mark.parametrize("name", NON_FINITE)
def test_infinities_as_in_pytorch(name):
    """oracle.check wants NaN and infinities in the reference's places."""
    logits = oracle.make("random", (4, BLOCKS))
    NON_FINITE[name](logits)
    plain = oracle.make("random", (4, BLOCKS), seed=3)
    for soft, smoothing in itertools.product((False, True), (0.0, 0.1)):
        _check_ce(logits, _target(soft, 4, BLOCKS), smoothing)
    target = _target(False, 4, BLOCKS)
    _check_distil(plain, target, logits, None, "soft", 0.5, 2.0, 0.0, "batchmean")
    for kind in ("hard", "soft"):
        _check_distil(plain, target, plain, logits, kind, 0.5, 2.0, 0.0, "batchmean")


def test_the_teachers_first_largest_logit_counts():
    teacher = torch.zeros(4, BLOCKS)
    teacher[0, [4500, 10]] = 1.0  # equal in two blocks
    teacher[1, [20, 30]] = 1.0  # equal in one
    teacher[2, 4999] = float("nan")  # argmax takes NaN for the largest
    teacher[3] = -INF
    logits = oracle.make("random", (4, BLOCKS))
    found, dlogits = _check_distil(
        logits, _target(False, 4, BLOCKS), teacher, None, "hard", 1.0, 1.0, 0.0, "batchmean"
    )
    assert (dlogits < 0).nonzero().tolist() == [[0, 10], [1, 20], [2, 4999], [3, 0]]
    assert found.isfinite().all()


@pytest.mark.parametrize("index", [-100, -1, 50, 2**40])
def test_index_out_of_range(index):
    """NaN in the loss and in the row's gradient, nothing else, and nothing read out of bounds."""
    logits = oracle.make("random", (3, 50)).requires_grad_()
    target = torch.tensor([3, index, 4])
    with pytest.raises(IndexError):
        cross_entropy(logits, target, impl="reference")
    for smoothing in (0.0, 0.1):
        loss = cross_entropy(logits, target, label_smoothing=smoothing, impl="triton")
        (dlogits,) = torch.autograd.grad(loss, logits)
        assert loss.isnan()
        assert dlogits[1].isnan().all()
        assert dlogits[[0, 2]].isfinite().all()


def test_empty_batch_and_no_classes():
    empty, index = torch.empty(0, 10), torch.empty(0, dtype=torch.int64)
    for impl in ("triton", "reference"):
        logits = empty.clone().requires_grad_()
        found = [_ce(logits, index, 0.1, impl), _ce(logits, empty, 0.1, impl)]
        for kind in ("hard", "soft"):
            rest = (kind, 0.5, 2.0, 0.1, "batchmean")
            found.append(_distil(logits, index, empty, logits, *rest, impl))
        assert all(loss.isnan() for loss in found)
        (dlogits,) = torch.autograd.grad(sum(found), logits)
        assert dlogits.shape == (0, 10)
    with pytest.raises(ValueError, match="logits: expected at least one class"):
        cross_entropy(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name):
    logits, soft, teacher, student = (
        STRIDES[name](oracle.make("random", (20, 200), seed=seed)) for seed in range(4)
    )
    rows, classes = logits.shape
    _check_ce(logits, soft, 0.1)
    indices = (torch.arange(2 * rows) % classes)[::2]
    _check_distil(logits, indices, teacher, student, "soft", 0.5, 2.0, 0.1, "numel")
    _check_distil(logits, indices, teacher, student, "hard", 0.5, 2.0, 0.1, "numel")


def test_offsets_past_32_bits():
    """Two rows 2**31 elements apart; the 4 GB between them are never touched."""
    logits = torch.empty(2**31 + 10, dtype=torch.float16).as_strided((2, 10), (2**31, 1))
    logits.copy_(oracle.make("random", (2, 10), torch.float16))
    target = torch.tensor([3, 9])
    args = (logits, target, 0.1)
    oracle.check(registry.COMPILED["triton"]["cross_entropy"](*args), reference.cross_entropy, args)


def test_the_mean_of_many_rows():
    """3,000 rows take its program three turns."""
    rows, loss = oracle.make("random", (3000,), mean=5.0), torch.empty(())
    losses._mean_kernel[(1,)](rows, loss, 3000, BLOCK=1024)
    assert float(loss) == float(rows.double().mean().float())


def test_repeats_bit_for_bit():
    logits, teacher, student = (oracle.make("random", (4, BLOCKS), seed=s) for s in range(3))
    arguments = (logits, _target(True, 4, BLOCKS), teacher, student, "soft", 0.5, 2.0, 0.1, "numel")
    gradients.check_repeats(_distil, arguments, (0, 3), (torch.tensor(1.7),))


def test_targets_get_no_gradient():
    logits, soft = oracle.make("random", (3, 10)), _target(True, 3, 10).requires_grad_()
    why_not = explain("cross_entropy", logits, soft).reasons["triton"]
    assert why_not == ["target requires grad and the kernel has no gradient for it"]
    assert explain("cross_entropy", logits.requires_grad_(), soft.detach()).reasons["triton"] == []


def test_opcheck():
    triton = registry.COMPILED["triton"]
    logits, teacher, student = (oracle.make("random", (3, 20), torch.float16, seed=s)
                                for s in range(3))  # fmt: skip
    soft, index, dloss = _target(True, 3, 20), _target(False, 3, 20), torch.tensor(1.7)
    torch.library.opcheck(triton["cross_entropy"], (logits, soft, 0.1))
    torch.library.opcheck(triton["cross_entropy_fwd"], (logits, soft, 0.1))
    _, statistics = triton["cross_entropy_fwd"](logits, soft, 0.1)
    torch.library.opcheck(triton["cross_entropy_bwd"], (dloss, logits, soft, statistics, 0.1))
    for token, rest in ((None, ("hard", 0.3, 2.0, 0.1, "batchmean")),
                        (student, ("soft", 0.3, 2.0, 0.1, "numel"))):  # fmt: skip
        arguments = (logits, index, teacher, token)
        torch.library.opcheck(triton["distillation_loss"], (*arguments, *rest))
        torch.library.opcheck(triton["distillation_loss_fwd"], (*arguments, *rest))
        _, statistics = triton["distillation_loss_fwd"](*arguments, *rest)
        backward = (dloss, *arguments, statistics, *rest)
        torch.library.opcheck(triton["distillation_loss_bwd"], backward)
