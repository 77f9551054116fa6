"""What every benchmark shares: interleaved timing in one process, ratios with their spread, goals, and the JSON.

A benchmark is a module with a function `measure`, which returns its figures, and a command around it:

    if __name__ == "__main__":
        command(measure, __doc__)
"""

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
"""Where the figures lie that docs/benchmarks.md is rendered from."""

PACKAGES = (
    *("torch", "regard", "numpy", "entmax", "natten", "transformers", "torch_geometric", "local-attention"),
    *("performer-pytorch", "x-transformers", "nystrom-attention", "triton"),
)
"""Those whose versions a figure is written down with."""

Run = Callable[[], Any]


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
    row: str = ""
    """The goal of `benchmarks.goals` that it is a measurement of."""
    share: float | None = None
    """What ours achieved of the machine's matrix-product peak."""

    @property
    def met(self) -> bool | None:
        if self.value is None or self.goal is None:
            return None
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


@dataclass
class Benchmark:
    """All figures of one command. `shape` says what was computed: axes by their letters, and the like."""

    name: str
    about: str
    figures: list[Figure] = field(default_factory=list)
    shape: dict[str, Any] = field(default_factory=dict)

    def add(self, *figures: Figure) -> None:
        self.figures += figures


class Times(dict[str, list[float]]):
    """Seconds of each contender in each round, and the contenders themselves."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        super().__init__({name: [] for name in runs})
        self.runs = runs


def race(
    contenders: Mapping[str, Run], *, repeats: int = 7, warmup: int = 1, number: int = 1, seconds: float = 20
) -> Times:
    """Seconds of each contender in each round. All run in every round, so that a slow stretch hits all of them.

    `number` calls are timed together. After `seconds` no third round is begun, nor a later one.
    """
    for _ in range(warmup):
        for run in contenders.values():
            run()
    times = Times(contenders)
    names, started = list(contenders), time.perf_counter()
    for n in track(range(repeats), description=" / ".join(names)[:40], transient=True, console=Console(stderr=True)):
        if n >= 2 and time.perf_counter() - started > seconds:
            continue
        for name in names if n % 2 == 0 else names[::-1]:
            run, began = contenders[name], time.perf_counter()
            for _ in range(number):
                run()
            times[name].append((time.perf_counter() - began) / number)
    return times


def ratio(times: Mapping[str, Sequence[float]], ours: str, theirs: str) -> tuple[float, float, float]:
    """Median, least and greatest of ours / theirs over the rounds."""
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def compared(
    what: str,
    times: Mapping[str, Sequence[float]],
    ours: str,
    theirs: str,
    *,
    why: Mapping[str, str] | None = None,
    **about: Any,
) -> Figure:
    """The ratio of two contenders' times as a figure. `about`: `goal`, `better`, `note`, ... as in `Figure`.

    Where theirs did not run, the figure says so, with the reason in `why`; and where its goal is not met, what ours
    spends its time in.
    """
    if theirs not in times:
        return Figure(what, None, **about | {"note": (why or {}).get(theirs, f"{theirs} did not run"), "share": None})
    median, low, high = ratio(times, ours, theirs)
    if about.get("better") == "higher":  # how many times faster ours is
        median, low, high = 1 / median, 1 / high, 1 / low
    figure = Figure(what, median, "x", low, high, **about)
    if figure.met is False and isinstance(times, Times):
        figure = replace(figure, note="; ".join(filter(None, (figure.note, where(times.runs[ours])))))
    return figure


def able(peers: Mapping[str, Callable[[], Run]]) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers that are installed and run here, made ready, and for the others the reason why not."""
    runs, why = {}, {}
    for name, make in peers.items():
        try:
            run = make()
            run()
        except ModuleNotFoundError as error:
            why[name] = f"the package {error.name} is not installed"
        except Exception as error:  # a compiler that is missing, an operation that it lacks
            why[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:80]}"
        else:
            runs[name] = run
    return runs, why


def where(run: Run, seconds: float = 0.2) -> str:
    """The three functions that a call spends most time in: said beside what is not as fast as it should be."""
    profile, began = cProfile.Profile(), time.perf_counter()
    while not profile.getstats() or time.perf_counter() - began < seconds:
        profile.runcall(run)
    spent: dict[tuple[str, int, str], Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(line[2] for line in spent.values())
    most = sorted(spent.items(), key=lambda line: -line[1][2])[:3]
    return "of its time: " + ", ".join(f"{name.strip('<>')} {line[2] / total:.0%}" for (*_, name), line in most)


def forward_backward(run: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Sequence[torch.Tensor]]:
    """The function that runs it and the gradients of all inputs."""

    def both() -> Sequence[torch.Tensor]:
        out = run()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return both


def peak(dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """Measured FLOP/s of a large matrix product: what this machine can do at best."""
    a, b = torch.randn(2, size, size).to(dtype)
    times = race({"matrix product": lambda: a @ b}, repeats=5)["matrix product"]
    return 2 * size**3 / min(times)


_peak = cache(lambda dtype: peak(dtype))


def share(flops: float, seconds: float, dtype: torch.dtype = torch.float32) -> float:
    """What work done in this time is of the machine's matrix-product peak."""
    return flops / seconds / _peak(dtype)


def growth(seconds: Mapping[int, float]) -> float:
    """The exponent of the length in these times: the slope of log time over log length, by least squares."""
    x, y = torch.tensor([[float(n), s] for n, s in seconds.items()], dtype=torch.float64).log().T
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def agree(got: torch.Tensor, want: torch.Tensor, *, within: float = 1e-3) -> None:
    """No claim of speed without the same answer: raises if the largest difference exceeds `within`."""
    off = float((got.detach() - want.detach()).abs().max())
    if not off <= within:
        raise SystemExit(f"results differ by {off:.3g}, more than {within}: nothing is timed")


def arguments(about: str) -> argparse.Namespace:
    """--json FILE, --save, --repeats N, --threads N."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--save", action="store_true", help=f"write them into docs/{FOLDER.name}")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def command(measure: Callable[..., Benchmark], about: str | None) -> None:
    """Measure as the command line asks, print the figures and save them."""
    args = arguments(about or "")
    finish(measure(repeats=args.repeats), args)


def finish(benchmark: Benchmark, args: argparse.Namespace) -> None:
    """Print the table, and write the JSON where asked."""
    Console(width=100).print(table(benchmark.about, HEADINGS, map(cells, benchmark.figures)))
    target = FOLDER / f"{benchmark.name}.json" if args.save else args.json
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(recorded(benchmark), indent=1) + "\n", encoding="utf-8")


def recorded(benchmark: Benchmark) -> dict[str, Any]:
    """A benchmark as it is written down."""
    record = {k: getattr(benchmark, k) for k in ("name", "about", "shape")} | {"machine": machine()}
    return record | {"figures": [asdict(f) | {"met": f.met} for f in benchmark.figures]}


HEADINGS = ("what", "measured", "spread", "of peak", "goal", "")


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """For the terminal; a column in which nothing stands is left out."""
    made = Table(title=title, title_justify="left")
    lines = list(rows)
    used = [n for n in range(len(headings)) if any(line[n] for line in lines)]
    for n in used:
        made.add_column(headings[n], justify="left" if n in (0, len(headings) - 1) else "right")
    for line in lines:
        made.add_row(*(line[n] for n in used))
    return made


def cells(f: Figure) -> list[str]:
    """A figure as the cells of a table."""
    value = "not measured" if f.value is None else quantity(f.value, f.unit)
    spread = "" if f.low is None or f.high is None else f"{f.low:.3g} - {f.high:.3g}"
    share = "" if f.share is None else f"{f.share:.0%}"
    goal = "" if f.goal is None else bound(f.goal, f.unit, f.better)
    verdict = {True: "met", False: "not met", None: ""}[f.met]
    return [f.what, value, spread, share, goal, " ".join(filter(None, (verdict, f"({f.note})" if f.note else "")))]


def quantity(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".strip()


def bound(goal: float, unit: str, better: str) -> str:
    return f"{'<=' if better == 'lower' else '>='} {goal:g} {unit}".strip()


def machine() -> dict[str, str]:
    """What was measured on, in words."""
    from regard.bench.machine import processor

    found = {"device": processor(), "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
