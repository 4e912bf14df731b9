"""One page, self-contained, of everything measured: bench/results/*.json as pictures and tables.

    python bench/report.py                        # build/report.html
    python bench/report.py --pictures docs --named accuracy speedup    # the README's pictures
    python bench/report.py --readme README.md     # and its table

The rows of each device stand apart. A row measured with other kernels than today's is stale and
marked; beside every row stands the command that makes it anew.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import evidence
from deit.commands import flags
from evidence import paper_table

try:
    from page import distillation, html, listings, overview, pictures
    from page.drawing import WIDE, Picture
except ModuleNotFoundError as missing:
    package = (missing.name or "").partition(".")[0]
    raise SystemExit(f"error: the page needs {package} (pip install {package})") from None

Row = dict[str, Any]
TITLE = "fused-deit: what was measured"


@dataclass(frozen=True)
class Options:
    """Make the page."""

    results: flags.Positional[tuple[Path, ...]] = ()
    """Files of results. Not given: all of bench/results."""
    out: Path = evidence.ROOT / "build" / "report.html"
    """Where the page goes."""
    pictures: Path | None = None
    """A folder for the pictures as files of their own, for a README."""
    named: tuple[str, ...] = ()
    """Which pictures: accuracy, accuracy-2 (other terms or another device), speedup, ...; not
    given: all."""
    readme: Path | None = None
    """A Markdown file, whose table of speeds is written anew between its marks."""


@dataclass(frozen=True)
class Found:
    """What the results hold: evidence rows, each with its file, and documents by file."""

    rows: list[Row]
    documents: dict[str, Row]
    kernels: dict[str | None, str]  # scope -> the hash of today's kernels

    def stale(self, row: Row) -> bool:
        """Have the kernels changed since? Never for what runs none of them."""
        today = self.kernels[row.get("kernels_scope")]
        return row.get("kernels_sha256") not in (None, today)

    def devices(self) -> list[str]:
        """Every device something was measured on, that of most rows first.

        Its pictures have the names without a number, which the README shows.
        """
        sources = [*self.rows, *self.documents.values()]
        counts = Counter(row.get("device", "unnamed") for row in sources)
        return [device for device, _ in counts.most_common()]

    def of(self, device: str) -> Found:
        """What was measured on one device."""
        same = lambda row: row.get("device", "unnamed") == device
        documents = {name: each for name, each in self.documents.items() if same(each)}
        return Found([row for row in self.rows if same(row)], documents, self.kernels)


def load(paths: Sequence[Path]) -> Found:
    """The results in these files; ValueError that names the file for what is none."""
    rows: list[Row] = []
    documents: dict[str, Row] = {}
    for path in sorted(paths):
        content = evidence.load(path)
        if isinstance(content, list):
            rows += [row | {"file": path.name} for row in evidence.read([path])]
        else:
            documents[path.name] = content
    if not rows and not documents:
        raise ValueError("results: expected files of results; got none")
    scopes = {each.get("kernels_scope") for each in (*rows, *documents.values())}
    return Found(rows, documents, {each: evidence.kernels_sha256(scope=each) for each in scopes})


# Pictures ---------------------------------------------------------------------------------------


def panels(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows on like terms, with those terms in words; those of most rows first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["mode"] == "inference":
            batches = "" if row["protocol"] == "deit2021" else ", TF32 off" * bool(row["driver"])
            kind = f"{row['protocol']}, {row['dtype']}{batches * (row['dtype'] == 'fp32')}"
            found.setdefault(kind, []).append(row)
    return sorted(found.items(), key=lambda each: -len(each[1]))


def drawn(found: Found) -> list[Picture]:
    """Every picture that one device's results have the rows for."""
    made = []
    for terms, rows in panels(found.rows):
        if any(row["quoted_top1"] is not None for row in rows):
            made.append(_dated(pictures.accuracy(rows, terms), rows, found))
    for dtype, kind, rows in _by_what_was_timed(found.rows):
        if pictures.comparisons(rows):
            made.append(_dated(pictures.speedups(rows, kind, dtype), rows, found))
    for document in found.documents.values():
        made += [_dated(each, [document], found) for each in distillation.drawn(document)]
        if document.get("kind") == "operators":
            shown = [pictures.by_operator(document), pictures.roofline(document)]
            made += [_dated(each, [document], found) for each in shown]
        if document.get("kind") == "scaling":
            names = dict.fromkeys(row["sweep"] for row in document["rows"])
            shown = [pictures.sweep(document, name) for name in names]
            made += [_dated(each, [document], found) for each in shown]
    return made


def _dated(picture: Picture, drawn_from: Sequence[Row], found: Found) -> Picture:
    """The picture, its caption saying when it was measured and how much of that is stale."""
    dates = sorted(row.get("date", "")[:10] for row in drawn_from)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    stale = sum(map(found.stale, drawn_from))
    old = f" Stale, measured with other kernels: {stale} of {len(drawn_from)} results." * bool(
        stale
    )
    return replace(picture, caption=f"{picture.caption} Measured {when}.{old}")


def _by_what_was_timed(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    found: list[tuple[str, str, list[Row]]] = []
    counts = Counter(row["dtype"] for row in rows)
    for dtype, _ in counts.most_common():  # the first has the name without a number
        for kind in pictures.SPEEDUPS:
            alike = [r for r in rows if r["dtype"] == dtype and pictures.timed(r) == kind]
            found.append((dtype, kind, alike))
    return found


# The page ---------------------------------------------------------------------------------------

MACHINE = ("device", "cpu", "cores", "threads", "cpu_capability", "driver", "python", "torch",
           "cuda", "triton", "timm", "gpu_state")  # fmt: skip
HIDDEN = (*MACHINE, "processor", "kind", "schema", "title", "command", "date", "kernels_sha256",
          "kernels_scope", "seconds")  # fmt: skip


def machine(found: Found) -> str:
    """The device and the versions; where runs differed, every value."""
    values: dict[str, list[str]] = {}
    for row in [*found.rows, *found.documents.values()]:
        for name in MACHINE:
            if row.get(name) is not None and str(row[name]) not in values.setdefault(name, []):
                values[name].append(str(row[name]))
    if found.rows:
        peak = max(found.rows, key=lambda row: row["peak_gflop_per_s"])
        best = f"{peak['peak_gflop_per_s']:.0f} GFLOP/s, {peak['peak_size']}³ {peak['dtype']}"
        values["matrix product, best measured"] = [f"{best}, by {peak['peak_by']}"]
    return html.facts((name, ", ".join(each)) for name, each in values.items())


PEAK = "Of the peak: GFLOP/s over the matrix product of that dtype measured in the same run"
MODES: dict[str, tuple[str, str, Callable[..., str]]] = {  # evidence's modes -> how they are shown
    "inference": ("Networks", f"Medians of interleaved rounds. {PEAK}.", listings.models),
    "latency": (
        "Latency",
        "Single calls, one after another, each network's contenders in turn.",
        listings.latencies,
    ),
    "training": (
        "Training steps",
        "Forward, loss, backward and AdamW; GFLOP counted as three forwards, the backward being "
        f"two. {PEAK}: the model's FLOP utilisation, MFU.",
        listings.models,
    ),
}


def section(device: str, found: Found) -> str:
    """One device: machine, pictures, tables, what is stale."""
    parts = [f"<h2>{escape(device)}</h2>", machine(found)]
    parts += [picture.html() for picture in drawn(found)]
    if table5 := listings.paper(found.rows, found.stale):
        parts.append(f"<h3>Table 5 of the paper, beside this device</h3>{table5}")
    parts += [
        f"<h3>{title}</h3><p class='quiet'>{said}</p>{listing(rows, found.stale)}"
        for mode, (title, said, listing) in MODES.items()
        if (rows := [row for row in found.rows if row["mode"] == mode])
    ]
    for name, document in found.documents.items():
        title = f"<h3>{escape(document.get('title', name))}</h3>"
        if found.stale(document):
            title += '<p class="quiet">Stale: the kernels have changed since.</p>'
        if document.get("kind") == "operators":
            parts.append(title + listings.operators(document))
        else:
            parts.append(title + html.document(document, HIDDEN))
    named = [each | {"file": name} for name, each in found.documents.items()]
    results = [*found.rows, *named]
    said = f"{sum(map(found.stale, results))} of {len(results)} results are stale"
    why = "the kernels have changed since they were measured."
    parts.append(f"<h3>Runs</h3><p>{said}: {why}</p>{listings.runs(results, found.stale)}")
    return f"<section>{''.join(parts)}</section>"


def make(found: Found) -> str:
    """The whole page."""
    intro = (
        f"<h1>{escape(TITLE)}</h1><p>Speeds are measured on the devices named here, contenders of "
        "a run interleaved in rounds and checked for equal outputs first. Accuracies and V100 "
        f"speeds are <em>quoted</em> from {escape(paper_table.SOURCE)}, never measured here. A "
        "click on a column's head sorts a table; pointing at a mark names it.</p>"
    )
    if speeds := overview.table(found.rows, found.stale):
        intro += (
            "<h2>DeiT on every device</h2><p class='quiet'>Images/s, medians of rounds; "
            "of several runs the one that timed most. What it did not time is from another run, "
            f"with its batch where that differs.</p>{speeds}"
        )
    sections = [section(device, found.of(device)) for device in found.devices()]
    return html.whole(TITLE, intro + "".join(sections))


def save_pictures(folder: Path, named: Sequence[str], found: Found) -> None:
    """Pictures as files of their own, with colours and paper in them: NAME.svg, NAME-2.svg, ...

    Raises ValueError for a name that no picture has.
    """
    files: dict[str, Picture] = {}
    seen: Counter[str] = Counter()
    several = len(found.devices()) > 1
    for device in found.devices():
        for picture in drawn(found.of(device)):
            if several:  # a file stands alone: nothing above it names the device
                picture = replace(picture, title=f"{picture.title}: {device}")
            seen[picture.name] += 1
            again = f"-{seen[picture.name]}" if seen[picture.name] > 1 else ""
            files[picture.name + again] = picture
    if wrong := sorted(set(named) - files.keys()):
        raise ValueError(f"named: expected among {', '.join(sorted(files))}; got {wrong[0]!r}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in named or files:
        (folder / f"{name}.svg").write_text(files[name].svg(WIDE), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 2 for files that hold no results."""
    options = flags.parse(Options, arguments, __doc__)
    try:
        found = load(options.results or sorted(evidence.RESULTS.glob("*.json")))
        if options.pictures:
            save_pictures(options.pictures, options.named, found)
        if options.readme:
            table = overview.markdown(found.rows, found.stale)
            text = overview.into(options.readme.read_text(encoding="utf-8"), table)
            options.readme.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(make(found), encoding="utf-8")
    stale = sum(map(found.stale, [*found.rows, *found.documents.values()]))
    print(f"{options.out}: {len(found.rows)} rows, {len(found.documents)} documents, {stale} stale")
    return 0


if __name__ == "__main__":
    sys.exit(main())
