"""The goals that speed and memory are held against, each in one place, and what the saved figures say of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Figure, bound, quantity


@dataclass(frozen=True)
class Goal:
    """A limit, and the benchmark whose figures show whether it is kept."""

    work: str
    limit: float | None
    """None: it differs from figure to figure, as `against` says."""
    against: str
    benchmark: str
    better: str = "lower"
    unit: str = "x"

    @property
    def words(self) -> str:
        if self.limit is None:
            return self.against
        return f"{bound(self.limit, self.unit, self.better)} {self.against}".strip()


GOALS: dict[str, Goal] = {
    "plain": Goal("plain attention through regard.attention, (1, 8, 1024, 64)", 1.01, "torch SDPA", "plain"),
    "tiny": Goal("plain attention on tiny inputs", 10, "more than torch SDPA", "plain", unit="us"),
    "window": Goal("causal window 512, T = 16k, fp32, forward", 0.06, "SDPA causal", "window"),
    "window training": Goal("the same, forward and backward", 0.08, "SDPA causal", "window"),
    "window peak": Goal("the same, forward, its own pairs", 0.8, "of the matrix peak", "window", "higher", ""),
    "window flex": Goal("the same, forward", 1, "faster than compiled FlexAttention", "window", "higher"),
    "decode": Goal("decode, fp32, S = 16 .. 64k, 1 and 2 threads", None, "<= max(1 x, +8 us) of SDPA", "decode"),
    "decode bf16": Goal("decode, bf16, S <= 1k", 0.25, "SDPA in bf16", "decode"),
    "decode bf16 long": Goal("decode, bf16, S >= 4k", 0.7, "our fp32", "decode"),
    "step": Goal("a layer's step, 512 wide, 1k cached", 1.2, "its bare projections and the kernel", "decode"),
    "half": Goal(
        "bf16, full, causal and window 512, T = 4k", None, "<= 1 x fp32; 0.667 with avx512_bf16, 0.5 with AMX", "half"
    ),
    "half peak": Goal("the same", 0.6, "of the bf16 matrix peak", "half", "higher", ""),
    "documents": Goal("documents of about 777 in 8k", 0.1, "SDPA with the mask as a tensor", "documents"),
    "padding": Goal("padding, 4 x 1024", 0.7, "SDPA with the mask as a tensor", "documents"),
    "prefix": Goal(
        "decoding after a shared prompt, the best case", 4.8, "faster than caches apart", "prefix_tree", "higher"
    ),
    "neighborhood": Goal("2-D neighborhood 7 x 7", 20, "faster than natten", "neighborhood", "higher"),
    "block sparse": Goal("block-sparse at density d", None, "<= 1.1 d + 0.02 of dense SDPA", "block_sparse"),
    "routing": Goal("chosen by content, T = 8k, density <= 10 %, choosing included", 0.7, "SDPA", "routing"),
    "routing moba": Goal("the same, MoBA", 0.3, "SDPA", "routing"),
    "patterns": Goal("patterns by head at density d, T = 16k", None, "<= 1.1 d + 0.02 of dense SDPA", "patterns"),
    "bias memory": Goal("any score bias, T = 16k, memory, inference", 59, "below eager", "memory", "higher"),
    "bias memory training": Goal("any score bias, T = 16k, memory, training", 32, "below eager", "memory", "higher"),
    "bias": Goal("any score bias, T = 16k, time", 1.3, "SDPA with a ready-made dense bias", "bias"),
    "linear": Goal("causal linear attention, T = 16k", 20, "faster than SDPA causal", "linear", "higher"),
    "linear growth": Goal("causal linear attention, exponent of T in its time", 1.1, "", "linear", unit=""),
    "scan growth": Goal("scans by chunks, exponent of T in their time, 1k .. 32k", 1.1, "", "linear", unit=""),
    "entmax": Goal("entmax 1.5, forward and backward", 4, "faster than the entmax package", "normalizers", "higher"),
    "paged": Goal("a step over a cache in pages of 16, S = 1k and 16k", 1.0, "the same cache in one piece", "paged"),
    "paged memory": Goal("8 forks of 4k tokens", 7.5, "less memory than 8 copies", "paged", "higher"),
    "import": Goal("import regard, with torch", 2, "", "imports", unit="s"),
    "import ours": Goal("import regard, ours alone", 0.2, "", "imports", unit="s"),
    "compiled": Goal("masked attention under torch.compile on CPUs", 1.02, "the same called eagerly", "compiled"),
    "recompiles": Goal("torch.compile over new lengths", 2, "graphs after the first", "recompiles", unit=""),
}
"""In the order of the summary."""


def goal(row: str) -> dict[str, Any]:
    """What a figure that measures this goal is told of it: `Figure(what, value, **goal("window"))`."""
    return {"row": row, "goal": GOALS[row].limit, "better": GOALS[row].better}


@dataclass(frozen=True)
class Verdict:
    """A goal, and what was measured of it."""

    goal: Goal
    measured: str
    said: str


def verdicts(records: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """For every goal whether it is met, by the figures in the records of all benchmarks."""
    figures: dict[str, list[Figure]] = {row: [] for row in GOALS}
    for record in records:
        for figure in map(figure_of, record["figures"]):
            if figure.row in figures:
                figures[figure.row].append(figure)
    return [_verdict(GOALS[row], found) for row, found in figures.items()]


def figure_of(saved: Mapping[str, Any]) -> Figure:
    """A figure out of its JSON."""
    return Figure(**{key: value for key, value in saved.items() if key != "met"})


def _verdict(about: Goal, figures: Sequence[Figure]) -> Verdict:
    """Met if all its figures are; what is shown is the one furthest from the goal, or the least ahead of it."""
    known = [f for f in figures if f.met is not None]
    if not known:
        why = next((f.note for f in figures if f.note), "")
        return Verdict(about, "", f"not measured ({why})" if why else "not measured")
    worst = max(known, key=_excess)
    assert worst.value is not None
    measured = quantity(worst.value, worst.unit)
    if len(known) > 1:
        measured += f" ({worst.what})"
    met = sum(bool(f.met) for f in known)
    said = "met" if met == len(known) else "not met" if len(known) == 1 else f"not met ({met} of {len(known)} are)"
    if missing := len(figures) - len(known):
        said = f"{said}, {missing} not measured"
    return Verdict(about, measured, said)


def _excess(f: Figure) -> float:
    """How far beyond its goal, as a factor; at most 1 where it is met."""
    assert f.value is not None
    assert f.goal is not None
    return f.value / f.goal if f.better == "lower" else f.goal / max(f.value, 1e-12)
