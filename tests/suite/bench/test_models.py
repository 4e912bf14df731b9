"""bench/models.py, and docs/models.md against the timm that is installed."""

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("transformers", minversion="5.0")

import models  # noqa: E402 - after the skips
from deit.fused_vit import hf_dinov2  # noqa: E402


def written():
    text = models.FILE.read_text(encoding="utf-8")
    if models.versions() not in text:
        pytest.skip(f"docs/models.md is of other versions than these. {models.versions()}")
    return text


def test_every_architecture_is_in_the_table_once():
    text = written()
    named = [
        word for line in text.splitlines() if line.startswith("| ") for word in line.split("`")
    ]
    for name in (*models.architectures(), *models.TRANSFORMERS):
        assert named.count(name) == 1, name


def test_the_counts_are_of_all():
    rows = [line.split("|") for line in written().splitlines() if line.startswith("| ")]
    counts = [(int(row[2]), int(row[3])) for row in rows if row[2].strip().isdigit()]
    assert len(counts) == len(models.VERDICTS)
    found = tuple(map(sum, zip(*counts, strict=True)))
    assert found == (len(models.architectures()), len(models.TRANSFORMERS))


# `make models CHECK=1` tries all of them; here one of most kinds.
SAMPLE = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "levit_128s",
          "vit_base_patch32_clip_quickgelu_224", "mobilevit_xxs",
          "vit_relpos_small_patch16_224"]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_says_what_is_found(name):
    (line,) = (line for line in written().splitlines() if f"`{name}`" in line)
    found = models.of_timm(name)
    cells = (found.verdict, found.model, found.reason.replace("|", "\\|"))
    assert line.startswith(f"| {' | '.join(cells)} | ")


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("dinov2", "whole"), ("clip_vision_model", "whole"), ("siglip_vision_model", "whole")],
)
def test_transformers_towers(name, verdict):
    if name == "dinov2" and hf_dinov2.REFUSED:  # in transformers 5.17
        pytest.skip(next(iter(hf_dinov2.REFUSED.values())))
    found = models.of_transformers(name)
    assert (found.verdict, found.reason) == (verdict, "")


def test_verdicts():
    class Attention(torch.nn.Module):
        pass

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()
            self.own = torch.nn.Parameter(torch.zeros(3))

    class Model(torch.nn.Module):
        def __init__(self, *parts):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block()])
            self.parts = torch.nn.ModuleList(parts)

    norm, mlp = torch.nn.LayerNorm(8), timm.layers.Mlp(8, 8)
    reason = "Block: no fused form of this class"
    assert models.judged("timm", Model()) == models.Kind("timm", "not", "Model", reason)
    assert models.judged("timm", Model(norm)).verdict == "norms"
    assert models.judged("timm", Model(norm, mlp)).verdict == "in part"


def test_another_version_is_not_compared(monkeypatch, capsys):
    monkeypatch.setattr(models, "versions", lambda: "Of timm 0.0.1.")
    monkeypatch.setattr(models, "found", lambda only: pytest.fail("it was tried"))
    assert models.main(["--check"]) == 0
    assert "skipped" in capsys.readouterr().out


def test_a_difference_is_found(monkeypatch, capsys, tmp_path):
    file = tmp_path / "models.md"
    monkeypatch.setattr(models, "FILE", file)
    kind = models.Kind("timm", "not", "Model", "why")
    monkeypatch.setattr(models, "found", lambda only: {kind: ["vit_a"]})
    assert models.main(["--write"]) == 0
    assert models.main(["--check"]) == 0
    file.write_text(file.read_text().replace("why |", "why else |"))
    assert models.main(["--check"]) == 1
    assert "-| not | Model | why else | `vit_a` |" in capsys.readouterr().out
