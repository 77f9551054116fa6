"""Tensors in files: as they are named there, read, and written whole or not at all."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as write_tensors
from torch import Tensor

from regard.files import DTYPES as NAMES
from regard.files import Header, write_atomically

DTYPES = {getattr(torch, name): known for name, known in NAMES.items()}
"""As safetensors calls them."""


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
