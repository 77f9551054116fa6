"""The mechanism that CONTRIBUTING shows is real: its two files are written out and run, and its card is found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regard
from regard import cards

ROOT = Path(__file__).parent.parent
FILES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The mechanism's file, imported as regard.scores.clipped, and gone again afterwards."""
    mechanism, test, _ = FILES
    (tmp_path / "clipped.py").write_text(mechanism)
    (tmp_path / "test_clipped.py").write_text(test)
    monkeypatch.setattr(regard.scores, "__path__", [*regard.scores.__path__, str(tmp_path)])
    yield tmp_path
    cards._registry.pop("clipped", None)
    sys.modules.pop("regard.scores.clipped", None)
    vars(regard.scores).pop("clipped", None)


def test_the_example_is_a_mechanism(example: Path) -> None:
    from regard.scores.clipped import Clipped  # type: ignore[import-not-found]

    card = regard.card("clipped")
    assert (card.family, card.is_part, card.options) == ("scores", True, {"clip": 10.0})
    assert card.gist == "Clipped logits: the tanh of each score, stretched, so that no head is too sure."
    assert "tanh" in Clipped.__doc__
    layer = regard.create("clipped+rotary", dim=24, num_heads=6, causal=True, clip=3.0)
    assert layer.score_mix.clip == 3.0
    assert layer(torch.randn(2, 5, 24)).shape == (2, 5, 24)
    with pytest.raises(ValueError, match="Clipped: clip is out of range"):
        regard.create("clipped", dim=24, num_heads=6, clip=-1)


@pytest.mark.slow
def test_the_example_passes_its_own_test_and_the_linter(example: Path) -> None:
    """In a process of its own, where the file stands in the room as if it had been there always."""
    code = f"import regard.scores\n\nregard.scores.__path__.append({str(example)!r})\n"
    (example / "conftest.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "-c",
        "/dev/null",
    ]
    done = subprocess.run([*command, str(example)], capture_output=True, text=True, cwd=example, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    lint = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--ignore=I001",
        "--config",
        str(ROOT / "pyproject.toml"),
        str(example),
    ]
    done = subprocess.run(lint, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "No module named ruff" in done.stderr, done.stdout
