"""What is installed here and what runs: `deit info`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deit.kernels.device import tuning
from deit.kernels.engine import device_key, dispatch, native, registry, verdicts
from deit.kernels.engine.operator import OPERATORS
from deit.kernels.engine.processor import processor, processor_label

PACKAGES = ("fused-deit", "torch", "triton", "torchvision", "timm", "transformers", "numpy")


def collect() -> dict[str, Any]:
    """Versions, devices, libraries and operators as plain data (JSON types only).

    versions: package -> version or None. cpu, gpus: the devices. libraries: kind ->
    `native.status`. operators: operator -> device -> {"auto": implementation in inference,
    "evidence": on what, "reasons": {implementation: [why not, ...]}, "measured": a list of what
    was measured, by calls}; no reasons means that it runs there, on whatever inputs its own limits
    allow (`deit.kernels.explain` tells for given ones). A ratio is to PyTorch's speed: 2 is twice.
    keys: device -> what its measurements are kept under. tuned: a sentence for each GPU model on
    its configurations from `deit tune`.
    """
    gpus = _gpus()
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": gpus,
        "libraries": {kind: native.status(kind) for kind in native.LIBRARIES},
        "operators": {
            name: {device: _operator(name, device) for device in _devices(gpus)}
            for name in OPERATORS
        },
        "keys": {name: _key(name) for name in _devices(gpus)},
        "tuned": _tuned(),
    }


def _key(device: str) -> dict[str, Any]:
    table = verdicts.table_of(torch.device(device))
    path = verdicts.path(table.key)
    return {
        "key": str(table.key),
        "file": str(path) if path.exists() else None,
        "ignored": table.ignored or None,
        "shipped": table.label or None,
        "versions": device_key.versions(table.key.kind),
    }


def _tuned() -> list[str]:
    """Looking for such a file touches a device only where it exists."""
    return [
        f"{table.device}: {table.ignored or f'{len(table.entries)} tuned configurations'}"
        for table in tuning.tables().values()
    ]


def info(*, as_json: bool = False) -> None:
    """Print `collect()` for people, or as JSON."""
    if as_json:
        print(json.dumps(collect(), indent=2))
    else:
        print_report(collect(), Console())


def report() -> str:
    """What `info` prints, as plain text of 100 columns."""
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        print_report(collect(), console)
    return capture.get()


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__
    versions["CUDA runtime (torch's)"] = torch.version.cuda
    versions["platform"] = platform.platform()
    return versions


def _cpu() -> dict[str, Any]:
    return {
        **processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "pytorch_uses": torch.backends.cpu.get_cpu_capability(),
        "library_uses": None if native.why_not("cpu") else native.cpu_isa(),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def _devices(gpus: list[dict[str, Any]]) -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(len(gpus)))]


def _operator(name: str, device: str) -> dict[str, Any]:
    kind, _, number = device.partition(":")
    index = int(number) if number else None
    reasons: dict[str, list[str]] = {}
    for implementation in dispatch.IMPLEMENTATIONS:
        if implementation == "reference":
            reasons[implementation] = []
            continue
        why_not = list(dispatch.environment(implementation, kind, index))
        if name not in registry.KERNELS[implementation]:
            why_not.append(f"it has no {name} kernel")
        reasons[implementation] = why_not
    auto = dispatch.expected(name, "auto", torch.device(device))
    known = verdicts.measured_of(verdicts.table_of(torch.device(device)), name)
    measured = [
        {
            "calls": str(one.shape_class),
            "at": str(one.problem),
            "runs": one.winner,
            "ratio": round(one.ratio, 3),
            "date": one.date,
            "evidence": evidence,
            "candidates": {n: asdict(each) for n, each in one.candidates.items()},
            "rival": None if one.rival is None else asdict(one.rival),
        }
        for evidence, one in known
    ]
    evidence = _evidence(name, torch.device(device), measured)
    return {"auto": auto, "evidence": evidence, "reasons": reasons, "measured": measured}


def _evidence(name: str, device: torch.device, measured: list[dict[str, Any]]) -> str:
    """In a line: where, when and how much faster than PyTorch's; or that nobody measured it."""
    if not measured:
        table = verdicts.table_of(device)
        shipped = table.prior is not None and table.prior.of_any(name, False)
        return f"shipped for {table.label}" if shipped else verdicts.NOT_MEASURED
    newest = max(measured, key=lambda one: one["date"])
    faster = [one["ratio"] for one in measured if one["runs"] != "reference"]
    said = f"{newest['evidence']} {newest['date'][:10]}"
    if not faster:
        return f"{said}: PyTorch's is as fast"
    times = f"{min(faster):.2f}" + (f" to {max(faster):.2f}" if len(faster) > 1 else "")
    of = "" if len(faster) == len(measured) else f", {len(faster)} of {len(measured)} calls"
    return f"{said}: {times}x{of}"


def print_report(data: dict[str, Any], console: Console) -> None:
    """Print what `collect` returned."""
    table = Table("what", "version", title="Versions", title_justify="left")
    for name, version in data["versions"].items():
        table.add_row(name, version or "not installed")
    console.print(table)
    _print_devices(data, console)
    for kind, library in data["libraries"].items():
        _print_library(kind, library, console)
    for device, key in data["keys"].items():
        said = key["ignored"] or key["file"] or "nothing was measured here"
        shipped = f"; shipped for {key['shipped']}" if key["shipped"] else ""
        console.print(f"[bold]measured on {device}[/bold] ({escape(key['key'])}): "
                      f"{escape(said + shipped)}", highlight=False, soft_wrap=True)  # fmt: skip
    for line in data["tuned"]:
        console.print(f"[bold]tuning[/bold] {escape(line)}", highlight=False)
    for device in _devices(data["gpus"]):
        _print_operators(device, data["operators"], console)


def _print_devices(data: dict[str, Any], console: Console) -> None:
    cpu = data["cpu"]
    console.print(f"[bold]CPU[/bold] {escape(processor_label(cpu))}: {cpu['cores']} cores, "
                  f"{cpu['threads']} threads in use", highlight=False)  # fmt: skip
    console.print(
        f"  instruction sets: {' '.join(cpu['instruction_sets']) or 'unknown'}; PyTorch uses "
        f"{cpu['pytorch_uses']}, the C++ library {cpu['library_uses'] or 'is not usable'}",
        highlight=False,
    )
    if not data["gpus"]:
        console.print("[bold]GPU[/bold] none visible to torch")
    for index, gpu in enumerate(data["gpus"]):
        console.print(
            f"[bold]GPU {index}[/bold] {escape(gpu['name'])}: compute capability "
            f"{gpu['capability']}, {gpu['memory_gib']} GiB, {gpu['multiprocessors']} "
            "multiprocessors",
            highlight=False,
        )


def _print_library(kind: str, library: dict[str, Any], console: Console) -> None:
    state = (
        "[green]built, loads[/green]" if library["usable"] else "[yellow]cannot be used[/yellow]"
    )
    console.print(f"[bold]{kind} library[/bold] {state}", highlight=False)
    for reason in library["reasons"]:
        console.print(f"  {escape(reason)}", highlight=False)
    built = library["built"]
    if library["path"] and built and built.get("built"):
        console.print(f"  {escape(library['path'])}", highlight=False, soft_wrap=True)
        console.print(
            f"  built {library['time']} against torch {built['torch']} by "
            f"{escape(built['compiler'])}, for {', '.join(built['architectures'])}",
            highlight=False,
        )
    if library["stale"]:
        console.print(f"  [yellow]stale: csrc/ has changed since; {escape(native.AGAIN)}[/yellow]")


def _print_operators(device: str, operators: dict[str, Any], console: Console) -> None:
    """One row an operator, and each reason once below: they repeat from operator to operator."""
    names = [name for name in dispatch.IMPLEMENTATIONS if name != "reference"]
    table = Table(title=f"Operators on {device}", title_justify="left")
    for column in ("operator", "auto runs"):
        table.add_column(column, no_wrap=True)
    for column in ("on what evidence", *names):
        table.add_column(column)
    notes: list[str] = []
    for operator, devices in operators.items():
        entry, cells = devices[device], []
        for name in names:
            marks = []
            for reason in entry["reasons"][name]:
                text = f"{name}: {reason}" if not reason.startswith("it has no") else ""
                if text and text not in notes:
                    notes.append(text)
                marks.append(f"no ({notes.index(text) + 1})" if text else "no kernel")
            cells.append(marks[-1] if marks else "yes")
        table.add_row(operator, entry["auto"], entry["evidence"], *cells)
    console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"  ({number}) {escape(note)}", highlight=False)
