"""The sources are of every Python version that pyproject claims, as far as one is on this machine."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEWER = [f"3.{minor}" for minor in range(11, 16)]


@pytest.mark.parametrize("version", NEWER)
def test_the_sources_compile(version: str, tmp_path: Path) -> None:
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    python = next((str(path) for path in found if path and working(str(path), version)), None)
    if python is None:
        pytest.skip(f"no Python {version} here")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [python, "-m", "compileall", "-q", str(tmp_path / "src")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def working(python: str, version: str) -> bool:
    """Whether it starts and is that version: a shim may point nowhere."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == version


def test_the_oldest_claimed_versions_are_those_of_ci() -> None:
    """A version that nobody runs is no claim."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(line for line in project["dependencies"] if line.startswith("torch"))
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert pinned.partition("==")[2].startswith(torch.partition(">=")[2])
    assert project["requires-python"] == ">=3.11"
