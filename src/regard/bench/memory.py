"""How much memory something takes."""

import contextlib
import sys
from pathlib import Path

import torch


class PeakMemory:
    """The most memory in use since it was made, less what was in use then."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            # Forget the peak of importing: from here on it is the peak of training.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self.before = self._now()

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, self._peak() - self.before)

    def _now(self) -> int:
        if self.device.type == "cuda":
            return 0
        return _status("VmRSS") or self._peak()

    def _peak(self) -> int:
        # Not getrusage first: its peak starts at that of the process which this one was started from.
        if found := _status("VmHWM"):
            return found
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    """Bytes that Linux reports for this process, or 0."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
