"""Whatever a worker does, there is one answer, and nothing of it stays behind."""

import os
import sys
import threading
import time

import pytest

from regard.bench.process import Stop, answer

JOB = {"cell": {"settings": {"threads": 1}}}


def ask(code, *, timeout=60.0, stop=None, on_step=lambda step, loss: None):
    return answer(JOB, timeout=timeout, stop=stop or Stop(), on_step=on_step, command=(sys.executable, "-c", code))


def test_steps_and_the_result_arrive():
    seen = []
    code = """
import sys, json
job = json.loads(sys.stdin.readline())
print(json.dumps({"step": 1, "loss": 8.0}))
print("not an event")
print(json.dumps({"result": job["cell"]["settings"]}))
"""
    assert ask(code, on_step=lambda *pair: seen.append(pair)) == {"result": {"threads": 1}}
    assert seen == [(1, 8.0)]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (out of memory, perhaps)"),
        ("import sys; sys.exit('the last\\nwords')", "exit code 1: words"),
        ("import os; os._exit(0)", "exit code 0"),
        ("import os; os.close(1); os._exit(7)", "exit code 7"),
    ],
)
def test_a_worker_that_dies_is_a_failure_with_a_reason(code, said):
    assert said in ask(code)["failed"]


def test_a_worker_that_hangs_is_ended():
    start = time.monotonic()
    assert "limit of 1 seconds" in ask("import time; time.sleep(600)", timeout=1.0)["failed"]
    assert time.monotonic() - start < 10


def test_a_stop_ends_the_worker_and_its_children(tmp_path):
    code = f"""
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
time.sleep(600)
"""
    stop = Stop()

    def press():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        stop.number = 2

    threading.Thread(target=press, daemon=True).start()
    assert ask(code, stop=stop) is None
    deadline = time.monotonic() + 10
    while alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
