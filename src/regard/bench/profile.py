"""Time and memory of mechanisms over lengths: forward, training step and one step of decoding, with measured growth.

Every cell (one mechanism at one length) runs in a process of its own, so that its peak memory is its own, and is ended
after a time limit, so that a quadratic mechanism costs a table no more than its own cell.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regard.bench.machine import check_device, cores
from regard.bench.process import Stop, answer, tried
from regard.checks import number, refuse, short, whole
from regard.files import write_atomically
from regard.models.mixer import Spec, Stack, build, find, look_here, parse_stack, protocol
from regard.tasks import Task, mechanisms_for

COMMAND = (sys.executable, "-P", "-m", "regard.bench.profile_worker")

QUANTITIES = {
    "forward": "s",
    "training": "s",
    "step": "s",
    "forward_bytes": "B",
    "training_bytes": "B",
    "state_bytes": "B",
}
"""What a cell measures, and its unit: `training` is forward and backward, `step` one token after the whole length."""


class ProfileError(ValueError):
    """A profile that cannot be made; the message is one line."""


@dataclass(frozen=True)
class Profile:
    """What to measure, and where to keep it."""

    mechanisms: tuple[str, ...] = ()
    """Names, with options in brackets: 'window(window=64)'; none = the baseline and what cards show here."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens: 1k..32k doubles, 500,1k,3k lists."""
    dim: int = 256
    """M, the model width."""
    heads: int = 4
    """H, query heads."""
    batch: int = 1
    """B, sequences."""
    causal: bool = True
    """Whether later tokens are hidden."""
    limit: float = 60.0
    """Seconds that one cell may take, loading included."""
    threads: int = 0
    """CPU threads of a cell; 0 = as many as there are cores, at most 8."""
    device: str = "cpu"
    """'cpu', 'cuda' or 'cuda:N'."""
    out: Path = Path("runs/profile")
    """Folder of profile.json and report.html."""

    def __post_init__(self) -> None:
        if not self.mechanisms:
            object.__setattr__(self, "mechanisms", (Task.baseline, *mechanisms_for("profile")))
        try:
            whole("profile", dim=self.dim, heads=self.heads, batch=self.batch)
            whole("profile", 0, threads=self.threads)
            number("profile", above=0, limit=self.limit)
            for length in self.lengths:
                whole("profile", lengths=length)
            if not self.lengths or len(set(self.lengths)) < len(self.lengths):
                refuse("profile", "lengths", "are missing or come twice", self.lengths, "different ints >= 1")
        except (ValueError, TypeError) as error:
            raise ProfileError(str(error)) from error


@dataclass(frozen=True)
class Measured:
    """One mechanism at one length. A quantity it has not is missing."""

    mechanism: str
    length: int
    values: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    """Why it has no values, or not all of them."""
    traceback: str = ""
    """Where it failed, as Python tells it."""


def lengths(text: str) -> tuple[int, ...]:
    """Read '1k..32k' (doubling), '1000,3000' or a mixture; k is 1024."""
    found: list[int] = []
    for part in text.split(","):
        ends = [_number(end) for end in part.split("..")]
        if len(ends) == 1:
            found.append(ends[0])
        elif len(ends) == 2 and 0 < ends[0] <= ends[1]:
            n = ends[0]
            while n <= ends[1]:
                found.append(n)
                n *= 2
        else:
            raise ProfileError(
                f"profile: lengths cannot be read (got {short(repr(part))}); expected such as 1k..32k or 512,1000,4k"
            )
    return tuple(dict.fromkeys(found))


def _number(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", text)
    if not match:
        raise ProfileError(
            f"profile: length cannot be read (got {short(repr(text.strip()))}); expected such as 512 or 4k"
        )
    return int(match[1]) * (1024 if match[2] else 1)


def why_not(spec: Spec, causal: bool) -> str:
    """Why a mechanism cannot be profiled over lengths; '' if it can."""
    kind = protocol(spec)
    if kind not in ("TokenMixer", "FeatureMixer", "Pooler"):
        return f"a {kind} has no one length to grow"
    if spec.own or kind != "TokenMixer":
        return ""
    from regard import catalog

    wanted = "causal" if causal else "bidirectional"
    lacking = [name for name in spec.names if wanted not in catalog.card(name).supports]
    return f"{', '.join(lacking)} cannot be {wanted}" if lacking else ""


def run(
    config: Profile,
    *,
    on_cell: Callable[[Measured], None] = lambda cell: None,
    stop: Stop | None = None,
    measure: Callable[..., dict[str, Any] | None] = answer,
) -> list[Measured]:
    """Measure all cells, shorter lengths first, and keep them in profile.json after each one.

    A mechanism whose cell ran into the limit is not tried at greater lengths.
    """
    specs = _specs(config, measure)
    config.out.mkdir(parents=True, exist_ok=True)
    found: list[Measured] = []
    given_up: dict[str, int] = {}
    with stop or Stop() as watching:
        for spec, length in ((spec, length) for length in sorted(config.lengths) for spec in specs):
            if (name := str(spec)) in given_up:
                cell = Measured(name, length, reason=f"left out: {given_up[name]} tokens took too long")
            else:
                job, limits = _job(name, length, config), {"timeout": config.limit, "stop": watching}
                said = measure(job, **limits, on_step=lambda n, x: None, command=COMMAND)
                if said is None:
                    return found
                failed = {"reason": said.get("failed", "no answer"), "traceback": said.get("traceback", "")}
                cell = Measured(name, length, **said.get("result", failed))
            if "longer than the limit" in cell.reason:
                given_up[name] = length
            found.append(cell)
            save(config, found)
            on_cell(cell)
    return found


def _specs(config: Profile, measure: Callable[..., dict[str, Any] | None]) -> list[Spec]:
    """The mechanisms. Unknown names and options, and sizes that don't fit, are refused before anything runs.

    The caller's own are built in a process of their own.
    """
    check_device("profile", config.device)
    specs = [_one(text) for text in config.mechanisms]
    for spec in specs:
        if spec.own:
            look_here()
            find(spec)
            continue
        made(spec, config.dim, config.heads, config.causal)
    own, job = [str(spec) for spec in specs if spec.own], _job("", 0, config)
    for name, why in tried(own, job, timeout=config.limit, ask=measure, command=COMMAND).items():
        raise ProfileError(why if why.startswith("profile: ") else f"profile: {name}: {why}")
    return specs


def _one(text: str) -> Spec:
    found = parse_stack(text)
    if isinstance(found, Stack):
        each = ",".join(map(str, found.kinds))
        raise ProfileError(f"profile: {short(text)} is several layers, and a profile measures one; name each: {each}")
    return found


def made(spec: Spec, dim: int, heads: int, causal: bool) -> Any:
    """A module of the mechanism. Raises ProfileError where it cannot be profiled."""
    if reason := why_not(spec, causal):
        raise ProfileError(f"profile: {spec}: {reason}")
    return build(spec, dim, heads, causal=causal and protocol(spec) == "TokenMixer")


def _job(mechanism: str, length: int, config: Profile) -> dict[str, Any]:
    """What the worker is told."""
    return {
        "mechanism": mechanism,
        "length": length,
        **{name: getattr(config, name) for name in ("dim", "heads", "batch", "causal", "limit")},
        "cell": {"settings": {"threads": config.threads or cores(), "device": config.device}},
    }


def save(config: Profile, cells: Sequence[Measured]) -> None:
    """profile.json: the settings and every cell so far."""
    settings = {**asdict(config), "out": str(config.out)}
    record = {"settings": settings, "cells": [asdict(cell) for cell in cells]}
    write_atomically(config.out / "profile.json", json.dumps(record, indent=1) + "\n")


def growth(cells: Sequence[Measured], mechanism: str, quantity: str) -> float | None:
    """The exponent e of quantity ~ length^e: the slope between the two greatest lengths that are a factor apart.

    Short lengths measure calls, not work, so of all lengths only the upper half (at least two) is fitted.
    """
    points = sorted((c.length, c.values[quantity]) for c in cells if c.mechanism == mechanism and quantity in c.values)
    points = [(n, v) for n, v in points if v > 0]
    points = points[min(len(points) // 2, max(0, len(points) - 2)) :]
    return _slope(points)


def formula_growth(card: Any, own: dict[str, Any], config: Profile) -> float | None:
    """The same exponent of the card's formula for time, at the lengths profiled."""
    from regard.cost import costs

    points = []
    for n in sorted(config.lengths):
        at = costs(card, own, batch=config.batch, heads=config.heads, length=n, width=config.dim // config.heads)
        if not isinstance(at["time"], float):
            return None
        points.append((n, at["time"]))
    return _slope(points[min(len(points) // 2, max(0, len(points) - 2)) :])


def _slope(points: Sequence[tuple[int, float]]) -> float | None:
    """Least squares of log value on log length."""
    if len(points) < 2:
        return None
    logs = [(math.log(n), math.log(v)) for n, v in points]
    x, y = (sum(z) / len(logs) for z in zip(*logs, strict=True))
    return sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)
