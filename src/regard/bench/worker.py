"""The process of one cell: reads its job as a line of JSON, writes events as lines of JSON.

    {"step": 10, "loss": 3.2}  …  {"result": {...}}  |  {"failed": "reason", "traceback": "..."}  |  {"full": "reason"}

It ends when its input closes, so that no worker outlives a run that was killed.
"""

import errno
import json
import os
import sysconfig
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regard.bench.record import Cell


def main() -> None:
    job = json.loads(_line())
    threading.Thread(target=_until_closed, daemon=True).start()
    # What a mechanism prints must not mix with the events.
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def say(event: dict[str, Any]) -> None:
        events.write(json.dumps(event, allow_nan=False) + "\n")

    try:
        result = work(job, lambda step, loss: say({"step": step, "loss": loss}))
    except MemoryError:
        say({"failed": "out of memory"})
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            say({"full": str(error.filename or job["checkpoint"])})
        else:
            from regard.bench.probing import Refused  # whose words tell more than where they were said

            say({"failed": reason(error), "traceback": "" if isinstance(error, Refused) else told(error)})
    else:
        say({"result": result})
    events.close()
    os._exit(0)  # what is left is tearing torch down


def work(job: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Do the job and return the fields of its result, without the cell; or of each mechanism whose speed is asked."""
    import torch

    from regard import tasks
    from regard.bench.speeds import in_turns
    from regard.bench.train import TrainingError, train

    cell = Cell(**job["cell"])
    torch.set_num_threads(cell.settings["threads"])
    # Numbers below 1e-38 make matrix products on CPUs many times slower and carry nothing.
    torch.set_flush_denormal(True)
    task = tasks.make(cell.task, job["options"])
    if "speeds" in job:
        return in_turns(task, job["speeds"], cell.settings, lambda turn: progress(turn, 0.0))
    if not task.settings().items() <= cell.settings.items():
        raise TrainingError("the data has changed since the run began")
    checkpoint = Path(job["folder"]) / job["checkpoint"] if job["checkpoint"] else None
    result = asdict(train(cell, task, progress=progress, checkpoint=checkpoint))
    return {**{k: v for k, v in result.items() if k != "cell"}, "checkpoint": job["checkpoint"]}


def reason(error: Exception) -> str:
    """An exception in one line."""
    said = " ".join(str(error).split())
    if "out of memory" in said.lower() or "can't allocate memory" in said.lower():
        said = "out of memory"
    kind = type(error).__name__
    plain = isinstance(error, ValueError) and said
    return (said if plain else f"{kind}: {said}" if said else kind)[:500] + place(error)


def place(error: Exception) -> str:
    """' (file.py, line 7)' of the caller's own code, where the error came from it or passed through it; else ''."""
    installed = tuple(f"{path}{os.sep}" for path in {*sysconfig.get_paths().values(), str(Path(__file__).parents[1])})
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*installed, "<"))]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def told(error: Exception, most: int = 8000) -> str:
    """The traceback; the middle of one that is very long is left out."""
    said = "".join(traceback.format_exception(error))
    return said if len(said) <= most else f"{said[: most // 2]}\n...\n{said[-most // 2 :]}"


def _line() -> bytes:
    """The first line of standard input, unbuffered: what follows belongs to `_until_closed`."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or b"\n"
    return line


def _until_closed() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
