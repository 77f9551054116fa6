"""A fault of the caller's own mechanism ends its own cell, with file, line and traceback or the name of a signal."""

import inspect
import json
import re
import sys
import time
from pathlib import Path

import pytest

from bench import faulty
from regard.bench.process import Stop, answer

HERE = Path(__file__).parent
JOB = {"cell": {"settings": {"threads": 1}}, "checkpoint": ""}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and their words are those of Linux")


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def told(fault, timeout=60.0):
    began = time.monotonic()
    command = (sys.executable, "-P", "-c", "import faulty; faulty.main()")
    how = {"timeout": timeout, "stop": Stop(), "on_step": lambda step, loss: None}
    said = answer({**JOB, "fault": fault}, command=command, **how)
    assert time.monotonic() - began < 30
    return json.loads(json.dumps(said))


def line(fault):
    """Where the fault's own line stands: its last."""
    lines, first = inspect.getsourcelines(getattr(faulty, fault))
    return first + len(lines) - 1


HERE_IT_WAS = {
    "raises": "RuntimeError: boom",
    "raises_no_error": "GeneratorExit",
    "says_nothing_readable": "Mute: its text cannot be made",
    "says_too_much": "RuntimeError: eeee",
    "says_half_letters": "RuntimeError: \udc80 half \ud800",
    "exits_by_exception": "SystemExit: 0",
    "exits": "its process ended with exit code 7",
    "exits_well": "its process ended with exit code 0",
    "forks_and_exits": "its process ended with exit code 3",
    "segfaults": "its process was ended by SIGSEGV",
    "aborts": "its process was ended by SIGABRT",
    "interrupted": "KeyboardInterrupt",
    "eats_memory": "out of memory",
    "recurses": "RecursionError: maximum recursion depth exceeded",
    "fills_a_disk": "OSError: [Errno 28] No space left on device: 'mine.bin'",
    "sleeps": "took longer than the limit of 2 seconds",
    "spins_in_c": "took longer than the limit of 2 seconds",
}


@pytest.mark.parametrize("fault", HERE_IT_WAS)
def test_its_file_and_line_are_told(fault):
    said = told(fault, timeout=2.0 if "longer" in HERE_IT_WAS[fault] else 60.0)
    assert said["failed"].startswith(HERE_IT_WAS[fault])
    assert said["failed"].endswith(f" (faulty.py, line {line(fault)})")
    assert len(said["failed"]) < 540
    assert len(said["traceback"]) < 9000
    assert re.search(rf'/faulty.py", line {line(fault)},? in {fault}\n', said["traceback"])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("killed", "its process was ended by SIGKILL (out of memory, perhaps)"),
        ("kills_its_group", "its process was ended by SIGKILL (out of memory, perhaps)"),
        ("closes_descriptors", "its process closed the descriptor that its events travel on"),
    ],
)
def test_what_leaves_no_trace_is_named(fault, reason):
    assert told(fault) == {"failed": reason, "traceback": ""}


def test_a_process_that_was_stopped_is_late():
    assert told("stops", timeout=2.0)["failed"].startswith("took longer than the limit of 2 seconds")


@pytest.mark.parametrize(
    "habit",
    [
        "asks",
        "changes_the_world",
        "goes_on_twice",
        "ignores_signals",
        "leaves_a_child",
        "leaves_a_session",
        "leaves_threads",
        "prints",
    ],
)
def test_what_is_no_fault_changes_nothing(habit):
    assert told(habit) == {"result": {"fine": True}}


def test_what_is_written_to_every_descriptor_is_ignored_and_told():
    assert told("writes_everywhere") == {"result": {"fine": True}, "ignored": 1}
