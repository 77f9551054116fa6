"""A C++ compiler may do what it likes: attention still runs, and one line says why the C++ kernels don't."""

import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regard import doctor
from regard.kernels.native import build, cache

if build.why_not():
    pytest.skip("; ".join(build.why_not()), allow_module_level=True)


def load():
    """What the first call of a process finds."""
    return build._load.__wrapped__("1")


def builds(folder: Path) -> int:
    log = folder / "builds"
    return len(log.read_text().splitlines()) if log.exists() else 0


WRONG = {
    "bytes that are no text": (r"printf '\377\376 error: \033[31m \000 no\n'; exit 1", r"error: "),
    "no word": ("exit 3", r"no message \(exit code 3\)"),
    "no library": ("exit 0", "made no library"),
    "an empty library": (': > "$made"', "made no library"),
    "a foreign file": ('echo hello > "$made"', "could not be loaded"),
    "a library cut short": ('head -c 20000 REAL > "$made"', "ends a process that loads it, by SIG"),
    "a library without a symbol": ('sed s/regard_topk/regard_tipk/ REAL > "$made"', "lacks regard_topk$"),
    "a signal": ("kill -9 $$", "ended by SIGKILL"),
    "a full disk": ("echo ld: final link failed: No space left on device; exit 1", "No space left on device"),
    "output without end": ("yes", "printed more than 1 MiB"),
    "a folder": ('mkdir "$made"', "made no library"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_compiler_that_gives(name, compiler, tmp_path, caplog):
    does, words = WRONG[name]
    script = compiler(does)
    with caplog.at_level(logging.WARNING, "regard"):
        reason = load()
    assert isinstance(reason, str)
    assert reason.isprintable()
    assert len(reason) < 400
    assert reason.startswith(f"{script} could not build them: ")
    assert re.search(words, reason), reason
    assert caplog.messages == [f"native kernels: {reason}; torch's run instead"]
    assert [path.name for path in (tmp_path / "cache" / "native").iterdir()] == ["lock"]


def test_a_compiler_that_hangs_goes_with_all_it_started(compiler, tmp_path, monkeypatch):
    compiler(f'sleep 1000 & echo $! > "{tmp_path}/started"; wait')
    monkeypatch.setattr(build, "LIMIT", 0.5)
    assert "longer than 0.5 s" in load()
    started = int((tmp_path / "started").read_text())
    for _ in range(100):
        state = Path(f"/proc/{started}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the compiler started still runs")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("sleep 1000", "gives no version: .* longer than 0.5 s"),
        ("exit 7", r"gives no version: no message \(exit code 7\)"),
        ("yes", "printed more than"),
    ],
)
def test_a_compiler_that_says_no_version(version, words, compiler, tmp_path, monkeypatch):
    compiler(version=version)
    monkeypatch.setattr(build, "MOMENT", 0.5 if "sleep" in version else build.MOMENT)
    assert re.search(words, load())
    assert not builds(tmp_path)


def test_a_compiler_that_is_no_program(compiler):
    compiler().write_bytes(b"\x00\xff\x00\xff")
    assert "could not be built or loaded" in load()


def test_bytes_that_are_no_text_harm_nothing(compiler):
    compiler(r"""printf '\377 warning: \376\n'; cp REAL "$made" """, version=r"printf '\377\376'")
    assert load().regard_lanes() == build.library().regard_lanes()


def test_a_library_that_never_ends_loading(compiler, tmp_path, monkeypatch):
    source = 'extern "C" int regard_lanes() { return 16; } struct S { S() { for (volatile int i = 0;; i = 1); } } s;'
    (tmp_path / "slow.cpp").write_text(source)
    compiler(f'g++ -shared -fPIC "{tmp_path}/slow.cpp" -o "$made"')
    monkeypatch.setattr(build, "MOMENT", 1.0)
    assert "not done after 1 s" in load()


CODE = """
import json, sys, torch, regard
from regard.kernels import plan
from regard.kernels.native import build
build.LIMIT = 0.5
q = torch.randn(1, 1, 300, 8)
mask = regard.masks.causal() & regard.masks.window(9)
out = regard.attention(q, q, q, mask=mask)
torch.testing.assert_close(out, regard.attention(q, q, q, mask=mask, kernel="eager"))
plan.KERNELS = {name: plan.KERNELS[name] for name in ("eager", "native")}  # FlexAttention takes its time
found = {finding.name: (finding.state, finding.text) for finding in regard.doctor.examine()}
print(json.dumps({"native": found["native on cpu"], "kept": found["compiled kernels"]}))
"""


@pytest.mark.parametrize("does", ["sleep 1000", 'head -c 20000 REAL > "$made"'])
def test_in_a_process_of_its_own(does, compiler, tmp_path):
    script = compiler(does)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"native kernels: {script} could not build them")
    found = json.loads(done.stdout)
    state, text = found["native"]
    assert state == "no"
    assert text.startswith(f"{script} could not build them")
    assert found["kept"] == ["ok", f"kept in {tmp_path}/cache/native; this installation brings none"]


# --- doctor -------------------------------------------------------------------------------------------------------


def test_doctor_says_where_they_are_kept(compiler, tmp_path, monkeypatch):
    compiler()
    assert doctor._compiled().text == f"kept in {tmp_path}/cache/native; this installation brings none"
    (tmp_path / "cache" / "native").chmod(0o777)
    found = doctor._compiled()
    assert found.state == "no"
    assert "native can be written by others; kept in" in found.text
    monkeypatch.setattr(cache.tempfile, "tempdir", "/proc/nowhere")
    assert "set REGARD_CACHE" in doctor._compiled().text
