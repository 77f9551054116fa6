"""The process of one cell of a profile: reads its job as a line of JSON, writes {"result": ...} or {"failed": ...}."""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 5
SHARE = 0.25
"""Of the cell's time limit, that each quantity may take in all."""


def main() -> None:
    job = json.loads(sys.stdin.readline())
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what a mechanism prints must not mix with the answer
    try:
        said: dict[str, Any] = {"result": measure(job)}
    except Exception as error:
        from regard.bench.worker import reason

        said = {"failed": reason(error)}
    events.write(json.dumps(said) + "\n")
    events.close()
    os._exit(0)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The values of one cell, and why some are missing."""
    import torch

    from regard.bench.decoding import state_bytes
    from regard.bench.memory import PeakMemory
    from regard.models.mixer import build, parse

    device = torch.device(job["cell"]["settings"]["device"])
    torch.set_num_threads(job["cell"]["settings"]["threads"])
    torch.manual_seed(0)
    spec, dim, length = parse(job["mechanism"]), job["dim"], job["length"]
    module: Any = build(spec, dim, job["heads"], causal=_causality(spec, job["causal"])).to(device).eval()
    x, small = (_input(spec, job["batch"], n, dim).to(device) for n in (length, min(length, 64)))
    values, reasons = {}, []

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad():
            module(x)
        wait()

    def training() -> None:
        given = x.detach().requires_grad_()
        out = module(given)
        out.backward(torch.ones_like(out))
        wait()

    module(small.requires_grad_()).sum().backward()  # what first calls load, and later ones share
    module.zero_grad()
    for name, run in (("forward", forward), ("training", training)):
        if name == "training":
            module.train()
        memory = PeakMemory(device)
        began = time.perf_counter()
        run()
        first = time.perf_counter() - began
        values[f"{name}_bytes"] = float(memory.bytes())
        values[name] = _again(run, first, job["limit"] * SHARE)
    module.eval()
    if "streaming" not in getattr(module, "supports", ()) or not getattr(module, "causal", False):
        reasons.append("does not stream")
    else:
        with torch.no_grad():
            state = module.init_state(job["batch"], length + 1, device=device)
            chunk = 1024
            for start in range(0, length, chunk):
                _, state = module.step(x[:, start : start + chunk], state)
            values["state_bytes"] = float(state_bytes(state))
            token = x[:, :1]

            def step() -> None:
                module.step(token, state)
                wait()

            began = time.perf_counter()
            step()
            values["step"] = _again(step, time.perf_counter() - began, job["limit"] * SHARE, rounds=20)
    return {"values": {k: v for k, v in values.items() if math.isfinite(v)}, "reason": "; ".join(reasons)}


def _causality(spec: Any, causal: bool) -> bool:
    from regard.models.mixer import protocol

    return causal and protocol(spec) == "TokenMixer"


def _input(spec: Any, batch: int, length: int, dim: int) -> Any:
    """Tokens, or a square map of about as many places."""
    import torch

    from regard.models.mixer import protocol

    if protocol(spec) == "FeatureMixer":
        side = max(1, round(math.sqrt(length) / 8)) * 8
        return torch.randn(batch, dim, side, side)
    return torch.randn(batch, length, dim)


def _again(run: Callable[[], None], first: float, budget: float, rounds: int = ROUNDS) -> float:
    """Median seconds of as many further calls as the budget allows; of the first where it allows none."""
    times: list[float] = []
    while len(times) < rounds and sum(times) + first < budget:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times) if times else first


if __name__ == "__main__":
    main()
