"""examples/spark.py on two executors, one of which is killed midway: IMAGES OUT WEIGHTS MARK."""

import os
import signal
import sys
from pathlib import Path

import spark as example
from pyspark.sql import SparkSession

images, out, weights, mark = sys.argv[1:]
plain = example.predict_batch_udf


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def dying(load):
    def make():
        predict, calls = load(), []

        def once(found):
            calls.append(len(found))
            if len(calls) == 2:
                try:
                    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    pass  # one has died
                else:
                    executor = parent(os.getppid())  # of the daemon that forked this worker
                    assert "java" in Path(f"/proc/{executor}/comm").read_text()
                    os.kill(executor, signal.SIGKILL)
            return predict(found)

        return once

    return make


if __name__ == "__main__":
    example.predict_batch_udf = lambda load, **how: plain(dying(load), **how)
    session = (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.files.maxPartitionBytes", "16m")  # four files to a task
        .getOrCreate()
    )
    example.predict(session, images, out, weights, threads=1, topk=3)
    session.stop()
