"""One cell of a comparison: train one mechanism with one seed on one task, and measure it.

Run each cell in a process of its own (`regard.bench.worker`), or its peak memory is that of all before it.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.auxiliary import auxiliary_losses
from regard.bench.decoding import state_after
from regard.bench.machine import processor
from regard.bench.match import flops, matched, parameters, sizes
from regard.bench.memory import PeakMemory
from regard.bench.probing import another, refuse_what_breaks_laws
from regard.bench.record import Cell, Result
from regard.models.mixer import parse_stack
from regard.tasks import Task

CURVE_POINTS = 100

Progress = Callable[[int, float], None]
"""Called with the step and its training loss, in the task's unit."""


class TrainingError(ValueError):
    """This cell cannot be trained; the message is one line."""


def train(
    cell: Cell, task: Task, *, progress: Progress = lambda step, loss: None, checkpoint: Path | None = None
) -> Result:
    """Train and measure `cell`. Raises TrainingError, Refused, or whatever the mechanism raises."""
    began, want = time.perf_counter(), cell.settings
    device = torch.device(want["device"])
    mechanism = parse_stack(cell.mechanism)
    size = matched(task, mechanism, sizes(task, want), want["match"])
    torch.manual_seed(cell.seed)
    model: Any = task.model(mechanism, size).to(device)
    excepted = refuse_what_breaks_laws(model, task, mechanism, device, "before training")
    same = another(model, task, mechanism, device)
    cost = flops(task, model)
    memory = PeakMemory(device)
    curve = fit(model, task, want, cell.seed, device, progress)
    peak = memory.bytes()
    refuse_what_breaks_laws(model, task, mechanism, device, "after training")
    model.eval()
    heldout, notes = task.measure(model, want["batch"], device)
    if not math.isfinite(heldout[task.metric.main]):
        raise TrainingError(f"the held-out {task.metric.name} is {heldout[task.metric.main]}")
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        task.keep(model, mechanism, size, checkpoint)
    return Result(
        cell,
        "done",
        metric=task.metric,
        curve=curve,
        heldout=heldout,
        parameters=parameters(model),
        flops_per_token=cost,
        mlp_dim=size.mlp_dim,
        peak_memory_bytes=peak,
        state_bytes=state_after(model.mixers, size.dim, task.tokens, device),
        seconds=time.perf_counter() - began,
        environment={
            "device name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "torch": torch.__version__,
            "regard": version("regard"),
            "python": platform.python_version(),
            "threads": str(torch.get_num_threads()),
        },
        notes=[*filter(None, [same, mechanism.cut(size.depth)]), *excepted, *notes],
        data=task.told(),
    )


def fit(
    model: nn.Module,
    task: Task,
    want: Mapping[str, Any],
    seed: int,
    device: torch.device,
    progress: Progress,
) -> list[tuple[int, float]]:
    """AdamW, warm-up over a tenth of the steps, then a cosine down to a tenth.

    What is lowered is the task's loss and the mechanism's own, if it has one. Returns the curve of the task's loss
    (means over stretches of steps, in the task's unit).
    """
    steps = want["steps"]
    warm, every = max(1, steps // 10), max(1, math.ceil(steps / CURVE_POINTS))
    optimizer, schedule = optimized(model, want["lr"], steps, warm)
    curve, recent = [], []
    model.train()
    with auxiliary_losses(model) as others:
        for step, batch in zip(range(1, steps + 1), task.batches(want["batch"], seed)):
            shown = descend(model, task, optimizer, on(device, batch), others)
            schedule.step()
            if not math.isfinite(shown):
                raise TrainingError(f"the training loss became {shown} at step {step}")
            recent.append(shown)
            if step % every == 0 or step == steps:
                curve.append((step, statistics.fmean(recent)))
                recent.clear()
            progress(step, shown)
    return curve


def descend(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    others: Callable[[], Iterable[Tensor]],
) -> float:
    """One step down the task's loss and the model's own ones. Returns the task's, in its unit."""
    loss = task.loss(model, batch)
    optimizer.zero_grad(set_to_none=True)
    sum(others(), start=loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item() * task.loss_scale


def optimized(
    model: nn.Module, lr: float, steps: int, warm: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with weight decay for matrices alone, and the course of its learning rate."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: rate(n, steps, warm))


def on(device: torch.device, batch: Any) -> Any:
    """A batch with its tensors on the device."""
    return batch.to(device) if isinstance(batch, Tensor) else type(batch)(on(device, part) for part in batch)


def rate(step: int, steps: int, warm: int) -> float:
    """Share of the learning rate at a step counted from 0."""
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
