"""What this machine computes with."""

import math
import os
import platform
import re
from pathlib import Path

from regard.checks import refuse


def processor() -> str:
    """The processor, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores this process may use, by a container's quota too; at most 8, as small models gain no more."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return min(count, 8)


def threads_for(numbers: int) -> int:
    """CPU threads for a model whose activations hold so many numbers: one for each 65,536, at most all cores.

    A thread that has less to do waits longer for the others than it works.
    """
    return max(1, min(cores(), numbers // 65_536))


def check_device(who: str, device: str) -> None:
    """Refuse what torch cannot compute on here, before any work is done."""
    if device == "cpu":
        return
    if not isinstance(device, str) or not re.fullmatch(r"cuda(:\d+)?", device):
        refuse(who, "device", "is unknown", repr(device), "'cpu', 'cuda' or 'cuda:N'")
    import torch

    if int(device.partition(":")[2] or 0) >= (there := torch.cuda.device_count()):
        seen = f"'cpu', or one of the {there} GPUs that torch sees" if there else "'cpu': torch sees no GPU"
        refuse(who, "device", "is not there", repr(device), seen)
