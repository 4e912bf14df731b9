"""Predictions on a Spark cluster: `predict_batch_udf`, one model a Python worker.

    spark-submit examples/spark.py photos/ predictions/ --weights deit_small_patch16_224.pth

Spark reads the files, retries the tasks of an executor that died and writes Parquet.
"""

import argparse

import numpy as np
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

ROW = T.StructType(
    [
        T.StructField("class", T.ArrayType(T.IntegerType())),
        T.StructField("score", T.ArrayType(T.FloatType())),
        T.StructField("error", T.StringType()),
    ]
)


def predictor(weights: str, threads: int, topk: int):
    def load():  # once a Python worker, which Spark keeps for its next tasks
        from deit.batch import Model

        model = Model(weights, output="probabilities", threads=threads)

        def predict(images):
            values, errors = model.read(images)
            best = np.argsort(-values, axis=1)[:, :topk]
            score = np.take_along_axis(values, best, axis=1)
            return {"class": best, "score": score, "error": np.array(errors, dtype=object)}

        return predict

    return predict_batch_udf(load, return_type=ROW, batch_size=32)


def predict(spark: SparkSession, images: str, out: str, weights: str, threads=1, topk=5) -> None:
    files = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(images)
    found = files.select("path", predictor(weights, threads, topk)("content").alias("found"))
    read = F.col("found.error").isNull()
    values = [F.when(read, F.col(f"found.{name}")).alias(name) for name in ("class", "score")]
    found.select("path", *values, "found.error").write.parquet(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images")
    parser.add_argument("out")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--threads", type=int, default=1, help="spark.task.cpus")
    given = parser.parse_args()
    session = SparkSession.builder.appName("deit").getOrCreate()
    predict(session, given.images, given.out, given.weights, given.threads)
