"""The process of one cell of a profile: reads its job and answers as `regard.bench.worker` does."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.bench.decoding import state_bytes
from regard.bench.memory import PeakMemory
from regard.bench.profile import made
from regard.bench.worker import Progress, built, main
from regard.models.mixer import Spec, parse, protocol

ROUNDS = 5
SHARE = 0.25
"""Of the cell's time limit, that each quantity may take in all."""


def measure(job: dict[str, Any], progress: Progress = lambda step, loss: None) -> dict[str, Any]:
    """The values of one cell, and why some are missing."""
    if "build" in job:
        return built(job["build"], lambda text: made(parse(text), job["dim"], job["heads"], job["causal"]), progress)
    device = torch.device(job["cell"]["settings"]["device"])
    torch.set_num_threads(job["cell"]["settings"]["threads"])
    torch.manual_seed(0)
    spec = parse(job["mechanism"])
    module: Any = made(spec, job["dim"], job["heads"], job["causal"]).to(device).eval()
    x, small = (_input(spec, job["batch"], n, job["dim"]).to(device) for n in (job["length"], min(job["length"], 64)))
    module(small.requires_grad_()).sum().backward()  # what first calls load, and later ones share
    module.zero_grad()
    budget = job["limit"] * SHARE
    values = _passes(module, x, budget)
    if streams := "streaming" in getattr(module, "supports", ()) and getattr(module, "causal", False):
        values |= _steps(module, x, budget)
    found = {name: value for name, value in values.items() if math.isfinite(value)}
    return {"values": found, "reason": "" if streams else "does not stream"}


def _passes(module: Any, x: Tensor, budget: float) -> dict[str, float]:
    """Seconds and bytes of a forward pass, and of a forward and a backward one."""

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def training() -> None:
        out = module(x.detach().requires_grad_())
        out.backward(torch.ones_like(out))

    values = {}
    for run in (forward, training):
        module.train(run is training)
        memory = PeakMemory(x.device)
        first = _seconds(run, x.device)
        values[f"{run.__name__}_bytes"] = float(memory.bytes())
        values[run.__name__] = _again(run, x.device, first, budget)
    module.eval()
    return values


@torch.no_grad()
def _steps(module: Any, x: Tensor, budget: float) -> dict[str, float]:
    """Bytes of the state behind all tokens, and seconds of one token more."""
    state = module.init_state(len(x), x.shape[1] + 1, device=x.device)
    for part in x.split(1024, 1):
        _, state = module.step(part, state)
    size = float(state_bytes(state))

    def step() -> None:
        module.step(x[:, :1], state)

    return {"state_bytes": size, "step": _again(step, x.device, _seconds(step, x.device), budget, rounds=20)}


def _input(spec: Spec, batch: int, length: int, dim: int) -> Tensor:
    """Tokens, or a square map of about as many places."""
    if protocol(spec) == "FeatureMixer":
        side = max(1, round(math.sqrt(length) / 8)) * 8
        return torch.randn(batch, dim, side, side)
    return torch.randn(batch, length, dim)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _again(run: Callable[[], None], device: torch.device, first: float, budget: float, rounds: int = ROUNDS) -> float:
    """Median seconds of as many further calls as the budget allows; of the first where it allows none."""
    times: list[float] = []
    while len(times) < rounds and sum(times) + first < budget:
        times.append(_seconds(run, device))
    return statistics.median(times) if times else first


if __name__ == "__main__":
    main(measure)
