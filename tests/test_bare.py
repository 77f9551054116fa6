"""Nothing that a mechanism does not itself need may be missing: each extra is made to fail, in fresh processes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("bare", ROOT / "tools" / "bare.py")
bare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bare)


def without(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """An environment whose processes, and those that these start, can't import these packages."""
    for name in names:
        (folder / name).mkdir()
        text = f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})\n'
        (folder / name / "__init__.py").write_text(text)
    above = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, above)), "COLUMNS": "80"}


@pytest.mark.slow
@pytest.mark.parametrize("name", bare.EXTRAS)
def test_each_extra_may_be_missing(name: str, tmp_path: Path) -> None:
    """The whole catalogue is imported and listed without it."""
    code = "import regard; print(len(regard.mechanisms()), len(regard.analyses()))"
    env = without(tmp_path, (name,))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert all(int(number) > 10 for number in done.stdout.split())


@pytest.mark.slow  # `make bare` does the same in a really bare environment
def test_all_may_be_missing(tmp_path: Path) -> None:
    """List, show, create, plan and a short comparison, without any extra and without a compiler."""
    env = without(tmp_path, bare.EXTRAS)
    script = [sys.executable, str(ROOT / "tools" / "bare.py")]
    done = subprocess.run(script, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of the extras: none" in done.stdout
    assert "no C++ compiler" in done.stdout
