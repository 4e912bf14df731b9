"""The results as a table, as verdicts, and as evidence rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import evidence
from evidence import devices, paper_table
from evidence.timing import Spread, compare, percentile, spread
from race.contenders import Contender
from race.photos import Photographs
from race.race import Race

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRAINING_FLOPS = 3  # a training step counts as three forwards: backward is two


def speeds(contender: Contender) -> Spread:
    """Images/s over the rounds; the mean is the batch over the mean seconds, as in the paper."""
    spread_ = spread([contender.batch / seconds for seconds in contender.samples])
    mean = contender.batch / statistics.fmean(contender.samples)
    return Spread(spread_.low, spread_.median, spread_.high, mean, spread_.n)


def verdict(fused: Contender, other: Contender) -> str:
    """How the fused model compares with another contender of the same rounds.

    A claim is made only where the interval of the paired ratios leaves out 1: what slows the
    machine down slows both contenders of a round, so their ratio is steadier than either speed.
    """
    found = compare(_image_seconds(fused), _image_seconds(other))
    label = f"{fused.label} vs {other.variant}"
    if found.verdict not in ("faster", "slower"):
        few = " to tell" if found.verdict == "too few rounds" else ""
        return f"{label}: {found.verdict}{few} ({found})"
    times = max(found.ratio, 1 / found.ratio)
    return f"{label}: {times:.2f}x {found.verdict} ({found})"


def _image_seconds(contender: Contender) -> list[float]:
    return [seconds / contender.batch for seconds in contender.samples]


def number(value: float) -> str:
    """Four significant digits, never in exponent form."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def gflop(contender: Contender, train: bool) -> float:
    """GFLOP for one image, two a multiply-add."""
    return contender.network.flops * (TRAINING_FLOPS if train else 1) / 1e9


def empty(*columns: Column | str) -> Table:
    """A table with these columns and no rows yet; a head alone makes a column of numbers."""
    made = (Column(c, justify="right") if isinstance(c, str) else c for c in columns)
    return Table(*made, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def quoted_numbers(head: str) -> Column:
    """A column of the paper's numbers."""
    return Column(head, justify="right", style="dim")


def table(race: Race) -> Table:
    """One row a contender, 78 columns wide at most."""
    paper = race.settings.protocol == "deit2021"
    shown = empty(
        Column("measured", overflow="fold", max_width=25),
        "img/s\nmean of runs" if paper else "img/s\nquartiles",
        *("ms per\nimage", "GFLOP/s", "% of\npeak", "peak\nMB"),
        *map(quoted_numbers, ("quoted\ntop-1", "quoted\nV100 img/s")),
    )
    for contender in race.finalists:
        speed = speeds(contender)
        rate = speed.mean if paper else speed.median
        flops = rate * gflop(contender, race.settings.train)
        row, memory = contender.network.quoted, contender.memory_bytes
        how = contender.variant + (f", batch {contender.batch}" if _batches_differ(race) else "")
        shown.add_row(
            Text(f"{contender.network.label}\n  {how}", style=_style(contender)),
            f"{number(rate)}\n{number(speed.low)} to {number(speed.high)}",
            number(1e3 / rate),
            number(flops),
            # The peak is of the run's dtype: it says nothing of 8-bit products.
            "-"
            if contender.precision in evidence.EIGHT_BITS
            else f"{100 * flops * 1e9 / race.peak.flops_per_s:.0f}",
            "-" if memory is None else f"{memory / 1e6:.0f}",
            f"{row.top1}" if row else "-",
            f"{row.v100_img_s}" if row else "-",
        )
    return shown


def latencies(race: Race) -> Table:
    """One row a contender: the middle and the tail of single calls, in milliseconds."""
    numbers = ("p50, ms", "p99, ms", "quartiles, ms", "calls", "peak MB")
    shown = empty(Column("measured", overflow="fold", max_width=40), *numbers)
    for contender in race.finalists:
        times = [1e3 * seconds for seconds in contender.samples]
        middle, memory = spread(times), contender.memory_bytes
        shown.add_row(
            Text(contender.label, style=_style(contender)),
            number(middle.median),
            number(percentile(times, 99)),
            f"{number(middle.low)} to {number(middle.high)}",
            f"{middle.n}",
            "-" if memory is None else f"{memory / 1e6:.0f}",
        )
    return shown


def _style(contender: Contender) -> str:
    return "bold" if contender.is_fused else ""


def _batches_differ(race: Race) -> bool:
    return len({contender.batch for contender in race.finalists}) > 1


def terms(race: Race, facts: Mapping[str, Any]) -> str:
    """One line: what was measured, where and how."""
    s = race.settings
    kind = str(s.dtype).removeprefix("torch.")
    mode = "training steps" if s.train else "single calls" if s.latency else "inference"
    if s.neighbour:
        mode += " beside a process that keeps one core busy"
    if s.teacher:
        mode += f" with the labels of {s.teacher.label}"
    where = facts["device"]
    if s.device.type == "cpu":
        where += f", {facts['threads']} threads, {facts['cpu_capability']}"
    batch = "each network's largest batch" if _batches_differ(race) else f"batch {race.batch}"
    tf32 = ", TF32 off" if s.dtype == torch.float32 and s.device.type == "cuda" else ""
    rounds = len(race.finalists[0].samples)
    return (
        f"{mode}, protocol {s.protocol}, {kind}{tf32}, {batch}, {rounds} interleaved rounds\n"
        f"measured on {where}\n"
        f"torch {facts['torch']}, timm {facts['timm']}; peak {race.peak}"
    )


def show(race: Race, facts: Mapping[str, Any], photographs: Mapping[str, Photographs]) -> None:
    """Print everything on stdout, 80 to 120 columns wide."""
    console = Console(highlight=False)
    console.width = min(120, max(80, console.width)) if console.is_terminal else 100
    out = console.print
    out(terms(race, facts), markup=False)
    out(latencies(race) if race.settings.latency else table(race))
    for contender in race.finalists:
        if contender.is_fused:
            for line in _about_fused(race, contender):
                out(line, markup=False)
    for label, photos in photographs.items():
        for line in photo_lines(label, photos):
            out(line, markup=False)
    compiled = [c for c in race.finalists if c.compile_seconds is not None]
    if compiled:
        times = (
            f"{c.label} {c.compile_seconds:.0f} s{' (cached)' if c.compile_cached else ''}"
            for c in compiled
        )
        out("apart from timing: building " + ", ".join(times), markup=False)
    warm = sum(c.warmup_seconds for c in race.finalists)
    out(f"apart from timing: warming up {warm:.0f} s in all", markup=False)
    for contender in race.finalists:
        if contender.about:
            out(f"{contender.label}: {contender.about}", style="dim", markup=False)
    out(_footnotes(race), style="dim", markup=False)
    for message in race.notes:
        out(f"note: {message}", markup=False)


def _about_fused(race: Race, fused: Contender) -> list[str]:
    others = [c for c in race.finalists if c.network is fused.network and c is not fused]
    lines = [verdict(fused, other) for other in others]
    operators = fused.operators or {}
    ran = ", ".join(f"{operator}: {impl}" for operator, impl in operators.items())
    return [*lines, f"{fused.label} ran {ran or 'none of the operators'}"]


def _footnotes(race: Race) -> str:
    each = "a training step counted as three forwards" if race.settings.train else "forward"
    memory = devices.MEMORY_IS[race.settings.device.type]
    return (
        f"quoted: {paper_table.SOURCE} (one V100, fp32, the largest batch), not measured here. "
        f"FLOPs: two a multiply-add, {each}. Peak MB: {memory}. "
        f"{'The teacher counts in the time alone. ' * (race.settings.teacher is not None)}"
        "Convnets keep the paper's image sizes; of each, the fastest variant tried is shown."
    )


def photo_lines(label: str, photos: Photographs) -> list[str]:
    """The photographs' figures and what could not be read."""
    work = "decoding and augmenting" if photos.augmented else "decoding"
    lines = [
        f"photographs through {label}: {photos.used} files read, {photos.images} images a pass, "
        f"{photos.workers} {work} processes",
        f"  the loader alone: {number(photos.loader.median)} img/s",
    ]
    for variant, model in photos.model.items():
        whole = photos.end_to_end[variant]
        lines.append(
            f"  {variant}: model only {number(model.median)} img/s, end to end "
            f"{number(whole.median)} img/s "
            f"({number(whole.low)} to {number(whole.high)}, n={whole.n})"
        )
    if photos.unreadable:
        named = "; ".join(photos.unreadable[:10])
        more = len(photos.unreadable) - 10
        lines.append(
            f"  {len(photos.unreadable)} unreadable, left out: {named}"
            + (f"; and {more} more" if more > 0 else "")
        )
    return lines


def rows(
    race: Race,
    facts: Mapping[str, Any],
    arguments: Sequence[str] | None,
    photographs: Mapping[str, Photographs],
    script: str = "throughput.py",
) -> list[dict[str, Any]]:
    """One evidence row a contender; see evidence.FIELDS."""
    s = race.settings
    common = {
        **facts,
        "schema": evidence.SCHEMA,
        "date": evidence.now(),
        "command": evidence.command_line(arguments, script),
        "protocol": s.protocol,
        "mode": "training" if s.train else "latency" if s.latency else "inference",
        "batch_asked": s.batch,
        "teacher": s.teacher.label if s.teacher else None,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == s.dtype),
        "tf32": False,
        "gpu_state": devices.gpu_query(s.device, "clocks.sm,clocks.mem,power.draw,temperature.gpu"),
        "peak_gflop_per_s": race.peak.flops_per_s / 1e9,
        "peak_size": race.peak.size,
        "peak_by": race.peak.by,
    }
    return [common | _row(race, contender, photographs) for contender in race.finalists]


def _row(
    race: Race, contender: Contender, photographs: Mapping[str, Photographs]
) -> dict[str, Any]:
    network, speed = contender.network, speeds(contender)
    photos = photographs.get(network.label)
    work = gflop(contender, race.settings.train)
    quoted = network.quoted
    scope = race.scope(contender.precision)
    return {
        "network": network.label,
        "contender": contender.variant,
        "img_size": network.img_size,
        "batch": contender.batch,
        "n": speed.n,
        "calls_per_sample": contender.calls,
        "img_per_s": speed.median,
        "img_per_s_low": speed.low,
        "img_per_s_high": speed.high,
        "img_per_s_mean": speed.mean,
        "seconds": contender.samples,
        "parameters": sum(p.numel() for p in contender.module.parameters()),
        "gflop_per_image": work,
        "gflop_per_s": work * speed.median,
        "memory_bytes": contender.memory_bytes,
        "warmup_seconds": contender.warmup_seconds,
        "compile_seconds": contender.compile_seconds,
        "logits_error": contender.logits_error,
        "tried": contender.tried,
        "operators": contender.operators,
        "kernels_sha256": race.kernels[scope] if contender.is_fused else None,
        "kernels_scope": scope if contender.is_fused else None,
        "quoted_top1": quoted.top1 if quoted else None,
        "quoted_v100_img_per_s": quoted.v100_img_s if quoted else None,
        "quoted_source": paper_table.SOURCE if quoted else None,
        "photographs": photos.row(contender.variant) if photos else None,
        "peer": contender.about,
    }
