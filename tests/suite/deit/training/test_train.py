"""Whole runs: what they report, keep and compute."""

import ast
import itertools
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import training
from PIL import Image
from safetensors.torch import load_file
from training import same

from deit import load
from deit.commands.cli import main
from deit.fused_vit.blocks import FusedBlock
from deit.recipes import recipe
from deit.training import assemble, distillation, trainer
from deit.training.options import Shape
from deit.training.trainer import Trainer, train
from deit.weights import networks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_reports_and_keeps_what_it_did(whole):
    out, result = whole
    assert result["finished"]
    assert result["update"] == 9
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["update"] for e in entries if "model" in e] == [3, 6, 9]
    assert entries[-1]["model"]["images"] == 24
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["00000006", "00000009"]
    about = json.loads((out / "run.json").read_text())
    assert about["classes"] == ["blue", "green", "red"]
    assert about["options"]["recipe"]["mixup"] == 0.8


def test_the_average_is_evaluated_by_its_own_weights(whole, data, capsys):
    last = [json.loads(line) for line in (whole[0] / "log.jsonl").read_text().splitlines()][-1]
    for name in ("model", "average"):
        weights = str(whole[0] / f"{name}.safetensors")
        assert main(["eval", weights, "--data", str(data), "--json", "--workers", "0"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(last[name]["loss"], rel=1e-5)
    assert last["average"]["loss"] != pytest.approx(last["model"]["loss"], rel=1e-3)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(whole, data, tmp_path):
    train(training.options(data, tmp_path / "a", workers=2))
    assert same(training.weights(whole[0]), training.weights(tmp_path / "a")) == []
    train(training.options(data, tmp_path / "b", seed=1, recipe_epochs=1))
    assert same(training.weights(whole[0]), training.weights(tmp_path / "b"))


def test_only_its_own_methods_assign_an_objects_state():
    """Those of the objects that a run is made of: the trainer, its learner, pace, and so on."""
    trees = [ast.parse(path.read_text()) for path in Path(trainer.__file__).parent.glob("*.py")]
    targets = [
        target
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        for each in getattr(node, "targets", None) or [node.target]
        for target in ast.walk(each)
        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
    ]
    own = {t.attr for t in targets if isinstance(t.value, ast.Name) and t.value.id == "self"}
    foreign = {ast.unparse(t) for t in targets} - {f"self.{name}" for name in own}
    assert {"update", "average", "scores"} <= own
    assert [name for name in foreign if name.rpartition(".")[2] in own] == []


def short_run(options, monkeypatch):
    """The losses of each update, and the final weights."""
    found, step = [], Trainer.step

    def watched(self, *arguments):
        result = step(self, *arguments)
        found.append(result[0])
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", watched)
        train(options)
    return found, training.weights(options.out)


@pytest.fixture(params=["plain", "distilled"])
def short(request, whole, data):
    """Makes options of three updates, without a teacher or with one and the token."""
    extra = {"distill": "hard", "teacher": str(whole[0]), "distilled": True}
    given = extra if request.param == "distilled" else {}
    return lambda out, **changes: training.options(
        data, out, **{"recipe_epochs": 1, "recipe_drop_path": 0.0, **given, **changes}
    )


@pytest.mark.parametrize(
    "means",
    [
        {"accumulate": 4},
        {"checkpoint_activations": True},
        {"checkpoint_activations": True, "recipe_drop_path": 0.3},  # drawn alike once more
        {"compile": True},  # drop_path: compiled code draws otherwise
    ],
    ids=["accumulate", "checkpoint", "checkpoint and drop", "compile"],
)
def test_other_means_give_the_same_losses(means, short, tmp_path, monkeypatch):
    drop = {k: v for k, v in means.items() if k.startswith("recipe_")}
    expected, weights = short_run(short(tmp_path / "plain", **drop), monkeypatch)
    found, others = short_run(short(tmp_path / "other", **means), monkeypatch)
    assert found == pytest.approx(expected, rel=2e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_activations_are_recomputed_by_fused_blocks(short, tmp_path, monkeypatch):
    calls, advance = [], FusedBlock.advance

    def counted(self, *arguments, **options):
        calls.append(self.training)
        return advance(self, *arguments, **options)

    monkeypatch.setattr(FusedBlock, "advance", counted)
    train(short(tmp_path, checkpoint_activations=True))
    assert sum(calls) == 3 * 2 * 2  # updates, blocks, and each of them twice


def test_bf16_is_close_and_not_the_same(short, tmp_path, monkeypatch):
    expected, _ = short_run(short(tmp_path / "fp32"), monkeypatch)
    found, weights = short_run(short(tmp_path / "bf16", dtype="bf16"), monkeypatch)
    assert found != expected
    assert found == pytest.approx(expected, rel=2e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_fusing_the_network_and_its_loss_are_pytorchs(dtype, short, tmp_path, monkeypatch):
    expected, _ = short_run(short(tmp_path / "fused", dtype=dtype), monkeypatch)
    asked = []
    for name in ("cross_entropy", "distillation_loss"):
        loss = getattr(distillation, name)

        def watched(*arguments, loss=loss, **options):
            asked.append(options["impl"])
            return loss(*arguments, **options)

        monkeypatch.setattr(distillation, name, watched)
    monkeypatch.setattr(FusedBlock, "advance", None)
    found, _ = short_run(short(tmp_path / "plain", dtype=dtype, fuse=False), monkeypatch)
    assert asked == ["reference"] * 3
    assert found == pytest.approx(expected, rel=2e-5 if dtype == "fp32" else 2e-2)


def test_fp16_scales_its_loss_and_skips_an_overflow(short, tmp_path, monkeypatch):
    expected, _ = short_run(short(tmp_path / "fp32"), monkeypatch)
    found, _ = short_run(short(tmp_path / "fp16", dtype="fp16"), monkeypatch)
    assert found != expected
    assert found == pytest.approx(expected, rel=5e-3)
    # 2**40 is infinite in fp16: no update is made, and the scale falls by half each time.
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    options = short(tmp_path / "over", dtype="fp16")
    train(options)
    torch.manual_seed(options.seed)
    start = {f"model.{k}": v for k, v in assemble.network(options, 3).state_dict().items()}
    ended = training.weights(options.out)
    assert same(start, {name: ended[name] for name in start}) == []
    saved = torch.load(options.out / "checkpoints" / "00000003" / "training.pt")
    assert saved["scaler"]["scale"] == 2.0**37


def test_distillation_with_a_token_reports_three_heads(whole, data, tmp_path, capfd):
    result = train(
        training.options(
            data, tmp_path, distill="hard", teacher=str(whole[0]), distilled=True, recipe_epochs=1
        )
    )
    assert list(result["model"]["top1"]) == ["class", "distillation", "softmax-sum"]
    assert "teacher: " in capfd.readouterr().err


def test_fine_tuning_at_a_higher_resolution(whole, data, tmp_path):
    result = train(
        training.options(data, tmp_path, weights=str(whole[0]), img_size=32, recipe_epochs=1)
    )
    assert result["finished"]
    found = training.weights(tmp_path)
    assert found["model.pos_embed"].shape == (1, 17, 64)


def test_transfer_to_other_classes_starts_their_heads_afresh(whole, tmp_path):
    rng, other = np.random.default_rng(1), tmp_path / "data"
    for split, name in itertools.product(("train", "val"), ("dark", "light")):
        (other / split / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 100, (20, 20, 3), dtype=np.uint8) + 100 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(other / split / name / f"{i}.png")
    result = train(
        training.options(
            other, tmp_path / "run", weights=str(whole[0]), recipe_lr=1e-6, recipe_epochs=1
        )
    )
    assert result["model"]["images"] == 16
    before, after = training.weights(whole[0]), training.weights(tmp_path / "run")
    assert after["model.head.weight"].shape == (2, 64)
    name = "model.blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)


def test_a_timm_network_starts_and_teaches_from_a_file(data, tmp_path):
    torch.manual_seed(0)
    published = timm.create_model("test_resnet", num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.save({"model": published.state_dict()}, tmp_path / "resnet.pth")
    name = f"timm:test_resnet={tmp_path / 'resnet.pth'}"
    torch.testing.assert_close(networks.pretrained(name, 32)(images), published(images))
    own = {"arch": "timm:test_resnet", "shape": Shape(), "recipe_epochs": 1, "recipe_ema": None}
    options = training.options(data, tmp_path / "run", weights=name, recipe_lr=1e-9, **own)
    result = train(options)  # three classes, by a fresh head
    assert result["finished"]
    found = training.weights(tmp_path / "run")
    torch.testing.assert_close(found["model.conv1.0.weight"], published.conv1[0].weight.detach())
    with pytest.raises(ValueError, match="weights: expected those of arch timm:resnet18; got timm"):
        train(replace(options, arch="timm:resnet18", out=tmp_path / "other"))
    taught = training.options(
        data, tmp_path / "taught", distill="soft", teacher=name, recipe_epochs=1
    )
    with pytest.raises(ValueError, match=r"teacher: expected logits of shape \(2, 3\).*\(2, 5\)"):
        train(taught)
    torch.save(load_file(tmp_path / "run" / "model.safetensors"), tmp_path / "three.pth")
    teacher = f"timm:test_resnet={tmp_path / 'three.pth'}"
    assert train(replace(taught, teacher=teacher))["finished"]


def test_fixres_changes_the_classifier_alone(whole, data, tmp_path):
    train(
        training.options(
            data,
            tmp_path,
            weights=str(whole[0]),
            train_only="classifier",
            recipe_crop="center",
            recipe_ema=None,
            recipe_epochs=1,
        )
    )
    before, after = training.weights(whole[0]), training.weights(tmp_path)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"model.head.weight", "model.head.bias"}


def test_deit3s_recipe_trains_our_network_with_layer_scale(data, tmp_path):
    short = recipe("deit3", epochs=2, batch_size=16, warmup_epochs=0.0)
    result = train(replace(training.options(data, tmp_path), recipe=short))
    assert result["finished"]
    model = load(tmp_path / "model.safetensors")
    assert model.config.layer_scale == 1e-4
    for block in model.blocks:
        for scale in (block.ls1, block.ls2):
            assert scale.gamma.isfinite().all()
            assert not torch.equal(scale.gamma, torch.full_like(scale.gamma, 1e-4))


def test_the_commands_run(data, whole, tmp_path, capsys):
    flags = (
        f"--data {data} --out {tmp_path / 'run'} --arch deit_ti --img-size 16 --embed-dim 64 "
        "--depth 1 --patch-size 8 --epochs 1 --batch-size 16 --ema None --workers 0 --device cpu "
        "--eval-crop 0.6"
    )
    assert main(["train", *flags.split()]) == 0
    assert (
        main(["eval", str(tmp_path / "run"), "--data", str(data), "--json", "--workers", "0"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["model"]
    assert (found["images"], found["top1"]) == (24, last["top1"])
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)  # the run's own crop
    other = tmp_path / "other"
    shutil.copytree(data / "val", other / "val")
    (other / "val" / "blue").rename(other / "val" / "azure")  # labels would move
    assert main(["eval", str(tmp_path / "run"), "--data", str(other), "--workers", "0"]) == 2
    assert "classes that training has not: ['azure']" in capsys.readouterr().err
    assert main(["train", *flags.split(), "--mixup", "-1"]) == 2
    assert "mixup: expected at least 0; got -1" in capsys.readouterr().err
