"""What a student minimises, against the paper's equations in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deit.training.distillation import Objective, Teacher, check_classes
from deit.training.options import Distillation, Options


def logits(seed, batch=6, classes=5):
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)) * 2


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def test_hard_with_the_token_is_equation_3():
    z, token, teacher = logits(0), logits(1), logits(2)
    loss = Objective(Distillation("hard"))((z, token), LABELS, teacher)
    expected = (F.cross_entropy(z, LABELS) + F.cross_entropy(token, teacher.argmax(1))) / 2
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_soft_without_the_token_is_equation_2():
    z, teacher = logits(0), logits(2)
    loss = Objective(Distillation("soft"))(z, LABELS, teacher)
    divergence = F.kl_div(
        (z / 3).log_softmax(1), (teacher / 3).log_softmax(1), log_target=True, reduction="batchmean"
    )
    expected = 0.9 * F.cross_entropy(z, LABELS) + 0.1 * 9 * divergence
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_smoothing_is_of_the_true_labels_only():
    z, token, teacher = logits(0), logits(1), logits(2)
    loss = Objective(Distillation("hard"), label_smoothing=0.1)((z, token), LABELS, teacher)
    true = F.cross_entropy(z, LABELS, label_smoothing=0.1)
    assert loss == pytest.approx(float(true + F.cross_entropy(token, teacher.argmax(1))) / 2)


def test_without_a_teacher_both_heads_learn_the_labels():
    z, token = logits(0), logits(1)
    loss = Objective(Distillation())((z, token), LABELS, None)
    expected = (F.cross_entropy(z, LABELS) + F.cross_entropy(token, LABELS)) / 2
    assert loss == pytest.approx(float(expected), rel=1e-6)


def test_binary_cross_entropy_takes_mixed_targets():
    z, target = logits(0), logits(3).softmax(1)
    loss = Objective(Distillation(), loss="bce")(z, target, None)
    expected = F.binary_cross_entropy_with_logits(z, target) * z.shape[1]
    assert loss == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="loss: distillation is defined for ce"):
        Objective(Distillation("hard"), loss="bce")


class Sees(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.images = None

    def forward(self, images):
        self.images = images
        return self.conv(images).mean((2, 3))


def test_a_teacher_gets_images_by_its_own_statistics_and_never_trains():
    raw = torch.rand(2, 3, 8, 8, dtype=torch.float64).float()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    own_mean, own_std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    shape = (1, 3, 1, 1)
    images = (raw - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    inner = Sees()
    teacher = Teacher(inner, mean=own_mean, std=own_std, student_mean=mean, student_std=std).train()
    out = teacher(images)
    expected = (raw - torch.tensor(own_mean).view(shape)) / torch.tensor(own_std).view(shape)
    assert torch.allclose(inner.images, expected, atol=1e-6)
    assert not inner.training
    assert not out.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert inner.images.is_contiguous(memory_format=torch.channels_last)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"teacher: expected logits of shape \(2, 7\).*\(2, 5\)"):
        check_classes(Sees(), torch.zeros(2, 3, 8, 8), 7)


def test_a_teacher_goes_with_distillation(tmp_path):
    with pytest.raises(ValueError, match="teacher: expected a teacher with soft or hard"):
        Options("d", tmp_path, distillation=Distillation("hard"))
    with pytest.raises(ValueError, match="got teacher x and distillation none"):
        Options("d", tmp_path, teacher="x")


def test_the_losses_run_as_they_are_told():
    with pytest.raises(NotImplementedError, match="cuda"):
        Objective(Distillation(), impl="cuda")(logits(0), LABELS, None)
    with pytest.raises(NotImplementedError, match="cuda"):
        Objective(Distillation("hard"), impl="cuda")(logits(0), LABELS, logits(2))
