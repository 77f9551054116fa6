"""Seconds that `import regard` takes in a fresh process, and how many of them are not torch's.

python -m benchmarks.imports
"""

import statistics
import subprocess
import sys

from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Figure, command

CODE = """
import time
began = time.perf_counter()
import torch, numpy, einops
middle = time.perf_counter()
import regard
print(time.perf_counter() - began, time.perf_counter() - middle)
"""


def seconds() -> list[float]:
    """In all, and ours."""
    return [float(x) for x in subprocess.check_output([sys.executable, "-c", CODE], text=True).split()]


def measure(*, repeats: int) -> Benchmark:
    runs = [seconds() for _ in range(repeats)]
    result = Benchmark("imports", "import regard, in a fresh process")
    for (what, row), taken in zip((("with torch", "import"), ("ours alone", "import ours")), zip(*runs), strict=True):
        result.add(Figure(what, statistics.median(taken), "s", min(taken), max(taken), **goal(row)))
    return result


if __name__ == "__main__":
    command(measure, __doc__)
