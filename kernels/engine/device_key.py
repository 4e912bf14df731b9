"""What a measurement belongs to: a device as it is told from others, and versions."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from deit.kernels.engine import build_record, processor

# A processor's key to take for this one's, for tests: "AMD family 26 model 2, AVX512 VNNI".
PRETENDED = "FUSED_DEIT_DEVICE_KEY"

_FOLDER = Path(__file__).resolve().parents[1]
_SOURCES = {
    "cpu": ("*/__init__.py", "*/reference.py", "*/cpu.py"),
    "cuda": ("*/__init__.py", "*/reference.py", "*/triton*.py", "*/tiles.py", "*/cuda.py",
             "device/*.py"),
}  # fmt: skip
_CPU = re.compile(
    r"(?P<vendor>[^,]+?)(?: family (?P<family>\d+))?(?: model (?P<model>\d+))?"
    r"(?:, (?P<sets>[^,]*?))?(?:, (?P<threads>\d+) threads?)?"
)


@dataclass(frozen=True)
class DeviceKey:
    """A device; its text names it in files and messages.

    kind: a torch device's type. Of a CPU: vendor, family, model, the instruction sets by the names
    of their groups, PyTorch's threads. Of a GPU: name, capability, driver.
    """

    kind: str
    vendor: str = ""
    family: int | None = None
    model: int | None = None
    instruction_sets: tuple[str, ...] = ()
    threads: int = 0
    name: str = ""
    capability: tuple[int, int] | None = None
    driver: str = ""

    def __str__(self) -> str:
        if self.kind != "cpu":
            major, minor = self.capability or (0, 0)
            return f"{self.name}, compute capability {major}.{minor}, driver {self.driver}"
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return f"{self.processor()}, {' '.join(self.instruction_sets)}, {threads}"

    def processor(self) -> str:
        """A CPU by its vendor and numbers: "AMD family 26 model 2"."""
        family = "" if self.family is None else f" family {self.family}"
        return self.vendor + family + ("" if self.model is None else f" model {self.model}")


def device_key(device: torch.device) -> DeviceKey:
    """The key of a device of this machine, with the threads that PyTorch uses now."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return _key(device.type, device.index, threads)


def forget() -> None:
    """Ask the machine again; for tests that pretend another."""
    for cached in (_key, driver, versions):
        cached.cache_clear()


@functools.cache
def _key(kind: str, index: int | None, threads: int) -> DeviceKey:
    if kind == "cuda":
        capability = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        return DeviceKey(kind, name=name, capability=capability, driver=driver())
    if kind != "cpu":
        return DeviceKey(kind, name=kind)
    pretended = os.environ.get(PRETENDED)
    if pretended:
        return parse(pretended, threads)
    cpu = processor.processor()
    return DeviceKey(
        "cpu",
        cpu["vendor"] or cpu["model"].replace(",", " "),
        cpu["family"],
        cpu["model_number"],
        tuple(processor.instruction_sets(cpu["instruction_sets"])),
        threads,
    )


def parse(text: str, threads: int) -> DeviceKey:
    """A CPU's key from its text; `threads` where it names none.

    Raises ValueError for what is no such text.
    """
    found = _CPU.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"{PRETENDED}: expected a processor as in 'AMD family 26 model 2, AVX512 VNNI'; "
            f"got {text!r}"
        )
    number = lambda name: None if found[name] is None else int(found[name])
    return DeviceKey(
        "cpu",
        found["vendor"],
        number("family"),
        number("model"),
        tuple((found["sets"] or "").split()),
        int(found["threads"] or threads),
    )


@functools.cache
def driver() -> str:
    """The NVIDIA kernel module's version; CUDA's as the driver states it where /proc has none."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[0]
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value}" if version.value else "none"


@functools.cache
def versions(kind: str) -> dict[str, str]:
    """What a measurement on a type of device depends on beside the device: torch, Triton on a GPU,
    and the kernels' sources by what they say."""
    record = build_record.read(_FOLDER)
    built = "none" if record is None else str(record.get("sources"))
    patterns = _SOURCES.get(kind, _SOURCES["cpu"])
    files = {path for pattern in patterns for path in _FOLDER.glob(pattern)}
    found = {"torch": str(torch.__version__)}
    if kind == "cuda":
        found["triton"] = _version("triton")
    else:  # ATEN_CPU_CAPABILITY limits it
        found["torch"] += f", {torch.backends.cpu.get_cpu_capability()}"
    found["kernels"] = sources_hash(sorted(files), built)
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def sources_hash(files: Iterable[Path], built: str) -> str:
    """Of Python's syntax, without docstrings, comments and layout, and of what the build says."""
    total = hashlib.sha256(built.encode())
    for path in files:
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_text(body[0]):
                body[0] = ast.Pass()
        total.update(f"{path.parent.name}/{path.name}\0{_said(tree)}\0".encode())
    return total.hexdigest()[:16]


def _said(node: object) -> str:
    """A node's syntax, the same under every Python: what is absent is left out.

    `ast.dump` writes empty lists before Python 3.13, and since 3.12 nodes have type_params.
    """
    if isinstance(node, list):
        return f"[{','.join(map(_said, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    given = [(name, getattr(node, name, None)) for name in node._fields]
    fields = [f"{name}={_said(value)}" for name, value in given if value not in (None, [])]
    return f"{type(node).__name__}({','.join(fields)})"


def _is_text(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
