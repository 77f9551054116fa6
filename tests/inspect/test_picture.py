"""Pictures are PNG, JPEG or WebP by what they hold, and none too large is decoded."""

import io
import json
import os
import struct
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import pytest

from regard.inspect import picture

PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes | None = None) -> bytes:
    """A grey picture; by default of zeros."""
    data = zlib.compress(bytes(height * (width + 1)) if rows is None else rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return PNG + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As much of Pillow as is used up to the size; what is decoded is listed."""
    decoded: list[Any] = []

    class Opened:
        size = (2**14, 2**14)

        def __enter__(self) -> "Opened":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def convert(self, mode: str) -> None:
            decoded.append(mode)

    def opened(file: io.BytesIO, formats: tuple[str, ...]) -> Opened:
        assert formats == ("PNG", "JPEG", "WEBP")
        return Opened()

    monkeypatch.setitem(sys.modules, "PIL", types.SimpleNamespace(Image=types.SimpleNamespace(open=opened)))  # type: ignore[arg-type]
    return decoded


OTHERS = {
    "gif": b"GIF89a" + bytes(20),
    "tiff": b"II*\0" + bytes(20),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "bmp": b"BM" + bytes(60),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "wav": b"RIFF\0\0\0\0WAVE",
    "empty": b"",
    "half a signature": PNG[:5],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_whatever_their_name(kind: str, tmp_path: Path, decoder: list[Any]) -> None:
    (tmp_path / "a.png").write_bytes(OTHERS[kind])
    with pytest.raises(ValueError, match="no PNG, JPEG or WebP") as refused:
        picture.pixels(tmp_path / "a.png", 8)
    assert str(refused.value).startswith(f"{tmp_path / 'a.png'}: ")
    assert decoder == []


def test_nothing_too_large_is_read_or_decoded(
    tmp_path: Path, decoder: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(ValueError, match=r"a\.png: it is 16384 x 16384 pixels; expected at most"):
        picture.pixels(tmp_path / "a.png", 8)
    monkeypatch.setattr(picture, "BYTES", 100)
    (tmp_path / "a.png").write_bytes(PNG + bytes(100))
    with pytest.raises(ValueError, match=r"a\.png: it is longer than 100 bytes"):
        picture.pixels(tmp_path / "a.png", 8)
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (("pipe.png", "no plain file"), ("gone.png", "no such file"), (".", "no plain file")):
        with pytest.raises(ValueError, match=words):
            picture.pixels(tmp_path / name, 8)
    assert decoder == []


@pytest.mark.parametrize("size", [10**6, 0, True, "8", [8], [8, 8, 8], [8, 10**6], None, 8.5])
def test_sizes_that_a_config_may_not_ask_for(size: Any, tmp_path: Path, decoder: list[Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="explain: image_size"):
        picture.pixels(tmp_path / "a.png", size)


@pytest.mark.parametrize(
    "said",
    [[], {"image_mean": 3}, {"image_mean": [0.5] * 2}, {"image_std": [0, 1, 1]}, {"image_mean": [None] * 3}, "x"],
)
def test_a_preprocessor_of_wrong_kinds(said: Any, tmp_path: Path, decoder: list[Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"^.*preprocessor_config\.json: ") as refused:
        picture.pixels(tmp_path / "a.png", 8, tmp_path)
    assert "\n" not in str(refused.value)


def test_real_pictures(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "picture"
    drawn = Image.frombytes("RGB", (9, 7), bytes(range(189)))
    whole = {}
    for kind in ("PNG", "JPEG", "WEBP"):
        drawn.save(path, kind)
        assert picture.pixels(path, (6, 5)).shape == (1, 3, 6, 5)
        whole[kind] = path.read_bytes()
    for kind, data in whole.items():
        for at in (len(data) // 2, len(data) // 4, 20):
            path.write_bytes(data[:at])
            with pytest.raises(ValueError, match=r"^.*picture: ") as refused:
                picture.pixels(path, 8)
            assert "\n" not in str(refused.value), kind
    drawn.save(path, "GIF")
    with pytest.raises(ValueError, match="no PNG, JPEG or WebP"):
        picture.pixels(path, 8)
    for data in (png(30_000, 30_000, b"\0" * 9), png(2**31 - 1, 2**31 - 1, b""), png(0, 5)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^.*picture: "):
            picture.pixels(path, 8)
