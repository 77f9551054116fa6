"""Real text as bytes: the caller's files and folders, or by default what every Python brings along.

The end of the text is held out. Files of a folder are put in an order that hashes of their names decide, so
that the held-out end is drawn from all of it and every machine agrees on it.
"""

import codecs
import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from regard import catalog
from regard.models.checkpoint import save
from regard.models.lm import LanguageModel, LMConfig, language_model
from regard.models.mixer import Mechanism, parse
from regard.tasks import Batch, Defaults, Metric, Size, Task, TaskError, counts

POSITIONS = "rotary"
DEFAULT_BYTES = 6_000_000
LIMIT = 1 << 30
"""Most bytes taken from files; what is beyond stays unread."""
HELDOUT_BYTES = 32_768
"""Held-out bytes that are predicted, the same ones at every length."""


class TextError(TaskError):
    """The text cannot be used; the message is one line."""


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and bytes held out."""

    source: str
    train: bytes
    heldout: bytes
    told: tuple[str, ...] = ()
    """Which files were read and which were not, and what is held out, one line each."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of both parts."""
        digest = hashlib.sha256(len(self.train).to_bytes(8, "little"))
        digest.update(self.train)
        digest.update(self.heldout)
        return digest.hexdigest()

    def batches(self, batch: int, length: int, seed: int) -> Iterator[Int[Tensor, "batch length+1"]]:
        """Random stretches of the training part, without end. The seed alone decides them."""
        data = torch.frombuffer(bytearray(self.train), dtype=torch.uint8)
        windows = data.unfold(0, length + 1, 1)
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield windows[torch.randint(len(windows), (batch,), generator=generator)].long()

    def heldout_windows(self, length: int, most: int) -> Int[Tensor, "N length+1"]:
        """Stretches spread evenly over the held-out part; they predict about `most` bytes, each once."""
        data = torch.frombuffer(bytearray(self.heldout), dtype=torch.uint8).long()
        fit = (len(data) - 1) // length
        count = max(1, min(fit, most // length))
        starts = [length * (n * fit // count) for n in range(count)]
        return torch.stack([data[start : start + length + 1] for start in starts])


@dataclass(frozen=True)
class NextByte(Task):
    """Predict the next byte of real text, in a causal language model."""

    name: ClassVar[str] = "text"
    gist: ClassVar[str] = "Predict the next byte of text: your own, or Python's sources and docs."
    takes: ClassVar[Mapping[str, frozenset[str]]] = {"TokenMixer": frozenset({"causal"})}
    metric: ClassVar[Metric] = Metric()
    loss_scale: ClassVar[float] = 1 / math.log(2)
    defaults: ClassVar[Defaults] = Defaults(
        steps=400,
        batch=4,
        dim=64,
        depth=2,
        heads=4,
        lr=3e-3,
    )
    keeps_models: ClassVar[bool] = True

    length: int = 256
    text: Text | Sequence[str | Path] = ()
    """Files and folders; none = the standard library's sources and docs."""

    @classmethod
    def mechanisms(cls) -> tuple[str, ...]:
        """Everything that is compared has positions: the host has none, and the order of bytes is most of the task."""
        return tuple(dict.fromkeys(map(with_positions, super().mechanisms())))

    def __post_init__(self) -> None:
        counts(self, length=1)
        if not isinstance(self.text, Text):
            object.__setattr__(self, "text", load(self.text, length=self.length))

    @property
    def data(self) -> Text:
        assert isinstance(self.text, Text)
        return self.text

    @property
    def tokens(self) -> int:
        return self.length

    def describe(self) -> str:
        return self.data.source

    def told(self) -> list[str]:
        return list(self.data.told)

    def settings(self) -> dict[str, Any]:
        size = len(self.data.train) + len(self.data.heldout)
        return {
            "data": self.describe(),
            "bytes": size,
            "fingerprint": self.data.fingerprint,
            "length": self.length,
        }

    def config(self, mechanism: Mechanism, size: Size) -> LMConfig:
        return LMConfig(str(mechanism), size.dim, size.depth, size.heads, size.mlp_dim, length=self.length)

    def model(self, mechanism: Mechanism, size: Size) -> LanguageModel:
        return language_model(self.config(mechanism, size))

    def keep(self, model: nn.Module, mechanism: Mechanism, size: Size, path: Path) -> None:
        assert isinstance(model, LanguageModel)
        save(model, self.config(mechanism, size), path)

    def example(self) -> Batch:
        return (torch.zeros(1, self.length, dtype=torch.long),)

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        return ((ids,) for ids in self.data.batches(batch, self.length, seed))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        (ids,) = batch
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: int, device: torch.device) -> tuple[dict[str, float], list[str]]:
        """Bits per byte in stretches of one, two and four training lengths.

        The predicted bytes are the same at each; the longer the stretch, the more of them have a long past. What
        a mechanism cannot do is left out, with a note.
        """
        windows = self.data.heldout_windows(4 * self.length, HELDOUT_BYTES)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        found, notes = {}, []
        for factor in (1, 2, 4):
            try:
                total = 0.0
                rows = zip(
                    inputs.reshape(-1, factor * self.length).split(max(1, batch // factor)),
                    targets.reshape(-1, factor * self.length).split(max(1, batch // factor)),
                )
                for x, y in rows:
                    logits = model(x.to(device)).flatten(0, 1).float()
                    total += F.cross_entropy(logits, y.to(device).flatten(), reduction="sum").item()
            except (ValueError, IndexError, RuntimeError) as error:
                if factor == 1:
                    raise
                notes.append(f"no {factor}x: {' '.join(str(error).split())[:200]}")
                continue
            bits = total / targets.numel() / math.log(2)
            if math.isfinite(bits) or factor == 1:
                found[f"{factor}x"] = bits
            else:
                notes.append(f"no {factor}x: the held-out loss is {bits}")
        return found, notes


def with_positions(mechanism: str) -> str:
    """Joined to rotary positions where it takes some and brings none; softmax with them is `rotary`."""
    spec = parse(mechanism)
    cards = [catalog.card(name) for name in spec.names]
    if any(card.family == "positions" or not card.is_part for card in cards):
        return mechanism
    return POSITIONS if spec.name == "softmax" else f"{mechanism}+{POSITIONS}"


def needed_bytes(length: int) -> int:
    """The least text that training at `length` and testing at four times that takes."""
    return 2 * (4 * length + 1)


def load(paths: Sequence[str | Path] = (), *, length: int, heldout: float = 0.1) -> Text:
    """Read text and cut off the held-out end (at least one stretch of four training lengths)."""
    found = Reading()
    for path in paths:
        _named(Path(path), found)
    if not paths:
        _standard_library(found)
    data = b"\n".join(found.pieces)
    source = ", ".join(map(str, paths)) if paths else "Python standard library"
    if not data.strip():
        raise TextError(f"text: {source} is empty; give text of at least {needed_bytes(length)} bytes")
    if len(data) < needed_bytes(length):
        raise TextError(
            f"text: {source} is too short ({len(data)} bytes); training at length {length} and testing at "
            f"{4 * length} needs at least {needed_bytes(length)} bytes"
        )
    end = len(data) - max(int(len(data) * heldout), 4 * length + 1)
    return Text(source, data[:end], data[end:], tuple(found.told(end, len(data))))


@dataclass
class Reading:
    """What was read, piece by piece, and what was not."""

    names: list[str] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the files that were not read for it."""

    def take(self, name: str, data: bytes) -> None:
        self.names.append(name)
        self.pieces.append(data)

    def leave(self, reason: str, name: str) -> None:
        self.left.setdefault(reason, []).append(name)

    def told(self, end: int, total: int) -> Iterator[str]:
        """In words, first all in short; the pieces stand end to end with a byte between two.

        Args:
            end: those from this byte on are held out.
        """
        left = sum(map(len, self.left.values()))
        out = f"the last {total - end:,} bytes ({(total - end) / total:.1%})"
        yield f"read {_plural(self.names)}, {total:,} bytes{f', and left out {left:,}' * bool(left)}; held out: {out}"
        yield f"read: {_files(self.names)}"
        for reason, names in self.left.items():
            yield f"not read, {reason}: {_files(names)}"
        at, first = 0, 0
        while at + len(self.pieces[first]) < end:
            at += len(self.pieces[first]) + 1
            first += 1
        inside = f"from byte {end - at:,} of {self.names[first]}" if end > at else f"from {self.names[first]}"
        yield f"held out: {out}, {inside} on"


def _files(names: Sequence[str]) -> str:
    """'2 files (a.txt, b.txt)', '900 files (a.txt, b.txt, c.txt and 897 more)'."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{_plural(names)} ({shown})"


def _plural(names: Sequence[str]) -> str:
    return f"{len(names):,} file{'s' * (len(names) != 1)}"


def _named(path: Path, found: Reading) -> None:
    if not path.exists():
        raise TextError(f"text: {path} does not exist")
    if path.is_dir():
        _folder(path, found)
        return
    if not path.is_file():
        raise TextError(f"text: {path} is no plain file; give a file or a folder of plain UTF-8 text")
    data = _read(path, LIMIT)
    if reason := _binary(data):
        raise TextError(f"text: {path} is not text ({reason}); give plain UTF-8 text")
    found.take(str(path), data)
    if len(data) == LIMIT and path.stat().st_size > LIMIT:
        found.leave(f"beyond the limit of {LIMIT:,} bytes", f"{path} from there on")


def _folder(path: Path, found: Reading) -> None:
    files: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(folder, name) for name in names):
            if file.name.startswith(".") or file.is_symlink() or not file.is_file():
                found.leave("hidden, or links", str(file))
            else:
                files.append(file)
    before = len(found.pieces)
    _distinct(path, files, LIMIT, found)
    if len(found.pieces) == before:
        raise TextError(
            f"text: {path} holds no text files (got {len(files)} files that are empty, or no UTF-8); expected some text"
        )


def _standard_library(found: Reading) -> None:
    """Sources and language reference that come with Python, without its tests: a few MB.

    They are the same wherever the same Python is.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__", "lib2to3"}
    files = [
        Path(folder, name)
        for folder, folders, names in _walk(root, skip)
        for name in names
        # Files that the build of one machine writes differ between machines.
        if name.endswith(".py") and not name.startswith("_sysconfigdata")
    ]
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}  # type: ignore[misc]
    for name in sorted(topics, key=_shuffled):
        found.take(f"help({name!r})", topics[name].encode())
    _distinct(root, files, DEFAULT_BYTES - sum(map(len, found.pieces)), found)
    if not found.pieces:
        raise TextError(f"text: no sources of the standard library in {root}; name your own text")
    order = sorted(range(len(found.pieces)), key=lambda n: hashlib.sha256(found.pieces[n]).digest())
    found.names, found.pieces = [found.names[n] for n in order], [found.pieces[n] for n in order]


def _walk(root: Path, skip: set[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(("config-", "."))]
        yield folder, folders, names


def _distinct(root: Path, files: list[Path], limit: int, found: Reading) -> None:
    """Take the text files in hashed order, until the limit.

    Copies come once: a copy on both sides of the cut would make the held-out part easy.
    """
    seen, total = set(), 0
    for file in sorted(files, key=lambda file: _shuffled(file.relative_to(root).as_posix())):
        if total > limit:
            found.leave(f"beyond the limit of {limit:,} bytes", str(file))
            continue
        data = _read(file, limit + 1)
        if len(data) > limit:
            found.leave(f"beyond the limit of {limit:,} bytes", str(file))
            continue
        digest = hashlib.sha256(data).digest()
        why = "empty" if not data.strip() else "copies" if digest in seen else "no text" if _binary(data) else ""
        if why:
            found.leave(why, str(file))
            continue
        seen.add(digest)
        total += len(data)
        if total > limit:
            found.leave(f"beyond the limit of {limit:,} bytes", str(file))
            continue
        found.take(str(file), data)


def _shuffled(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _read(path: Path, most: int) -> bytes:
    """The file's bytes, or so many of them; of one that is longer and holds NUL bytes, which no text does, a few."""
    try:
        with path.open("rb") as file:
            first = file.read(min(most, 2**16))
            return first if b"\0" in first else first + file.read(max(0, most - len(first)))
    except OSError as error:
        _raise(error)
        raise


def _raise(error: OSError) -> None:
    raise TextError(f"text: {error.filename} cannot be read: {error.strerror}") from error


def _binary(data: bytes) -> str:
    """Why this is no text, or ''. Old 8-bit text passes: a few bytes outside UTF-8 are allowed."""
    if b"\0" in data:
        return "it holds NUL bytes"
    decoder = codecs.getincrementaldecoder("utf-8")(
        errors="replace"
    )  # in pieces: of all at once it takes 4 x the bytes
    wrong = sum(decoder.decode(data[at : at + 2**20]).count("�") for at in range(0, len(data), 2**20))
    wrong += decoder.decode(b"", final=True).count("�")
    if wrong > 0.1 * len(data):
        return f"{wrong} of its {len(data)} bytes are not UTF-8"
    return ""
