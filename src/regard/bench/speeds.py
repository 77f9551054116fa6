"""How fast mechanisms train and generate, measured in turns in one process when all of them are trained.

A turn is some training steps and some tokens of one mechanism; after a turn of each comes the next round, so that a
busy minute of the machine falls on all alike. The first steps, which compile and load, are not counted.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from regard.bench.auxiliary import auxiliary_losses
from regard.bench.decoding import generating
from regard.bench.events import TURNS
from regard.bench.match import matched, sizes
from regard.bench.train import descend, on, optimized
from regard.models.lm import LanguageModel
from regard.models.mixer import parse_stack
from regard.tasks import Task

WARM = 3
"""Training steps that are not counted."""
TURN = 0.1
"""Seconds of training that a turn takes at least, where a step takes less."""
TOKENS = 7
"""Tokens of a turn."""


class Runner:
    """One mechanism's model, warm."""

    def __init__(self, task: Task, name: str, settings: Mapping[str, Any], device: torch.device) -> None:
        mechanism = parse_stack(name)
        torch.manual_seed(0)
        size = matched(task, mechanism, sizes(task, settings), settings["match"])
        self.task, self.model = task, task.model(mechanism, size).to(device)
        self.optimizer, _ = optimized(self.model, settings["lr"], settings["steps"], 1)
        self.batch = on(device, next(iter(task.batches(settings["batch"], 0))))
        self.steps = max(1, min(20, round(TURN / self.train(WARM)[-1])))
        self.next_token: Callable[[], None] | None = None
        if isinstance(self.model, LanguageModel):
            self.next_token = generating(self.model, task.tokens, WARM + TURNS * TOKENS, device)
            self.generate(WARM)

    def train(self, steps: int) -> list[float]:
        """The seconds of each of these steps."""
        self.model.train()
        with auxiliary_losses(self.model) as others:
            return _timed(lambda: descend(self.model, self.task, self.optimizer, self.batch, others), steps)

    def generate(self, tokens: int) -> list[float]:
        """The seconds of each of these tokens; none where nothing is generated."""
        self.model.eval()
        return _timed(self.next_token, tokens) if self.next_token else []


def in_turns(
    task: Task, mechanisms: Sequence[str], settings: Mapping[str, Any], progress: Callable[[int, float], None]
) -> dict[str, dict[str, float]]:
    """Mechanism -> tokens per second and their spreads, as fields of a Result.

    `progress` is called before each turn, with the turns that are done and the place of whoever is next.
    """
    device, runners = torch.device(settings["device"]), {}
    at_first = torch.get_num_threads(), torch.get_default_dtype()
    for place, name in enumerate(mechanisms):
        progress(0, place)
        _back(*at_first)
        runners[name] = Runner(task, name, settings, device)
    train: dict[str, list[float]] = {name: [] for name in runners}
    generate: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(TURNS):
        for place, (name, runner) in enumerate(runners.items()):
            progress(number, place)
            _back(*at_first)
            train[name].append(statistics.median(runner.train(runner.steps)))
            if tokens := runner.generate(TOKENS):
                generate[name].append(statistics.median(tokens))
    progress(TURNS, 0)
    size = settings["batch"] * task.tokens
    return {name: _told("train", train[name], size) | _told("generate", generate[name], 1) for name in runners}


def _back(threads: int, dtype: torch.dtype) -> None:
    """What one mechanism's code may have changed for all others."""
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


def _timed(work: Callable[[], object], times: int) -> list[float]:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def _told(what: str, seconds: Sequence[float], tokens: int) -> dict[str, float]:
    """The median over the rounds, and half the distance of their quartiles."""
    if not seconds:
        return {}
    rates = [tokens / one for one in seconds]
    low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
    return {f"{what}_tokens_per_second": statistics.median(rates), f"{what}_spread": (high - low) / 2}
