"""Pictures out of files: PNG, JPEG and WebP, by what they hold; the size is looked at before anything is decoded."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import number, refuse, whole
from regard.files import naming, read, read_json

BYTES = 2**26
"""Of the longest file that is read."""
PIXELS = 2**26
"""Of the largest picture that is decoded: 8192 x 8192, which takes 200 MB as RGB."""
SIDE = 2**13
"""Of the largest picture that a model may want, in pixels."""
FORMATS = ("PNG", "JPEG", "WEBP")


def pixels(path: Path, size: int | Sequence[int], folder: Path | None = None) -> Float[Tensor, "1 3 Y X"]:
    """A picture as a model wants it, with mean and deviation of its preprocessor_config.json, else 1/2.

    Args:
        size: Y and X, in pixels, or one for both.
        folder: of the model.

    Raises:
        ValueError: no PNG, JPEG or WebP, one that is cut off or too large, or a preprocessor_config.json that says no
            mean and deviation, in one line that names the file.
        ImportError: without Pillow.
    """
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        refuse("explain", "image_size", "has the wrong form", str(size)[:80], "an int, or two")
    for side in sides:
        whole("explain", most=SIDE, image_size=side)
    mean, deviation = _normalisation(folder)
    made = _decoded(path, *sides).permute(2, 0, 1) / 255
    return ((made - mean) / deviation)[None]


def _decoded(path: Path, Y: int, X: int) -> Tensor:
    """(Y, X, 3), uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('explain --image needs Pillow: pip install "regard[transformers]"') from error
    import numpy as np

    with naming(path):
        data = read(path, BYTES)
        webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
        if not (webp or data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))):
            raise ValueError("it is no PNG, JPEG or WebP; expected one of these")
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:  # this reads the head alone
            width, height = picture.size
            if width * height > PIXELS or min(width, height) < 1:
                raise ValueError(f"it is {width} x {height} pixels; expected at most {PIXELS} together")
            table = np.asarray(picture.convert("RGB").resize((X, Y), Image.Resampling.BICUBIC))
    return torch.from_numpy(table.copy())


def _normalisation(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each colour, (3, 1, 1)."""
    found = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    path = None if folder is None else folder / "preprocessor_config.json"
    if path is not None and path.is_file():
        with naming(path):
            said = read_json(path)[0]
            if not isinstance(said, dict):
                raise ValueError("it is no object")
            found |= {name: said[name] for name in found if said.get(name) is not None}
            for name, values in found.items():
                if not isinstance(values, list) or len(values) != 3:
                    refuse("explain", name, "has the wrong form", str(values)[:80], "a list of three numbers")
                for value in values:
                    number("explain", above=0 if name == "image_std" else None, most=1e6, **{name: value})
    mean, deviation = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in found.values())
    return mean, deviation
