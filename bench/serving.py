"""Latency against load: single requests to a server that forms batches, and to one that does not.

    python bench/serving.py --arch deit_ti

examples/litserve_server.py on this machine, over the loopback, twice: `batches of up to 8` waits
5 ms for more requests, `one at a time` does not. Both are asked at the same rates, in turn. A
request's time runs from when it was due, not from when a client was free to send it, so a server
that falls behind shows it. The client runs on the same cores.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

import deit
import evidence
from deit.commands import flags
from deit.weights.checkpoint import save
from evidence import devices, timing
from peers import calibration

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MOST_REQUESTS = 2000  # of one rate


@dataclass(frozen=True)
class Options:
    """Measure a server's latency against load."""

    arch: str = "deit_ti"
    """A network of random weights."""
    shares: tuple[float, ...] = (0.2, 0.5, 0.8, 1.0, 1.5)
    """Loads, as shares of what the server gives that takes one request at a time."""
    seconds: float = 10.0
    """Of each load."""
    most: int = 8
    """Images of a batch."""
    wait: float = 0.005
    """Seconds for which a batch waits."""
    threads: int = 0
    """Of the network; 0: one a core."""
    json: Path | None = None
    """Where to write the result."""


def bodies() -> list[bytes]:
    """Requests with photographs of 500 x 375 pixels."""
    found = []
    for array in calibration.shipped():
        file = io.BytesIO()
        ImageOps.fit(Image.fromarray(array), (500, 375)).save(file, "JPEG", quality=90)
        found.append(json.dumps({"image": base64.b64encode(file.getvalue()).decode()}).encode())
    return found


@contextmanager
def serving(weights: Path, most: int, wait: float, threads: int) -> Iterator[str]:
    """The example's server in a process group of its own; its address. Raises OSError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import os, signal, threading\n"
        "def end():  # with the process that started it, however that ended\n"
        "    os.read(0, 1)  # sys.stdin has a lock, which a forked worker would wait for\n"
        "    os.killpg(os.getpgrp(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=end, daemon=True).start()\n"
        "    import litserve_server\n"
        f"    litserve_server.server({most}, {wait}).run(host='127.0.0.1', port={port},"
        " generate_client_file=False, log_level='error')\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "serve.py"  # a file, which spawned workers can import
        script.write_text(code)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "DEIT_WEIGHTS": str(weights),
            "DEIT_THREADS": str(threads),
        }
        process = subprocess.Popen(
            [sys.executable, str(script)], env=environment, cwd=folder, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(address, process)
            yield f"{address}/predict"
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise OSError("the server did not start (pip install 'fused-deit[clusters]')")


def ask(address: str, body: bytes) -> None:
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found = json.loads(answer.read())
    if "class" not in found:
        raise OSError(f"the server answered {found}")


def one_after_another(address: str, every: list[bytes], seconds: float) -> float:
    """Requests/s of a client that waits for each answer."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds and count < MOST_REQUESTS:
        ask(address, every[count % len(every)])
        count += 1
    return count / (time.perf_counter() - start)


def loaded(address: str, every: list[bytes], rate: float, seconds: float) -> dict[str, float]:
    """Latencies of requests that come at random times, `rate` a second on average."""
    count = max(20, min(MOST_REQUESTS, round(rate * seconds)))
    draw = random.Random(0)
    due, at = [], 0.0
    for _ in range(count):
        at += draw.expovariate(rate)
        due.append(at)
    start = time.perf_counter() + 0.1

    def send(number: int) -> float:
        time.sleep(max(0.0, start + due[number] - time.perf_counter()))
        ask(address, every[number % len(every)])
        return time.perf_counter() - start

    with ThreadPoolExecutor(64) as clients:
        ends = list(clients.map(send, range(count)))
    took = [1e3 * (end - begin) for end, begin in zip(ends, due, strict=True)]
    return {
        "p50_ms": timing.percentile(took, 50),
        "p99_ms": timing.percentile(took, 99),
        "answered_per_s": count / max(ends),
        "requests": count,
    }


def measure(options: Options, weights: Path) -> list[dict[str, Any]]:
    """Prints each row as it is known."""
    threads = options.threads or len(os.sched_getaffinity(0))
    every = bodies()
    kinds = {"one at a time": (1, 0.0), f"up to {options.most}": (options.most, options.wait)}
    rows = []
    with (
        serving(weights, *kinds["one at a time"], threads) as single,
        serving(weights, *kinds[f"up to {options.most}"], threads) as batched,
    ):
        servers = dict(zip(kinds, (single, batched), strict=True))
        for address in servers.values():
            one_after_another(address, every, 1.0)
        alone = one_after_another(single, every, options.seconds)
        print(f"one call at a time, one after another: {alone:.1f} requests/s")
        print(f"{'batches':>15} {'load/s':>8} {'answered/s':>11} {'p50 ms':>9} {'p99 ms':>9}")
        for share in options.shares:
            for name, address in servers.items():
                row = loaded(address, every, share * alone, options.seconds)
                rows.append({"batches": name, "load_per_s": share * alone, "share": share, **row})
                print(f"{name:>15} {share * alone:8.1f} {row['answered_per_s']:11.1f} "
                      f"{row['p50_ms']:9.1f} {row['p99_ms']:9.1f}", flush=True)  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 0; 2 for bad options, or no server."""
    options = flags.parse(Options, arguments, __doc__)
    load = os.getloadavg()[0]
    print(f"the load before was {load:.1f}: taken beside other work if above 0.5")
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.safetensors"
            save(deit.create(options.arch).eval(), weights)
            rows = measure(options, weights)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        about = {
            "kind": "serving",
            "title": "Latency against load",
            "date": evidence.now(),
            "command": evidence.command_line(arguments, "serving.py"),
            **devices.describe(torch.device("cpu")),
        }
        evidence.save(options.json, {**about, "load": load, "arch": options.arch, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
