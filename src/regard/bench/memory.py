"""Peak resident memory of this process."""

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The most memory this process has held at once, so far.

    Linux counts it per program in /proc; getrusage there also remembers the parent's size from before the program
    started, which hides everything smaller.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
