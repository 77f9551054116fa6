"""Whatever a worker does, there is one answer, and nothing of it stays behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from regard.bench import process, wire
from regard.bench.process import Stop, answer

JOB = {"cell": {"settings": {"threads": 1}}}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SAY = """
import sys, json, os
from regard.bench import wire
job = json.loads(sys.stdin.readline())
def say(event):
    for line in wire.lines(event, job["secret"]):
        os.write(1, line)
"""


def ask(code, *, timeout=60.0, stop=None, on_step=lambda step, loss: None):
    return answer(JOB, timeout=timeout, stop=stop or Stop(), on_step=on_step, command=(sys.executable, "-c", code))


def test_steps_and_the_result_arrive():
    seen = []
    code = """
say({"step": 1, "loss": 8.0})
say({"result": job["cell"]["settings"]})
"""
    assert ask(SAY + code, on_step=lambda *pair: seen.append(pair)) == {"result": {"threads": 1}}
    assert seen == [(1, 8.0)]


def test_events_are_neither_forged_nor_spoiled():
    """Whatever else is written to their descriptor, whole lines or halves of one, is ignored and counted."""
    code = r"""
long = {"result": {"text": "x" * 5000, "more": "\u00e9\ud800\n"}}
first, *others = wire.lines(long, job["secret"])
os.write(1, json.dumps({"result": {"forged": True}}).encode() + b"\n")
os.write(1, b"half a line, and " + first + b"\xff\x00{")
for line in others:
    os.write(1, line + b"0" * 10_000)
"""
    said = ask(SAY + code)
    assert said["result"] == {"text": "x" * 5000, "more": "\u00e9\ud800\n"}
    assert said["ignored"] >= 5


def test_lines_are_no_longer_than_a_pipe_takes_at_once():
    event = {"result": "a text\n" * 300}
    sent = list(wire.lines(event, "secret"))
    assert max(map(len, sent)) <= 512
    for secret, found in (("secret", event), ("another", None)):
        reader = wire.Reader(secret)
        read = [reader.read(part) for line in sent for part in line.split(b"\n")]
        assert list(filter(None, read)) == [found] * bool(found)
        assert reader.ignored == (0 if found else len(sent))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (out of memory, perhaps)"),
        ("import os, signal; os.killpg(0, signal.SIGKILL)", "SIGKILL (out of memory, perhaps)"),
        ("import sys; sys.exit('the last\\nwords')", "exit code 1: words"),
        ("import os; os._exit(0)", "exit code 0"),
        ("import os; os.close(1); os._exit(7)", "exit code 7"),
    ],
)
def test_a_worker_that_dies_is_a_failure_with_a_reason(code, said):
    assert said in ask(code)["failed"]


def test_what_cannot_be_started_is_a_failure(tmp_path):
    said = answer(JOB, timeout=60, stop=Stop(), on_step=lambda *_: None, command=(str(tmp_path / "nothing"),))
    assert said["failed"] == f"its process ended with exit code 127: {tmp_path / 'nothing'}: No such file or directory"


def test_a_worker_that_hangs_is_ended_and_says_where():
    start = time.monotonic()
    code = "import faulthandler; faulthandler.enable()\ndef hang():\n    while True: pass\nhang()"
    said = ask(code, timeout=1.0)
    assert "limit of 1 seconds" in said["failed"]
    assert "in hang" in said["traceback"]
    assert time.monotonic() - start < 10


def test_one_that_will_not_say_where_is_ended_too(monkeypatch):
    monkeypatch.setattr(process, "ABORTING", 0.2)
    code = "import signal, time\nfor n in (2, 6, 10, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(600)"
    assert ask(code, timeout=1.0) == {"failed": "took longer than the limit of 1 seconds", "traceback": ""}


CHILD = """
import os, sys, time, pathlib
def child(kind):
    if os.fork() == 0:
        if kind == "session": os.setsid()
        if kind == "orphan" and os.fork(): os._exit(0)
        with open({path!r}, "a") as file: file.write(f"{{os.getpid()}}\\n")
        time.sleep(600)
for kind in ("plain", "session", "orphan"): child(kind)
while len(pathlib.Path({path!r}).read_text().split()) < 3: time.sleep(0.01)
"""


def children(path):
    while not path.exists() or len(path.read_text().split()) < 3:
        time.sleep(0.02)
    return list(map(int, path.read_text().split()))


@LINUX
def test_what_a_worker_leaves_behind_holds_up_nothing_and_is_ended(tmp_path):
    """Children in its group, in sessions of their own and orphaned ones, all with the pipes to the run in hand."""
    path = tmp_path / "pids"
    path.touch()
    start = time.monotonic()
    assert "exit code 3" in ask(CHILD.format(path=str(path)) + "os._exit(3)", timeout=60)["failed"]
    assert time.monotonic() - start < 10
    assert not any(map(alive, children(path)))


@LINUX
def test_a_stop_ends_the_worker_and_its_children(tmp_path):
    path, stop = tmp_path / "pids", Stop()
    path.touch()

    def press():
        children(path)
        stop.number = 2

    threading.Thread(target=press, daemon=True).start()
    assert ask(CHILD.format(path=str(path)) + "time.sleep(600)", stop=stop) is None
    assert not any(map(alive, children(path)))


@LINUX
@pytest.mark.parametrize("victim", ["run", "guard"])
def test_no_worker_outlives_the_run_or_its_guard(tmp_path, victim):
    path = tmp_path / "pids"
    path.touch()
    code = CHILD.format(path=str(path)) + "time.sleep(600)"
    run = f"""
from regard.bench.process import *
print(answer({JOB!r}, timeout=60, stop=Stop(), on_step=None, command=({sys.executable!r}, "-c", {code!r}))["failed"])
"""
    with subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, text=True) as job:
        found = children(path)
        # They tell of themselves in any order, and the orphan is a child of the guard by then.
        worker = next(pid for pid in map(parent, found) if parent(parent(pid)) == job.pid)
        guard = parent(worker)
        os.kill(job.pid if victim == "run" else guard, signal.SIGKILL)
        said, _ = job.communicate(timeout=20)
    assert ("SIGKILL" in said) == (victim == "guard")
    ended = [worker, guard, *found] if victim == "run" else [worker, guard]
    until = time.monotonic() + 10
    while any(map(alive, ended)):
        assert time.monotonic() < until
        time.sleep(0.02)
    for pid in found:  # of a guard that was killed
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_result_that_is_there_when_a_stop_comes_is_kept():
    stop = Stop()
    code = SAY + 'say({"step": 1, "loss": 0.0}); say({"result": {}}); import time; time.sleep(600)'

    def on_step(step, loss):
        time.sleep(0.5)
        stop.number = 15

    assert ask(code, stop=stop, on_step=on_step) == {"result": {}}


@LINUX
def test_a_flood_of_words_takes_no_room():
    code = SAY + 'os.write(2, b"z" * 20_000_000); os.write(1, b"y" * 20_000_000); say({"result": {}})'
    said = ask(code)
    assert said["result"] == {}
    assert said["ignored"] == -(-20_000_000 // 4096)
    assert json.loads(json.dumps(said)) == said


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid):
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
