"""Evidence rows: what was measured, where, by which sources, and whether that still holds.

A results file is a JSON array of rows, one a contender. A row whose kernels have changed since
is stale, and whoever prints it says so.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from evidence import sources
from evidence.sources import EIGHT_BITS as EIGHT_BITS  # a part of this interface
from evidence.sources import scope_of as scope_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SCHEMA = 2  # 1 hashed the bytes of files, and named a CPU by its name alone

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
    "processor": (dict,),  # vendor, family, model_number, instruction_sets: of `devices.describe`
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


def eight_bits(contender: str) -> str:
    """The 8 bits of a contender's products, by its name in a row: "int8", "fp8" or ""."""
    return next((kind for kind in EIGHT_BITS if kind in contender), "")


def kernels_sha256(root: Path = ROOT, scope: str | None = None) -> str:
    """The hash of the scope's sources, of what they say; see bench/evidence/sources.py.

    scope: of `scope_of`: only those which that contender can run; None for all. Raises ValueError
    where there are none: a hash of nothing would never go stale.
    """
    return sources.sha256(sources.read(root), scope)


def kernels(device: str, *, int8: bool = False, fp8: bool = False) -> dict[str, str]:
    """The fields of a row that runs our kernels on this type of device, as `scope_of` takes it."""
    scope = scope_of(device, int8=int8, fp8=fp8)
    return {"kernels_sha256": kernels_sha256(scope=scope), "kernels_scope": scope}


def now() -> str:
    """The date of a row that is written now."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


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
    if row.get("schema", SCHEMA) != SCHEMA:
        wrong.append(f"schema is {row['schema']}, not {SCHEMA}")
    if wrong:
        raise ValueError("row: " + "; ".join(wrong))


def command_line(arguments: Sequence[str] | None, script: str = "throughput.py") -> str:
    """The command as it can be repeated: paths reduced to their last part.

    arguments: None for those that this process was started with.
    """
    shown = []
    for argument in sys.argv[1:] if arguments is None else arguments:
        name, equals, value = argument.rpartition("=")
        shown.append(name + equals + (Path(value).name if "/" in value else value))
    return " ".join([f"python bench/{script}", *shown])


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Check the rows and write them, all or none; the folder is made where it is missing.

    Raises ValueError for rows of two devices, too: what compares a file's rows may trust it.
    """
    for row in rows:
        check(row)
    found = dict.fromkeys(row["device"] for row in rows)
    if len(found) > 1:
        raise ValueError(f"rows: expected one device's; got {' and '.join(found)}")
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
