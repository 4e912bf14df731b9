"""Processes of one run take the same measurements, whoever makes them."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import fusing
import pytest
import standing
from fusing import make
from torch import distributed as dist

from deit.fused_vit import fuse, measuring, ranks
from deit.kernels.engine import verdicts


@pytest.fixture
def store(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    return store


def test_one_makes_it_and_the_others_take_it(store):
    made = []

    def make(rank):
        def one():
            made.append(rank)
            return {"by": rank}

        return ranks.shared("it", one, 60.0)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(make, range(4)))
    assert len(made) == 1
    assert found == [{"by": made[0]}] * 4
    assert ranks.shared("another", lambda: {"by": 9}, 60.0) == {"by": 9}


def test_what_one_raises_the_others_hear(store):
    with pytest.raises(OSError, match="no room"):
        ranks.shared("it", lambda: (_ for _ in ()).throw(OSError("no room")), 60.0)
    with pytest.raises(ranks.Missing, match="OSError: no room"):
        ranks.shared("it", dict, 60.0)


def test_one_that_dies_keeps_nobody_for_ever(store):
    store.add("fused-deit/it/asked", 1)
    with pytest.raises(ranks.Missing, match="nothing came from it within"):
        ranks.shared("it", dict, 0.1)


@pytest.fixture
def asked(tmp_path):
    with standing.unknown_machine(tmp_path) as patch:
        patch.setattr(measuring.whole_models, "race", lambda *_, **__: standing.outcome(1.5))
        yield patch, standing.stand_in(patch, measuring)


def test_processes_with_no_group_measure_nothing_and_use_no_file(asked):
    patch, calls = asked
    fuse(make("ours"))
    standing.forget()
    patch.setenv("WORLD_SIZE", "8")
    report = fuse(make("ours"))
    assert len(calls) == 1
    assert any("WORLD_SIZE is 8 and no process group" in note for note in report.notes)
    assert report.operators["linear"] == "reference"  # nothing is shipped for this machine
    assert verdicts.in_force(standing.CPU) == []


def test_with_nothing_measured_they_take_what_one_has_stored(asked, store, tmp_path):
    patch, _ = asked
    fuse(make("ours"))
    patch.setattr(ranks, "many", lambda: True)
    for cache in (tmp_path, tmp_path / "another node's"):
        standing.forget()
        patch.setattr(measuring, "_counts", {})
        patch.setenv("XDG_CACHE_HOME", str(cache))
        assert fuse(make("ours"), measure="never").operators["linear"] == "cpu"


def test_a_process_that_gives_nothing_is_said(asked, store):
    patch, calls = asked
    patch.setattr(ranks, "many", lambda: True)
    patch.setattr(measuring, "PATIENCE", 0.1)
    patch.setattr(dist.HashStore, "add", lambda *_: 2)  # another was first
    with pytest.warns(UserWarning, match="the process of this group that measures gave nothing"):
        report = fuse(make("ours"), budget=0.1)
    assert calls == []
    assert report.operators["linear"] == "reference"
    assert report.fused


PROGRAM = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
import fusing, standing
from deit.fused_vit import fuse, measuring, records
rank = int(os.environ["RANK"])
store = dist.FileStore({store!r}, 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
torch.set_num_threads(1)
winner = ("cpu", "reference")[rank]  # they would disagree
asked = standing.stand_in(standing.pytest.MonkeyPatch(), measuring, winner)
measuring.whole_models.race = lambda *_, **__: standing.outcome(1.5 + rank)
reports = [fuse(fusing.make("ours")), fuse(fusing.make("timm", dim=32))]
reports.append(fuse(fusing.make("ours"), measure="now"))
if rank == 0:  # alone: nobody waits for the other
    fuse(fusing.make("hugging face"))
dist.barrier()
said = [[r.operators, list(map(str, r.evidence.values())), list(map(str, r.races))]
        for r in reports]
print(json.dumps([len(asked), records.record(standing.CPU) if rank else None, said]))
dist.destroy_process_group()
"""


def test_two_processes_with_caches_of_their_own_agree(tmp_path):
    tests = os.path.dirname(fusing.__file__)
    program = PROGRAM.format(tests=tests, store=str(tmp_path / "store"))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ
            | {
                "RANK": str(rank),
                "XDG_CACHE_HOME": str(tmp_path / str(rank)),
                "FUSED_DEIT_DEVICE_KEY": standing.UNKNOWN,
                "FUSED_DEIT_MEASURE": "auto",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [each.communicate(timeout=150) for each in running]
    assert [each.returncode for each in running] == [0, 0], ends
    (one, _, first), (other, record, second) = (json.loads(out.splitlines()[-1]) for out, _ in ends)
    assert first == second
    assert one + other == 3  # once each for both; the last has nothing that was not measured
    assert record["verdicts"]
