"""Files that somebody hands over, and files that are written.

Whatever is wrong with one ends in one line that names it; what is written is there whole or not at all.
"""

import contextlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST = 2**26
"""Bytes of the longest JSON text that is read."""
SHOWN = 500
"""Characters of the longest message about a file, beside its path."""

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Of each tensor its dtype, as safetensors calls it, and its shape."""

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
"""torch's names, and how safetensors calls them."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip
"""Of all dtypes that are read."""


# --- reading -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error inside becomes a ValueError of one line that begins with the path, unless it names its file already."""
    try:
        yield
    except Exception as error:  # what a file may make some library raise can't be listed
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and text.startswith(str(path.parent if path.parent.name else path)):
            if text == str(error) and len(text) <= SHOWN + len(str(path)):
                raise
            raise ValueError(_short(text, SHOWN + len(str(path)))) from error
        if isinstance(error, RecursionError):
            text = "it is nested too deep"
        elif isinstance(error, FileNotFoundError):
            text = "there is no such file"
        elif isinstance(error, OSError) and error.strerror:
            text = error.strerror
        elif isinstance(error, MemoryError | OverflowError):
            text = f"it asks for too much ({text})"
        elif isinstance(error, KeyError):
            text = f"it has no {text}"
        raise ValueError(f"{path}: {_short(text or type(error).__name__, SHOWN)}") from error


def _short(text: str, to: int) -> str:
    return text if len(text) <= to else f"{text[: to - 3]}..."


def read(path: Path, most: int) -> bytes:
    """A file's bytes. Refused: what is no plain file, as a pipe that never ends, and more than `most` bytes."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no plain file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is longer than {most} bytes")
    return data


def parsed(text: str, *, infinite: bool = False) -> Any:
    """What JSON says. Keys that stand twice, NaN and infinity are refused: readers differ in what they make of them.

    Args:
        infinite: NaN and infinity may stand there, as in what transformers writes.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=float if infinite else _no_number)


def read_json(path: Path, *, infinite: bool = False) -> tuple[Any, bytes]:
    """What the file says, and its bytes; see `parsed`."""
    data = read(path, LONGEST)
    return parsed(data.decode(), infinite=infinite), data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def header(path: Path) -> Header:
    """What is in a safetensors file, without reading any tensor."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[Header, dict[str, str]]:
    """What is in a safetensors file, and what it says besides, without reading any tensor.

    The tensors must fill the file without gaps or overlaps, so that none is larger than the file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no plain file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        rest = os.fstat(file.fileno()).st_size - 8 - length
        if length > LONGEST or rest < 0:
            raise ValueError("it is no file of safetensors, or damaged")
        said = parsed(file.read(length).decode())
    if not isinstance(said, dict):
        raise ValueError("its header is no object")
    besides = said.pop("__metadata__", {})
    if not isinstance(besides, dict) or not all(isinstance(value, str) for value in besides.values()):
        raise ValueError("its metadata are no texts")
    found, places = {}, []
    for name, about in said.items():
        dtype, shape, (start, end) = (about[key] for key in ("dtype", "shape", "data_offsets"))
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, start, end)):
            raise ValueError(f"{name[:80]!r} has no sizes of a tensor")
        if dtype not in BITS:
            raise ValueError(f"{name[:80]!r} has a dtype that is not read ({str(dtype)[:20]!r})")
        if 8 * (end - start) != BITS[dtype] * math.prod(shape):
            raise ValueError(f"{name[:80]!r} is not as long as its shape says")
        found[name] = (str(dtype), tuple(shape))
        places.append((start, end))
    at = 0
    for start, end in sorted(places):
        if start != at:
            raise ValueError("its tensors overlap, or leave gaps")
        at = end
    if at != rest:
        raise ValueError(f"its tensors are {at} bytes long, and {rest} stand there")
    return found, besides


# --- writing -------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`, so that a reader at any moment sees the old file or the new one, whole."""
    with replacing(path) as beside:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path`: filled inside, it takes its place at the end, or is gone if that doesn't come."""
    mode = path.stat().st_mode & 0o777 if path.exists() else None
    with _named(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            _finish(name, path, mode)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What goes wrong names the file that was asked for, not the one beside it that nobody knows of."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _finish(name: str, path: Path, mode: int | None) -> None:
    """Put the file beside it, whole and on disk, in its place."""
    with open(name, "rb+") as file:
        os.fsync(file.fileno())
    if mode is None:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    os.chmod(name, mode)
    os.replace(name, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
