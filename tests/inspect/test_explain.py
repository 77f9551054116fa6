"""`regard explain`: models from folders, offline, a page for each, and one line for what cannot be."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.inspect.hosts import made
from tests.inspect.minilm import folder as minilm_folder
from tests.inspect.minilm import needs_minilm
from typer.testing import CliRunner

from regard import cli
from regard.bench import compare
from regard.inspect.picture import pixels
from regard.models.checkpoint import save
from regard.models.lm import LMConfig, language_model


def regard(*arguments: object) -> Any:
    environment = {"COLUMNS": "100", "NO_COLOR": "1", "FORCE_COLOR": None, "REGARD_TRACEBACK": None}
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env=environment, prog_name="regard")


def lines(*arguments: object) -> list[str]:
    result = regard(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def refusal(*arguments: object) -> str:
    result = regard(*arguments)
    assert result.exit_code == cli.MISTAKE, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a tiny encoder and a tokenizer of words."""
    from transformers import BertTokenizer

    at = tmp_path / "tiny"
    made("bert").float().save_pretrained(at)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "."]
    (at / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(at / "vocab.txt")).save_pretrained(at)
    return at


def byte_model(path: Path, mechanism: str = "rotary") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = LMConfig(mechanism, 16, 2, 4, 16)
    return save(language_model(config), config, path)


def test_a_model_of_transformers(bert: Path) -> None:
    said = lines("explain", "--model", bert, "--text", "The cat sat.", "--out", "page.html")
    assert said[0] == f"BertModel of {bert}: 2 attention layers, 8 heads, 6 tokens"
    assert said[-1] == "page: page.html"
    assert any(line.startswith("most weight on [SEP] and the like: ") for line in said)
    page = Path("page.html").read_text()
    assert "[SEP]" in page
    assert "cat" in page
    assert "<title>What BertModel of tiny attends to</title>" in page


def test_before_and_after_a_swap(bert: Path) -> None:
    said = lines("explain", "--model", bert, "--text", "The cat sat.", "--swap", "window(window=2)")
    assert said[-1] == "page: attention.html"
    facts = re.search(r'id="facts">(.*?)</script>', Path("attention.html").read_text(), re.DOTALL)
    assert facts is not None
    assert [one["name"] for one in json.loads(facts[1])["traces"]] == ["BertModel of tiny", "window(window=2)"]
    assert "did you mean" in refusal("explain", "--model", bert, "--text", "cat", "--swap", "windw")


def test_only_the_layers_asked_for(bert: Path) -> None:
    said = lines("explain", "--model", bert, "--text", "cat", "--layers", "1")
    assert "1 attention layers, 4 heads" in said[0]
    assert Path("attention.html").is_file()
    assert "did not run (got [7]); expected some of [0, 1]" in refusal(
        "explain", "--model", bert, "--text", "x", "--layers", "7"
    )
    assert "layers must be whole numbers" in refusal("explain", "--model", bert, "--text", "x", "--layers", "a")


def test_the_newest_model_of_compare_is_the_default(tmp_path: Path) -> None:
    import os

    old = byte_model(tmp_path / "runs" / "a" / "checkpoints" / "old.safetensors", "softmax")
    new = byte_model(tmp_path / "runs" / "b" / "checkpoints" / "new.safetensors")
    os.utime(old, (1, 1))
    said = lines("explain", "--text", "def f(x):")
    assert said[0] == "rotary of runs/b/checkpoints/new.safetensors: 2 attention layers, 8 heads, 9 tokens"
    assert new.is_file()
    assert lines("explain", "--text", "x", "--model", "runs/a")[0].startswith("softmax of runs/a/checkpoints/old")
    assert lines("explain", "--text", "x", "--model", old)[0].startswith("softmax of ")


def test_without_a_model_one_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[compare.CompareConfig] = []

    def run(config: compare.CompareConfig) -> int:
        asked.append(config)
        byte_model(Path(config.out) / "checkpoints" / "made.safetensors")
        return 0

    monkeypatch.setattr(compare, "run", run)
    said = lines("explain", "--text", "x = 1")
    assert said[0].startswith("no model under runs/ yet, so that a small one is trained")
    assert "regard compare" in said[1]
    assert said[-1] == "page: attention.html"
    lines("explain", "--text", "x = 1")
    assert len(asked) == 1
    assert asked[0].checkpoint


@pytest.mark.slow
def test_the_small_model_is_trained_within_a_minute() -> None:
    said = lines("explain", "--text", "x = 1")
    assert "page: attention.html" in said
    assert list(Path("runs/explain/checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give --text, or --image"),
        (("--text", "x", "--model", "./nowhere"), "does not exist"),
        (("--text", "x", "--out", "no/such/page.html"), "the folder no/such does not exist"),
        (("--text", "x", "--model", "."), "holds no model: neither config.json nor checkpoints"),
        (("--text", "x", "--model", "own.pt"), "looks like a pickle"),
        (("--text", "x", "--model", "own.safetensors", "--swap", "window"), "exchanges the attention of transformers"),
        (("--image", "a.png", "--model", "own.safetensors"), "reads no pictures"),
        (("--text", "", "--model", "own.safetensors"), "at least 1"),
    ],
)
def test_refusals(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "own.pt").write_bytes(b"PK")
    byte_model(tmp_path / "own.safetensors")
    assert words in refusal("explain", *arguments)
    assert not Path("attention.html").exists()


def test_pickles_are_not_loaded(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    torch.save({}, bert / "pytorch_model.bin")
    assert "safetensors" in refusal("explain", "--model", bert, "--text", "cat")


def test_code_that_comes_with_a_model_is_not_run(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "evil.py").write_text("open('ran', 'w')\nclass Config: pass\nclass Model: pass\n")
    refusal("explain", "--model", bert, "--text", "cat")
    assert not Path("ran").exists()


def test_a_tokenizer_of_other_tokens(bert: Path) -> None:
    """It names tokens that the model has no row for, which torch says somewhere inside."""
    from transformers import BertTokenizer

    (bert / "tokenizer.json").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(500)), "cat"]
    (bert / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(bert / "vocab.txt")).save_pretrained(bert)
    said = refusal("explain", "--model", bert, "--text", "cat")
    assert f"BertModel of {bert} cannot be run on this: IndexError" in said


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "1.0"}', "[" * 100_000])
def test_a_damaged_tokenizer(bert: Path, text: str) -> None:
    (bert / "tokenizer.json").write_text(text)
    assert refusal("explain", "--model", bert, "--text", "cat").startswith(f"error: {bert}")
    assert not Path("attention.html").exists()


class Picture:
    """As much of a Pillow image as is used."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.size = table.shape[1::-1]

    def __enter__(self) -> "Picture":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def convert(self, mode: str) -> "Picture":
        assert mode == "RGB"
        return self

    def resize(self, size: tuple[int, int], how: object) -> np.ndarray:
        X, Y = size
        return self.table[:Y, :X]


@pytest.fixture
def pillow(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    table = np.arange(14 * 13 * 3, dtype=np.uint8).reshape(14, 13, 3)
    image = types.SimpleNamespace(
        open=lambda file, formats: Picture(table), Resampling=types.SimpleNamespace(BICUBIC=3)
    )
    monkeypatch.setitem(sys.modules, "PIL", types.SimpleNamespace(Image=image))  # type: ignore[arg-type]
    return table


def test_a_picture(tmp_path: Path, pillow: np.ndarray) -> None:
    made("vit").float().save_pretrained(tmp_path / "vit")
    Path("a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    said = lines("explain", "--model", "vit", "--image", "a.png")
    assert said[0] == "ViTModel of vit: 2 attention layers, 8 heads, 10 tokens"
    told = {"image_mean": [0.0, 0.5, 1.0], "image_std": [1.0, 0.5, 2.0]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(told))
    got = pixels(Path("a.png"), (12, 10), tmp_path / "vit")
    assert got.shape == (1, 3, 12, 10)
    for channel, (mean, deviation) in enumerate(zip(*told.values(), strict=True)):
        want = (pillow[7, 3, channel] / 255 - mean) / deviation
        assert float(got[0, channel, 7, 3]) == pytest.approx(want, abs=1e-6)
    assert "reads no text; give --image" in refusal("explain", "--model", "vit", "--text", "x")
    assert "reads pictures only" in refusal("explain", "--model", "vit", "--text", "x", "--image", "a.png")


def test_a_picture_needs_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("vit").float().save_pretrained(tmp_path / "vit")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert 'Pillow: pip install "regard[transformers]"' in refusal("explain", "--model", "vit", "--image", "a.png")


def test_text_may_hold_anything(bert: Path) -> None:
    lines("explain", "--model", bert, "--text", "</script><img onerror=x> \u2028\x00", "--out", "a.html")
    assert "<img onerror" not in Path("a.html").read_text()


@needs_minilm
def test_the_real_encoder() -> None:
    said = lines("explain", "--model", minilm_folder(), "--text", "The quick brown fox jumps over the lazy dog.")
    assert "6 attention layers, 72 heads, 12 tokens" in said[0]
    assert any(line.startswith("most weight on the token before: 9") for line in said)
