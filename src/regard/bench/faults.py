"""What went wrong in a worker, in one line and in full: of exceptions, of crashes, and of what ended without a word."""

import os
import re
import signal
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from regard.bench.wire import CLOSED

LONGEST = 500
"""Characters of a reason."""
CRASH = ("Fatal Python error: ", "os._exit was called\n")
"""How Python's fault handler begins, and what a worker says before it leaves by `os._exit`."""


class Refused(ValueError):
    """The mechanism is not what it claims to be; the message is one line: which law, by how much, when, where."""


def reason(error: BaseException) -> str:
    """An exception in one line."""
    kind = type(error).__name__
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = "its text cannot be made"
    if "out of memory" in said.lower() or "can't allocate memory" in said.lower() or isinstance(error, MemoryError):
        kind, said = "", "out of memory"
    plain = not kind or (isinstance(error, ValueError) and said)
    return (said if plain else f"{kind}: {said}" if said else kind)[:LONGEST] + place(error)


def place(error: BaseException) -> str:
    """' (file.py, line 7)' of the caller's own code, where the error came from it or passed through it; else ''."""
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    return _place(frames[::-1])


def told(error: BaseException, most: int = 8000) -> str:
    """The traceback; the middle of one that is very long is left out."""
    return _shortened("".join(traceback.format_exception(error)), most)


def late(seconds: float, said: bytes) -> dict[str, Any]:
    """The answer for a worker that had to be ended; `said` is the end of what it wrote on stderr."""
    where, dump = _crash(said.decode(errors="replace"))
    return {"failed": f"took longer than the limit of {seconds:g} seconds{where}", "traceback": dump}


def death(code: int, said: bytes) -> dict[str, Any]:
    """The answer for a worker that ended without one: by this exit code, or this signal if it is below 0."""
    text = said.decode(errors="replace")
    where, dump = _crash(text)
    last = ["", *text.strip().splitlines()][-1].strip()[:300]
    if code == CLOSED:
        how = "its process closed the descriptor that its events travel on"
    elif code >= 0:
        how = f"its process ended with exit code {code}"
    else:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (out of memory, perhaps)" if name == "SIGKILL" else ""
        how = f"its process was ended by {name}{hint}"
    return {"failed": how + (where if dump else f": {last}" if last else ""), "traceback": dump}


def _crash(said: str) -> tuple[str, str]:
    """Where it was, and the traceback that says so, as the fault handler wrote it; '' and '' where it did not."""
    start = max(map(said.rfind, CRASH))
    if start < 0:
        return "", ""
    dump = said[start:].partition("\nExtension modules:")[0].strip() + "\n"
    frames = re.findall(r'^  File "(.*)", line (\d+) in ', dump.partition("Current thread")[2] or dump, re.MULTILINE)
    return _place([(name, int(number)) for name, number in frames]), _shortened(dump)


def _place(frames: list[tuple[str, int]]) -> str:
    """Of frames, the innermost first: the first that is the caller's own."""
    installed = tuple(f"{path}{os.sep}" for path in {*sysconfig.get_paths().values(), str(Path(__file__).parents[1])})
    for name, number in frames:
        if not name.startswith((*installed, "<")):
            return f" ({Path(name).name}, line {number})"
    return ""


def _shortened(text: str, most: int = 8000) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}\n...\n{text[-most // 2 :]}"
