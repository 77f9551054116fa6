"""Reading files that somebody wrote: whatever is wrong with one ends in one line that names it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as write_tensors
from torch import Tensor

from regard.models.checkpoint import write_atomically

LONGEST = 2**26
"""Bytes of the longest JSON file that is read."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64",
}  # fmt: skip
"""As safetensors calls them."""

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Of each tensor its dtype, as safetensors calls it, and its shape."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error inside becomes a ValueError of one line that begins with the path, unless it does already."""
    try:
        yield
    except Exception as error:  # what a file may make some library raise can't be listed
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and text.startswith(str(path.parent)):
            raise
        if isinstance(error, RecursionError):
            text = "it is nested too deep"
        if isinstance(error, FileNotFoundError):
            text = "there is no such file"
        if isinstance(error, MemoryError | OverflowError):
            text = f"it asks for too much ({text})"
        raise ValueError(f"{path}: {text[:400] or type(error).__name__}") from error


def read_json(path: Path) -> tuple[Any, bytes]:
    """What the file says, and its bytes. Keys that stand twice, NaN and infinity are refused."""
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} bytes")
    return json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_no_number), data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def header(path: Path) -> Header:
    """What is in a safetensors file, without reading any tensor."""
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file: these, or all. Each in memory of its own, which is aligned: within the file
    they are not, and some operations round otherwise there."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in (file.keys() if names is None else names)}


def header_of(tensors: Mapping[str, Tensor]) -> Header:
    """The header that a file of these tensors has."""
    for name, t in tensors.items():
        if t.dtype not in DTYPES:
            raise ValueError(f"save: {name} has a dtype that no file is known to hold (got {t.dtype})")
    return {name: (DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The tensors as safetensors, whole or not at all. Gives the sha256 of the file."""
    data = write_tensors({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
