"""One job in a process of its own: whatever happens to it, the caller gets one answer."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import IO, Any


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
    command: tuple[str, ...] = (sys.executable, "-P", "-m", "regard.bench.worker"),
) -> dict[str, Any] | None:
    """The worker's last event: {"result": …}, {"failed": reason} or {"full": path}; None if stopped."""
    threads = str(job["cell"]["settings"]["threads"])
    environment = {
        # Threads that wait without sleeping rob each other: a shared machine would train 5 times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # The worker finds what this process finds, the caller's own mechanisms among it.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with tempfile.TemporaryFile() as errors:
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=_forward, args=(worker.stdout, lines), daemon=True).start()
        deadline = time.monotonic() + timeout
        try:
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(json.dumps(job).encode() + b"\n")
                worker.stdin.flush()
            while True:
                if stop.number:
                    return None
                if time.monotonic() > deadline:
                    return {"failed": f"took longer than the limit of {timeout:g} seconds"}
                with contextlib.suppress(queue.Empty):
                    line = lines.get(timeout=0.1)
                    if line is None:
                        return {"failed": _death(worker.wait(), errors)}
                    event = _event(line)
                    if "step" in event:
                        on_step(event["step"], event["loss"])
                    elif event:
                        return event
        finally:
            _end(worker)


def _forward(stream: IO[bytes], lines: "queue.Queue[bytes | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _death(code: int, errors: IO[bytes]) -> str:
    """Why a worker ended without a word."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
    said = errors.read().decode(errors="replace").strip().splitlines()
    last = f": {said[-1].strip()[:300]}" if said else ""
    if code >= 0:
        return f"its process ended with exit code {code}{last}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " (out of memory, perhaps)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}{last}"


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Nothing of the worker stays behind, its own children included."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
    else:
        worker.kill()
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
