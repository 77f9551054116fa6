"""Language models as safetensors files: written whole or not at all, read with every byte checked.

Only safetensors is read. The file holds the tensors, the model's `LMConfig` and a sha256 over both.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from regard.files import write_atomically
from regard.models.lm import LanguageModel, LMConfig, language_model
from regard.models.mixer import parse

FORMAT = "regard.lm/1"


def save(model: LanguageModel, config: LMConfig, path: str | Path) -> Path:
    """Write the model to a .safetensors file."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    text = json.dumps(asdict(config), sort_keys=True)
    metadata = {"format": FORMAT, "config": text, "sha256": _digest(tensors, text)}
    write_atomically(path, write_tensors(tensors, metadata))
    return path


def load(path: str | Path, mechanism: str | None = None) -> tuple[LanguageModel, LMConfig]:
    """Read what `save` wrote. ValueError names the file and what is wrong with it.

    A model with the caller's own mechanism ('module:callable') is built only if it is named in `mechanism`: a
    file must not decide which code is imported.
    """
    path = Path(path)
    tensors, config = _read(path)
    if parse(config.mechanism).own and config.mechanism != mechanism:
        raise ValueError(
            f"{path} was made with the mechanism {config.mechanism!r}, which is no part of regard; "
            "name it as well if you trust that code"
        )
    if mechanism is not None and mechanism != config.mechanism:
        raise ValueError(f"{path} was made with the mechanism {config.mechanism!r}, not {mechanism!r}")
    # Sizes are compared before anything is built, so that a forged configuration cannot ask for all memory.
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    sizes = {
        "embedding.weight": (config.vocab, config.dim),
        "blocks.0.up.weight": (config.mlp_dim, config.dim),
    }
    wrong = [n for n, shape in sizes.items() if n not in tensors or tuple(tensors[n].shape) != shape]
    if wrong or len(blocks) != config.depth:
        raise ValueError(f"{path}: its tensors do not fit its configuration ({(wrong or ['depth'])[0]})")
    try:
        model = language_model(config)
        model.load_state_dict(tensors, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot be loaded by this version of regard: {reason}") from error
    return model.eval(), config


def _read(path: Path) -> tuple[dict[str, Tensor], LMConfig]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or path.suffix in (
        ".pt",
        ".pth",
        ".bin",
        ".pkl",
        ".ckpt",
    ):
        raise ValueError(f"{path} looks like a pickle, which can run code when loaded; only .safetensors is accepted")
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size].decode())
        metadata = header["__metadata__"]
        tensors = read_tensors(data)
        text, digest, kind = metadata["config"], metadata["sha256"], metadata["format"]
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is damaged, or no model of regard ({len(data)} bytes)") from error
    if kind != FORMAT:
        raise ValueError(f"{path} has format {kind!r}; this version of regard reads {FORMAT!r}")
    if _digest(tensors, text) != digest:
        raise ValueError(f"{path} is damaged: its contents do not match their checksum")
    try:
        return tensors, LMConfig(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its configuration is not one of a regard model: {error}") from error


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
