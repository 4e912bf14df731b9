"""The process that measures: a plan on standard input, lines of JSON on standard output.

Which candidate it is at stands in a small file that the parent reads where this process ends or
hangs: a line for every call would wake the parent beside the call that is timed.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from deit.kernels.engine import verdicts
from deit.kernels.engine.json_files import Fields
from deit.kernels.engine.problems import Problem
from deit.kernels.measure.race import NoTime, Poisoned, Race

MARK_BYTES = 256


def main() -> None:
    """Measure what the plan on standard input says."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(**what: Any) -> None:
        channel.write(json.dumps(what) + "\n")
        channel.flush()

    plan = json.loads(sys.stdin.read())
    torch.set_num_threads(plan["threads"])
    for module in plan["modules"]:
        importlib.import_module(module)
    verdicts.use(verdicts.revive_all(plan["given"], "plan"))
    device = torch.device(plan["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    end = time.monotonic() + plan["budget"]
    left = sum(one["weight"] for one in plan["problems"]) or 1.0
    for one in plan["problems"]:
        number = one["number"]
        problem = Problem.revive(Fields(one["problem"], "plan"))
        seconds = (end - time.monotonic()) * one["weight"] / max(left, 1e-9)
        left -= one["weight"]
        try:
            rest = end - time.monotonic()
            if rest <= 0:
                raise NoTime
            race = Race(
                problem, device, marker(plan["mark"], number), one["refused"], seconds, rest
            )
            verdict = race.run(secrets.randbelow(1 << 20))
            verdicts.use([verdict])  # a rival runs by it
            answer(number=number, verdict=verdict.plain())
        except NoTime:
            answer(number=number, why="no time left", late=True)
        except Poisoned as error:  # the parent reads which candidate it was
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        except Exception as error:
            answer(number=number, why=f"{type(error).__name__}: {error}".splitlines()[0][:300])


def marker(descriptor: int, number: int) -> Callable[[str], None]:
    """Writes down which candidate of a problem is begun; each mark differs from the last."""
    count = [0]

    def mark(name: str) -> None:
        count[0] += 1
        text = json.dumps([number, name, count[0]])
        os.pwrite(descriptor, text.encode().ljust(MARK_BYTES), 0)

    return mark
