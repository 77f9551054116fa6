"""Traces on disk: a folder with one JSON file and the tensors as safetensors, which are read where they are used.

trace.json  what is no tensor     layer-0000.safetensors  q, k, v of a layer     shared-0000.safetensors  masks, biases
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard.checks import refuse
from regard.files import write_atomically
from regard.inspect.layers import LayerTrace, part_of

FORMAT = "regard.trace/1"
_PLAIN = ("name", "index", "kind", "side", "scale", "softcap", "heads")


class Writer:
    """Writes layers one by one; each comes back as a layer whose tensors lie in the file until they are used."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            refuse("trace", "the folder", "is not empty", self.folder, "a new or an empty folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        self._shared: dict[int, tuple[Tensor, int]] = {}

    def write(self, layer: LayerTrace) -> LayerTrace:
        """To disk and back."""
        tensors = {"q": layer.q, "k": layer.k, "v": layer.v}
        if layer.sinks is not None:
            tensors["sinks"] = layer.sinks
        # A rule is code; its results are data.
        if layer.logit_rule is not None:
            tensors["logits"] = layer.logits()
        if layer.weight_rule is not None:
            tensors["weights"] = layer.weights()
        record = {name: getattr(layer, name) for name in _PLAIN}
        for name in ("mask", "bias"):
            shared = getattr(layer, name)
            record[name] = None if shared is None else self._share(shared)
        _save(self.folder / _layer_file(len(self.records)), tensors)
        self.records.append(record)
        return _read_layer(self.folder, len(self.records) - 1, record)

    def finish(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """What belongs to no layer. With this the folder is a trace."""
        if tensors:
            _save(self.folder / "trace.safetensors", dict(tensors))
        text = json.dumps({"format": FORMAT, **about, "layers": self.records}, ensure_ascii=True)
        write_atomically(self.folder / "trace.json", text.encode())

    def discard(self) -> None:
        """Remove what was written: the pass did not come to its end."""
        for n in range(len(self.records) + 1):
            (self.folder / _layer_file(n)).unlink(missing_ok=True)
        for n in range(len(self._shared) + 1):
            (self.folder / _shared_file(n)).unlink(missing_ok=True)

    def _share(self, t: Tensor) -> int:
        if id(t) not in self._shared:
            n = len(self._shared)
            _save(self.folder / _shared_file(n), {"tensor": t})
            self._shared[id(t)] = t, n
        return self._shared[id(t)][1]


def read(folder: str | Path) -> tuple[dict[str, Any], tuple[LayerTrace, ...], dict[str, Tensor]]:
    """What `finish` was told, the layers, and the tensors that belong to none. ValueError names what is wrong."""
    folder = Path(folder)
    path = folder / "trace.json"
    try:
        about = json.loads(path.read_bytes())
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        records = about.pop("layers")
        layers = tuple(_read_layer(folder, n, record) for n, record in enumerate(records))
        other = folder / "trace.safetensors"
        return about, layers, _open(other) if other.exists() else {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no trace of regard: {error}") from error


def _read_layer(folder: Path, n: int, record: Mapping[str, Any]) -> LayerTrace:
    tensors = _open(folder / _layer_file(n))
    plain: dict[str, Any] = {name: record[name] for name in _PLAIN}
    for name in ("mask", "bias"):
        shared = record[name]
        plain[name] = None if shared is None else _open(folder / _shared_file(int(shared)))["tensor"]
    for name in ("logit", "weight"):
        plain[f"{name}_rule"] = _Table(tensors[f"{name}s"]) if f"{name}s" in tensors else None
    plain["heads"] = tuple(plain["heads"])
    return LayerTrace(q=tensors["q"], k=tensors["k"], v=tensors["v"], sinks=tensors.get("sinks"), **plain)


class _Table:
    """Logits or weights that were computed before."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, layer: LayerTrace, heads: Tensor, rows: Tensor) -> Tensor:
        return part_of(self.table, heads, rows).clone()


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def _open(path: Path) -> dict[str, Tensor]:
    """The file's tensors, mapped: their bytes are read when they are used."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _layer_file(n: int) -> str:
    return f"layer-{n:04}.safetensors"


def _shared_file(n: int) -> str:
    return f"shared-{n:04}.safetensors"
