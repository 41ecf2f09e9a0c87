"""Reads tables with DuckDB and with Sail, and compares every row with the NDJSON that it must say, null for null.

    python readers.py EXPECTED_FOLDER TABLES_FOLDER      # EXPECTED_FOLDER/<Type>.ndjson, one resource a line

Prints a line a table and reader; exits with 1 where a value differs. Neither reader shares code with fhirlake: DuckDB reads
the log with the Delta kernel and the files by itself, Sail has its own of both.
"""

import base64
import json
import os
import sys
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

# Columns that Pathling's layout derives; what they say is checked by fhirlake's own tests.
DERIVED = ("_versioned", "_scale", "_canonicalized")


def is_derived(name):
    return name in ("_fid", "_extension") or name.endswith(DERIVED)


def instant(text):
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def differences(said, read, path):
    """What a row `read` says otherwise than the JSON `said`."""
    if isinstance(said, dict):
        if not isinstance(read, dict):
            yield f"{path}: {read!r} for an object"
            return
        # Extensions are in a map of their own; contained resources and the extensions of primitives have no column.
        hidden = ("resourceType", "extension", "contained")
        members = {k: v for k, v in said.items() if k not in hidden and not k.startswith("_")}
        for name, value in members.items():
            yield from differences(value, read.get(name), f"{path}.{name}")
        for name, value in read.items():
            if name not in members and not is_derived(name) and value is not None:
                yield f"{path}.{name}: {value!r} for nothing"
    elif isinstance(said, list):
        if not isinstance(read, list) or len(read) != len(said):
            yield f"{path}: {read!r} for a list of {len(said)}"
            return
        for at, (one, other) in enumerate(zip(said, read)):
            yield from differences(one, other, f"{path}[{at}]")
    elif isinstance(read, datetime):
        read = read if read.tzinfo else read.replace(tzinfo=timezone.utc)
        if read != instant(said):
            yield f"{path}: {read} for {said}"
    elif isinstance(read, Decimal):
        if read != Decimal(str(said)).quantize(Decimal("0.000001")):
            yield f"{path}: {read} for {said}"
    elif isinstance(read, (bytes, bytearray)):
        if bytes(read) != base64.b64decode(said):
            yield f"{path}: other bytes"
    elif read != said or isinstance(read, bool) != isinstance(said, bool):
        yield f"{path}: {read!r} for {said!r}"


def compare(reader, name, rows, expected):
    found = {}
    wrong = []
    for row in rows:
        if row["id"] in found:
            wrong.append(f"{row['id']} stands twice")
        found[row["id"]] = row
    wrong += [f"{key} is missing" for key in expected.keys() - found.keys()]
    wrong += [f"{key} is there" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        wrong += differences(expected[key], found[key], f"{name}/{key}")
    print(f"{reader} {name}: {len(found)} rows, {len(wrong)} differences", flush=True)
    for line in wrong[:10]:
        print(f"  {line}")
    return not wrong


def duckdb_rows(tables):
    import duckdb
    from duckdb_extensions import import_extension

    connection = duckdb.connect()
    # From the package: DuckDB would look for it in its own folder, and then on the network.
    import_extension("delta", con=connection)
    connection.execute("LOAD delta")
    connection.execute("SET TimeZone = 'UTC'")
    # An absolute path: the extension takes nothing else.
    return lambda path: connection.execute(f"SELECT * FROM delta_scan('{path.resolve()}')").to_arrow_table().to_pylist()


def sail_rows(tables):
    from pysail.spark import SparkConnectServer
    from pyspark.sql import SparkSession

    server = SparkConnectServer()
    server.start()
    _, port = server.listening_address
    session = SparkSession.builder.remote(f"sc://localhost:{port}").getOrCreate()
    session.conf.set("spark.sql.session.timeZone", "UTC")
    # The server lives as long as somebody holds it.
    return lambda path, server=server: session.read.format("delta").load(str(path.resolve())).toArrow().to_pylist()


def main():
    wanted, tables = Path(sys.argv[1]), Path(sys.argv[2])
    good = True
    for reader, start in (("duckdb", duckdb_rows), ("sail", sail_rows)):
        rows = start(tables)
        for file in sorted(wanted.glob("*.ndjson")):
            lines = [json.loads(line, parse_float=Decimal) for line in file.read_text().splitlines() if line]
            expected = {line["id"]: line for line in lines}
            good &= compare(reader, file.stem, rows(tables / f"{file.stem}.parquet"), expected)
    sys.stdout.flush()
    # Sail's server was seen to wait for itself when the interpreter ends.
    os._exit(0 if good else 1)


if __name__ == "__main__":
    main()
