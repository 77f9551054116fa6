"""The entry point, of `regard` and of `python -m regard`.

Signals are seen to before anything is imported that takes time. Where something has to be kept first, as in a run of
`regard compare`, `regard.bench.process.Stop` sees to them instead.
"""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _leave)
    from regard.cli import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End at once. An exception could get lost in whatever is being imported."""
    with contextlib.suppress(Exception):  # it came while something was being written
        sys.stdout.flush()
    os._exit(128 + number)


if __name__ == "__main__":
    main()
