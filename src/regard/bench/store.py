"""Where results are kept: one SQLite file in a run's folder, one committed row for each finished cell.

A row is there entirely or not at all, whatever kills the process. One process at a time may write to a
folder.
"""

import contextlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from regard.bench.record import Result, stored
from regard.files import SHOWN

FILE = "results.db"
VERSION = 1
COLUMNS = {
    "key": "TEXT PRIMARY KEY",
    "cell": "TEXT NOT NULL",
    "result": "TEXT NOT NULL",
    "status": "TEXT NOT NULL",
    "created": "TEXT NOT NULL",
}
LONGEST = 2**28
"""Bytes of the longest value that is read from a file of somebody else's."""
SECONDS = 60.0
"""The longest that reading it may take."""


class StoreError(ValueError):
    """The store cannot be used; the message is one line."""


class Store:
    """The rows of one folder, open for writing. Use `opened`."""

    def __init__(self, folder: Path, database: sqlite3.Connection):
        self.folder, self.path, self._database = folder, folder / FILE, database

    def get(self, key: str) -> Result | None:
        """The result of this cell, if there is one."""
        with _explained(self.path):
            row = self._database.execute("SELECT cell, result FROM cells WHERE key = ?", (key,)).fetchone()
        return _result(self.path, *row) if row else None

    def put(self, result: Result) -> None:
        """Commit one row, in place of an earlier one of the same cell. Back from here, it is on disk."""
        record = asdict(result)
        cell = record.pop("cell")
        row = (
            result.cell.key,
            json.dumps(cell, sort_keys=True),
            json.dumps(record, allow_nan=False),
            result.status,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        with _explained(self.path), self._database:
            self._database.execute(
                "INSERT INTO cells VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                "result = excluded.result, status = excluded.status, created = excluded.created",
                row,
            )

    def results(self) -> list[Result]:
        """Every row, in the order of their commits."""
        with _explained(self.path):
            rows = self._database.execute("SELECT cell, result FROM cells ORDER BY rowid").fetchall()
        return [_result(self.path, *row) for row in rows]


@contextlib.contextmanager
def opened(folder: str | Path) -> Iterator[Store]:
    """Make the folder if need be, lock it, and open its store."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"output folder {folder} cannot be made: {error.strerror}") from error
    with _locked(folder):
        _sweep(folder)
        with contextlib.closing(_connect(folder / FILE)) as database:
            yield Store(folder, database)


def read(folder: str | Path) -> list[Result]:
    """Every row of a folder's store, while another process may be writing. StoreError, one line, where it is none."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise StoreError(f"{path} does not exist; it is written by `regard compare`")
    with (
        _explained(path),
        contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database,
    ):
        _distrust(database)
        if not _is_ours(database, path):
            raise StoreError(f"{path} holds no results of `regard compare`")
        rows = database.execute("SELECT cell, result FROM cells ORDER BY rowid")
        return [_result(path, *row) for row in rows]


def _connect(path: Path) -> sqlite3.Connection:
    if path.exists() and not path.is_file():
        raise StoreError(f"{path} is no file")
    with _explained(path):
        database = sqlite3.connect(path, timeout=10)
        try:
            database.execute("PRAGMA synchronous = FULL")
            if not _is_ours(database, path):
                with database:
                    database.execute(f"CREATE TABLE cells ({', '.join(f'{n} {t}' for n, t in COLUMNS.items())})")
                    database.execute(f"PRAGMA user_version = {VERSION}")
        except BaseException:
            database.close()
            raise
    return database


def _distrust(database: sqlite3.Connection) -> None:
    """For a file that anybody may have written: a query of it ends, and takes no more memory than a row may have."""
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
    end = time.monotonic() + SECONDS
    database.set_progress_handler(lambda: time.monotonic() > end, 100_000)


def _is_ours(database: sqlite3.Connection, path: Path) -> bool:
    """Whether it has the table of results; StoreError where it has another of that name, or does more than hold it."""
    database.execute("PRAGMA trusted_schema = OFF")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, VERSION):
        raise StoreError(f"{path} has format {version}; this version of regard reads {VERSION}")
    found = database.execute("SELECT type, sql FROM sqlite_master WHERE name = 'cells' COLLATE NOCASE").fetchall()
    if database.execute("SELECT 1 FROM sqlite_master WHERE type = 'trigger' LIMIT 1").fetchone():
        raise StoreError(f"{path} has triggers, which no store of `regard compare` has")
    if not found:
        return False
    columns = {row[1]: row[6] for row in database.execute("PRAGMA table_xinfo(cells)")}
    plain = [kind for kind, sql in found if kind == "table" and str(sql).upper().startswith("CREATE TABLE")]
    if len(plain) != len(found) or list(columns) != list(COLUMNS) or any(columns.values()):
        raise StoreError(f"{path}: its cells are no table of results of `regard compare`")
    return True


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one line that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        free = shutil.disk_usage(path.parent).free
        if "full" in str(error) or "disk I/O" in str(error):
            raise StoreError(disk_full(path, free)) from error
        if "interrupted" in str(error):
            raise StoreError(f"{path} cannot be read: it takes longer than {SECONDS:g} s") from error
        raise StoreError(f"{path} cannot be used as a results store: {str(error)[:SHOWN]}") from error


def disk_full(path: Path, free: int | None = None) -> str:
    """The one line for a disk without room."""
    free = shutil.disk_usage(path.parent).free if free is None else free
    return (
        f"{path} cannot be written: the disk is full or failing ({free:,} bytes free); "
        "finished cells are kept, make room and run the same command again"
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when its owner dies, so that no lock is ever stale."""
    path = folder / ".lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(f"output folder {folder} cannot be written to: {error.strerror}") from error
    with os.fdopen(handle, "r+") as file:
        if not _lock(file.fileno()):
            owner = file.read().strip()
            raise StoreError(
                f"another run is working in {folder} (process {owner or 'unknown'}); "
                "wait for it, or choose another folder"
            )
        try:
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        except OSError as error:
            raise StoreError(disk_full(path)) from error
        yield


def _lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            # A byte far behind the owner's number, which stays readable.
            os.lseek(handle, 1 << 20, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            return True
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for orphan in [*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")]:
        with contextlib.suppress(OSError):
            orphan.unlink()


def _result(path: Path, cell: object, result: object) -> Result:
    try:
        return stored(cell, result)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise StoreError(f"{path}: a row is no result of `regard compare`: {why[:SHOWN]}") from error
