"""Does with Pathling on Spark what the Python sync script does, for `tests/suite/pathling.rs`.

Reads commands from stdin, one a line, and answers each with a line of JSON:

    merge   off|on NDJSON_FOLDER TABLES    merges <Type>.ndjson into TABLES/<Type>.parquet by id
    compare off|on NDJSON_FOLDER TABLES    counts rows of the table that Pathling would not encode, and the reverse

`on` is `enable_extensions=True`. `FHIRLAKE_PATHLING_JARS` names the jars of `tests/pathling.txt`, with `:` between them.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

from pathling import PathlingContext
from pyspark.sql import SparkSession

DELTA = "org.apache.spark.sql.delta.catalog.DeltaCatalog"


def context(spark, extensions):
    return PathlingContext.create(spark, enable_extensions=extensions == "on")


def types(folder):
    return sorted(file.stem for file in Path(folder).glob("*.ndjson"))


def merge(pathling, folder, tables):
    pathling.read.ndjson(folder).write.delta(tables, save_mode="merge")
    return {"merged": types(folder)}


def plain(value):
    """A row without what Pathling numbers anew each time: `_fid`, and the extensions that hang on it."""
    if isinstance(value, dict):
        members = {name: plain(inner) for name, inner in value.items() if name not in ("_fid", "_extension")}
        # A struct of nulls, which Pathling writes for a canonical value that its decimal does not hold, says nothing.
        return {name: inner for name, inner in members.items() if inner != {}}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def rows(frame):
    # Null members are left out, so that columns which only one side has do not count where nothing is in them.
    return Counter(json.dumps(plain(json.loads(row)), sort_keys=True) for row in frame.toJSON().collect())


def extensions(frame):
    """How many extensions there are by URL, which numbering does not change."""
    if "_extension" not in frame.columns:
        return {}
    urls = frame.selectExpr("explode(flatten(map_values(_extension))) as e").selectExpr("e.url as url")
    return {row["url"]: row["count"] for row in urls.groupBy("url").count().collect()}


def compare(spark, pathling, folder, tables):
    source, answer = pathling.read.ndjson(folder), {}
    for name in types(folder):
        expected, found = source.read(name), spark.read.format("delta").load(f"{tables}/{name}.parquet")
        wanted, there = rows(expected), rows(found)
        missing, extra = wanted - there, there - wanted
        answer[name] = {
            "rows": found.count(),
            "missing": sum(missing.values()),
            "extra": sum(extra.values()),
            "extensions differ": extensions(expected) != extensions(found),
            "examples": [*list(missing)[:1], *list(extra)[:1]],
        }
    return answer


def main():
    builder = SparkSession.builder.master("local[2]").appName("fhirlake")
    settings = {
        "spark.jars": os.environ["FHIRLAKE_PATHLING_JARS"].replace(":", ","),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": DELTA,
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.sql.shuffle.partitions": "2",
        "spark.ui.enabled": "false",
    }
    for name, value in settings.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    contexts = {extensions: context(spark, extensions) for extensions in ("off", "on")}
    print(json.dumps({"ready": spark.version}), flush=True)
    for line in sys.stdin:
        what, extensions, folder, tables = line.rstrip("\n").split("\t")
        pathling = contexts[extensions]
        try:
            answer = merge(pathling, folder, tables) if what == "merge" else compare(spark, pathling, folder, tables)
        except Exception as error:  # The test shows what Spark says.
            answer = {"error": str(error)[:2000]}
        print(json.dumps(answer), flush=True)


main()
