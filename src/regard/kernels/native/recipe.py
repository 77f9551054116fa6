"""What the C++ kernels are made of, and which of those that a wheel carries ready-made suits this machine.

A wheel has a library for each class of processors (`hatch_build.py` in the repository builds them). They have a plain C
interface, and link neither torch nor an OpenMP runtime, whose functions torch has brought: so they are tied to no
version of either. One is used only if it was made of these very sources, for no more than this processor can, and is
whole; what can't be used is compiled here (`build`). It imports Python's own library alone: wheels are built where no
torch is.
"""

import hashlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
READY = HERE / "ready"
"""Where a wheel has its libraries; a checkout has no such folder."""
SOURCES = ("attention.cpp", "bf16.cpp", "decode.cpp", "indexed.cpp", "listed.cpp", "paged.cpp", "rows.cpp")
HEADERS = ("attention.h", "greatest.h", "simd.h")
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
"""No -ffast-math: linked in, it would make every thread of the process flush small numbers to zero."""


class Variant(NamedTuple):
    """A class of processors."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    """As /proc/cpuinfo calls it."""


_V3 = frozenset(["sse4_2", "popcnt", "cx16", "movbe", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_BF16 = _V4 | frozenset(["avx512_bf16"])
VARIANTS = {
    "x86_64": (
        Variant("x86_64_v4_bf16", ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), _BF16),
        Variant("x86_64_v4", ("-march=x86-64-v4",), _V4),
        Variant("x86_64_v3", ("-march=x86-64-v3",), _V3),
    ),
    "aarch64": (Variant("armv8_a", ("-march=armv8-a",), frozenset({"asimd"})),),
}
"""Machine -> its classes, the best first. Where none suits, as before AVX2, a library compiled there may still."""


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)


def texts() -> list[str]:
    """What is compiled."""
    return [(HERE / name).read_text("utf-8") for name in SOURCES + HEADERS]


def digest(variant: Variant) -> str:
    """Of all that makes a variant's library what it is, but for the compiler."""
    return hashlib.sha256("\0".join([*FLAGS, *variant.flags, *texts()]).encode()).hexdigest()


def ready() -> Path | str:
    """The library that this installation carries for this processor, or why there is none."""
    variants, has = VARIANTS.get(platform.machine(), ()), _features()
    try:
        known = json.loads((READY / "libraries.json").read_text("utf-8"))
        for variant in variants:
            if variant.name in known and variant.needs <= has:
                return _whole(variant, known[variant.name])
    except FileNotFoundError:
        return "this installation brings none"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"what this installation brings can't be read: {error}"
    return f"this installation brings {', '.join(known) or 'none'}, and this processor can do none of them"


def _whole(variant: Variant, told: dict[str, str]) -> Path | str:
    file = READY / told["file"]
    if told["made_of"] != digest(variant):
        return f"{file.name} of this installation was made of other sources"
    if hashlib.sha256(file.read_bytes()).hexdigest() != told["sha256"]:
        return f"{file.name} of this installation is damaged"
    return file


def _features() -> set[str]:
    """What this processor can do and the system lets it do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").partition(":")[2].split())
