"""Compiles the C++ kernels into a wheel, one library for each class of processors (`regard.kernels.native.recipe`).

Without a compiler, with one that fails, or with REGARD_NATIVE=0, the wheel is one of Python alone that runs anywhere,
and a warning says so. The tag promises no more than the libraries keep: no version of Python, and of the C library the
one whose functions they use. It runs where wheels are built, with hatchling and without torch.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

ROOT = Path(__file__).parent
INSIDE = "regard/kernels/native"
LIMIT = 300.0
"""Seconds that one call of the compiler may take."""
GCC_8 = {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
"""What is in the C++ library of GCC 8, the oldest one beside torch: its own wheels are for manylinux_2_28."""


class Native(BuildHookInterface):
    """What hatchling calls for a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the libraries, and have them packed."""
        if version == "editable" or os.environ.get("REGARD_NATIVE") == "0":
            return
        self.scratch = tempfile.TemporaryDirectory()
        folder = Path(self.scratch.name)
        try:
            made = build(folder)
            build_data["tag"] = f"py3-none-{tag([path.read_bytes() for path in made[:-1]])}"
        except (Unbuilt, OSError) as error:
            self.app.display_warning(f"The C++ kernels are not in this wheel: {error}. Where it runs they are compiled")
            self.app.display_warning("when first used, if there is a compiler; else torch's run in their place.")
            return
        build_data["pure_python"] = False
        build_data["force_include"].update({str(path): f"{INSIDE}/ready/{path.name}" for path in made})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """They are packed."""
        if hasattr(self, "scratch"):
            self.scratch.cleanup()


class Unbuilt(Exception):
    """Why there is no library."""


def recipe() -> Any:
    """The package's own module, without the package, which imports torch."""
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "src" / INSIDE / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["recipe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder: Path) -> list[Path]:
    """The libraries for this machine's processors in a folder, and last the file that says what they are made of."""
    parts = recipe()
    variants = parts.VARIANTS.get(parts.platform.machine(), ())
    if sys.platform != "linux" or not variants:
        raise Unbuilt(f"there is no recipe for {sys.platform} on {parts.platform.machine()}")
    if (compiler := parts.compiler()) is None:
        raise Unbuilt("no C++ compiler found (looked for $CXX, g++, clang++)")
    with ThreadPoolExecutor() as pool:
        libraries = list(pool.map(lambda variant: library(compiler, parts, variant, folder), variants))
    known = {
        variant.name: {"file": path.name, "made_of": parts.digest(variant), "sha256": sha256(path)}
        for variant, path in zip(variants, libraries, strict=True)
    }
    (folder / "libraries.json").write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")
    return [*libraries, folder / "libraries.json"]


def library(compiler: str, parts: Any, variant: Any, folder: Path) -> Path:
    """One library. In two steps, of which the second knows nothing of OpenMP: its functions are those of the runtime
    that torch has loaded, under whatever name, and no second one comes with its own threads."""
    made, objects = folder / f"{variant.name}.so", folder / variant.name
    objects.mkdir()
    sources = [str(parts.HERE / name) for name in parts.SOURCES]
    called([compiler, "-c", *parts.FLAGS, *variant.flags, *sources], objects)
    names = [Path(name).with_suffix(".o").name for name in parts.SOURCES]
    called([compiler, "-shared", "-s", *names, "-o", str(made)], objects)
    if b"__kmpc_" in made.read_bytes():
        raise Unbuilt(f"{compiler} makes calls to LLVM's OpenMP runtime, and torch brings GNU's")
    return made


def called(command: list[str], folder: Path) -> None:
    """Run the compiler there."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT, errors="replace")
    except subprocess.TimeoutExpired:
        raise Unbuilt(f"{command[0]} took longer than {LIMIT:g} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no message"]
        raise Unbuilt(f"{command[0]} failed (exit code {done.returncode}): {said[0][:200]}")


def tag(libraries: list[bytes]) -> str:
    """The platform on which such libraries run, as far as their versioned symbols tell; else this very one."""
    wanted = {name: max((needed(data, name) for data in libraries), default=()) for name in ("GLIBC", *GCC_8)}
    if not wanted["GLIBC"] or any(wanted[name] > known for name, known in GCC_8.items()):
        return next(platform_tags())
    major, minor = wanted["GLIBC"][:2]
    return f"manylinux_{major}_{minor}_{os.uname().machine}"


def needed(data: bytes, name: str) -> tuple[int, ...]:
    """The newest version of NAME's symbols that a library asks for, such as (2, 27) of GLIBC."""
    found = re.findall(rb"\0" + name.encode() + rb"_([0-9.]+)(?=\0)", data)
    return max((tuple(map(int, version.split(b"."))) for version in found), default=())


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
