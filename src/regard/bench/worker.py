"""The process of one cell: reads its job as a line of JSON, and tells events as `regard.bench.wire` writes them.

    {"step": 10, "loss": 3.2}  …  {"result": {...}}  |  {"failed": "reason", "traceback": "..."}  |  {"full": "reason"}

It ends with its guard (`regard.bench.guard`), so that no worker outlives a run that was killed.
"""

import errno
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from regard.bench import wire
from regard.bench.faults import CRASH, Refused, place, reason, told
from regard.bench.record import Cell
from regard.models.mixer import parse_stack

GUARD = "REGARD_GUARD"
"""Environment variable: the guard's process id. The guard sets it, and can't import this."""
HIGH = 500
"""Descriptors from here on are out of the way of a mechanism that closes or reuses the first ones."""

Progress = Callable[[int, float], None]


def main(do: "Callable[[dict[str, Any], Progress], dict[str, Any]] | None" = None) -> None:
    """Do the one job of this process by `do`, by default `work`, and tell how it ended."""
    job = json.loads(_line())
    say = _speaker(job.pop("secret"))
    try:
        result = (do or work)(job, lambda step, loss: say({"step": step, "loss": loss}))
    except BaseException as error:  # a mechanism may raise SystemExit or KeyboardInterrupt, too
        no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and no_room and not place(error):
            say({"full": str(error.filename or job["checkpoint"])})
        else:
            # A refusal's words tell more than where they were said.
            say({"failed": reason(error), "traceback": "" if isinstance(error, Refused) else told(error)})
    else:
        say({"result": result})
    _leave(0)  # what is left is tearing torch down


_leave = os._exit


def _speaker(secret: str) -> Callable[[dict[str, Any]], None]:
    """Take the descriptors out of a mechanism's reach; returns what writes an event."""
    _end_with_guard()
    events, errors = _moved(1), _moved(2)
    os.dup2(2, 1)  # what a mechanism prints
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    faulthandler.enable(errors)
    me, pipe = os.getpid(), os.fstat(events).st_ino

    def exit_(status: int) -> NoReturn:
        if os.getpid() == me:
            with open(errors, "w", closefd=False, errors="replace") as file:
                print(CRASH[1] + "".join(_innermost_first()), file=file, flush=True)
        _leave(status)

    os._exit = exit_  # the only way to end without a trace of where

    def say(event: dict[str, Any]) -> None:
        if os.getpid() != me:
            _leave(0)  # a copy of this process, made by a mechanism
        try:
            if os.fstat(events).st_ino != pipe:
                _leave(wire.CLOSED)
            for line in wire.lines(event, secret):
                os.write(events, line)
        except OSError:
            _leave(wire.CLOSED)

    return say


def _innermost_first() -> list[str]:
    """The frames of whoever asked to leave, as the fault handler writes them."""
    frames = traceback.extract_stack(sys._getframe(2))[::-1]
    return [f'  File "{frame.filename}", line {frame.lineno} in {frame.name}\n' for frame in frames]


def _moved(descriptor: int) -> int:
    """A copy of it that programs started from here do not inherit."""
    try:
        import fcntl

        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, HIGH)
    except (ImportError, OSError):  # Windows, or fewer are allowed
        return os.dup(descriptor)


def work(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Do the job and return the fields of its result, without the cell.

    Or those of each mechanism in "speeds"; or, of each in "build", why it can't be built.
    """
    import torch

    from regard import tasks
    from regard.bench.match import sizes
    from regard.bench.speeds import in_turns
    from regard.bench.train import TrainingError, train

    cell = Cell(**job["cell"])
    torch.set_num_threads(cell.settings["threads"])
    # Numbers below 1e-38 make matrix products on CPUs many times slower and carry nothing.
    torch.set_flush_denormal(True)
    task = tasks.make(cell.task, job["options"])
    if "build" in job:
        size = sizes(task, cell.settings)
        return built(job["build"], lambda text: task.model(parse_stack(text), size), progress)
    if "speeds" in job:
        return in_turns(task, job["speeds"], cell.settings, progress)
    if not task.settings().items() <= cell.settings.items():
        raise TrainingError("the data has changed since the run began")
    checkpoint = Path(job["folder"]) / job["checkpoint"] if job["checkpoint"] else None
    result = asdict(train(cell, task, progress=progress, checkpoint=checkpoint))
    return {**{k: v for k, v in result.items() if k != "cell"}, "checkpoint": job["checkpoint"]}


def built(names: list[str], build: Callable[[str], object], progress: Progress) -> dict[str, Any]:
    """Build these mechanisms, one after the other. Returns name -> why one cannot be."""
    found = {}
    for number, name in enumerate(names):
        progress(number, 0.0)  # who ends this process is known by that
        try:
            build(name)
        except BaseException as error:
            found[name] = reason(error)
    return found


def _line() -> bytes:
    """The first line of standard input, unbuffered: what follows belongs to `_until_closed`."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or b"\n"
    return line


def _end_with_guard() -> None:
    """Linux ends this process with its guard; elsewhere a thread looks whether that is still there."""
    if (guard := int(os.environ.pop(GUARD, 0))) and sys.platform == "linux":
        return
    entered = os.dup(0)

    def watch() -> None:
        if guard:
            while os.getppid() == guard:
                time.sleep(0.5)
        else:
            while os.read(entered, 4096):
                pass
        _leave(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
