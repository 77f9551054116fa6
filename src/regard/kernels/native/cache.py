"""Where compiled kernels are kept: folders that are the user's own, entries that are whole or not there.

What is loaded from here runs as the user. So a folder or file that belongs to somebody else, that others may write or
that is a link is left alone, and an entry counts only with its own digest beside it: of a library cut short, the
missing pages would end the process when they are first touched.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SCRATCH = "build-"
"""How the folders of builds begin; such as are left belong to builds that were killed."""
EARLIER = "tmp"
"""How they began before; without any digest."""


class Busy(Exception):
    """Another process is building."""


def chosen() -> Path:
    """The folder that the environment names, or the user's cache, made if need be; OSError where it isn't safe."""
    if given := os.environ.get("REGARD_CACHE"):
        own = Path(given).absolute()
        return _claimed(own.parent, own.name, "native")
    return _claimed(_user_cache(), "regard", "native")


def temporary() -> Path:
    """What serves where that one can't: a folder of this user's among the temporary ones."""
    return _claimed(Path(tempfile.gettempdir()), f"regard-{os.geteuid()}", "native")


def entry(folder: Path, key: str) -> int | None:
    """A descriptor of the library under that key, open for reading; None where it isn't there, whole and the user's.

    What was looked at is what the descriptor gives, whatever happens to the name meanwhile.
    """
    found = _opened(folder / f"{key}.so")
    digest = _opened(folder / f"{key}.sha256")
    fine = False
    try:
        if found is not None and digest is not None:
            fine = hashlib.sha256(_bytes(found)).hexdigest().encode() == _bytes(digest)
    finally:
        if digest is not None:
            os.close(digest)
        if found is not None and not fine:
            os.close(found)
    return found if fine else None


def keep(library: bytes, scratch: Path, key: str) -> None:
    """Put an entry into the folder of this scratch folder: whoever looks, also after a loss of power, finds the old
    one, none or the new one."""
    folder = scratch.parent
    for suffix, data in ((".so", library), (".sha256", hashlib.sha256(library).hexdigest().encode())):
        beside = scratch / f"entry{suffix}"
        with open(beside, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, folder / f"{key}{suffix}")
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def building(folder: Path, wait: float) -> Iterator[Path]:
    """A scratch folder for the only one who builds in this folder; what killed builds left there is swept. Busy after
    `wait` seconds of another's building."""
    import fcntl  # not on Windows, where nothing is built

    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise Busy(f"another process has been building them for more than {wait:g} s") from None
                time.sleep(0.05)
        for left in folder.iterdir():
            if left.name.startswith((SCRATCH, EARLIER)):
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)
    finally:
        # Said outright: processes that were forked meanwhile have the descriptor too, and would keep the lock.
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _user_cache() -> Path:
    if (base := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return base
    try:
        return Path.home().absolute() / ".cache"
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder") from None


def _claimed(outside: Path, *own: str) -> Path:
    """The folder outside/own/..., made where it isn't there; OSError where others could put something into it."""
    folder = Path(os.path.realpath(outside))
    for part in (*reversed(folder.parents), folder):
        mode = _made(part).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"{part} can be written by others")
    for name in own:
        folder /= name
        if wrong := _foreign(_made(folder), stat.S_ISDIR):
            raise PermissionError(f"{folder} {wrong}")
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PermissionError(f"{folder} lies where no code may run (noexec)")
    return folder


def _made(folder: Path) -> os.stat_result:
    if not os.path.lexists(folder):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    return folder.lstat()


def _foreign(found: os.stat_result, kind: Callable[[int], bool]) -> str:
    """Why this is not to be trusted, if so."""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not kind(found.st_mode):
        return "is something else than it should be"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by others"
    return ""


def _opened(file: Path) -> int | None:
    """A descriptor, if it is a file of the user's alone. O_NONBLOCK: of a pipe there may be no writer."""
    try:
        found = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    # A second name may be somebody's who wants an old file of the user's to be taken for this one.
    if _foreign(state := os.fstat(found), stat.S_ISREG) or state.st_nlink != 1:
        os.close(found)
        return None
    return found


def _bytes(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()
