"""One job in a process of its own: whatever happens to it, the caller gets one answer."""

import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any

from regard.bench import faults, wire

WORKER = (sys.executable, "-P", "-m", "regard.bench.worker")
GUARD = (sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")))
LINGER = 5.0
"""Seconds that what is left in the pipes of a dead process may take to be read."""
ABORTING = 2.0
"""Seconds that a worker has to say where it was when it is ended for being late."""
TAIL = 65_536
"""Bytes that are kept of what a worker writes on stderr."""


class Stop:
    """Notes SIGINT and SIGTERM while it is entered, for loops to look at between two steps."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


def answer(
    job: dict[str, Any],
    *,
    timeout: float,
    stop: Stop,
    on_step: Callable[[int, float], None],
    command: tuple[str, ...] = WORKER,
) -> dict[str, Any] | None:
    """The worker's last event: {"result": …}, {"failed": reason} or {"full": path}; None if stopped.

    Its death is what is waited for, whatever it leaves behind; that is ended, too. Where something else came in among
    its events, "ignored" says how many lines.
    """
    secret, threads = secrets.token_hex(16), str(job["cell"]["settings"]["threads"])
    environment = {
        # Threads that wait without sleeping rob each other: a shared machine would train 5 times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # The worker finds what this process finds, the caller's own mechanisms among it.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    worker = subprocess.Popen(
        (*GUARD, str(os.getpid()), *command) if hasattr(os, "fork") else command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        heard = _Heard(worker, secret)
        with contextlib.suppress(BrokenPipeError):
            assert worker.stdin is not None
            worker.stdin.write(json.dumps({**job, "secret": secret}).encode() + b"\n")
            worker.stdin.flush()
        said = _last(worker, heard, timeout, stop, on_step)
    finally:
        _end(worker)
    return {**said, "ignored": heard.ignored} if said and heard.ignored else said


def tried(names: list[str], job: dict[str, Any], *, timeout: float, ask: Any, **how: Any) -> dict[str, str]:
    """Have a worker build these mechanisms, until one ends it. Returns name -> why one cannot be built."""
    if not names:
        return {}
    begun = [names[0]]
    said = ask(
        {**job, "build": names},
        timeout=timeout,
        stop=Stop(),
        on_step=lambda number, _: begun.append(names[number]),
        **how,
    )
    said = said or {}
    return dict(said["result"]) if "result" in said else {begun[-1]: said.get("failed", "no answer")}


class _Heard:
    """Reads what a worker says, in threads of their own: its events, and the end of what it writes on stderr."""

    def __init__(self, worker: "subprocess.Popen[bytes]", secret: str) -> None:
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader, self._said = wire.Reader(secret), b""
        self._threads = [
            threading.Thread(target=work, args=(stream,), daemon=True)
            for work, stream in ((self._listen, worker.stdout), (self._keep, worker.stderr))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ignored(self) -> int:
        return self._reader.ignored

    def said(self) -> bytes:
        """The end of stderr, and all events: to be asked for when the worker is dead."""
        until = time.monotonic() + LINGER
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return self._said

    def _listen(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(4096):
                if (event := self._reader.read(line)) is not None:
                    self.events.put(event)

    def _keep(self, stream: IO[bytes]) -> None:
        with stream:
            while part := os.read(stream.fileno(), TAIL):
                self._said = (self._said + part)[-TAIL:]


def _last(
    worker: "subprocess.Popen[bytes]",
    heard: _Heard,
    timeout: float,
    stop: Stop,
    on_step: Callable[[int, float], None],
) -> dict[str, Any] | None:
    deadline = time.monotonic() + timeout
    while True:
        dead = worker.poll() is not None
        said = heard.said() if dead else b""
        stopped, late = stop.number, time.monotonic() > deadline
        with contextlib.suppress(queue.Empty):
            while True:
                event = heard.events.get(timeout=0 if dead or stopped or late else 0.1)
                if "step" not in event:
                    return event
                on_step(event["step"], event["loss"])
        if stopped:
            return None
        if dead:
            return faults.death(worker.returncode, said)
        if late:
            return _late(worker, heard, timeout)


def _late(worker: "subprocess.Popen[bytes]", heard: _Heard, timeout: float) -> dict[str, Any]:
    # Windows has no such signal.
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired, AttributeError):
        worker.send_signal(signal.SIGUSR1)
        worker.wait(ABORTING)
    return faults.late(timeout, heard.said() if worker.poll() is not None else b"")


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """Nothing of the worker stays behind: its guard, whose input is closed, sees to that and follows."""
    assert worker.stdin is not None
    with contextlib.suppress(OSError):
        worker.stdin.close()
    if not hasattr(os, "fork"):
        worker.kill()
    try:
        worker.wait(LINGER)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
