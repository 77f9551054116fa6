"""`regard explain`: a model from a folder, a trace of one text or picture, and the page of it.

Only safetensors are read and no code that comes with a model is run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard import files
from regard.inspect.page.render import render
from regard.inspect.picture import pixels
from regard.inspect.statistics import HeadStatistics
from regard.inspect.trace import Trace, trace
from regard.integrations.folder import config_of, fetched, look, pretrained, tokenizer
from regard.models.checkpoint import load as read
from regard.models.lm import LanguageModel

RUNS = Path("runs")
"""Where `regard compare` writes."""

SHOWN = 8
"""Heads that a line of the summary names."""

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to be traced, and what reads text and pictures for it."""

    name: str
    model: nn.Module
    tokenizer: Any = None
    folder: Path | None = None

    @property
    def short(self) -> str:
        """The name without the folders before the last, as a page's title has it; 'org/model' is one name."""
        what, of, where = self.name.partition(" of ")
        return what + of + (Path(where).resolve().name if Path(where).exists() else where)


def explain(
    text: str | None,
    *,
    model: str | None = None,
    image: Path | None = None,
    layers: Sequence[int] | None = None,
    swap: str | None = None,
    out: Path = Path("attention.html"),
    say: Say = print,
) -> Path:
    """Trace one text or picture and write the page; `say` is told what was found, a line at a time.

    Args:
        model: a folder or name of a transformers model, a file or folder of `regard compare --checkpoint`; default the
            newest of these under runs/, and where there is none, one that is trained now.
        swap: a mechanism that the page shows beside the model's own attention.

    Raises:
        ValueError, OSError, ImportError: a model or picture that cannot be read, or a mechanism that cannot be put in.
    """
    if text is None and image is None:
        raise ValueError("explain: nothing to look at; give --text, or --image for a model of pictures")
    if not out.parent.is_dir():
        raise ValueError(f"explain: the folder {out.parent} does not exist")
    loaded = load(model, say)
    call = _inputs(loaded, text, image)

    def traced() -> Trace:
        try:
            with torch.no_grad():
                return trace(loaded.model, call, tokenizer=loaded.tokenizer, layers=layers)
        except (ValueError, TypeError, OSError, ImportError):
            raise
        except Exception as error:  # files that fit each other by their sizes alone, as a tokenizer of other tokens
            reason = " ".join(str(error).split())[: files.SHOWN]
            raise ValueError(f"{loaded.name} cannot be run on this: {type(error).__name__}: {reason}") from error

    first, second = traced(), None
    if swap is not None:
        with _swapped(loaded, swap):
            second = traced()
    _write(out, loaded.short, first, second, swap)
    for line in summary(loaded.name, first):
        say(line)
    say(f"page: {out}")
    return out


def load(model: str | None, say: Say = print) -> Loaded:
    """The model that is meant; see `explain`."""
    if model is None:
        return _own(_newest(RUNS, "*/checkpoints/*.safetensors") or _trained(say))
    path = Path(model)
    if path.is_file():
        return _own(path)
    if (kept := _newest(path, "checkpoints/*.safetensors")) is not None:
        return _own(kept)
    if not path.is_dir() and (path.is_absolute() or model.startswith((".", "~"))):
        raise ValueError(f"{path} does not exist; expected a folder or file, or the name of a model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model: neither config.json nor checkpoints of `regard compare --checkpoint`")
    return _transformers(model)


def summary(name: str, traced: Trace) -> list[str]:
    """What stands out, a line each."""
    table = traced.statistics()
    B, _, T, S = traced.layers[0].shape
    size = f"{T} tokens" if T == S else f"{T} x {S} tokens"
    lines = [f"{name}: {len(traced.layers)} attention layers, {len(table)} heads, {size}" + f", {B} texts" * (B > 1)]
    words = {
        "separators": "on [SEP] and the like",
        "first": "on the first token",
        "previous": "on the token before",
        "following": "on the token after",
    }
    for field, what in words.items():
        known = [row for row in table if getattr(row, field) is not None and math.isfinite(getattr(row, field))]
        if known:
            most = max(known, key=lambda row: getattr(row, field))
            if getattr(most, field) < 0.005:
                continue
            lines.append(f"most weight {what}: {getattr(most, field):.0%} in {_head(most)}")
    if lost := [_head(row) for row in table if not math.isfinite(row.entropy)]:
        named = ", ".join(lost[:SHOWN]) + f" and {len(lost) - SHOWN} more" * (len(lost) > SHOWN)
        lines.append(f"weights that are no numbers (NaN or infinity): {named}")
    return lines


def _head(row: HeadStatistics) -> str:
    side = f"{row.side} " * bool(row.side)
    return f"{side}layer {row.index} head {row.head}" + " (cross)" * (row.kind == "cross")


def _newest(folder: Path, pattern: str) -> Path | None:
    found = list(folder.glob(pattern)) if folder.is_dir() else []
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _own(path: Path) -> Loaded:
    model, config = read(path)
    return Loaded(f"{config.mechanism} of {path}", model)


def _trained(say: Say) -> Path:
    """A small byte-level model, trained as `regard compare` trains."""
    from regard.bench.compare import run
    from regard.bench.config import CompareConfig

    say(f"no model under {RUNS}/ yet, so that a small one is trained (less than a minute); for a better one:")
    say("  regard compare --mechanisms rotary --checkpoint, or give --model")
    folder = RUNS / "explain"
    small = CompareConfig(
        mechanisms=["rotary"], seeds=(0,), steps=200, batch=8, length=128, dim=64, depth=4, heads=4, out=folder,
        checkpoint=True,
    )  # fmt: skip
    code = run(small)
    if code:
        raise ValueError(f"explain: the small model could not be trained (exit code {code}); give --model")
    made = _newest(folder, "checkpoints/*.safetensors")
    assert made is not None
    return made


def _transformers(model: str) -> Loaded:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError('explain --model needs transformers: pip install "regard[transformers]"') from error
    found = look(Path(model) if Path(model).is_dir() else fetched(model))
    made = pretrained(AutoModel, found, config_of(found))
    reads = getattr(made, "main_input_name", "input_ids") == "input_ids"
    return Loaded(f"{type(made).__name__} of {model}", made.eval(), tokenizer(found) if reads else None, found.folder)


def _inputs(loaded: Loaded, text: str | None, image: Path | None) -> Any:
    """What the model is called with."""
    if image is None:
        if loaded.tokenizer is None and not isinstance(loaded.model, LanguageModel):
            raise ValueError(f"explain: {type(loaded.model).__name__} reads no text; give --image")
        return text
    config = getattr(loaded.model, "config", None)
    config = getattr(config, "vision_config", config)
    if config is None or getattr(config, "patch_size", None) is None:
        raise ValueError(f"explain: {type(loaded.model).__name__} reads no pictures; leave --image out")
    call: dict[str, Any] = {"pixel_values": pixels(image, config.image_size, loaded.folder)}
    if text is not None:
        if loaded.tokenizer is None:
            raise ValueError(f"explain: {type(loaded.model).__name__} reads pictures only; leave --text out")
        call |= loaded.tokenizer(text, return_tensors="pt")
    elif loaded.tokenizer is not None:
        raise ValueError(f"explain: {type(loaded.model).__name__} reads text as well; give --text")
    return call


def _swapped(loaded: Loaded, mechanism: str) -> Any:
    model: Any = loaded.model
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            f"explain: --swap exchanges the attention of transformers' models, and {loaded.name} is none; give --model"
        )
    from regard.integrations.transformers import swap

    return swap(model, mechanism)


def _write(out: Path, name: str, first: Trace, second: Trace | None, swap: str | None) -> None:
    names = (name, swap) if swap is not None and swap != name else ("before", "after")
    html = render(first, other=second, names=names, title=f"What {name} attends to")
    files.write_atomically(out, html)
