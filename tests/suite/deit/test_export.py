"""What is exported computes what the network computes."""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from PIL import Image

from deit import create
from deit.attention_maps import attention_maps, picture
from deit.commands.cli import main
from deit.configs import Config
from deit.data.images import Prepare, normalise
from deit.export import preparation, to_aoti
from deit.fused_vit import fuse, fused
from deit.kernels.engine import dispatch, limits, native
from deit.kernels.prove import schemas
from deit.model import DeiT
from deit.training.report import draw, history
from deit.training.runs import RunFolder
from deit.weights import networks
from deit.weights.checkpoint import save

ROOT = Path(__file__).resolve().parents[3]
SMALL = Config("small", embed_dim=64, num_heads=1, depth=2, img_size=32, num_classes=7)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save(DeiT(SMALL), path)
    return path


def test_exported_weights_have_the_networks_logits(weights, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["export", str(weights), "--out", str(out)]) == 0
    assert "differ by 0 at most" in capsys.readouterr().out


# What a program does with the file that never saw the network.
PROGRAMS = {
    "torch": "run = torch.export.load(sys.argv[1]).module()",
    "aoti": "from deit.export import load_package; run = load_package(sys.argv[1])",
    "onnx": "import onnxruntime; session = onnxruntime.InferenceSession(sys.argv[1]); "
    "run = lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])",
}
FRESH = """
import sys, torch
images, logits = torch.load(sys.argv[2])
PROGRAM
with torch.no_grad():
    print(float((run(images) - logits).abs().max()))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A distilled network, and what `deit export` writes of it, by format; each is written once."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(1)
    model = DeiT(replace(SMALL, distilled=True, layer_scale=0.1)).eval()
    for head in (model.head, model.head_dist):
        torch.nn.init.normal_(head.weight, std=0.1)
    save(model, folder / "small.safetensors")

    @functools.cache
    def written(form):
        out, said = folder / f"{form}.{'onnx' if form == 'onnx' else 'pt2'}", io.StringIO()
        command = ["export", str(folder / "small.safetensors"), "--format", form]
        with contextlib.redirect_stdout(said):
            assert main([*command, "--out", str(out)]) == 0
        assert "differ by" in said.getvalue()
        return out, said.getvalue()

    return model, written


@pytest.mark.parametrize("form", PROGRAMS)
def test_another_process_runs_the_file_of_a_distilled_network(form, exported, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="needs the package onnxscript")
        pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    model, written = exported
    (out, _), case = written(form), tmp_path / "case.pt"
    images = torch.randn(5, 3, 32, 32)  # another batch than the one it was exported with
    with torch.no_grad():
        torch.save((images, model(images)), case)
    program = FRESH.replace("PROGRAM", PROGRAMS[form])
    done = subprocess.run(
        [sys.executable, "-c", program, str(out), str(case)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
    if form == "aoti" and not native.why_not("cpu"):
        with zipfile.ZipFile(out) as package:  # the fused operators, not their decompositions
            code = b"".join(package.read(n) for n in package.namelist() if n.endswith(".cpp"))
        for operator in (b"layer_norm", b"linear", b"gelu_mlp", b"vit_block"):
            assert b"deit_cpu." + operator in code, operator


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """Runs examples/cpp, built here: arguments -> the finished process."""
    if native.why_not("cpu"):
        pytest.skip("; ".join(native.why_not("cpu")))
    compiler = os.environ.get("CXX", "c++")
    if shutil.which("make") is None or shutil.which(compiler.split()[0]) is None:
        pytest.skip(f"examples/cpp needs make and a C++ compiler; {compiler} or make is not here")
    if not (ROOT / "examples" / "cpp").is_dir():
        pytest.skip("examples/ is not here: the tests run on a wheel")
    out = tmp_path_factory.mktemp("cpp") / "classify"
    command = ["make", "-C", str(ROOT / "examples" / "cpp"), f"OUT={out}", f"CXX={compiler}"]
    torch_folder = Path(torch.__file__).parent
    done = subprocess.run(
        [*command, f"TORCH={torch_folder}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr

    def run(*arguments):
        return subprocess.run([out, *arguments], capture_output=True, text=True, timeout=120)

    return run


def test_a_program_in_cpp_classifies_photographs(exported, classify, tmp_path):
    model, written = exported
    package, said = written("aoti")
    library = native.FOLDER / native.LIBRARIES["cpu"]
    assert f"its operators are in {library}" in said
    photographs = [Image.fromarray(array) for array in sklearn.datasets.load_sample_images().images]
    photographs[1] = photographs[1].crop((0, 0, 301, 427))  # upright, and odd margins
    paths = [tmp_path / f"{number}.ppm" for number in range(len(photographs))]
    for path, photograph in zip(paths, photographs, strict=True):
        photograph.save(path)
    done = classify(package, library, *paths)
    assert done.returncode == 0, done.stderr
    prepare = Prepare(32, fast=True)
    with fused(model), torch.no_grad():
        expected = model(normalise(torch.stack([prepare(each) for each in photographs])))
    sections = re.split(r"^(?=/)", done.stdout, flags=re.MULTILINE)[1:]
    for path, row, section in zip(paths, expected, sections, strict=True):
        name, *lines = section.splitlines()
        assert name == str(path)
        shown = [line.split() for line in lines]
        best = row.topk(5)
        assert [f"{line[-2]} {line[-1]}" for line in shown] == [f"class {i}" for i in best.indices]
        logits = torch.tensor([float(line[4]) for line in shown])
        torch.testing.assert_close(logits, best.values, rtol=0, atol=1e-5)
        shares = torch.tensor([float(line[1]) for line in shown])
        torch.testing.assert_close(shares, 100 * row.softmax(0)[best.indices], rtol=0, atol=0.006)


def test_the_program_in_cpp_names_what_it_cannot_use(exported, classify, tmp_path):
    package, _ = exported[1]("aoti")
    library = native.FOLDER / native.LIBRARIES["cpu"]
    short = tmp_path / "short.ppm"
    short.write_bytes(b"P6 # a comment\n2 2\n255\n1234567890")
    for arguments, message in (
        ((package, library, short), "short.ppm: ends before its last pixel"),
        ((package, "/nowhere.so", short), "LIBRARY: /nowhere.so"),
        ((tmp_path / "none.pt2", library, short), "none.pt2: cannot be opened"),
    ):
        done = classify(*arguments)
        assert done.returncode == 1
        assert message in done.stderr


def on_a_gpu(monkeypatch):
    """Traces take CPU tensors for those of a GPU of compute capability 8.0."""
    before = dispatch.environment
    monkeypatch.setattr(
        dispatch,
        "environment",
        lambda name, *rest: before(name, *rest) if name == "cpu" else (),
    )
    monkeypatch.setattr(limits, "capability", lambda *_: (8, 0))


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a_package_calls_no_operator_that_python_launches(impl, exported, tmp_path, monkeypatch):
    on_a_gpu(monkeypatch)
    monkeypatch.setattr("deit.fused_vit.fuse", lambda model, _: fuse(model, impl))
    program = []
    compiler = "torch._inductor.aoti_compile_and_package"
    monkeypatch.setattr(compiler, lambda given, **_: program.append(given))
    monkeypatch.setattr("deit.export.load_package", lambda path: path)
    images, out = torch.randn(2, 3, 32, 32), tmp_path / "out.pt2"
    if impl == "triton":
        with pytest.raises(ValueError, match=r"deit_triton\.attention.* would need Python"):
            to_aoti(exported[0], images, out)
        return
    to_aoti(exported[0], images, out)
    called = {str(node.target) for node in program[0].graph.nodes}
    ours = {name.removesuffix(".default") for name in called if name.startswith("deit_")}
    in_library = {f"deit_cuda.{name}" for name in schemas.in_library("cuda")}
    assert {"deit_cuda.attention", "deit_cuda.linear", "deit_cuda.gelu_mlp"} <= ours <= in_library


def test_a_file_that_computes_something_else_is_refused(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("deit.export.difference", lambda *_: 0.1)
    assert main(["export", str(weights), "--out", str(tmp_path / "o.safetensors")]) == 2
    assert "differs from the network by 0.1" in capsys.readouterr().err


def test_the_model_card_says_how_to_prepare_images(weights, tmp_path):
    main(["export", str(weights), "--out", str(tmp_path / "o.safetensors")])
    card = (tmp_path / "README.md").read_text()
    assert "7 classes" in card
    assert "short side of 36 pixels" in card


def test_an_exported_run_keeps_how_its_images_are_prepared(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    torch.manual_seed(0)
    model = DeiT(replace(SMALL, num_classes=2)).eval()
    save(model, run / "model.safetensors")
    about = {
        "classes": ["boot", "bag"],
        "mean": [0.3] * 3,
        "std": [0.4] * 3,
        "options": {"data": "d", "recipe": {"eval_crop": 1.0}},
    }
    (run / "run.json").write_text(
        json.dumps(about | {"network": {"arch": "small", "img_size": 32}, "versions": {}})
    )
    exported = tmp_path / "boots" / "boots.safetensors"
    assert main(["export", str(run), "--out", str(exported)]) == 0
    assert main(["export", str(run), "--out", str(exported)]) == 0  # a card of ours is replaced
    assert "Classes: boot, bag." in (exported.parent / "README.md").read_text()
    assert networks.opened(exported)[1] == about
    assert networks.opened(run)[1]["classes"] == ["boot", "bag"]


def test_a_readme_that_is_no_model_card_is_not_overwritten(weights, tmp_path, capsys):
    (tmp_path / "README.md").write_text("# Mine\n")
    assert main(["export", str(weights), "--out", str(tmp_path / "o.safetensors")]) == 2
    assert "the model card would overwrite" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert not (tmp_path / "o.safetensors").exists()


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
    run.log(update=1, loss=2.0, lr=0.1, **pace)  # twice, as an older version's killed run
    run.log(update=1, model=scores)
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"update": 1, "loss": "low"}', "loss: expected a number; got 'low'"),
        ('{"update": 1, "loss": 1.0}', "images_per_s: expected a number; got none"),
        ('{"update": 1, "model": 3}', "model: expected a JSON object; got 3"),
        ('{"update": 1, "model": {"top1": {"class": 101}}}', "model.top1.class: .* got 101"),
        ('{"update": 1, "teacher": {}}', "teacher.top1: expected a JSON object; got none"),
    ],
)
def test_a_log_that_no_run_wrote_is_named_with_its_field(tmp_path, line, message):
    (tmp_path / "log.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"log\.jsonl: {message}"):
        history(tmp_path)


def test_of_images_that_are_no_photographs_a_package_says_nothing():
    assert preparation(DeiT(replace(SMALL, in_chans=1)), {}, []) == {}
    said = preparation(DeiT(SMALL), {"mean": [0.3] * 3}, ["boot", "two\nlines"])
    assert said["mean"] == "0.3 0.3 0.3"
    assert (said["short_side"], said["classes"]) == ("36", "boot\ntwo lines")
