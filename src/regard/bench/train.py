"""One cell of a comparison: train one mechanism with one seed on one task, and measure it.

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
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.fitting import sizes
from regard.bench.match import flops, matched, parameters
from regard.bench.memory import PeakMemory
from regard.bench.record import Cell, Result
from regard.models.checkpoint import save
from regard.models.lm import LanguageModel
from regard.models.mixer import parse
from regard.tasks import Task
from regard.tasks.text import NextByte

CURVE_POINTS = 100
GENERATED = 64

Progress = Callable[[int, float], None]
"""Called with the step and its training loss, in the task's unit."""


class TrainingError(ValueError):
    """This cell cannot be trained; the message is one line."""


def train(
    cell: Cell, task: Task, *, progress: Progress = lambda step, loss: None, checkpoint: Path | None = None
) -> Result:
    """Train and measure `cell`. Raises TrainingError, or whatever the mechanism raises."""
    began, want = time.perf_counter(), cell.settings
    device = torch.device(want["device"])
    mechanism = parse(cell.mechanism)
    size = matched(task, mechanism, sizes(task, want), want["match"])
    torch.manual_seed(cell.seed)
    model: Any = task.model(mechanism, size).to(device)
    cost = flops(task, model)
    memory = PeakMemory(device)
    curve, speed = fit(model, task, want, cell.seed, device, progress)
    peak = memory.bytes()
    model.eval()
    heldout, notes = task.measure(model, want["batch"], device)
    if not math.isfinite(heldout[task.metric.main]):
        raise TrainingError(f"the held-out {task.metric.name} is {heldout[task.metric.main]}")
    generation = generation_speed(model, task.tokens, device) if isinstance(model, LanguageModel) else 0.0
    if checkpoint is not None and isinstance(task, NextByte):
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        save(model, task.config(mechanism, size), checkpoint)
    return Result(
        cell,
        "done",
        metric=task.metric,
        curve=curve,
        heldout=heldout,
        parameters=parameters(model),
        flops_per_token=cost,
        mlp_dim=size.mlp_dim,
        train_tokens_per_second=speed,
        generate_tokens_per_second=generation,
        peak_memory_bytes=peak,
        state_bytes=sum(state_after(mixer, size.dim, task.tokens, device) for mixer in model.mixers),
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
    model: nn.Module,
    task: Task,
    want: Mapping[str, Any],
    seed: int,
    device: torch.device,
    progress: Progress,
) -> tuple[list[tuple[int, float]], float]:
    """AdamW, warm-up over a tenth of the steps, then a cosine down to a tenth.

    Returns the loss curve (means over stretches of steps, in the task's unit) and tokens per second (median
    over the steps after the first tenth).
    """
    steps = want["steps"]
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=want["lr"], betas=(0.9, 0.95))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: rate(n, steps, warm))
    every = max(1, math.ceil(steps / CURVE_POINTS))
    curve, recent, seconds = [], [], []
    model.train()
    for step, batch in zip(range(1, steps + 1), task.batches(want["batch"], seed)):
        start = time.perf_counter()
        loss = task.loss(model, on(device, batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown = loss.item() * task.shown
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(shown):
            raise TrainingError(f"the training loss became {shown} at step {step}")
        recent.append(shown)
        if step % every == 0 or step == steps:
            curve.append((step, statistics.fmean(recent)))
            recent.clear()
        progress(step, shown)
    return curve, want["batch"] * task.tokens / statistics.median(seconds[min(warm, steps - 1) :])


def on(device: torch.device, batch: Any) -> Any:
    """A batch with its tensors on the device."""
    return batch.to(device) if isinstance(batch, Tensor) else type(batch)(on(device, part) for part in batch)


def rate(step: int, steps: int, warm: int) -> float:
    """Share of the learning rate at a step counted from 0."""
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


@torch.no_grad()
def generation_speed(model: LanguageModel, length: int, device: torch.device) -> float:
    """Tokens per second of one sequence behind a past of the training length.

    Without streaming, each token is a full pass.
    """
    vocab = model.embedding.num_embeddings
    past = torch.randint(vocab, (1, length + GENERATED), generator=torch.Generator().manual_seed(0)).to(device)
    seconds = []
    if not model.streams:
        for n in range(4):
            start = time.perf_counter()
            model(past[:, n : n + length])[:, -1].argmax(-1).item()
            seconds.append(time.perf_counter() - start)
        return 1 / statistics.median(seconds)
    _, states = model.step(past[:, :length], model.init_state(1, length + GENERATED))
    for n in range(length, past.shape[1]):
        start = time.perf_counter()
        logits, states = model.step(past[:, n : n + 1], states)
        logits[:, -1].argmax(-1).item()
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)


@torch.no_grad()
def state_after(mixer: Any, dim: int, length: int, device: torch.device) -> int:
    """Bytes that a mixer keeps of one sequence of this length; 0 where it cannot stream."""
    try:
        state = mixer.init_state(1, length)
    except (ValueError, TypeError, NotImplementedError, AttributeError):
        return 0
    return state_bytes(mixer.step(torch.zeros(1, length, dim, device=device), state)[1])


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
