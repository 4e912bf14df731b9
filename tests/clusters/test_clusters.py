"""The examples on local clusters of two workers, one killed midway: every row is there once.

`make clusters` installs what they need and runs them: Ray, PySpark (half a gigabyte) and Java are
too much for every run of the tests.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import collection
import numpy as np
import pytest

from deit.batch import Inputs, Model

ROOT = Path(__file__).resolve().parents[2]
COUNT, BAD = 60, (7,)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return collection.folder(tmp_path_factory.mktemp("photos"), COUNT, bad=BAD)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return collection.weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


def driven(name, package, photos, weights, folder):
    """The rows that a cluster wrote, by path."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (make clusters)")
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    mark, out = folder / "one-has-died", folder / "out"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, str(Path(__file__).with_name(name)), photos, out, weights, mark]
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=400,
        check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert mark.exists(), "no worker was killed"
    rows = pq.read_table(out).to_pylist()
    paths = [row["path"].removeprefix("file:") for row in rows]
    assert sorted(paths) == sorted(item.name for item in Inputs([photos]))  # each of them once
    return dict(zip(paths, rows, strict=True))


def good(rows):
    """Those that could be read; the others have their error."""
    bad = {path for path, row in rows.items() if row["error"] is not None}
    assert {int(path[-8:-4]) for path in bad} == set(BAD)
    return {path: row for path, row in rows.items() if path not in bad}


def test_ray_with_an_actor_killed(photos, weights, tmp_path):
    rows = good(driven("drive_ray.py", "ray", photos, weights, tmp_path))
    wanted = Model(weights, output="embedding")(list(rows))
    found = np.array([row["embedding"] for row in rows.values()])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_spark_with_an_executor_killed(photos, weights, tmp_path):
    if shutil.which("java") is None and not os.environ.get("JAVA_HOME"):
        pytest.skip("Spark needs Java")
    every = driven("drive_spark.py", "pyspark", photos, weights, tmp_path)
    for row in every.values():  # neither classes nor scores where there is an error
        assert (row["class"] is None) == (row["score"] is None) == (row["error"] is not None)
    rows = good(every)
    values = Model(weights, output="probabilities")(list(rows))
    for row, wanted in zip(rows.values(), values, strict=True):
        assert row["class"] == list(np.argsort(-wanted)[:3])
        np.testing.assert_allclose(row["score"], np.sort(wanted)[::-1][:3], rtol=1e-3)
