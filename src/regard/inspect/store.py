"""Traces on disk: a folder with one JSON file and the tensors as safetensors, which are read where they are used.

trace.json  what is no tensor     layer-0000.safetensors  q, k, v of a layer     shared-0000.safetensors  masks, biases
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard.checks import choice, divides, fits, number, refuse, whole
from regard.files import header, naming, read_json, replacing, write_atomically
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
    """What `finish` was told, the layers, and the tensors that belong to none. ValueError, one line, names the file
    and what is wrong with it."""
    folder = Path(folder)
    if not (folder / "trace.json").is_file():
        raise ValueError(f"{folder / 'trace.json'} cannot be read: there is no such file")
    try:
        return _read(folder)
    except ValueError as error:
        text = str(error).removeprefix(f"{folder}{os.sep}")
        raise ValueError(f"{folder} holds no trace of regard: {text}") from error


def _read(folder: Path) -> tuple[dict[str, Any], tuple[LayerTrace, ...], dict[str, Tensor]]:
    path, other = folder / "trace.json", folder / "trace.safetensors"
    with naming(path):
        about = read_json(path)[0]
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        records = about.pop("layers")
        _check_about(about, records)
    layers = tuple(_read_layer(folder, n, record) for n, record in enumerate(records))
    tensors = _open(other) if other.exists() else {}
    with naming(other):
        if "images" in tensors:
            fits("trace", "B 3 Y X", {}, images=tensors["images"])
    return about, layers, tensors


def _check_about(about: Mapping[str, Any], records: Any) -> None:
    """Refuse what `finish` writes for no trace."""
    for name in ("tokens", "decoder_tokens"):
        rows = about[name]
        if rows is not None and not (isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)):
            refuse("trace", name, "are no rows of tokens", str(rows)[:80], "a list for each text")
    whole("trace", 0, most=2**31, extra_tokens=about["extra_tokens"])
    if (grid := about["grid"]) is not None:
        if not isinstance(grid, list) or len(grid) != 2:
            refuse("trace", "grid", "has the wrong form", str(grid)[:80], "rows and columns")
        for side in grid:
            whole("trace", 0, most=2**31, grid=side)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        refuse("trace", "layers", "are no list of layers", str(records)[:80], "an object for each")
    for record in records:
        for name in ("name", "side"):
            if not isinstance(record[name], str):
                refuse("trace", f"{name} of a layer", "is no text", str(record[name])[:80], "text")
        whole("trace", 0, most=2**31, index=record["index"])
        choice("trace", ("self", "cross"), kind=record["kind"])
        number("trace", scale=record["scale"])
        if record["softcap"] is not None:
            number("trace", above=0, softcap=record["softcap"])
        if not isinstance(record["heads"], list):
            refuse("trace", "heads", "are no list", str(record["heads"])[:80], "numbers of heads")
        for head in record["heads"]:
            whole("trace", 0, most=2**31, heads=head)
        for name in ("mask", "bias"):
            if record[name] is not None:
                whole("trace", 0, most=2 * len(records), **{name: record[name]})


def _read_layer(folder: Path, n: int, record: Mapping[str, Any]) -> LayerTrace:
    path = folder / _layer_file(n)
    tensors = _open(path)
    plain: dict[str, Any] = {name: record[name] for name in _PLAIN}
    with naming(path):
        sizes = fits("trace", "B H T D", {}, q=tensors["q"])
        sizes = fits("trace", "B G S D", sizes, k=tensors["k"])
        sizes = fits("trace", "B G S V", sizes, v=tensors["v"])
        divides("trace", G=sizes["G"], H=sizes["H"])
        for name, axes in (("sinks", "H"), ("logits", "B H T S"), ("weights", "B H T S")):
            if name in tensors:
                fits("trace", axes, sizes, **{name: tensors[name]})
        if odd := [name for name, t in tensors.items() if not t.is_floating_point()]:
            refuse("trace", odd[0], "has the wrong dtype", tensors[odd[0]].dtype, "floating point")
        if record["heads"] and len(record["heads"]) != sizes["H"]:
            refuse("trace", "heads", "are not as many as its queries have", len(record["heads"]), str(sizes["H"]))
    for name in ("mask", "bias"):
        plain[name] = None
        if record[name] is not None:
            shared = folder / _shared_file(record[name])
            t = _open(shared)
            with naming(shared):
                plain[name] = t["tensor"]
                fits("trace", "#B #H #T #S", sizes, **{name: plain[name]})
                if plain[name].is_floating_point() != (name == "bias"):
                    wanted = "bool" if name == "mask" else "floating point"
                    refuse("trace", name, "has the wrong dtype", plain[name].dtype, wanted)
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
    with replacing(path) as beside:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside)


def _open(path: Path) -> dict[str, Tensor]:
    """The file's tensors, mapped: their bytes are read when they are used."""
    with naming(path):
        header(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _layer_file(n: int) -> str:
    return f"layer-{n:04}.safetensors"


def _shared_file(n: int) -> str:
    return f"shared-{n:04}.safetensors"
