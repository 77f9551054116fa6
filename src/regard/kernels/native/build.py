"""Compiles the C++ kernels for this machine on first use, and loads them.

One call of the machine's own compiler on two files without any library's headers: a few seconds once, then the result
lies in the user's cache folder under a name made of the source, the compiler and the processor. Nothing is compiled
while `import regard` runs, and without a compiler everything still works on torch's kernels.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from regard import tracing

SOURCES = ("attention.cpp", "bf16.cpp", "rows.cpp")
HEADERS = ("attention.h", "simd.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
"""No -ffast-math: linked in, it would make every thread of the process flush small numbers to zero."""
SWITCH = "REGARD_NATIVE"
"""Environment variable: 0 leaves the C++ kernels alone."""

log = logging.getLogger(__name__)


def why_not() -> list[str]:
    """Why there are no C++ kernels here, if so. Builds them at the first call."""
    return [] if isinstance(found := _load(os.environ.get(SWITCH, "1")), ctypes.CDLL) else [found]


def library() -> ctypes.CDLL:
    """The compiled kernels; RuntimeError where there are none."""
    found = _load(os.environ.get(SWITCH, "1"))
    if isinstance(found, str):
        raise RuntimeError(f"native kernels: {found}")
    return found


def readable(x: torch.Tensor) -> bool:
    """Whether x is memory that C++ can read: no tensor subclass, nothing that torch.func or torch.compile traces."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and tracing.readable(x)


@lru_cache(maxsize=2)
def _load(switch: str) -> ctypes.CDLL | str:
    if switch == "0":
        return f"switched off by {SWITCH}=0"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler found (looked for $CXX, g++, clang++)"
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        return f"{compiler} could not build them: {lines[0].strip()[:200]}"
    except OSError as error:
        return f"they could not be built or loaded: {error}"


def _built(compiler: str) -> Path:
    """The path of the shared library, made if it isn't there."""
    here = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, _processor(), torch.__version__, " ".join(FLAGS)]
    parts += [(here / name).read_text() for name in SOURCES + HEADERS]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = _cache()
    target = folder / f"{key}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log.info("compiling regard's CPU kernels once, into %s", target)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name
        # libgomp itself stays out: torch has loaded its own, and a second one would bring a second set of threads.
        command = [compiler, *FLAGS, *(str(here / name) for name in SOURCES), "-o", str(made)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        os.replace(made, target)
    return target


def _cache() -> Path:
    if given := os.environ.get("REGARD_CACHE"):
        return Path(given) / "native"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "regard" / "native"


def _processor() -> str:
    """What -march=native looks at, so that a home folder shared by machines holds a library for each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in wanted)
