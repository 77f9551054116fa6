"""The store keeps every committed row, whatever happens after it."""

import json
import os
import resource
import sqlite3
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from regard import tasks
from regard.bench.record import Cell, Result
from regard.bench.store import StoreError, opened, read
from regard.tasks import Metric


def result(seed, **fields):
    return Result(Cell("text", "alibi", seed, {"steps": 3}), **{"status": "done", **fields})


FULL = result(
    0,
    curve=[(1, 8.0), (2, 7.5)],
    heldout={"1x": 3.25},
    parameters=7,
    environment={"torch": "x"},
    notes=["no 2x: it is too long"],
)


def test_what_is_put_comes_back(tmp_path):
    with opened(tmp_path / "new" / "folder") as store:
        store.put(FULL)
        assert store.get(FULL.cell.key) == FULL
        assert store.get(result(1).cell.key) is None
    assert read(tmp_path / "new" / "folder") == [FULL]


def test_the_metric_comes_back_and_rows_of_old_have_that_of_text(tmp_path):
    mine = result(3, heldout={"mean": 0.5}, metric=Metric("accuracy", better=1, main="mean", percent=True))
    with opened(tmp_path) as store:
        store.put(mine)
        old = {**json.loads(json.dumps(asdict(FULL))), "an older field": 1}
        cell = old.pop("cell")
        del old["metric"]
        row = (FULL.cell.key, json.dumps(cell), json.dumps(old), "done", "")
        store._database.execute("INSERT INTO cells VALUES (?, ?, ?, ?, ?)", row)
        store._database.commit()
    assert read(tmp_path) == [mine, FULL]
    assert FULL.metric == Metric() == tasks.find("text").metric


def test_a_row_is_replaced_and_not_doubled(tmp_path):
    with opened(tmp_path) as store:
        store.put(result(0, status="failed", reason="no luck"))
        store.put(FULL)
        store.put(result(1))
    assert read(tmp_path) == [FULL, result(1)]


def test_any_changed_setting_is_another_cell():
    cell = FULL.cell
    others = [replace(cell, **change) for change in ({"seed": 1}, {"mechanism": "x"}, {"settings": {"steps": 4}})]
    assert len({cell.key, *(other.key for other in others)}) == 4
    assert replace(cell, settings=json.loads(json.dumps(cell.settings))).key == cell.key


def test_nan_is_no_result(tmp_path):
    with opened(tmp_path) as store:
        with pytest.raises(ValueError, match="JSON"):
            store.put(result(0, parameters=float("nan")))
        assert store.results() == []


def test_two_runs_in_one_folder_are_refused_and_a_dead_ones_lock_is_no_hindrance(tmp_path):
    code = """
import sys, time
from regard.bench.store import opened
with opened(sys.argv[1]):
    print("in", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        with (
            pytest.raises(StoreError, match=rf"another run is working .*process {other.pid}\b"),
            opened(tmp_path),
        ):
            pass
        other.kill()
    assert (tmp_path / ".lock").read_text() == str(other.pid), "what the dead one left"
    with opened(tmp_path) as store:
        store.put(FULL)


def test_a_full_disk_loses_nothing_and_is_named(tmp_path):
    with opened(tmp_path) as store:
        store.put(FULL)
        store._database.execute(f"PRAGMA max_page_count = {store._database.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(StoreError, match=r"results\.db cannot be written: .*bytes free") as caught:
            store.put(result(1, reason="x" * 100_000))
        assert "\n" not in str(caught.value)
        assert store.results() == [FULL]
    assert read(tmp_path) == [FULL]


def test_a_write_that_the_system_refuses_loses_nothing(tmp_path):
    """EFBIG in the middle of a commit, by the process's own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as store:
        store.put(FULL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        try:
            with pytest.raises(StoreError, match=r"results\.db cannot be written"):
                store.put(result(1, reason="x" * 100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.results() == [FULL]
        store.put(result(1))
    assert read(tmp_path) == [FULL, result(1)]


def test_what_is_no_store_is_left_alone(tmp_path):
    path = tmp_path / "results.db"
    path.write_bytes(b"notes of mine " * 100)
    with pytest.raises(StoreError, match="not a database"), opened(tmp_path):
        pass
    assert path.read_bytes() == b"notes of mine " * 100


def test_a_newer_format_is_left_alone(tmp_path):
    with opened(tmp_path):
        pass
    database = sqlite3.connect(tmp_path / "results.db")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="format 99"), opened(tmp_path):
        pass


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(StoreError, match=r"output folder .* cannot be made"),
        opened(tmp_path / "file" / "run"),
    ):
        pass
    with pytest.raises(StoreError, match=r"does not exist"):
        read(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written to"), opened(tmp_path):
        pass


def test_half_written_files_of_a_killed_run_are_swept(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    orphans = [tmp_path / ".report.html.x.tmp", tmp_path / "checkpoints" / ".m.safetensors.y.tmp"]
    for orphan in orphans:
        orphan.write_text("half")
    with opened(tmp_path):
        assert not any(orphan.exists() for orphan in orphans)
