"""What every benchmark shares: interleaved timing in one process, ratios with their spread, goals, and the JSON."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
"""Where the figures lie that docs/benchmarks.md is rendered from."""

PEERS = ("torch", "regard", "numpy", "entmax", "natten", "transformers", "torch_geometric")


@dataclass(frozen=True)
class Figure:
    """One measured quantity, and the goal it is held against, if there is one."""

    what: str
    value: float | None
    """None: not measured, `note` says why."""
    unit: str = "x"
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    better: str = "lower"
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None or self.goal is None:
            return None
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


@dataclass
class Benchmark:
    """All figures of one command."""

    name: str
    about: str
    figures: list[Figure] = field(default_factory=list)

    def add(self, *figures: Figure) -> None:
        self.figures += figures


def race(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender in each round. All run in every round, so that a slow stretch hits all of them."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for n in track(range(repeats), description=" / ".join(names)[:40], transient=True, console=Console(stderr=True)):
        for name in names if n % 2 == 0 else names[::-1]:
            began = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - began)
    return times


def ratio(times: Mapping[str, Sequence[float]], ours: str, theirs: str) -> tuple[float, float, float]:
    """Median, least and greatest of ours / theirs over the rounds."""
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def compared(what: str, times: Mapping[str, Sequence[float]], ours: str, theirs: str, **goal: Any) -> Figure:
    """The ratio of two contenders' times as a figure; `goal` and `note` as in `Figure`."""
    median, low, high = ratio(times, ours, theirs)
    if goal.get("better") == "higher":  # how many times faster ours is
        median, low, high = 1 / median, 1 / high, 1 / low
    return Figure(what, median, "x", low, high, **goal)


def forward_backward(run: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
    """The function that runs it and the gradients of all inputs."""

    def both() -> object:
        out = run()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return both


def peak(dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """Measured FLOP/s of a large matrix product: what this machine can do at best."""
    a, b = torch.randn(2, size, size).to(dtype)
    times = race({"matrix product": lambda: a @ b}, repeats=5)["matrix product"]
    return 2 * size**3 / min(times)


def agree(got: torch.Tensor, want: torch.Tensor, *, within: float = 1e-3) -> None:
    """No claim of speed without the same answer: raises if the largest difference exceeds `within`."""
    off = float((got.detach() - want.detach()).abs().max())
    if not off <= within:
        raise SystemExit(f"results differ by {off:.3g}, more than {within}: nothing is timed")


def arguments(about: str) -> argparse.Namespace:
    """--json FILE, --repeats N, --threads N."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--save", action="store_true", help=f"write them into docs/{FOLDER.name}")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def finish(benchmark: Benchmark, args: argparse.Namespace) -> None:
    """Print the table, and write the JSON where asked."""
    table = Table(title=benchmark.about, title_justify="left")
    for column in ("what", "measured", "spread", "goal", ""):
        table.add_column(column, justify="left" if column in ("what", "") else "right")
    for f in benchmark.figures:
        table.add_row(*cells(f))
    Console(width=100).print(table)
    target = FOLDER / f"{benchmark.name}.json" if args.save else args.json
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        record = {"name": benchmark.name, "about": benchmark.about, "machine": machine()}
        record["figures"] = [asdict(f) | {"met": f.met} for f in benchmark.figures]
        target.write_text(json.dumps(record, indent=1) + "\n")


def cells(f: Figure) -> list[str]:
    """A figure as the cells of a table."""
    value = "not measured" if f.value is None else f"{f.value:.3g} {f.unit}"
    spread = "" if f.low is None or f.high is None else f"{f.low:.3g} - {f.high:.3g}"
    sign = "<=" if f.better == "lower" else ">="
    goal = "" if f.goal is None else f"{sign} {f.goal:g} {f.unit}"
    verdict = {True: "met", False: "not met", None: ""}[f.met]
    return [f.what, value, spread, goal, " ".join(filter(None, (verdict, f"({f.note})" if f.note else "")))]


def machine() -> dict[str, str]:
    """What was measured on, in words."""
    from regard.bench.train import processor

    found = {"device": processor(), "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
