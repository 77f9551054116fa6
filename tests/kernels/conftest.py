"""C++ compilers that do what a test wants."""

from pathlib import Path

import pytest

from regard.kernels.native import build, cache

SCRIPT = """#!/bin/sh
{version}
if [ "$1" = --version ]; then echo fake 1; exit 0; fi
echo built >> "{folder}/builds"
for word; do [ "$before" = -o ] && made="$word"; before="$word"; done
{does}
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a program the compiler, and the cache one of its own: `compiler(what the program does)`."""
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "real.so").write_bytes(Path(build.library()._name).read_bytes())

    def made(does: str = "", version: str = "") -> Path:
        script, real = tmp_path / "compiler", str(tmp_path / "real.so")
        script.write_text(SCRIPT.format(version=version, folder=tmp_path, does=does.replace("REAL", real)))
        script.chmod(0o700)
        monkeypatch.setenv("CXX", str(script))
        return script

    return made
