"""Language models as safetensors files: written whole or not at all, read with every byte checked.

Only safetensors is read. The file holds the tensors, the model's `LMConfig` and a sha256 over both.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from regard import catalog
from regard.checks import number, refuse, whole
from regard.files import DTYPES, FLOATS, Header, naming, parsed, read_header, write_atomically
from regard.models.lm import LanguageModel, LMConfig, language_model
from regard.models.mixer import Mechanism, parse_stack

FORMAT = "regard.lm/1"
LONGEST = 2**16
"""Characters of the longest configuration that is read."""
LARGEST = 2**16
"""The largest whole number that an option of a mechanism may be in a file, where no tensor of it is larger."""
SPARE = 2**24
"""Numbers that a model may hold beyond twice those of its file, in tables that are not kept: 64 MB."""


def save(model: LanguageModel, config: LMConfig, path: str | Path) -> Path:
    """Write the model to a .safetensors file."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    text = json.dumps(asdict(config), sort_keys=True)
    metadata = {"format": FORMAT, "config": text, "sha256": _digest(tensors, text)}
    write_atomically(path, write_tensors(tensors, metadata))
    return path


def load(path: str | Path, mechanism: str | None = None) -> tuple[LanguageModel, LMConfig]:
    """Read what `save` wrote. ValueError names the file and what is wrong with it, in one line.

    All names, shapes and dtypes of its tensors are compared with what its configuration builds before any of that is
    allocated. A model with the caller's own mechanism ('module:callable') is built only if it is named in `mechanism`:
    a file must not decide which code is imported.
    """
    path = Path(path)
    with naming(path):
        held, besides = _head(path)
        config = _config(path, besides)
        spec = parse_stack(config.mechanism)
        if spec.own and config.mechanism != mechanism:
            raise ValueError(
                f"{path} was made with the mechanism {config.mechanism!r}, which is no part of regard; "
                "name it as well if you trust that code"
            )
        if mechanism is not None and mechanism != config.mechanism:
            raise ValueError(f"{path} was made with the mechanism {config.mechanism!r}, not {mechanism!r}")
        _compare_sizes(path, config, held)
        try:
            if not spec.own:  # what the caller trusts may not be made for the device 'meta'
                _check_options(spec, max(LARGEST, *(n for _, shape in held.values() for n in shape)))
                with torch.device("meta"), torch.random.fork_rng([]):
                    _compare(path, language_model(config), held)
            tensors = _tensors(path, besides)
            model = language_model(config)
            if spec.own:
                _compare(path, model, held)
            model.load_state_dict(tensors, strict=True)
        except Exception as error:  # options that a file gives may make a mechanism raise anything
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} cannot be loaded by this version of regard: {reason}") from error
        return model.eval(), config


def _head(path: Path) -> tuple[Header, dict[str, str]]:
    """What the file says that it holds."""
    try:
        first = b""
        if path.is_file():
            with path.open("rb") as file:
                first = file.read(9)
        else:
            path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    pickles = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a length may begin so, too, before a {
    if (first.startswith(pickles) and first[8:] != b"{") or path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        raise ValueError(f"{path} looks like a pickle, which can run code when loaded; only .safetensors is accepted")
    try:
        held, besides = read_header(path)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is damaged, or no model of regard ({error})") from error
    if missing := {"format", "config", "sha256"} - besides.keys():
        raise ValueError(f"{path} is damaged, or no model of regard (it does not say its {sorted(missing)[0]})")
    if besides["format"] != FORMAT:
        raise ValueError(f"{path} has format {besides['format'][:80]!r}; this version of regard reads {FORMAT!r}")
    return held, besides


def _config(path: Path, besides: Mapping[str, str]) -> LMConfig:
    text = besides["config"]
    if len(text) > LONGEST:
        raise ValueError(f"{path}: its configuration is longer than {LONGEST} characters")
    try:
        said = parsed(text)
        if not isinstance(said, dict) or not isinstance(said.get("mechanism"), str):
            raise TypeError("it names no mechanism")
        if odd := said.keys() - {field.name for field in fields(LMConfig)}:
            raise TypeError(f"it has an unknown entry {sorted(odd)[0][:80]!r}")
        return LMConfig(**said)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its configuration is not one of a regard model: {error}") from error


def _compare_sizes(path: Path, config: LMConfig, held: Header) -> None:
    """Refuse a configuration whose own sizes are not those of the tensors."""
    blocks = {name.split(".")[1] for name in held if name.startswith("blocks.")}
    sizes = {
        "embedding.weight": (config.vocab, config.dim),
        "blocks.0.up.weight": (config.mlp_dim, config.dim),
    }
    wrong = [name for name, shape in sizes.items() if name not in held or held[name][1] != shape]
    if wrong or len(blocks) != config.depth:
        raise ValueError(f"{path}: its tensors do not fit its configuration ({(wrong or ['depth'])[0]})")


def _check_options(mechanism: Mechanism, most: int) -> None:
    """Refuse options out of all proportion: what a mechanism makes of them while it is built has no other bound."""
    for part in (part for spec in mechanism.kinds for part in spec.parts):
        defaults = catalog.card(part.name).options
        for name, value in part.options.items():
            for one in _flat(value):
                if isinstance(one, float) or (isinstance(one, int) and isinstance(defaults.get(name), float)):
                    number(part.name, least=-1e12, most=1e12, **{name: one})
                elif isinstance(one, int) and not isinstance(one, bool):
                    whole(part.name, -most, most=most, **{name: one})
                elif isinstance(one, complex | bytes):
                    refuse(part.name, name, "has the wrong type", type(one).__name__, "numbers or words")


def _flat(value: Any) -> list[Any]:
    """What stands in lists, tuples and so on."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return [one for inner in value for one in _flat(inner)]
    return [value]


def _compare(path: Path, model: LanguageModel, held: Header) -> None:
    """Refuse tensors that are not the model's by name, shape and kind, and tables out of all proportion."""
    want = model.state_dict()
    if odd := sorted(want.keys() ^ held.keys()):
        where = "are missing" if odd[0] in want else "are too many"
        raise ValueError(f"{path}: its tensors do not fit its configuration ({odd[0][:80]!r} {where})")
    for name, t in want.items():
        dtype, shape = held[name]
        known = DTYPES.get(str(t.dtype).removeprefix("torch."))
        if shape != tuple(t.shape) or (dtype not in FLOATS if t.is_floating_point() else dtype != known):
            wanted = f"{known} {list(t.shape)}"
            raise ValueError(
                f"{path}: its tensors do not fit its configuration ({name[:80]!r} is {dtype} {list(shape)[:8]}; "
                f"expected {wanted})"
            )
    numbers = sum(t.numel() for t in want.values())
    if (asked := sum(t.numel() for t in (*model.parameters(), *model.buffers()))) > 2 * numbers + SPARE:
        raise ValueError(f"{path}: its configuration asks for {asked} numbers, and the file holds {numbers}")


def _tensors(path: Path, besides: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors, if they are as they were written, and numbers."""
    tensors = read_tensors(path.read_bytes())
    if _digest(tensors, besides["config"]) != besides["sha256"]:
        raise ValueError(f"{path} is damaged: its contents do not match their checksum")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(f"{path}: its {name[:80]!r} holds what is no number (NaN); was its training lost?")
    return tensors


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
