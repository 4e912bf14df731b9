"""Evidence rows: what was measured, where, by which sources, and whether that still holds.

A results file is a JSON array of rows, one a contender. A row whose kernels have changed since
is stale, and whoever prints it says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1

_TEXT, _NUMBER = (str,), (int, float)
# Field -> the types it may have. Everything is present in every row; None where it does not
# apply (no GPU driver on a CPU, no kernels of ours in a convnet).
FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "date": _TEXT,  # UTC, ISO 8601
    "command": _TEXT,
    "protocol": _TEXT,  # "modern" or "deit2021"
    "mode": _TEXT,  # "inference", "latency" (one call a sample) or "training"
    "network": _TEXT,
    "contender": _TEXT,  # "fused", "eager", a peer's name; of convnets with the memory format
    "img_size": (int,),
    "batch": (int,),
    "batch_asked": (int,),
    "dtype": _TEXT,
    "tf32": (bool,),
    "device": _TEXT,
    "driver": (str, type(None)),
    "gpu_state": (str, type(None)),  # clocks, power, temperature just after timing
    "cpu": _TEXT,
    "cores": (int,),
    "threads": (int,),
    "cpu_capability": _TEXT,
    "python": _TEXT,
    "torch": _TEXT,
    "cuda": (str, type(None)),
    "triton": (str, type(None)),
    "timm": _TEXT,
    "n": (int,),  # timed samples (rounds)
    "calls_per_sample": (int,),
    "img_per_s": _NUMBER,  # median
    "img_per_s_low": _NUMBER,  # first quartile
    "img_per_s_high": _NUMBER,  # third quartile
    "img_per_s_mean": _NUMBER,  # of the mean seconds, as the paper reports
    "seconds": (list,),  # every sample: seconds a batch, in the rounds' order
    "parameters": (int, type(None)),
    "gflop_per_image": _NUMBER,  # two a multiply-add; training counted as three forwards
    "gflop_per_s": _NUMBER,
    "peak_gflop_per_s": _NUMBER,  # this device's matrix product, measured in the same run
    "peak_size": (int,),
    "peak_by": _TEXT,  # "matmul" or "1x1 convolution"
    "memory_bytes": (int, type(None)),
    "warmup_seconds": _NUMBER,
    "compile_seconds": (int, float, type(None)),
    "logits_error": (int, float, type(None)),  # relative L2 distance from the wider dtype
    "tried": (dict,),  # other variants of this network -> img/s, or why it was not tried
    "operators": (dict, type(None)),  # operator -> implementation, for the fused contender
    "kernels_sha256": (str, type(None)),
    "quoted_top1": (int, float, type(None)),
    "quoted_v100_img_per_s": (int, float, type(None)),
    "quoted_source": (str, type(None)),
    "photographs": (dict, type(None)),
    "teacher": (str, type(None)),  # whose labels a training step learns too
    "peer": (str, type(None)),  # another runtime's version and settings
    "kernels_scope": (str, type(None)),  # what the hash covers; None for all
}
SPEEDS = {"img_per_s", "img_per_s_low", "img_per_s_high", "img_per_s_mean"}
LATER = {"peer", "parameters", "kernels_scope", "teacher"}  # which the oldest rows lack: None

# Sources that never run on a device: a change of theirs leaves its figures as they were.
ELSEWHERE = {"cpu": ("kernels/triton/", "csrc/cuda/"), "cuda": ("csrc/cpu/",)}
# What products in 8 bits alone are made of, integers and e4m3; they share eight_bits*.
EIGHT_BITS = {
    "int8": re.compile(r"(^|/)(int8|quantize|eight_bits)[^/]*$"),
    "fp8": re.compile(r"(^|/)(fp8|cases_fp8|eight_bits)[^/]*$"),
}


def scope_of(device: str, *, int8: bool = False, fp8: bool = False) -> str:
    """Which sources a contender can run, in words: "cpu", "cpu int8", "cuda fp8", ...

    device: a torch device's type. Raises ValueError for one of which nothing is known.
    """
    if device not in ELSEWHERE:
        raise ValueError(f"device: expected {' or '.join(ELSEWHERE)}; got {device!r}")
    return device + " int8" * int8 + " fp8" * fp8


def eight_bits(contender: str) -> str:
    """Of which 8 bits a contender's products are, by its name in a row; "" for none."""
    return next((kind for kind in EIGHT_BITS if kind in contender), "")


def sources(root: Path = ROOT, scope: str | None = None) -> list[Path]:
    """The files that decide what the kernels compute and how fast, sorted.

    scope: of `scope_of`: only those which that contender can run; None for all. Raises ValueError
    where there are none: a hash of nothing would never go stale.
    """
    device, _, eight = (scope or "").partition(" ")
    elsewhere = ELSEWHERE[device] if scope else ()

    def counts(path: Path) -> bool:
        name = path.relative_to(root).as_posix()
        kinds = [kind for kind, pattern in EIGHT_BITS.items() if pattern.search(name)]
        ours = not name.startswith(elsewhere) and (not scope or not kinds or eight in kinds)
        return ours and path.is_file() and path.suffix not in (".so", ".o", ".pyc", ".md")

    found = sorted(
        path
        for folder, pattern in (("kernels", "*.py"), ("csrc", "*"))
        for path in (root / folder).rglob(pattern)
        if counts(path)
    )
    if not found:
        raise ValueError(f"root: expected a tree with kernels/ and csrc/; got {root}")
    return found


def kernels_sha256(root: Path = ROOT, scope: str | None = None) -> str:
    """SHA-256 over the name and the bytes of every kernel source within the scope."""
    total = hashlib.sha256()
    for path in sources(root, scope):
        content = path.read_bytes()
        total.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


def is_stale(row: dict[str, Any], root: Path = ROOT) -> bool:
    """Have the kernels that this row measured changed since? Never for rows without kernels."""
    recorded = row.get("kernels_sha256")
    return recorded is not None and recorded != kernels_sha256(root, row.get("kernels_scope"))


def check(row: dict[str, Any]) -> None:
    """Raises ValueError naming every field that is missing, unknown or not what it may be."""
    if not isinstance(row, dict):
        raise ValueError(f"row: expected a JSON object; got {type(row).__name__}")
    wrong = [f"{name} is missing" for name in FIELDS if name not in row and name not in LATER]
    wrong += [f"{name} is unknown" for name in row if name not in FIELDS]
    for name, types in FIELDS.items():
        value = row.get(name)
        if name in row and not isinstance(value, types):
            wrong.append(f"{name} is {type(value).__name__}, not {types[0].__name__}")
        elif isinstance(value, bool) and bool not in types:
            wrong.append(f"{name} is bool, not {types[0].__name__}")
        elif name in SPEEDS and name in row and not 0 < value < math.inf:
            wrong.append(f"{name} is {value}, not a positive number")
    if wrong:
        raise ValueError("row: " + "; ".join(wrong))


def command_line(arguments: Sequence[str], script: str = "throughput.py") -> str:
    """The command as it can be repeated: paths reduced to their last part."""
    shown = []
    for argument in arguments:
        name, equals, value = argument.rpartition("=")
        shown.append(name + equals + (Path(value).name if "/" in value else value))
    return " ".join([f"python bench/{script}", *shown])


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Check the rows and write them, all or none; the folder is made where it is missing."""
    for row in rows:
        check(row)
    save(path, list(rows))


def save(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a later run, sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def load(path: Path) -> Any:
    """A results file's content: a list of rows, or a dict; ValueError that names the file."""
    from deit.kernels.engine import json_files

    content = json_files.read(path)
    if not isinstance(content, (list, dict)):
        raise ValueError(f"{path.name}: expected JSON rows; got {type(content).__name__}")
    return content


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of several results files, checked; errors name the file."""
    rows = []
    for path in paths:
        found = load(path)
        try:
            if not isinstance(found, list):
                raise ValueError(f"expected a JSON array of rows; got {type(found).__name__}")
            for row in found:
                check(row)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        rows += found
    return rows
