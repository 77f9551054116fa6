"""Folders of models: each file that transformers would open is looked at first, and of weights only safetensors are.

transformers chooses how weights are read by their names' suffix, and takes pickles, wherever an index or a config leads
it. So no path to a model goes around `look`. No code that comes with a model is run.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from regard.checks import refuse
from regard.files import FLOATS, Header, header, naming, read_json

WHOLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SAFE = {"trust_remote_code": False, "local_files_only": True}
"""What every `from_pretrained` gets."""
SPARE = 2**26
"""Numbers that a model may hold beyond twice those of its files: tables of positions, a head that is drawn anew."""

_LEADING = ("transformers_weights", "configuration_files", "checkpoint_path", "quantization_config")
"""Entries of a config by which other files than those looked at, or other code, would read the weights."""
_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")
"""How timm's names of models begin that lead to a place."""
_COUNTS = ("layer", "block", "label", "depth", "stage", "expert", "codebook", "quantizer")
_SIZES = {"size", "dim", "width", "capacity", "id"}


@dataclass(frozen=True)
class Weights:
    """A folder's config as it stands there, and the files of weights that transformers will open, with what is in
    them."""

    folder: Path
    said: dict[str, Any]
    files: dict[Path, Header]

    @property
    def first(self) -> Path:
        return next(iter(self.files))

    @cached_property
    def held(self) -> Header:
        """All tensors."""
        return {name: about for held in self.files.values() for name, about in held.items()}

    @cached_property
    def numbers(self) -> int:
        return sum(math.prod(shape) for _, shape in self.held.values())


def fetched(name: str) -> Path:
    """The folder of a model on the hub, downloaded unless it is there: no file of it but those that are read."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "model*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja"],
                ignore_patterns=["*/*", "model.*.safetensors"],
            )
        )
    except Exception as error:  # those of the network can't be listed
        text = " ".join(str(error).split())[:400]
        raise ValueError(f"model {name[:80]!r} is no folder, and could not be had from the hub: {text}") from error


def look(folder: str | Path) -> Weights:
    """The weights of a folder.

    Raises:
        ValueError: a file is missing, damaged or leads out of the folder, weights are not safetensors, or the config
            would have other files read, in one line that names the file. No tensor is read.
    """
    folder = Path(folder)
    with naming(folder):
        _inside(folder)
    with naming(folder / CONFIG):
        said = read_json(folder / CONFIG, infinite=True)[0]
        if not isinstance(said, dict):
            raise ValueError("it is no object with model_type, architectures and so on")
        _check_config(said)
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            with naming(folder / name):
                if not isinstance(read_json(folder / name, infinite=True)[0], dict):
                    raise ValueError("it is no object")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder / 'adapter_config.json'}: it leads to another model; merge the adapter into its own")
    found: dict[Path, Header] = {}
    for path in _weights(folder):
        with naming(path):
            found[path] = header(path)
    made = Weights(folder, said, found)
    with naming(folder / CONFIG):
        _check_counts(said, len(made.held))
    return made


def _inside(folder: Path) -> None:
    """Refuse links out of the folder, and what is no file or folder at all."""
    real = folder.resolve()
    homes, repository = [real], real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):  # the hub's cache links to its blobs
        homes += [repository / "blobs", repository.parent / "blobs"]
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        to = path.resolve()
        if not any(map(to.is_relative_to, homes)):
            raise ValueError(f"{path}: it is a link out of the folder; expected a plain file")
        if not (to.is_file() or to.is_dir()):
            raise ValueError(f"{path}: it is no plain file")


def _weights(folder: Path) -> list[Path]:
    """The files that transformers opens: the whole one, or those of the index."""
    index, whole = folder / INDEX, folder / WHOLE
    if not index.exists():
        if not whole.exists():
            raise ValueError(f"{whole}: there is no such file, and no {INDEX}; only safetensors are read")
        return [whole]
    with naming(index):
        said = read_json(index)[0]
        named = said.get("weight_map") if isinstance(said, dict) else None
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise ValueError("it has no weight_map of names")
        for name in sorted(set(named.values())):
            if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(f"it names {name[:80]!r}; expected plain names of safetensors in its folder")
            if not (folder / name).exists():
                raise ValueError(f"it names {name[:80]!r}, which is not there")
        return [whole] if whole.exists() else [folder / name for name in sorted(set(named.values()))]


def entries(said: Any, under: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a config and of the configs in it, by name; those of a list by the list's."""
    if isinstance(said, dict):
        for name, value in said.items():
            if name not in ("id2label", "label2id"):
                yield from entries(value, name)
    if isinstance(said, list):
        for value in said:
            yield from entries(value, under)
    if under:
        yield under, said


def _check_config(said: dict[str, Any]) -> None:
    for name, value in entries(said):
        if name in _LEADING and value is not None:
            raise ValueError(f"it has {name!r}, which leads to other files or code; expected plain safetensors weights")
        if isinstance(value, str) and (value.startswith(_ELSEWHERE) or (name == "backbone" and "/" in value)):
            raise ValueError(f"its {name[:80]!r} leads elsewhere ({value[:80]!r}); expected a model that is all here")


def _check_counts(said: dict[str, Any], names: int) -> None:
    """A config may not go far beyond the `names` tensors that are there: its lists, and the model's, grow with its
    numbers of layers and labels, whatever stands in the files."""
    for name, value in entries(said):
        counts = any(word in name for word in _COUNTS) and _SIZES.isdisjoint(name.split("_"))
        if counts and isinstance(value, int) and value > max(1000, names):
            refuse("config", name[:80], "is too large", value, f"no more than the files' {names} tensors")


def config_of(found: Weights) -> Any:
    """The config as transformers has it."""
    from transformers import AutoConfig

    with naming(found.folder / CONFIG):
        return AutoConfig.from_pretrained(found.folder, **SAFE)


def pretrained(kind: Any, found: Weights, config: Any, **options: Any) -> Any:
    """`kind.from_pretrained`, of safetensors alone, once what the config asks for is held against what is there.

    Args:
        kind: a model class of transformers, or one of its Auto classes.
    """
    with naming(found.folder / CONFIG):
        with torch.device("meta"), torch.random.fork_rng([]):
            build = getattr(kind, "from_config", kind)  # Auto classes have it
            made = build(copy.deepcopy(config))
        state = made.state_dict()
        asked = sum(t.numel() for t in (*made.parameters(), *made.buffers()))
        if asked > 2 * found.numbers + SPARE:
            raise ValueError(f"it asks for {asked} numbers, and the model's files hold {found.numbers}")
    for path, held in found.files.items():
        for name, (dtype, _) in held.items():
            if name in state and state[name].is_floating_point() != (dtype in FLOATS or dtype.startswith("F8")):
                raise ValueError(f"{path}: {name[:80]!r} is {dtype}; expected {state[name].dtype}")
    with naming(found.first), quiet():
        return kind.from_pretrained(found.folder, config=config, use_safetensors=True, **SAFE, **options)


def tokenizer(found: Weights) -> Any:
    """The folder's tokenizer."""
    from transformers import AutoTokenizer

    with naming(found.folder):
        return AutoTokenizer.from_pretrained(found.folder, **SAFE)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and warnings."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
