"""What a stage is given, and how its findings reach the disk while it runs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qualification.checkout import ROOT

# Errors after which a CUDA context answers nothing more: every later call fails too.
POISON = ("illegal memory access", "unspecified launch failure", "misaligned address",
          "device-side assert", "illegal instruction")  # fmt: skip


class Poisoned(Exception):
    """The CUDA context of this process is lost; the rest of its work cannot be done."""


@dataclass
class Context:
    """One stage's process.

    rows: evidence, one dict each. failures: sentences; any makes the stage fail. unrun: what this
    stage should have run and did not, for want of time, memory or a tool, a sentence each. notes:
    what a reader should know that is neither.
    """

    stage: str
    out: Path
    command: str
    dry: bool
    deadline: float  # time.monotonic() at which to stop of one's own accord
    job: str = ""
    jobs: int = 1
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unrun: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _facts: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> Any:
        """The torch.device that is qualified: the first GPU, or in a dry run the CPU."""
        import torch

        return torch.device("cpu") if self.dry else torch.device("cuda", 0)

    @property
    def partial(self) -> Path:
        """Where findings are kept as they come, for the case that this process is killed."""
        name = f"{self.stage}.{self.job}" if self.job else self.stage
        return self.out / "parts" / f"{name.replace(':', '.')}.jsonl"

    def left(self) -> float:
        """Seconds until this stage should end."""
        return self.deadline - time.monotonic()

    def row(self, **fields: Any) -> None:
        """Keep one evidence row, completed with the machine, the versions and the sources."""
        self._facts = self._facts or facts(self)
        self._keep("rows", {"stage": self.stage, **fields, **self._facts})

    def fail(self, text: str) -> None:
        self._keep("failures", text)

    def skip(self, text: str) -> None:
        """Say that something was not run: the headline counts it."""
        if text not in self.unrun:
            self._keep("unrun", text)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self._keep("notes", text)

    def _keep(self, kind: str, value: Any) -> None:
        getattr(self, kind).append(value)
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        with self.partial.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, value]) + "\n")

    def attempt(self, label: str, work: Callable[[], None]) -> bool:
        """Run `work`; an exception becomes a failure that names `label`.

        Raises Poisoned after an error that a CUDA context does not survive.
        """
        try:
            work()
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            self.fail(f"{label}: {text}")
            if any(sign in text for sign in POISON):
                raise Poisoned(label) from error
            return False
        return True

    def fan_out(self, jobs: Sequence[str], prefix: Sequence[str] = (), **env: str) -> None:
        """Run each job of this stage in a process of its own, a few at a time, and merge.

        A crash loses one job. `prefix` goes before the command (a sanitizer).
        """
        waiting = list(jobs)
        running: dict[str, subprocess.Popen[bytes]] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs and self.left() > 0:
                job = waiting.pop(0)
                running[job] = self._start(job, prefix, env)
            for job, process in list(running.items()):
                if process.poll() is not None or self.left() < -10:
                    self._collect(job, running.pop(job))
            if waiting and self.left() <= 0 and not running:
                for job in waiting:
                    self.skip(f"{job}: no time")
                return
            time.sleep(0.05)

    def _start(
        self, job: str, prefix: Sequence[str], env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        part = Context(self.stage, self.out, self.command, self.dry, self.deadline, job).partial
        part.unlink(missing_ok=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["--out", str(self.out), "--run-stage", self.stage, "--job", job]
        arguments += ["--seconds", f"{max(self.left(), 1):.0f}", "--command", self.command]
        with part.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(
                [*prefix, sys.executable, str(ROOT / "bench" / "qualify.py"), *arguments]
                + (["--dry-run"] if self.dry else []),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
            )

    def _collect(self, job: str, process: subprocess.Popen[bytes]) -> None:
        late = process.poll() is None
        if late:
            process.kill()
        code = process.wait()
        part = Context(self.stage, self.out, self.command, self.dry, 0.0, job).partial
        found = read_partial(part)
        self.rows += found["rows"]
        self.notes += [n for n in found["notes"] if n not in self.notes]
        self.failures += found["failures"]
        self.unrun += found["unrun"]
        if late:
            self.skip(f"{job}: stopped at the stage's time limit")
        elif code not in (0, 1):
            self.fail(f"{job}: {ending(code)}; {tail(part.with_suffix('.log'))}")


def read_partial(*paths: Path) -> dict[str, list[Any]]:
    """Findings as they were kept; a last line cut off by a kill is dropped."""
    found: dict[str, list[Any]] = {"rows": [], "failures": [], "unrun": [], "notes": []}
    for path in filter(Path.is_file, paths):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                kind, value = json.loads(line)
                found[kind].append(value)
            except (ValueError, KeyError, TypeError):
                continue
    return found


def ending(code: int) -> str:
    """How a process ended, in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def tail(path: Path, lines: int = 6) -> str:
    """The last lines of a log on one line."""
    if not path.is_file():
        return "no output"
    text = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:]
    return " | ".join(line.strip() for line in text)[-600:] or "no output"


def facts(context: Context) -> dict[str, Any]:
    """The device, the versions and the sources that a row belongs to."""
    import torch

    import evidence
    from evidence import devices

    device, driver = platform.processor() or platform.machine(), None
    if not context.dry:
        device = torch.cuda.get_device_name(context.device)
        driver = devices.gpu_query(context.device, "driver_version")
    return {
        "date": evidence.now(),
        "command": context.command,
        "device": device,
        "driver": driver,
        **devices.versions(),
        "interpreted": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "kernels_sha256": evidence.kernels_sha256(),
    }
