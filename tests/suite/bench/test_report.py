"""bench/report.py: the page from sample rows: its structure, what is marked stale, and, where
Chromium is installed, that it opens without errors and fits a phone and a desktop."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import evidence
import report
from evidence import paper_table
from page import drawing, listings, overview, pictures

Row = dict[str, Any]
ROOT = Path(__file__).parents[3]
VOID = {"meta", "link", "br"}

MACHINE: Row = {
    "device": "Sample <CPU>", "driver": None, "cpu": "Sample <CPU>", "processor": {},
    "cores": 2, "threads": 2,
    "cpu_capability": "AVX2", "python": "3.11", "torch": "2.15", "cuda": None, "triton": None,
    "timm": "1.0",
}  # fmt: skip


def throughput_rows(kernels: str) -> list[Row]:
    """A row a network of Table 5 and contender; speeds as if FLOPs were all that counts."""
    draw = random.Random(0)
    rows = []
    for quoted in paper_table.networks():
        convnet = quoted.model in paper_table.CONVNETS
        name = paper_table.label(quoted)
        ways = {"eager, channels_last": 1.0} if convnet else {"fused": 2.2, "eager": 1.0}
        for contender, gain in ways.items():
            speed = gain * quoted.v100_img_s / 50
            seconds = [8 / speed * draw.gauss(1, 0.02) for _ in range(7)]
            rows.append({
                **MACHINE, "schema": evidence.SCHEMA, "date": "2026-01-02T03:04:05+00:00",
                "command": f"python bench/table5.py --only {name}", "protocol": "modern",
                "mode": "inference", "network": name, "contender": contender,
                "img_size": quoted.img_size, "batch": 8, "batch_asked": 256, "dtype": "fp32",
                "tf32": False, "gpu_state": None, "n": 7, "calls_per_sample": 1,
                "img_per_s": speed, "img_per_s_low": 0.98 * speed, "img_per_s_high": 1.02 * speed,
                "img_per_s_mean": speed, "seconds": seconds, "parameters": 1000,
                "gflop_per_image": 2.5, "gflop_per_s": 2.5 * speed, "peak_gflop_per_s": 430.0,
                "peak_size": 2048, "peak_by": "matmul", "memory_bytes": 10**8,
                "warmup_seconds": 1.0, "compile_seconds": None, "logits_error": 1e-6,
                "tried": {}, "operators": None, "photographs": None, "peer": None,
                "kernels_sha256": kernels if contender == "fused" else None,
                "quoted_top1": quoted.top1, "quoted_v100_img_per_s": quoted.v100_img_s,
                "quoted_source": paper_table.SOURCE,
            })  # fmt: skip
    return rows + other_modes([row for row in rows if row["network"] == "deit_ti"])


def other_modes(pair: list[Row]) -> list[Row]:
    """Two networks' single calls of 1 and 4 images, and training steps: six rows."""
    calls = [
        row | {"mode": "latency", "batch": batch, "command": f"latency {batch}",
               "seconds": [batch * 0.01] * 98 + [0.5 * batch] * 2, "n": 100}
        for batch in (1, 4) for row in pair
    ]  # fmt: skip
    return calls + [row | {"mode": "training", "command": "training"} for row in pair]


def operators_document(kernels: str) -> Row:
    """Two operators, forward and backward, by ours and PyTorch's best."""
    rows = []
    for operator, calls, flops, size in (
        ("linear qkv", 12, 7e8, 1e7),
        ("layer_norm", 25, 5e6, 5e6),
    ):
        for direction, factor in (("forward", 1.0), ("backward", 2.2)):
            for contender, slow in (("cpu", 1.0), ("eager", 1.9), ("compiled", 1.7)):
                seconds = factor * slow * max(flops / 4e11, size / 2e10)
                rows.append({
                    "operator": operator, "direction": direction, "arch": "deit_ti", "batch": 16,
                    "dtype": "fp32", "contender": contender, "ours": "cpu", "best": "compiled",
                    "calls": calls, "n": 15, "sets": 4, "seconds": seconds, "low": 0.9 * seconds,
                    "high": 1.1 * seconds, "bytes": size, "flops": flops, "ratio": 1.7 / slow,
                    "ratio_low": 1.6 / slow, "ratio_high": 1.8 / slow, "share": 0.5 / slow,
                })  # fmt: skip
    ceilings = {"bytes_per_s": 2e10, "copy_bytes": 2**28, "flops_per_s": 4.3e11,
                "product": "2048³, fp32, by matmul"}  # fmt: skip
    return {**MACHINE, "kind": "operators", "title": "Operators", "kernels_sha256": kernels,
            "date": "2026-01-02T03:04:05+00:00", "command": "pytest bench/operators",
            "ceilings": ceilings, "rows": rows}  # fmt: skip


def scaling_document(kernels: str) -> Row:
    """Images/s against batch."""
    rows = [
        {"sweep": "batch", "network": "deit_ti", "contender": contender, "x": x, "n": 7,
         "img_per_s": gain * x**0.1, "img_per_s_low": gain * x**0.1 * 0.9,
         "img_per_s_high": gain * x**0.1 * 1.1, "memory_bytes": 10**6 * x}
        for contender, gain in (("fused", 100.0), ("eager", 60.0))
        for x in (1, 2, 4, 8, 16)
    ]  # fmt: skip
    fits = [{"sweep": "batch", "contender": "fused", "exponent": 0.9, "text": "seconds ~ x^0.90"}]
    return {**MACHINE, "kind": "scaling", "title": "Cost of scale", "kernels_sha256": kernels,
            "date": "2026-01-02T03:04:05+00:00", "command": "python bench/scaling.py",
            "rows": rows, "fits": fits}  # fmt: skip


def write_samples(folder: Path, kernels: str) -> list[Path]:
    """Four files of results; the last of a form the page knows nothing of."""
    other = {**MACHINE, "date": "2026-01-02", "command": "python bench/other.py",
             "kernels_sha256": kernels, "top1": 73.5, "curve": {"a": [1, 2]},
             "rows": [{"name": "<b>", "value": 1.5}, {"name": "c", "extra": [1]}]}  # fmt: skip
    contents = {"a.json": throughput_rows(kernels), "b.json": operators_document(kernels),
                "c.json": scaling_document(kernels), "d.json": other}  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return [folder / name for name in contents]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    out = folder / "page.html"
    files = [str(path) for path in write_samples(folder, evidence.kernels_sha256())]
    assert report.main([*files, "--out", str(out), "--pictures", str(folder / "svg")]) == 0
    return out


class Outline(HTMLParser):
    """Checks that every element is closed, and keeps what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.seen)


def test_structure(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.open == []
    # accuracy, speed-up, of calls, of steps, operators, roofline, batch: each wide and narrow
    assert (outline.count("figure"), outline.count("svg")) == (7, 14)
    # all devices, Table 5, networks, latency, training, operators, sweeps, fits, the others, runs
    assert outline.count("table") == 10
    words = " ".join(outline.words)
    for part in ("Accuracy (quoted)", "Speed-up", "Time by operator", "Roofline", "batch size",
                 "efficientnet_b8↑800", "quoted", "AVX2", "Sample <CPU>", "seconds ~ x^0.90",
                 "python bench/table5.py --only deit_b⚗↑384", "0 of 45 results are stale",
                 "Training steps", "deit_ti vs eager, 4 images",
                 "2.20x", "83.4 / 84.2", "2536.5", "V100 img/s"):  # fmt: skip
        assert part in words, part


def test_page_loads_nothing_and_names_no_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert link == "data:," or f'id="{link.removeprefix("#")}"' in text  # drawn there
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"\s<]*", text)) == namespaces
    assert str(ROOT) not in text
    assert "url(" not in text


def test_a_row_of_other_kernels_is_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    files = [str(path) for path in write_samples(tmp_path, "other kernels")]
    assert report.main([*files, "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    fused = sum(not q.model.startswith(("res", "reg", "eff")) for q in paper_table.networks())
    assert f"{fused + 6} of 45 results are stale" in text
    # of all devices, in Table 5, in the tables of networks, latency and training, and of runs
    assert text.count('<tr class="stale">') == 4 * fused + 3 + 3 + 3
    assert f"{fused + 6} stale" in capsys.readouterr().out
    assert f"Measured 2026-01-02. Stale, measured with other kernels: {fused} of 36" in text


def test_table5_holds_what_its_heads_say() -> None:
    """The figures of PyTorch in fp32 are not those of other runtimes or dtypes, however fast."""
    fused, eager = (row for row in throughput_rows("") if row["network"] == "deit_s")
    faster = {"img_per_s": 9e5, "img_per_s_mean": 9e5}
    others = [eager | {"contender": "OpenVINO"}, fused | {"dtype": "bf16"},
              fused | {"contender": "fused int8"}, fused | {"mode": "training"}]  # fmt: skip
    rows = [fused, eager, *(row | faster for row in others)]
    assert listings.paper(rows, lambda _: False) == listings.paper(rows[:2], lambda _: False)
    on_a_gpu = fused | {"driver": "570"}  # where Table 5 is in bf16
    assert listings.paper([on_a_gpu], lambda _: False) == ""
    assert listings.paper([on_a_gpu | {"dtype": "bf16"}], lambda _: False) != ""


def test_pictures_as_files_carry_their_colours(page: Path) -> None:
    found = sorted(path.name for path in (page.parent / "svg").iterdir())
    assert found == ["accuracy.svg", "operators.svg", "roofline.svg", "speedup-latency.svg",
                     "speedup-training.svg", "speedup.svg", "sweep-batch.svg"]  # fmt: skip
    for name in found:
        text = (page.parent / "svg" / name).read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in text
        assert Outline(text).open == []


def test_pictures_by_name(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(page.parent / "a.json"), "--out", str(tmp_path / "page.html")]
    named = ["--pictures", str(tmp_path / "svg"), "--named"]
    assert report.main([*files, *named, "accuracy"]) == 0
    assert [path.name for path in (tmp_path / "svg").iterdir()] == ["accuracy.svg"]
    assert report.main([*files, *named, "roofline"]) == 2
    assert "named: expected among accuracy, speedup, speedup-latency, " in capsys.readouterr().err


def test_what_only_pytorch_runs_counts_for_both() -> None:
    """Parts that nobody fused count in the time of both, so leaving them out gains nothing."""
    document = operators_document("x")
    alone = [row | {"ours": "eager", "best": "eager"} for row in document["rows"]
             if row["operator"] == "layer_norm" and row["contender"] == "eager"]  # fmt: skip
    rest = [row for row in document["rows"] if row["operator"] != "layer_norm"]
    drawing = pictures.by_operator(document | {"rows": rest + alone}).svg(900)
    assert drawing.count("layer_norm by eager") == 4


def test_latency_is_shown_by_its_middle_and_its_tail(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    table = text[text.index("<h3>Latency</h3>") : text.index("<h3>Training steps</h3>")]
    shown = re.findall(r'data-v="([^"]*)"', table)
    assert shown[:6] == ["deit_ti", "fused", "fp32", "1.0", "10.0", "500.0"]  # ms: p50, p99
    assert table.count("<tr") == 1 + 4
    networks = text[text.index("<h3>Networks</h3>") : text.index("<h3>Latency</h3>")]
    assert "latency 1" not in networks


def test_the_committed_results_make_a_page(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert report.main(["--out", str(out)]) == 0
    assert Outline(out.read_text(encoding="utf-8")).open == []


@pytest.mark.parametrize("content", ["", "3", '[{"a": 1}]'])
def test_what_is_no_result_is_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert report.main([str(tmp_path / "rows.json"), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "rows.json: " in error
    assert not (tmp_path / "page.html").exists()


def test_without_matplotlib_the_page_says_so() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import report"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        cwd=ROOT / "bench",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: the page needs matplotlib (pip install matplotlib)\n"


def test_identical_contenders_show_no_difference() -> None:
    rows = throughput_rows("x")
    pair = [dict(row) for row in rows if row["network"] == "deit_ti"][:2]
    pair[1]["seconds"] = pair[0]["seconds"]
    assert [each.found.verdict for each in pictures.comparisons(pair)] == ["no difference"]
    assert "no difference" in pictures.speedups(pair, "inference", "fp32").html()


def test_of_two_runs_of_the_same_the_longer_is_drawn() -> None:
    first = [dict(row) for row in throughput_rows("x") if row["network"] == "deit_ti"][:2]
    again = [row | {"date": "2030", "n": row["n"] + 1, "seconds": [1.0] * 9} for row in first]
    for rows in (first + again, again + first):
        assert [each.fused["date"] for each in pictures.comparisons(rows)] == ["2030"]


def test_the_terms_of_most_rows_have_the_name_without_a_number() -> None:
    """The README's pictures take that name, whatever file comes first."""
    rows = throughput_rows("x")
    few = [dict(row) | {"dtype": "bf16"} for row in rows if row["network"] == "deit_s"]
    for both in (few + rows, rows + few):
        found = report.Found(both, {}, {row.get("kernels_scope"): "" for row in both})
        titles: dict[str, str] = {}
        for each in report.drawn(found):
            titles.setdefault(each.name, each.title)
        assert titles["accuracy"].endswith("modern, fp32")
        assert titles["speedup"] == "Speed-up by variant: images/s, fp32"


def test_speedups_of_calls_and_steps_have_pictures_of_their_own() -> None:
    pair = [dict(row) for row in throughput_rows("x") if row["network"] == "deit_ti"][:2]
    rows = [row | {"mode": mode} for mode in ("latency", "inference", "training") for row in pair]
    rows += [row | {"protocol": "deit2021"} for row in pair]
    found = report.Found(rows, {}, {row.get("kernels_scope"): "" for row in rows})
    names = [each.name for each in report.drawn(found) if each.name.startswith("speedup")]
    assert names == ["speedup", "speedup-deit2021", "speedup-latency", "speedup-training"]


# Two devices ------------------------------------------------------------------------------------

OTHER = "Sample (family 25, AVX2)"


def on_other(rows: list[Row]) -> list[Row]:
    return [row | {"device": OTHER, "threads": 4} for row in rows]


def test_two_devices_stand_in_one_table_and_in_sections_of_their_own(tmp_path: Path) -> None:
    """The device of most rows keeps the README's pictures, whatever file comes first."""
    rows = throughput_rows("x")
    few = [row for row in rows if row["network"] in ("deit_ti", "deit_s")]
    evidence.save(tmp_path / "0.json", on_other(few))
    evidence.save(tmp_path / "1.json", rows)
    out, svg = tmp_path / "page.html", tmp_path / "svg"
    files = [str(tmp_path / name) for name in ("0.json", "1.json")]
    assert report.main([*files, "--out", str(out), "--pictures", str(svg)]) == 0
    text = out.read_text(encoding="utf-8")
    head, first, second = text.split("<section>")
    assert "<h2>Sample &lt;CPU&gt;</h2>" in first
    assert f"<h2>{OTHER}</h2>" in second
    shown = re.findall(r"<td[^>]*>([^<]*)</td>", head.partition("DeiT on every device")[2])
    assert [shown[i : i + 4] for i in (14, 21)] == [
        [OTHER, "4", "deit_ti", "8"], ["Sample &lt;CPU&gt;", "2", "deit_ti", "8"],
    ]  # fmt: skip
    assert (
        "<title>Accuracy (quoted) against images/s: modern, fp32: Sample &lt;CPU&gt;</title>"
        in (svg / "accuracy.svg").read_text(encoding="utf-8")
    )
    assert OTHER in (svg / "accuracy-2.svg").read_text(encoding="utf-8")


def test_the_readmes_table_says_device_batch_and_what_is_stale() -> None:
    fused, eager = (row for row in throughput_rows("x") if row["network"] == "deit_s")
    of = lambda name, speed: eager | {"contender": name, "img_per_s": speed}
    whole = [fused | {"img_per_s": 50.0}, of("eager", 20.0), of("OpenVINO", 52.0)]
    whole += [of("fused int8", 150.0) | {"kernels_sha256": "x"}, of("OpenVINO int8", 120.0)]
    another = [row | {"command": "other", "batch": 16, "date": "2027"}
               for row in (fused, of("compiled", 21.04))]  # fmt: skip
    others = on_other([fused | {"img_per_s": 9.0, "kernels_sha256": "old"}, of("eager", 4.0)])
    bad = [row | {"img_per_s": 9e9, **change} for row in whole for change in (
        {"mode": "training"}, {"protocol": "deit2021"}, {"dtype": "bf16"}, {"driver": "570"},
    )]  # fmt: skip
    stale = lambda row: row["kernels_sha256"] == "old"
    table = overview.markdown([*another, *whole, *others, *bad], stale)
    quoted = "DeiT-S, 79.8 %; 8"
    assert table.splitlines()[2:] == [
        f"| Sample <CPU>, 2 threads | {quoted} | 50 | 20 | 21 (16) | – | **52** | **150** | 120 |",
        f"| {OTHER}, 4 threads | {quoted} | **9**† | 4 | – | – | – | – | – |",
    ]
    assert "`torch.compile` | ONNX Runtime | OpenVINO | int8: fused" in table


def test_the_table_goes_between_its_marks(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    command = [str(page.parent / "a.json"), "--out", str(tmp_path / "p"), "--readme", str(readme)]
    readme.write_text(f"# Mine\n\n{overview.START}\nold\n{overview.END}\nAfter.\n")
    assert report.main(command) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"# Mine\n\n{overview.START}\n\n| images/s, measured on |")
    assert text.endswith(f"|\n\n{overview.END}\nAfter.\n")
    assert "old" not in text
    assert report.main(command) == 0
    assert readme.read_text(encoding="utf-8") == text
    readme.write_text("no marks")
    assert report.main(command) == 2
    assert "readme: expected a file with the lines <!-- measured" in capsys.readouterr().err


# Drawings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "width", "expected"),
    [
        (0.9, 110, 900, [1, 2, 5, 10, 20, 50, 100]),
        (0.9, 110, 356, [1, 3, 10, 30, 100]),
    ],
)
def test_ticks_are_round(low: float, high: float, width: int, expected: list[float]) -> None:
    figure, axes = drawing.field(width, 300, "across")
    drawing.by_logarithm(axes, "x")
    axes.set_xlim(low, high)
    figure.draw_without_rendering()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert shown == pytest.approx(expected)


def test_labels_cover_nothing() -> None:
    """Of names in a crowd only those are shown that have a place."""
    _, axes = drawing.field(400, 400, "across", "up")
    crowd = [(1 + i / 40, 1.0) for i in range(12)]
    for at in [*crowd, (0.0, 0.0), (2.0, 2.0)]:
        drawing.mark(axes, *at, "", drawing.look("c0"))
    boxes = drawing.label(axes, [(*at, "a label", "c0") for at in crowd])
    shown = [text for text in axes.texts if text.get_text() == "a label"]
    assert 0 < len(shown) < 12
    for box, text in zip(boxes[-len(shown) :], shown, strict=True):
        assert box.bounds == pytest.approx(text.get_window_extent().bounds)
    for i, box in enumerate(boxes[-len(shown) :], len(boxes) - len(shown)):
        assert not box.count_overlaps(boxes[:i])


def test_a_drawing_is_the_same_again_and_in_colours_by_name(page: Path) -> None:
    """The committed pictures change with their rows alone, and follow the paper."""
    picture = pictures.by_operator(operators_document("x"))
    text = picture.svg(900)
    assert text == picture.svg(900)
    drawn = text.partition("</style>")[2]
    assert "var(--c0)" in drawn
    assert not set(re.findall(r"#[0-9a-f]{6}\b", drawn)) - {"#000000"}
    wide, narrow = picture.svg(900, "wide"), picture.svg(356, "narrow")
    ids = [set(re.findall(r' id="([^"]*)"', each)) for each in (wide, narrow)]
    assert all(ids)
    assert not ids[0] & ids[1]


# In a browser -----------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PROBE = """<script>
addEventListener("error", (e) => document.title += " error: " + e.message);
addEventListener("load", () => {
  const column = (t, i) => [...t.tBodies[0].rows].map((r) => r.children[i].dataset.v);
  const table = document.querySelectorAll("table")[1];
  table.querySelectorAll("th button")[6].click();
  const up = column(table, 6).map(Number);
  table.querySelectorAll("th button")[6].click();
  const down = column(table, 6).map(Number);
  const shown = [...document.querySelectorAll("svg")].filter((s) => s.getClientRects().length);
  document.body.dataset.found = JSON.stringify({
    width: document.documentElement.clientWidth, scroll: document.documentElement.scrollWidth,
    paper: getComputedStyle(document.body).backgroundColor, shown: shown.length,
    widest: Math.max(...shown.map((s) => s.getBoundingClientRect().right)),
    scale: Math.min(...shown.map((s) => s.getBoundingClientRect().width / s.viewBox.baseVal.width)),
    up, down,
  });
});
</script></head>"""


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(page: Path, width: int, dark: bool, tmp_path: Path) -> None:
    """In a frame of that width: no errors, nothing too wide or too small, tables that sort."""
    inner = tmp_path / "inner.html"
    inner.write_text(page.read_text(encoding="utf-8").replace("</head>", PROBE, 1))
    # A window of Chromium has at least 500 px; a frame may have any width.
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe src="inner.html" width="{width}" height="900" style="border:0"></iframe>'
        "<script>onload = () => document.title = document.querySelector('iframe')"
        ".contentDocument.body.dataset.found</script>"
    )
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
             "--virtual-time-budget=4000", "--enable-logging=stderr", "--dump-dom"]  # fmt: skip
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [CHROMIUM, *flags, outer.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert not re.search(r":CONSOLE[:(].*", done.stderr), done.stderr
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(title[1])
    assert found["width"] >= width - 20  # less a scroll bar
    assert found["scroll"] <= found["width"]
    assert found["widest"] <= found["width"]
    assert found["shown"] == 7  # of wide and narrow drawings one each
    assert found["scale"] > 0.9  # type of 12 px is drawn at 11 px or more
    assert found["up"] == sorted(found["up"]) == found["down"][::-1]
    assert found["paper"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
