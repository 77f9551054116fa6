"""Layouts and counts of long sequences stay small and quick."""

import subprocess
import sys

import pytest

from regard import masks

PROGRAM = """
import resource, sys, time
import torch
from regard import masks
torch.set_num_threads(1)
T = 2**18
documents = masks.packed(torch.arange(0, T + 1, T // 64))
mask = {mask}
mask.layout(1024), mask.count(1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
layout, count = mask.layout(T), mask.count(T)
seconds = time.process_time() - start
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) * unit / 2**20, seconds, layout.num_blocks, count)
"""


@pytest.mark.parametrize(
    ("mask", "blocks", "count"),
    [
        pytest.param(
            "masks.causal() & masks.window(512)",
            5 * 2048 - 10,
            512 * 2**18 - 512 * 511 // 2,
            marks=pytest.mark.slow,
        ),
        ("masks.causal() & documents", 64 * (32 * 33 // 2), 64 * (4096 * 4097 // 2)),
        (
            "masks.causal() & (masks.window(256) | masks.global_tokens(1))",
            3 * 2048 - 3 + 2048 - 3,
            256 * 2**18 - 256 * 255 // 2 + 2**18 - 256,
        ),
    ],
)
def test_256k_without_the_square(mask, blocks, count):
    """T x S would be 64 GiB of booleans."""
    run = [sys.executable, "-c", PROGRAM.format(mask=mask)]
    megabytes, seconds, *found = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert [int(x) for x in found] == [blocks, count]
    assert float(megabytes) < 300
    assert float(seconds) < 20


def test_a_million_tokens_with_a_window():
    mask = masks.causal() & masks.window(1024)
    layout = mask.layout(2**20, block=256)
    assert layout.num_blocks == 5 * 4096 - 10
    assert mask.count(2**20) == 1024 * 2**20 - 1024 * 1023 // 2
