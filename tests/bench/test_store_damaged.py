"""A database that is damaged, or somebody else's, ends in one line that names it; nothing is run to find that out."""

import contextlib
import json
import random
import sqlite3
import time
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from regard import cli
from regard.bench import store
from regard.bench.record import Cell, Result
from regard.bench.store import StoreError, opened, read

FULL = Result(
    Cell("text", "alibi", 0, {"steps": 3}),
    "done",
    curve=[(1, 8.0), (2, 7.5)],
    heldout={"1x": 3.25},
    parameters=7,
    environment={"torch": "x"},
    notes=["a note"],
)
TABLE = "CREATE TABLE cells (key TEXT PRIMARY KEY, cell TEXT, result TEXT, status TEXT, created TEXT)"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "


@pytest.fixture
def kept(tmp_path):
    with opened(tmp_path) as written:
        written.put(FULL)
    return tmp_path


def database(folder, *statements):
    (folder / "results.db").unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(folder / "results.db")) as made:
        for statement in statements:
            made.execute(statement)
        made.commit()


def refused(folder, words):
    """By all that read a store; the line names the file."""
    for way in (lambda: read(folder), lambda: entered(folder)):
        with pytest.raises(StoreError, match=words) as error:
            way()
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(str(folder / "results.db"))
        assert len(str(error.value)) < len(str(folder)) + 700
    said = CliRunner().invoke(cli.app, ["report", str(folder)])
    assert said.exit_code == cli.MISTAKE
    assert len(said.stderr.splitlines()) == 1
    assert not (folder / "report.html").exists()


def entered(folder):
    with opened(folder) as written:
        written.results()


SCHEMAS = {
    "an endless view": [f"CREATE VIEW cells AS {ENDLESS} i AS key, '' AS cell, '' AS result, '' AS s, '' AS c FROM n"],
    "a view of the right names": [
        "CREATE VIEW cells AS SELECT 1 AS key, 2 AS cell, 3 AS result, 4 AS status, 5 AS created"
    ],
    "a trigger": [TABLE, "CREATE TRIGGER t AFTER INSERT ON cells BEGIN DELETE FROM cells; END"],
    "another table's trigger": [TABLE, "CREATE TABLE x (a)", "CREATE TRIGGER t AFTER INSERT ON x BEGIN SELECT 1; END"],
    "a column that computes": [TABLE[:-1] + ", more TEXT AS (hex(zeroblob(100000000))))"],
    "computed results": [TABLE.replace("result TEXT", "result TEXT AS (hex(zeroblob(100000000)))")],
    "other columns": ["CREATE TABLE cells (key, cell)"],
    "a search index": ["CREATE VIRTUAL TABLE cells USING fts5(key, cell, result, status, created)"],
    "a newer version": [TABLE, "PRAGMA user_version = 99"],
}  # fmt: skip


@pytest.mark.parametrize("way", SCHEMAS)
def test_tables_that_no_run_makes(way, tmp_path):
    database(tmp_path, *SCHEMAS[way])
    before = time.monotonic()
    refused(tmp_path, "no table of results|triggers|format 99")
    assert time.monotonic() - before < 5


def test_a_database_of_something_else_is_read_by_nobody(tmp_path):
    database(tmp_path, "CREATE TABLE notes (a)")
    with pytest.raises(StoreError, match=r"results\.db holds no results"):
        read(tmp_path)


def row(cell=None, result=None, **changed):
    said = asdict(FULL)
    own = said.pop("cell")
    return json.dumps({**own, **(cell or {})}), json.dumps({**said, **(result or {}), **changed})


DEEP = "[" * 100_000 + "]" * 100_000
ROWS = {
    "a number": (1, 2),
    "bytes": tuple(text.encode() for text in row()),
    "nothing": (None, None),
    "no JSON": ("{", "}"),
    "lists": ("[]", "[]"),
    "deep": (row()[0], DEEP),
    "a cell of lists": row({"settings": []}),
    "a seed of text": row({"seed": "0"}),
    "a truth as a seed": row({"seed": True}),
    "an unknown entry of a cell": row({"more": 1}),
    "half a cell": (json.dumps({"task": "text"}), row()[1]),
    "no status": (row()[0], "{}"),
    "a status of its own": row(status="won"),
    "a curve of numbers": row(curve=[1, 2]),
    "a curve of three": row(curve=[[1, 2.0, 3]]),
    "a curve of text": row(curve=[[1, "8"]]),
    "a loss that is none": (row()[0], row()[1].replace("3.25", "NaN")),
    "a loss without bounds": (row()[0], row()[1].replace("3.25", "1e999")),
    "a loss of 400 digits": (row()[0], row()[1].replace("3.25", "9" * 400)),
    "parameters of 400 digits": row(parameters=10**400),
    "a loss of text": row(heldout={"1x": "good"}),
    "notes of text": row(notes="note"),
    "an environment of numbers": row(environment={"torch": 2}),
    "a metric of numbers": row(metric=3),
    "a metric without sense": row(metric={"better": "more"}),
    "a reason of numbers": row(reason=3),
    "twice": (row()[0], row()[1][:-1] + ', "reason": "x"}'),
}


@pytest.mark.parametrize("way", ROWS)
def test_rows_that_no_run_writes(way, kept):
    with contextlib.closing(sqlite3.connect(kept / "results.db")) as made:
        made.execute("PRAGMA ignore_check_constraints = ON")
        made.execute("CREATE TABLE other (key TEXT PRIMARY KEY, cell TEXT, result TEXT, status TEXT, created TEXT)")
        made.execute("DROP TABLE cells")
        made.execute("ALTER TABLE other RENAME TO cells")
        made.execute("INSERT INTO cells VALUES ('k', ?, ?, 'done', '')", ROWS[way])
        made.commit()
    refused(kept, "a row is no result|cannot be used as a results store")


def test_every_cut_and_many_a_flipped_byte_end_in_one_line(kept):
    path = kept / "results.db"
    data, draw = path.read_bytes(), random.Random(0)
    spoilt = [data[: draw.randrange(1, len(data))] for _ in range(30)] + [b"\xff" * 5000, data[:100]]
    for _ in range(150):
        at = draw.randrange(len(data))
        spoilt.append(data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :])
    lines = []
    for content in spoilt:
        path.write_bytes(content)
        try:
            read(kept)
        except StoreError as error:
            lines.append(str(error))
    assert len(lines) > 20, "of the others, some change what nobody reads"
    assert all(str(path) in line and "\n" not in line for line in lines)


def test_what_is_locked_or_no_file_is_named(kept, monkeypatch):
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: real(path, **{**options, "timeout": 0.1}))
    with contextlib.closing(real(kept / "results.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match=r"results\.db cannot be used as a results store: database is locked"):
            read(kept)
    (kept / "results.db").unlink()
    (kept / "results.db").mkdir()
    with pytest.raises(StoreError, match=r"results\.db is no file"), opened(kept):
        pass
    with pytest.raises(StoreError, match=r"results\.db does not exist"):
        read(kept)


def test_a_query_without_end_is_ended(tmp_path, monkeypatch):
    """Whatever else may make one: reading has a time limit."""
    monkeypatch.setattr(store, "SECONDS", 0.2)
    monkeypatch.setattr(store, "_is_ours", lambda database, path: True)
    database(tmp_path, *SCHEMAS["an endless view"])
    with contextlib.closing(sqlite3.connect(tmp_path / "results.db")) as made:
        made.execute("DROP VIEW cells")
        made.execute(f"CREATE VIEW cells AS {ENDLESS} '' AS cell, '' AS result, i AS rowid FROM n WHERE i < 0")
        made.commit()
    with pytest.raises(StoreError, match=r"longer than 0\.2 s"):
        read(tmp_path)


def test_results_that_make_no_report_name_their_file(kept, monkeypatch):
    from regard.bench import report

    def broken(*given):
        raise KeyError("a\nb")

    monkeypatch.setattr(report, "write", broken)
    said = CliRunner().invoke(cli.app, ["report", str(kept)])
    assert said.exit_code == cli.MISTAKE
    assert said.stderr.splitlines() == [f"error: {kept / 'results.db'}: its results make no report: KeyError: 'a\\nb'"]
