"""The cache of compiled kernels gives only what is the user's own and whole, and is built by one at a time."""

import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kernels.test_native_build import builds, load
from regard.kernels.native import build, cache

COPY = 'cp REAL "$made"'
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
NOBODY = 65534


@pytest.fixture
def entry(compiler, tmp_path):
    """A library in the cache, and its digest."""
    compiler(COPY)
    assert load().regard_lanes()
    assert builds(tmp_path) == 1
    (found,) = (tmp_path / "cache" / "native").glob("*.so")
    return found


def test_an_entry_is_kept_whole_and_the_users_alone(entry, tmp_path):
    assert load().regard_lanes()
    assert builds(tmp_path) == 1
    folder = entry.parent
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".sha256", ".so"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent, *folder.iterdir())}
    assert set(modes.values()) == {0o600, 0o700}, modes
    with pytest.raises(FileNotFoundError):
        cache.keep(b"", folder / "build-gone", "key")
    assert len(list(folder.iterdir())) == 3


def replaced(file: Path, data: bytes) -> None:
    """By another file: this process has the first one loaded."""
    file.unlink()
    file.write_bytes(data)
    file.chmod(0o600)


def linked(entry: Path) -> None:
    entry.rename(entry.parent.parent / "elsewhere")
    entry.symlink_to(entry.parent.parent / "elsewhere")


def fifo(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry)


DAMAGE = {
    "is empty": lambda entry: replaced(entry, b""),
    "is cut short": lambda entry: replaced(entry, entry.read_bytes()[:20000]),
    "differs in a byte": lambda entry: replaced(entry, entry.read_bytes()[:-1] + b"?"),
    "is another file": lambda entry: replaced(entry, b"hello"),
    "has no digest": lambda entry: entry.with_suffix(".sha256").unlink(),
    "has an empty digest": lambda entry: entry.with_suffix(".sha256").write_bytes(b""),
    "is a link": linked,
    "has a digest by link": lambda entry: linked(entry.with_suffix(".sha256")),
    "has a second name": lambda entry: os.link(entry, entry.parent / "second"),
    "is a pipe": fifo,
    "can be written by a group": lambda entry: entry.chmod(0o620),
    "can be written by all": lambda entry: entry.chmod(0o602),
    "has a digest that all can write": lambda entry: entry.with_suffix(".sha256").chmod(0o666),
    "belongs to another": lambda entry: os.chown(entry, NOBODY, NOBODY),
    "has another's digest": lambda entry: os.chown(entry.with_suffix(".sha256"), NOBODY, NOBODY),
}


@pytest.mark.parametrize("what", [pytest.param(n, marks=AS_ROOT if "another" in n[-15:] else ()) for n in DAMAGE])
def test_an_entry_is_built_anew_that(what, entry, tmp_path):
    DAMAGE[what](entry)
    assert load().regard_lanes()
    assert builds(tmp_path) == 2
    assert load().regard_lanes()
    assert builds(tmp_path) == 2
    assert stat.S_ISREG(entry.lstat().st_mode)
    assert entry.stat().st_uid == os.geteuid()


def test_a_damaged_entry_ends_no_process(entry):
    """The whole way, in a process that would be ended by SIGBUS."""
    replaced(entry, entry.read_bytes()[:20000])
    code = "from regard.kernels.native import build; print(build.why_not())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_an_entry_that_lacks_a_function_is_built_anew(entry, tmp_path):
    wrong = entry.read_bytes().replace(b"regard_topk", b"regard_tipk")
    with cache.building(entry.parent, 1) as scratch:
        cache.keep(wrong, scratch, entry.stem)
    assert load().regard_topk
    assert builds(tmp_path) == 2


# --- folders ------------------------------------------------------------------------------------------------------


class Full:
    free = 0


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


UNSAFE = {
    "native can be written by others": lambda cache: (cache / "native").chmod(0o777),
    "native can be written by others ": lambda cache: (cache / "native").chmod(0o770),
    "cache can be written by others": lambda cache: cache.chmod(0o777),
    "outside can be written by others": lambda cache: cache.parent.chmod(0o777),
    "native is a symbolic link": lambda cache: moved(cache / "native"),
    "cache is a symbolic link": moved,
    "native belongs to another user": lambda cache: os.chown(cache / "native", NOBODY, NOBODY),
    "cache belongs to another user": lambda cache: os.chown(cache, NOBODY, NOBODY),
}


@pytest.mark.parametrize("what", [pytest.param(n, marks=AS_ROOT if "another" in n else ()) for n in UNSAFE])
def test_a_folder_is_left_alone_where(what, entry, tmp_path, monkeypatch, caplog):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "cache").rename(outside / "cache")
    monkeypatch.setenv("REGARD_CACHE", str(outside / "cache"))
    UNSAFE[what](outside / "cache")
    with caplog.at_level(logging.WARNING, "regard"):
        assert load().regard_lanes()
    (said,) = caplog.messages
    assert f"{what.strip()}; they are kept in {tmp_path}/temporary/regard-{os.geteuid()}/native instead" in said
    assert builds(tmp_path) == 2
    assert load().regard_lanes()
    assert builds(tmp_path) == 2


def test_a_folder_all_may_write_is_safe_where_only_owners_remove(entry, tmp_path):
    tmp_path.chmod(0o1777)
    assert load().regard_lanes()
    assert builds(tmp_path) == 1


def test_folders_above_may_be_links(entry, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "link" / "cache"))
    assert load().regard_lanes()
    assert builds(tmp_path) == 1


@pytest.mark.parametrize("where", ["nowhere to write", "no home", "a file in the way", "a full disk"])
def test_the_temporary_folder_serves_where_there_is(where, compiler, tmp_path, monkeypatch, caplog):
    compiler(COPY)
    if where == "nowhere to write":
        monkeypatch.setenv("REGARD_CACHE", "/proc/regard")  # not even root can
    elif where == "a file in the way":
        (tmp_path / "cache").write_text("")
    elif where == "a full disk":
        compiler('[ -e "{0}" ] && cp REAL "$made" || {{ touch "{0}"; exit 1; }}'.format(tmp_path / "second"))
        monkeypatch.setattr(build.shutil, "disk_usage", lambda path: Full)
    else:
        monkeypatch.delenv("REGARD_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def unknown():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(cache.Path, "home", unknown)
    with caplog.at_level(logging.WARNING, "regard"):
        assert load().regard_lanes()
    assert len(caplog.messages) == 1
    kept = tmp_path / "temporary" / f"regard-{os.geteuid()}" / "native"
    assert f"they are kept in {kept} instead" in caplog.text
    assert len(list(kept.glob("*.so"))) == 1


def test_without_any_folder_one_line_says_so(compiler, monkeypatch, caplog):
    compiler(COPY)
    monkeypatch.setenv("REGARD_CACHE", "/proc/regard")
    monkeypatch.setattr(cache.tempfile, "tempdir", "/proc/nowhere")
    with caplog.at_level(logging.WARNING, "regard"):
        assert load().startswith("they could not be built or loaded: ")
    assert len(caplog.messages) == 1


def test_a_disk_that_fills_up_while_an_entry_is_written(compiler, tmp_path, monkeypatch):
    compiler(COPY)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    assert "No space left on device" in load()
    assert [path.name for path in (tmp_path / "cache" / "native").iterdir()] == ["lock"]


def test_modes_are_narrow_whatever_the_umask(compiler, tmp_path):
    compiler(COPY)
    before = os.umask(0)
    try:
        assert load().regard_lanes()
        assert load().regard_lanes()
    finally:
        os.umask(before)
    assert builds(tmp_path) == 1


def test_a_relative_xdg_folder_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv("REGARD_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache.chosen() == tmp_path / ".cache" / "regard" / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert cache.chosen() == tmp_path / "there" / "regard" / "native"


# --- one at a time ------------------------------------------------------------------------------------------------


def test_of_those_who_ask_at_once_one_builds(compiler, tmp_path):
    compiler(f"sleep 0.5; {COPY}")
    found = []
    threads = [threading.Thread(target=lambda: found.append(load().regard_lanes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert builds(tmp_path) == 1


def test_a_killed_build_keeps_nobody_waiting_and_leaves_nothing(compiler, tmp_path, monkeypatch):
    compiler(f'echo $$ > "{tmp_path}/running"; exec sleep 1000')
    code = "from regard.kernels.native import build; build.why_not()"
    builder = subprocess.Popen([sys.executable, "-c", code])
    folder = tmp_path / "cache" / "native"
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "running").exists() or not (tmp_path / "running").read_text().strip():
            assert time.monotonic() < until
            time.sleep(0.05)
        monkeypatch.setattr(build, "WAIT", 0.3)
        assert load() == "another process has been building them for more than 0.3 s"
        assert any(path.name.startswith("build-") for path in folder.iterdir())
    finally:
        builder.kill()
        builder.wait()
    compiler(COPY)
    (folder / "tmpabcdefgh").mkdir()  # as earlier versions left them
    try:
        assert load().regard_lanes()
    finally:
        os.kill(int((tmp_path / "running").read_text()), signal.SIGKILL)
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".sha256", ".so"]
