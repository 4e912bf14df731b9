"""What is exported computes what the network computes."""

import json

import pytest
import torch
from PIL import Image

from deit import create
from deit.attention_maps import attention_maps, picture
from deit.checkpoint import save
from deit.cli import main
from deit.configs import Config
from deit.model import DeiT
from deit.report import draw, history
from deit.runs import RunFolder

SMALL = Config("small", embed_dim=64, num_heads=1, depth=2, img_size=32, num_classes=7)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(DeiT(SMALL), path)
    return path


@pytest.mark.parametrize(
    ("form", "suffix"), [("safetensors", "safetensors"), ("torch", "pt2"), ("aoti", "pt2")]
)
def test_exported_files_have_the_networks_logits(weights, tmp_path, form, suffix, capsys):
    out = tmp_path / f"out.{suffix}"
    assert main(["export", str(weights), "--out", str(out), "--format", form]) == 0
    assert "differ by" in capsys.readouterr().out
    assert out.stat().st_size > 0


def test_onnx_runs_in_onnx_runtime(weights, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs the package onnxscript")
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    out = tmp_path / "out.onnx"
    assert main(["export", str(weights), "--out", str(out), "--format", "onnx"]) == 0
    assert "differ by" in capsys.readouterr().out


def test_a_file_that_computes_something_else_is_refused(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("deit.export.difference", lambda *_: 0.1)
    assert main(["export", str(weights), "--out", str(tmp_path / "o.safetensors")]) == 2
    assert "differs from the network by 0.1" in capsys.readouterr().err


def test_the_model_card_says_how_to_prepare_images(weights, tmp_path):
    main(["export", str(weights), "--out", str(tmp_path / "o.safetensors")])
    card = (tmp_path / "README.md").read_text()
    assert "7 classes" in card
    assert "short side of 36 pixels" in card


@pytest.mark.parametrize("distilled", [False, True])
def test_attention_maps_are_the_softmax_of_the_prefix_tokens(distilled):
    torch.manual_seed(0)
    model = create("deit_ti", distilled=distilled, img_size=32, num_classes=3).eval()
    caught = []
    block = model.blocks[-1]
    block.norm1.register_forward_hook(lambda _, __, out: caught.append(out))
    images = torch.randn(2, 3, 32, 32)
    maps = attention_maps(model, images)
    prefix = 2 if distilled else 1
    assert maps.shape == (2, 3, prefix, 2, 2)
    q, k, _ = block.attn.qkv(caught[0]).view(2, 4 + prefix, 3, 3, 64).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-1, -2) / 8).softmax(-1)[:, :, :prefix, prefix:]
    torch.testing.assert_close(maps.flatten(3), expected)
    with pytest.raises(ValueError, match=r"layer: expected in \[-12, 12\); got 12"):
        attention_maps(model, images, 12)


def test_the_picture_has_a_row_for_each_token():
    sheet = picture(Image.new("RGB", (30, 20)), torch.rand(3, 2, 2, 2), heads=True)
    assert sheet.size == (5 * 34 - 4, 2 * 24 - 4)


def test_explain_image_writes_a_picture(weights, tmp_path):
    Image.new("RGB", (50, 40), (90, 10, 200)).save(tmp_path / "in.png")
    out = tmp_path / "maps.png"
    command = ["explain-image", str(tmp_path / "in.png"), "--weights", str(weights)]
    assert main([*command, "--out", str(out)]) == 0
    assert Image.open(out).size == (2 * 228 - 4, 224)  # 32 pixels are shown sevenfold


def test_reports_read_the_log(tmp_path, capsys, monkeypatch):
    run = RunFolder(tmp_path / "a")
    run.begin({})
    scores = {"top1": {"class": 50.0, "distillation": 55.0, "softmax-sum": 60.0}}
    pace = {"images_per_s": 10.0, "waited_percent": 1.0}
    run.log(update=0, teacher={"top1": {"class": 90.0}})
    for update in (1, 2):
        run.log(update=update, loss=2.0 / update, lr=0.1, **pace)
        run.log(update=update, model=scores)
    run.log(update=2, unreadable="x.png", reason="broken")
    found = history(tmp_path / "a")
    assert found.losses == [(1, 2.0), (2, 1.0)]
    expected = {"model, class": 50.0, "model, distillation": 55.0, "model, softmax-sum": 60.0}
    assert found.last == expected
    assert (found.teacher, found.unreadable) == (90.0, 1)
    pytest.importorskip("matplotlib")
    draw([found], tmp_path / "curves.svg")
    assert "held-out top-1" in (tmp_path / "curves.svg").read_text()
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["report", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    for word in ("60.00", "90.00", "distillation", "softmax-sum", "unreadable"):
        assert word in shown
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert json.loads((tmp_path / "a" / "run.json").read_text()) == {}
