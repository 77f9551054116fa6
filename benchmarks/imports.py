"""Seconds that `import regard` takes in a fresh process, and how many of them are not torch's.

python -m benchmarks.imports
"""

import statistics
import subprocess
import sys

from benchmarks.harness import Benchmark, Figure, arguments, finish

CODE = """
import time
began = time.perf_counter()
import torch, numpy, einops
middle = time.perf_counter()
import regard
print(time.perf_counter() - began, time.perf_counter() - middle)
"""


def main() -> None:
    args = arguments(__doc__)
    runs = [
        [float(x) for x in subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True).stdout.split()]
        for _ in range(max(3, args.repeats))
    ]
    result = Benchmark("imports", "import regard, in a fresh process")
    for what, n, goal in (("with torch", 0, 2.0), ("ours alone", 1, 0.2)):
        seconds = [run[n] for run in runs]
        result.add(Figure(what, statistics.median(seconds), "s", min(seconds), max(seconds), goal=goal))
    finish(result, args)


if __name__ == "__main__":
    main()
