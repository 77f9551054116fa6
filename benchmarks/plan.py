"""Whether `plan` tells the truth: every kernel that can run, measured on a grid of shapes, against what was predicted.

python -m benchmarks.plan            # the ranking, and what the choice costs
python -m benchmarks.plan --fit      # fits src/regard/kernels/rates.json to this machine
"""

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

import regard
from benchmarks.harness import Benchmark, Figure, agree, command, peak, race
from regard import masks
from regard.kernels.cost import OTHERS, RATES, Cost, Rates, kind, maker, rates
from regard.normalizers import Entmax
from regard.positions import Alibi

HEADS = {256: 8, 1024: 4, 4096: 2, 8192: 1}
"""Fewer for longer sequences, so that a cell takes seconds."""
CLOSE = 1.1
"""Times within this factor are as good as equal."""
SLOW = 1.5
"""Predicted seconds beyond which a kernel runs only if it is predicted to be near the best."""


@dataclass
class Cell:
    """One problem, and what each kernel that can run it took."""

    words: str
    given: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def plan(self) -> regard.Plan:
        return regard.plan(*self.given, **self.options)

    @property
    def costs(self) -> dict[str, Cost]:
        """Of the kernels that were measured."""
        costs = self.plan.costs
        return {name: costs[name] for name in self.seconds}

    @property
    def predicted(self) -> dict[str, float]:
        """Seconds of the kernels that were measured."""
        return {name: rates().seconds(cost, self.given[0].dtype) for name, cost in self.costs.items()}

    @property
    def regret(self) -> float:
        """Time of the chosen kernel over that of the fastest."""
        return self.seconds[self.plan.kernel] / min(self.seconds.values())

    def measure(self, repeats: int) -> None:
        """Every able kernel in turn, but those predicted to be slow without being near."""
        plan = self.plan
        guess = {name: rates().seconds(cost, self.given[0].dtype) for name, cost in plan.costs.items()}
        near = [name for name, s in guess.items() if s < SLOW or s < 3 * guess[plan.kernel]]
        runs = {name: lambda name=name: regard.attention(*self.given, **self.options, kernel=name) for name in near}
        want, within = runs[plan.kernel](), 3e-2 if self.given[0].dtype is torch.bfloat16 else 1e-3
        for run in runs.values():
            agree(run(), want, within=within)
        short = max(guess[name] for name in near) < 0.002
        times = race(runs, repeats=repeats, warmup=0, number=10 if short else 1, seconds=3)
        self.seconds = {name: min(found) for name, found in times.items()}


def grid(lengths: list[int]) -> Iterator[Cell]:
    """Full, causal and decoding; windows, documents, padding, chosen blocks, neighborhoods; biases and entmax."""
    for T in lengths:
        for H, D in ((HEADS[T], 64), (max(1, HEADS[T] // 2), 32)):
            at = f"T {T}, H {H}, D {D}"
            x = tuple(torch.randn(3, 1, H, T, D))
            near = masks.causal() & masks.window(max(32, T // 16))
            document = masks.documents((torch.rand(T) < 8 / T).cumsum(0))
            side = int(T**0.5)
            count = T // 64
            tiles = (torch.rand(1, H, count, count) < 0.15) | torch.eye(count, dtype=torch.bool)
            square = tuple(z[:, :, : side * side] for z in x)
            yield Cell(f"full, {at}", x)
            yield Cell(f"causal, {at}", x, {"mask": masks.causal()})
            yield Cell(f"one query, {at}", (x[0][:, :, :1], *x[1:]), {"mask": masks.causal()})
            yield Cell(f"window, {at}", x, {"mask": near})
            yield Cell(f"documents, {at}", x, {"mask": masks.causal() & document})
            yield Cell(f"blocks, {at}", x, {"mask": masks.chosen(tiles, T, T, 64)})
            yield Cell(f"neighborhood, {at}", square, {"mask": masks.neighborhood((side, side), 7)})
            yield Cell(f"alibi, {at}", x, {"mask": masks.causal(), "position": Alibi(H)})
            yield Cell(f"alibi in a window, {at}", x, {"mask": near, "position": Alibi(H)})
            yield Cell(f"entmax, {at}", x, {"mask": masks.causal(), "normalizer": Entmax()})
            half = tuple(z.bfloat16() for z in x)
            yield Cell(f"full in bf16, {at}", half)
            yield Cell(f"causal in bf16, {at}", half, {"mask": masks.causal()})
            yield Cell(f"window in bf16, {at}", half, {"mask": near})
        keep = masks.padding(lengths=torch.tensor([T, T // 2]))
        yield Cell(f"padding, {at}", tuple(torch.randn(3, 2, H, T, D)), {"mask": keep})


def run(repeats: int, lengths: list[int]) -> list[Cell]:
    """The grid, measured."""
    torch.manual_seed(0)
    cells = list(grid(lengths))
    with torch.no_grad():
        for cell in cells:
            cell.measure(repeats)
    return cells


def ordered(cells: list[Cell]) -> float:
    """Share of pairs of kernels, in one cell and not within `CLOSE`, whose predicted order is the measured one."""
    right = []
    for cell in cells:
        guess = cell.predicted
        for a, b in combinations(cell.seconds, 2):
            first, second = cell.seconds[a], cell.seconds[b]
            if max(first, second) > CLOSE * min(first, second):
                right.append((guess[a] < guess[b]) == (first < second))
    return sum(right) / max(1, len(right))


def correlation(cells: list[Cell]) -> float:
    """Spearman's, of predicted and measured times relative to each cell's fastest."""
    guessed, took = [], []
    for cell in cells:
        guess = cell.predicted
        if len(guess) > 1:
            guessed += [s / min(guess.values()) for s in guess.values()]
            took += [s / min(cell.seconds.values()) for s in cell.seconds.values()]
    ranks = torch.stack([torch.tensor(z).argsort().argsort().double() for z in (guessed, took)])
    return float(torch.corrcoef(ranks)[0, 1])


def measure(*, repeats: int, lengths: tuple[int, ...] = tuple(HEADS)) -> Benchmark:
    cells = run(min(repeats, 5), list(lengths))
    for cell in sorted(cells, key=lambda c: -c.regret):
        guess = cell.predicted
        both = ", ".join(f"{n} {1e3 * s:.3g} ({1e3 * guess[n]:.3g}) ms" for n, s in sorted(cell.seconds.items()))
        print(f"{cell.regret:5.2f}  {cell.words}: {cell.plan.kernel} of {both}", file=sys.stderr)
    regrets = [cell.regret for cell in cells]
    worst = max(cells, key=lambda cell: cell.regret)
    result = Benchmark("plan", "The kernel that plan chooses, against all that can run", shape={"T": list(lengths)})
    good = sum(r <= CLOSE for r in regrets) / len(regrets)
    result.add(
        Figure("time of the chosen kernel / the fastest, mean", statistics.mean(regrets), goal=1.1, high=max(regrets)),
        Figure("the same, worst cell", max(regrets), note=f"{worst.words}: {worst.plan.kernel}"),
        Figure(f"cells where it is the fastest or within {CLOSE:g} x", 100 * good, "%", note=f"{len(cells)} cells"),
        Figure("pairs of kernels in their predicted order", 100 * ordered(cells), "%"),
        Figure("Spearman correlation, predicted and measured ratios", correlation(cells), ""),
    )
    return result


def fit(cells: list[Cell], peak: float, *, rounds: int = 20) -> Rates:
    """The rates that explain the measured times best: least squares on relative errors.

    Only ratios are compared, and a machine is not equally fast in every minute: each cell may be off by a factor of
    its own, up to 2, which is found along with the rates.
    """
    import numpy as np
    from scipy.optimize import lsq_linear

    costs = [cost for cell in cells for cost in cell.costs.values()]
    where = np.array([n for n, cell in enumerate(cells) for _ in cell.costs])
    took = np.array([cell.seconds[name] for cell in cells for name in cell.costs])
    does = [kind(cost, cell.given[0].dtype) for cell in cells for cost in cell.costs.values()]
    kinds = sorted(set(does))
    terms = np.array(
        [[c.flops * (d == k) for k in kinds] + [c.bytes, c.streamed, c.calls] for c, d in zip(costs, does, strict=True)]
    )
    least = np.array([1 / (8 * peak)] * len(kinds) + [1e-12, 1e-12, 1e-8])  # BLAS is not the best there is everywhere
    factor = np.ones(len(cells))
    for _ in range(rounds):
        scaled = took * factor[where]
        rows = terms / scaled[:, None]
        size = np.abs(rows).max(0)  # one scale for all unknowns, or the solver takes the small ones for zero
        found = lsq_linear(rows / size, np.ones(len(rows)), bounds=(least * size, np.inf)).x / size
        off = np.log(terms @ found / took)
        factor = np.exp([np.median(off[where == n]) for n in range(len(cells))])
        factor = np.clip(factor / np.exp(np.log(factor).mean()), 0.5, 2)
    *each, moved, streamed, call = map(float, found)
    work = {k: _rounded(1 / (x * peak)) for k, x in zip(kinds, each, strict=True)}
    return Rates(*map(_rounded, (peak, 1 / moved, 1 / streamed, call)), rates().work | work)


def _rounded(x: float) -> float:
    return float(f"{x:.3g}")


if __name__ == "__main__":
    if "--fit" in sys.argv:
        known = json.loads(RATES.read_text(encoding="utf-8"))
        known[maker() or OTHERS] = asdict(fit(run(5, list(HEADS)), peak()))
        RATES.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(f"{RATES} is written:\n{RATES.read_text(encoding='utf-8')}")
    else:
        command(measure, __doc__)
