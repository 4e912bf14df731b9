"""`--augment-on device`: the workers' samples, from crops and what was drawn."""
# ruff: noqa: NPY002 (the augmentation libraries draw from the global generator)

import os
import subprocess
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import skimage.data
import torch
import training
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, _RAND_TRANSFORMS, AugmentOp
from torchvision.transforms.v2.functional import pil_to_tensor
from training import PROGRAM, TORCHRUN, losses, same

from deit.commands.cli import main
from deit.data.augment import posterize, seeded, training_transform
from deit.data.drawn import NUMBERS, _noted, split
from deit.data.images import IMAGENET_MEAN, IMAGENET_STD
from deit.data.loader import Loader
from deit.data.on_device import KERNELS, Augmentation, Drawn
from deit.data.sampling import Batches, Draw, Plan
from deit.data.sources import open_source
from deit.recipes import recipe
from deit.training.trainer import Trainer, train

SIZE = 96
CPU = torch.device("cpu")
FILL = (124, 116, 104)
LEVELS = ((0.0,) * 3, (1 / 255,) * 3)  # statistics by which an image keeps its 0 to 255
STATS = (IMAGENET_MEAN, IMAGENET_STD)
JITTER = {"policy": None, "color_jitter": 0.4, "random_erasing": 0.5, "repeats": 1}
RECIPES = {
    "deit": recipe("deit"),
    "decreasing": recipe("deit", policy="rand-m7-n3-mstd0.5"),
    "strongest": recipe("deit", policy="rand-m10-n3-inc1"),  # posterize to no bits, too
    "AutoAugment": recipe("deit", policy="original-mstd0.5"),
    "jitter": recipe("deit", **JITTER),
    "deit3": recipe("deit3"),
    "deit3, erasing": recipe("deit3", random_erasing=0.5),
    "fashion-mnist": recipe("fashion-mnist"),
    "fixres": recipe("fixres"),
}


@pytest.fixture(scope="module")
def photos():
    """Photographs of five kinds, RGB."""
    arrays = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    return [Image.fromarray(array) for array in (*arrays, *load_sample_images().images)]


@pytest.fixture(scope="module")
def crops(photos):
    """The same at SIZE x SIZE, as a worker's crop leaves them."""
    return [photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for photo in photos]


def levels(augmentation, images, drawn):
    """What the device makes of images, in levels of 0 to 255."""
    return augmentation(images.clone(), drawn).round()


# Of an operation: the largest difference of a level, and the largest mean one of a photograph.
EXACT, ROUNDED, RESAMPLED = (0, 0.0), (1, 0.02), (80, 1.2)
TOLERANCES = {
    "AutoContrast": (1, 0.35),
    **dict.fromkeys(("Equalize", "Invert", "SolarizeAdd"), EXACT),
    **dict.fromkeys(("Posterize", "PosterizeIncreasing"), EXACT),
    **dict.fromkeys(("Solarize", "SolarizeIncreasing"), EXACT),
    **dict.fromkeys(("Color", "ColorIncreasing", "Contrast", "ContrastIncreasing"), ROUNDED),
    **dict.fromkeys(("Brightness", "BrightnessIncreasing"), ROUNDED),
    **dict.fromkeys(("Sharpness", "SharpnessIncreasing"), ROUNDED),
    **dict.fromkeys(("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"), RESAMPLED),
    **dict.fromkeys(("TranslateX", "TranslateY"), RESAMPLED),
}


@pytest.mark.parametrize("magnitude", [0, 3, 9, 10])
@pytest.mark.parametrize("name", TOLERANCES)
def test_an_operation_is_timms(name, magnitude, crops):
    settings = {"translate_const": 43, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    operation = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=settings)
    if name.startswith("Posterize"):
        operation.aug_fn = posterize
    doing = operation.aug_fn
    noting = partial(_noted, doing.__name__, SIZE)
    expected, drawn = [], []
    for number, crop in enumerate(crops):
        with seeded(number):
            expected.append(pil_to_tensor(operation(crop)))
        operation.aug_fn = noting
        with seeded(number):
            drawn.append(Drawn(operation(())))
        operation.aug_fn = doing
    found = levels(
        Augmentation(*LEVELS, FILL, CPU), torch.stack([pil_to_tensor(c) for c in crops]), drawn
    )
    apart = (found - torch.stack(expected)).abs()
    most, mean = TOLERANCES[name]
    assert apart.max() <= most
    assert apart.mean((1, 2, 3)).max() <= mean


def test_every_operation_of_timms_policies_is_held_against_timms():
    assert {*_RAND_INCREASING_TRANSFORMS, *_RAND_TRANSFORMS} <= TOLERANCES.keys()
    assert {kernel for kernel, _ in NUMBERS.values()} == KERNELS.keys() - {"blur"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_sample_is_the_one_that_a_worker_makes(name, photos):
    how = (RECIPES[name], SIZE, *STATS)
    whole, (drawing, augmentation) = training_transform(*how), split(*how, CPU)
    expected, crops, drawn = [], [], []
    for number in range(60):
        photo = photos[number % len(photos)]
        with seeded(number):
            expected.append(whole(photo))
        with seeded(number):
            crop, what = drawing(photo)
        assert crop.dtype == torch.uint8
        crops.append(crop)
        drawn.append(what)
    found = augmentation(torch.stack(crops), drawn)
    apart = (found - torch.stack(expected)).abs()
    for each, what in zip(apart, drawn, strict=True):
        if what.erased is not None and what.noise is not None:
            top, left, bottom, right = what.erased
            each[:, top:bottom, left:right] = 0.0  # noise, drawn anew
    # Bounds in deviations of a channel. Most samples agree to a level, which is 0.018. A few
    # were moved by Pillow's bicubic weights and then equalised or sharpened.
    assert apart.mean((1, 2, 3)).median() <= 0.01
    assert apart.mean((1, 2, 3)).max() <= 0.2
    plain = torch.stack(crops).float().div(255).sub_(torch.tensor(STATS[0]).view(3, 1, 1))
    if name not in ("fashion-mnist", "fixres"):  # or the test would say nothing
        assert sum(bool(what.operations) for what in drawn) > 30
        moved = (plain.div_(torch.tensor(STATS[1]).view(3, 1, 1)) - torch.stack(expected)).abs()
        assert moved.mean((1, 2, 3)).median() > 0.1
    erased = sum(what.erased is not None for what in drawn)
    assert abs(erased / 60 - RECIPES[name].random_erasing) < 0.2


def test_erased_pixels_are_normal_noise_of_their_own(crops):
    images = torch.stack([pil_to_tensor(crop) for crop in crops[:4]])
    box = (10, 20, 60, 90)
    drawn = [Drawn((), box, 5), Drawn((), box, 6), Drawn((), box, None), Drawn()]
    augmentation = Augmentation(*STATS, FILL, CPU)
    found = augmentation(images.clone(), drawn)
    noise, other, zeros, untouched = found[:, :, 10:60, 20:90]
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1.0) < 0.05
    assert not torch.equal(noise, other)
    assert not zeros.any()
    plain = augmentation(images.clone(), [Drawn()] * 4)
    assert torch.equal(untouched, plain[3, :, 10:60, 20:90])
    assert torch.equal(found[0, :, :10], plain[0, :, :10])
    assert torch.equal(noise, augmentation(images[:1].clone(), drawn[:1])[0, :, 10:60, 20:90])


def batch_of(name, photos, count, size=SIZE):
    """Crops and what was drawn for them, and the device's part."""
    drawing, augmentation = split(RECIPES[name], size, *STATS, CPU)
    crops, drawn = [], []
    for number in range(count):
        with seeded(7, number):
            crop, what = drawing(photos[number % len(photos)])
        crops.append(crop)
        drawn.append(what)
    return torch.stack(crops), drawn, augmentation


@pytest.mark.parametrize("name", ["deit", "jitter", "deit3"])
def test_bits_do_not_depend_on_the_rest_of_the_batch_or_on_threads(name, photos, threads):
    # 37 pixels: images begin at odd places of memory.
    images, drawn, augmentation = batch_of(name, photos, 48, size=37)
    threads(2)
    together = augmentation(images.clone(), drawn)
    threads(1)
    for parts in (1, 5, 24):
        cut = torch.cat(
            [
                augmentation(some.clone(), drawn[at : at + parts])
                for at, some in zip(range(0, 48, parts), images.split(parts), strict=True)
            ]
        )
        assert torch.equal(cut, together)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["deit", "jitter", "deit3, erasing"])
def test_a_gpu_makes_the_same_samples(name, photos):
    images, drawn, here = batch_of(name, photos, 64)
    there = Augmentation(*STATS, tuple(here.fill.flatten().int().tolist()), torch.device("cuda"))
    expected = here(images.clone(), drawn)
    found = there(images.cuda(), drawn)
    assert torch.equal(found, there(images.cuda(), drawn))
    assert torch.equal(found[:8], there(images[:8].cuda(), drawn[:8]))
    apart = (found.cpu() - expected).abs()
    for each, what in zip(apart, drawn, strict=True):
        if what.noise is not None:
            top, left, bottom, right = what.erased
            each[:, top:bottom, left:right] = 0.0  # another generator's
    assert apart.mean((1, 2, 3)).max() <= 0.02


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("augmix-m3", "policy 'augmix-m3' has AugMixAugment, which has no kernel"),
        ("rand-m9-t3a", "policy 'rand-m9-t3a' has Desaturate, which has no kernel"),
        ("rand-m9-t3aw", "policy 'rand-m9-t3aw' has Desaturate"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(policy, said):
    with pytest.raises(ValueError, match=f"augment_on: {said}"):
        split(recipe("deit", policy=policy), SIZE, *STATS, CPU)


def test_other_devices_are_refused_by_name():
    with pytest.raises(ValueError, match="augment_on: expected a CPU or a CUDA device; got meta"):
        split(recipe("deit"), SIZE, *STATS, torch.device("meta"))


def loaded(data, augment_on, workers, name="deit"):
    """All batches of two epochs."""
    source = open_source(str(data), "train")
    how = (RECIPES[name], 16, *STATS)
    on_device = augment_on == "device"
    transform, augmentation = split(*how, CPU) if on_device else (training_transform(*how), None)
    torch.manual_seed(workers)  # what the process drew before must not matter
    np.random.seed(workers)
    return list(
        Loader(
            source,
            transform,
            Batches(Plan(len(source), 8, views=2, seed=3), 2),
            seed=3,
            workers=workers,
            device=CPU,
            augmentation=augmentation,
        )
    )


@pytest.mark.parametrize("name", ["deit", "deit3, erasing"])
def test_samples_are_the_same_for_any_number_of_workers(name, data):
    here, there = (loaded(data, "device", workers, name) for workers in (0, 2))
    assert len(here) == 12
    for one, other in zip(here, there, strict=True):
        assert one.drawn == other.drawn
        assert one.draws == other.draws
        assert one.images.dtype == torch.float32
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert any(what.operations for batch in here for what in batch.drawn)


def test_the_workers_augment_by_default_and_as_they_did(data):
    assert training.options(data, data / "nowhere").augment_on == "workers"
    source = open_source(str(data), "train")
    transform = training_transform(RECIPES["deit"], 16, *STATS)
    for batch in loaded(data, "workers", 0)[:2]:
        assert batch.drawn == []
        for image, draw in zip(batch.images, batch.draws, strict=True):
            with seeded(3, draw.epoch, draw.image, draw.view):
                assert torch.equal(image, transform(source.read(draw.image)[0]))


def test_a_batch_is_a_quarter_of_the_bytes_on_its_way(data):
    drawing, _ = split(RECIPES["deit"], 16, *STATS, CPU)
    source, draws = open_source(str(data), "train"), [Draw(0, p, 0, p, 0) for p in range(8)]
    loader = Loader(source, drawing, [draws], seed=0, workers=0, device=CPU)
    (batch,) = loader
    assert batch.images.nbytes == 8 * 3 * 16 * 16
    assert len(batch.drawn) == 8


def test_an_unreadable_image_takes_nothing_with_it(data, tmp_path):
    training.images(tmp_path)
    broken = sorted((tmp_path / "train" / "blue").iterdir())[2]
    broken.write_text("not an image")
    for batch in loaded(tmp_path, "device", 0):
        assert len(batch.images) == len(batch.drawn) == len(batch.draws)
    assert any(len(batch.drawn) < 8 for batch in loaded(tmp_path, "device", 0))


def test_a_run_that_goes_on_has_the_bits_of_one_that_did_not_stop(
    data, tmp_path, monkeypatch, one_thread
):
    options = training.options(data, tmp_path / "whole", augment_on="device")
    assert train(options)["finished"]
    step = Trainer.step

    def stopped(self, *arguments):
        self.signalled = self.update == 4
        return step(self, *arguments)

    other = replace(options, out=tmp_path / "stopped", workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        assert train(other)["update"] == 5
    assert train(other)["finished"]
    found = training.weights(options.out)
    assert same(found, training.weights(other.out)) == []
    assert train(training.options(data, tmp_path / "workers"))["finished"]
    assert same(found, training.weights(tmp_path / "workers"))  # another path, other bits


def test_two_processes_have_the_losses_of_one(data, tmp_path):
    changes = ["recipe_epochs=1", "recipe_drop_path=0", "augment_on=device"]
    printed = []
    for name, command in (("one", PROGRAM), ("two", [*TORCHRUN, PROGRAM[1]])):
        done = subprocess.run(
            [*command, str(data), str(tmp_path / name), *changes],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(losses(done.stdout))
    one, two = printed
    assert len(one) == 3
    assert two == pytest.approx(one, rel=2e-5)


def test_the_command_takes_it_and_refuses_before_it_writes(data, tmp_path, capsys):
    flags = (
        f"train --data {data} --arch deit_ti --img-size 16 --embed-dim 64 --depth 1 --patch-size 8 "
        "--epochs 1 --batch-size 16 --ema None --workers 0 --device cpu --augment-on device"
    ).split()
    assert main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert main([*flags, "--out", str(tmp_path / "no"), "--policy", "augmix-m3"]) == 2
    assert "has AugMixAugment, which has no kernel" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
