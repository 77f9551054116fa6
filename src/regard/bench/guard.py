"""Stands between a run and the process of one cell: waits for that process to end, then ends all that it left behind.

    python -I -S guard.py PID COMMAND ...

PID is the run's. The guard ends as the command did, by its exit code or its signal. When the run dies, or closes the
guard's input, the command is killed; on SIGUSR1 it is aborted, so that it may say first where it was. On Linux the
guard is the parent of every process whose own parent has ended, so that none gets away, whatever group or session it
moved to; elsewhere it ends the command's group. It needs nothing but the standard library, to be there at once.
"""

import ctypes
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NoReturn

PARENT = "REGARD_GUARD"
"""Environment variable of the command: the guard's process id."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LINUX = sys.platform == "linux"


def main(run: int, command: list[str]) -> NoReturn:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if LINUX:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _dies_with(run, signal.SIGTERM)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        _become(command, guard)

    def end(*number: int) -> None:
        with suppress(ProcessLookupError):
            for one in number:
                os.kill(worker, one)

    def watch() -> None:
        hung_up = select.poll()
        hung_up.register(0, 0)  # the end is told in any case; what comes in is the command's
        while os.getppid() == run and not hung_up.poll(500):
            pass
        end(signal.SIGKILL)

    signal.signal(signal.SIGTERM, lambda *_: end(signal.SIGKILL))
    signal.signal(signal.SIGUSR1, lambda *_: end(signal.SIGCONT, signal.SIGABRT))
    threading.Thread(target=watch, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    _end_all(worker)
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(guard, -code)
    os._exit(code if code >= 0 else 128 - code)


def _dies_with(parent: int, number: int) -> None:
    """Have this process signalled when its parent dies, and end it if that has come to pass already."""
    if LINUX:
        _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def _become(command: list[str], guard: int) -> NoReturn:
    """Turn this process, just forked, into the command."""
    try:
        os.setsid()  # whoever kills its group does not kill the guard
        _dies_with(guard, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out, this ends rather than the run
        os.execvpe(command[0], command, {**os.environ, PARENT: str(guard)})
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def _end_all(worker: int) -> None:
    """Kill until no child is left; those of a child that ends become the guard's own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for pid in _children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _children() -> Iterator[int]:
    mine = str(os.getpid()).encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            if file.read().rpartition(b")")[2].split()[1] == mine:
                yield int(name)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
