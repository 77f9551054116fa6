"""One cell of a comparison: train one mechanism with one seed in the host model, and measure it.

Run each cell in a process of its own (`regard.bench.worker`), or its peak memory is that of all before it.
"""

import dataclasses
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.match import cost, matched, parameters
from regard.bench.memory import PeakMemory
from regard.bench.record import Cell, Result
from regard.models.checkpoint import save
from regard.models.lm import LanguageModel, LMConfig, language_model
from regard.tasks.text import Text

HELDOUT_BYTES = 32_768
"""Held-out bytes that are predicted, the same ones at every length."""
CURVE_POINTS = 100
GENERATED = 64

Progress = Callable[[int, float], None]
"""Called with the step and its training loss in bits per byte."""


class TrainingError(ValueError):
    """This cell cannot be trained; the message is one line."""


def train(
    cell: Cell, text: Text, *, progress: Progress = lambda step, loss: None, checkpoint: Path | None = None
) -> Result:
    """Train and measure `cell`. Raises TrainingError, or whatever the mechanism raises."""
    began, want = time.perf_counter(), cell.settings
    device = torch.device(want["device"])
    host = LMConfig(cell.mechanism, want["dim"], want["depth"], want["heads"], 4 * want["dim"], length=want["length"])
    config = matched(host, want["match"])
    torch.manual_seed(cell.seed)
    model = language_model(config).to(device)
    flops = cost(config, model.blocks[0].mixer, "flops")
    memory = PeakMemory(device)
    curve, speed = fit(model, text, want, cell.seed, device, progress)
    peak = memory.bytes()
    model.eval()
    heldout, notes = bits_per_byte(model, text, config.length, want["batch"], device)
    generation, state = generation_speed(model, text, config.length, device)
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        save(model, config, checkpoint)
    return Result(
        cell,
        "done",
        curve=curve,
        heldout=heldout,
        parameters=parameters(model),
        flops_per_token=flops,
        mlp_dim=config.mlp_dim,
        train_tokens_per_second=speed,
        generate_tokens_per_second=generation,
        peak_memory_bytes=peak,
        state_bytes=state,
        seconds=time.perf_counter() - began,
        environment={
            "device name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "torch": torch.__version__,
            "regard": version("regard"),
            "python": platform.python_version(),
            "threads": str(torch.get_num_threads()),
        },
        notes=notes,
    )


def fit(
    model: LanguageModel,
    text: Text,
    want: Mapping[str, int],
    seed: int,
    device: torch.device,
    progress: Progress,
) -> tuple[list[tuple[int, float]], float]:
    """AdamW, warm-up over a tenth of the steps, then a cosine down to a tenth.

    Returns the loss curve (means over stretches of steps, in bits per byte) and tokens per second (median
    over the steps after the first tenth).
    """
    steps, tokens = want["steps"], want["batch"] * want["length"]
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=want["lr"], betas=(0.9, 0.95))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: rate(n, steps, warm))
    batches = text.batches(want["batch"], want["length"], seed)
    every = max(1, math.ceil(steps / CURVE_POINTS))
    curve, recent, seconds = [], [], []
    model.train()
    for step, ids in zip(range(1, steps + 1), batches):
        start = time.perf_counter()
        ids = ids.to(device)
        loss = cross_entropy(model, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bits = loss.item() / math.log(2)
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(bits):
            raise TrainingError(f"the training loss became {bits} at step {step}")
        recent.append(bits)
        if step % every == 0 or step == steps:
            curve.append((step, statistics.fmean(recent)))
            recent.clear()
        progress(step, bits)
    return curve, tokens / statistics.median(seconds[min(warm, steps - 1) :])


def rate(step: int, steps: int, warm: int) -> float:
    """Share of the learning rate at a step counted from 0."""
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def cross_entropy(model: LanguageModel, ids: Tensor) -> Tensor:
    """Mean loss in nats of predicting ids[:, 1:]."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel, text: Text, length: int, batch: int, device: torch.device
) -> tuple[dict[str, float], list[str]]:
    """Held-out loss in stretches of one, two and four training lengths.

    The predicted bytes are the same at each; the longer the stretch, the more of them have a long past. What
    a mechanism cannot do is left out, with a note.
    """
    windows = text.heldout_windows(4 * length, HELDOUT_BYTES)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    found, notes = {}, []
    for factor in (1, 2, 4):
        try:
            total = 0.0
            rows = zip(
                inputs.reshape(-1, factor * length).split(max(1, batch // factor)),
                targets.reshape(-1, factor * length).split(max(1, batch // factor)),
            )
            for x, y in rows:
                logits = model(x.to(device)).flatten(0, 1).float()
                total += F.cross_entropy(logits, y.to(device).flatten(), reduction="sum").item()
        except (ValueError, IndexError, RuntimeError) as error:
            if factor == 1:
                raise
            notes.append(f"no {factor}x: {' '.join(str(error).split())[:200]}")
            continue
        bits = total / targets.numel() / math.log(2)
        if math.isfinite(bits):
            found[f"{factor}x"] = bits
        elif factor == 1:
            raise TrainingError(f"the held-out loss is {bits}")
        else:
            notes.append(f"no {factor}x: the held-out loss is {bits}")
    return found, notes


@torch.no_grad()
def generation_speed(model: LanguageModel, text: Text, length: int, device: torch.device) -> tuple[float, int]:
    """Tokens per second of one sequence behind a past of the training length, and the bytes of state it left.

    Without streaming, each token is a full pass and there is no state: 0 bytes.
    """
    past = torch.frombuffer(bytearray(text.heldout[: length + GENERATED]), dtype=torch.uint8).long()[None].to(device)
    seconds = []
    if not model.streams:
        for n in range(4):
            start = time.perf_counter()
            model(past[:, n : n + length])[:, -1].argmax(-1).item()
            seconds.append(time.perf_counter() - start)
        return 1 / statistics.median(seconds), 0
    logits, states = model.step(past[:, :length], model.init_state(1, length + GENERATED))
    size = state_bytes(states)
    for n in range(length, past.shape[1]):
        start = time.perf_counter()
        logits, states = model.step(past[:, n : n + 1], states)
        logits[:, -1].argmax(-1).item()
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds), size


def state_bytes(state: object) -> int:
    """Bytes of all tensors in a state. A cache, which has room for tokens to come, is asked itself."""
    seen: set[int] = set()

    def size(value: object) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(known := getattr(value, "nbytes", None), int):
            return known
        parts: Iterable[object] = ()
        if isinstance(value, Mapping):
            parts = value.values()
        elif isinstance(value, list | tuple | set):
            parts = value
        elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            parts = vars(value).values()
        return sum(map(size, parts))

    return size(state)


def processor() -> str:
    """What this machine computes with, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def cores() -> int:
    """CPU cores this process may use, by a container's quota too; at most 8, as small models gain no more."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return min(count, 8)
