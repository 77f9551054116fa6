"""Loads the C++ kernels: those that the wheel brought (`recipe.ready`), else such as are compiled here on first use.

One call of the machine's own compiler on a few files without any library's headers: a few seconds once, then the result
lies in the user's cache folder (`cache`) under a name made of the source, the compiler and the processor. Nothing is
compiled while `import regard` runs. Without a compiler, or with one that fails, hangs or makes something else,
everything still works on torch's kernels, and `why_not` says why in one line.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import torch

from regard import tracing
from regard.kernels.native import cache, recipe

FLAGS = (*recipe.FLAGS, "-march=native", "-shared")
SYMBOLS = (
    *(
        "regard_lanes",
        "regard_fp16",
        "regard_bf16",
        "regard_attention",
        "regard_attention_bf16",
        "regard_attention_backward",
    ),
    *("regard_entmax", "regard_entmax_backward", "regard_topk", "regard_paged", "regard_decode"),
    *("regard_listed", "regard_listed_backward", "regard_lasting", "regard_greatest", "regard_indexed"),
)
"""What a library must have before any of it is used."""
SWITCH = "REGARD_NATIVE"
"""Environment variable: 0, at first use, leaves the C++ kernels alone."""
LIMIT, WAIT, MOMENT = 60.0, 30.0, 10.0
"""Seconds that a build may take, that others wait for it, and that a word from a compiler or a first try may take. Two
cores of a Xeon need 5 for the build."""
MOST = 1 << 20
"""Bytes that a compiler may print, and that a disk must have left for its failure to be its own."""
TRY = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).regard_lanes()"

log = logging.getLogger(__name__)


class Broken(Exception):
    """A compiler or a library that can't be used; the message is one line."""


@torch.compiler.assume_constant_result
def why_not() -> list[str]:
    """Why there are no C++ kernels here, if so. Builds them at the first call, unless the wheel brought them."""
    return [] if isinstance(found := _here(), ctypes.CDLL) else [found]


def library() -> ctypes.CDLL:
    """The compiled kernels; RuntimeError where there are none."""
    found = _here()
    if isinstance(found, str):
        raise RuntimeError(f"native kernels: {found}")
    return found


def readable(x: torch.Tensor) -> bool:
    """Whether x is memory that C++ can read: no tensor subclass, nothing that torch.func or torch.compile traces,
    no view whose sign is still to be turned."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and tracing.readable(x) and not x.is_neg()


@lru_cache(maxsize=1)
def _here() -> ctypes.CDLL | str:
    """The switch is read once: a look into the environment takes as long as a small call."""
    return _load(os.environ.get(SWITCH, "1"))


@lru_cache(maxsize=2)
def _load(switch: str) -> ctypes.CDLL | str:
    if switch == "0":
        return f"switched off by {SWITCH}=0"
    if isinstance(ready := brought(), ctypes.CDLL):
        return ready
    if os.name != "posix":
        return f"they are built on Linux and macOS, not on {platform.system()}"
    if (compiler := recipe.compiler()) is None:
        return "no C++ compiler found (looked for $CXX, g++, clang++)"
    try:
        return _found(compiler)
    except (Broken, cache.Busy, OSError) as error:
        reason = str(error) if isinstance(error, Broken | cache.Busy) else f"they could not be built or loaded: {error}"
        log.warning("native kernels: %s; torch's run instead", reason)
        return reason


@lru_cache(maxsize=1)
def brought() -> ctypes.CDLL | str:
    """The library that came with this installation, or why it can't be used."""
    try:
        return found if isinstance(found := recipe.ready(), str) else _opened(str(found))
    except Broken as error:
        return f"those that this installation brings: {error}"


def _found(compiler: str) -> ctypes.CDLL:
    """The library from the first folder that can be used, made if it isn't there."""
    key = _key(compiler)
    reasons: list[str] = []
    for place in (cache.chosen, cache.temporary):
        try:
            folder = place()
            found = _kept(folder, key) or _built(compiler, folder, key)
        except OSError as error:
            reasons.append(str(error))
            continue
        if reasons:
            log.warning("native kernels: %s; they are kept in %s instead", reasons[0], folder)
        return found
    raise OSError("; ".join(reasons))


def _kept(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library of that key, if it is there and can be used."""
    descriptor = cache.entry(folder, key)
    if descriptor is None:
        return None
    # By its descriptor: between two looks at a name it may become another's. It stays open, since the loader takes
    # whatever comes under a name that it has seen for the same library.
    opened = f"/proc/self/fd/{descriptor}"
    with contextlib.suppress(Broken):
        return _opened(opened if os.path.exists(opened) else str(folder / f"{key}.so"))
    return None


def _opened(path: str) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(path)
    except OSError as error:
        raise Broken(f"they could not be loaded: {_line(str(error))}") from None
    if missing := [name for name in SYMBOLS if not hasattr(found, name)]:
        raise Broken(f"the library lacks {', '.join(missing)}")
    return found


def _built(compiler: str, folder: Path, key: str) -> ctypes.CDLL:
    """The library, compiled, tried, and kept in the folder."""
    with cache.building(folder, WAIT) as scratch:
        if found := _kept(folder, key):  # made by whoever had the lock
            return found
        log.info("compiling regard's CPU kernels once, into %s", folder)
        made = scratch / "made.so"
        # Of libgomp only the name is linked: torch has loaded one, and a second would bring a second set of threads.
        command = [compiler, *FLAGS, *(str(recipe.HERE / name) for name in recipe.SOURCES), "-o", str(made)]
        try:
            _said(command, LIMIT, scratch)
            if not made.is_file() or not made.stat().st_size:
                raise Broken("it said that all went well, and made no library")
            _tried(made, scratch)
            _opened(str(made))
        except Broken as error:
            if shutil.disk_usage(scratch).free < MOST:
                raise OSError(f"{folder} has no room left") from None
            raise Broken(f"{compiler} could not build them: {error}") from None
        cache.keep(made.read_bytes(), scratch, key)
        return _kept(folder, key) or _opened(str(made))


def _tried(made: Path, scratch: Path) -> None:
    """Broken if the library ends a process that loads it, or never lets go of it. What can be said in order, such as a
    missing library of the compiler's that torch has brought here, is left to the loading."""
    if getattr(sys, "frozen", False) or not os.access(sys.executable or "", os.X_OK):  # no Python that could be asked
        return
    try:
        _said([sys.executable, "-I", "-S", "-c", TRY, str(made)], MOMENT, scratch)
    except Failed as error:
        if error.code < 0:
            raise Broken(f"what it made ends a process that loads it, by {_signal(error.code)}") from None
    except Broken:
        raise Broken(f"a process that loads what it made is not done after {MOMENT:g} s") from None


class Failed(Broken):
    """A program that ended with a code other than 0."""

    def __init__(self, code: int, said: str):
        lines = [line for line in said.splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() and not line.startswith("collect2:")]
        words = _line((telling or lines or ["no message"])[0])
        super().__init__(f"ended by {_signal(code)}" if code < 0 else f"{words} (exit code {code})")
        self.code = code


def _said(command: list[str], limit: float, scratch: Path | None = None) -> str:
    """What a program prints, in whatever bytes; Broken where it fails, or takes or says too much.

    It has a session of its own, so that with a compiler go the processes that it has started.
    """
    environment = os.environ | {"LC_ALL": "C"} | ({"TMPDIR": str(scratch)} if scratch else {})
    with tempfile.TemporaryFile(dir=scratch) as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        until = time.monotonic() + limit
        try:
            while process.poll() is None:
                if time.monotonic() > until:
                    raise Broken(f"{command[0]} took longer than {limit:g} s")
                if os.fstat(said.fileno()).st_size > MOST:
                    raise Broken(f"{command[0]} printed more than {MOST >> 20} MiB")
                time.sleep(0.01)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk does not even die
                process.wait(1)
            raise
        said.seek(0)
        text = said.read(MOST).decode(errors="replace")
    if process.returncode:
        raise Failed(process.returncode, text)
    return text


def _line(text: str) -> str:
    """One line of at most 200 characters that a terminal shows as they are."""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:200]


def _signal(code: int) -> str:
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"


def _key(compiler: str) -> str:
    """The name of the library: what it is made of, and for."""
    try:
        version = _said([compiler, "--version"], MOMENT)
    except Broken as error:
        raise Broken(f"{compiler} could not build them, it gives no version: {error}") from None
    parts = [version, _processor(), torch.__version__, " ".join(FLAGS), *recipe.texts()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native looks at, so that a home folder shared by machines holds a library for each."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in wanted)
