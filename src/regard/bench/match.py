"""Equal budgets: how wide the host's MLPs are, so that a model costs what it costs with the task's baseline.

    params   parameters of the whole model are equal within 1%
    flops    forward FLOPs per token are equal within 1%

What is counted as FLOPs, `regard.kernels.flops` says: two per multiply-add of matrix products, convolutions and
attention, for one example, divided by its tokens. Attention is charged the pairs that its mask allows, whatever kernel
runs. Elementwise work and softmax are free; where less is seen of a mixer than one use of each of its parameters, two
FLOPs per parameter and token are counted instead. An embedding lookup is free, the prediction over the vocabulary is
not.
"""

from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from regard.bench.record import Match
from regard.kernels.flops import FlopCounter
from regard.models.mixer import Mechanism, parse
from regard.tasks import Size, Task

TOLERANCE = 0.01


def sizes(task: Task, settings: Mapping[str, int] | None = None) -> Size:
    """The size of the baseline's host, by these settings or else by the task's defaults."""
    dim, depth, heads = itemgetter("dim", "depth", "heads")(vars(task.defaults) if settings is None else settings)
    return Size(dim, depth, heads, task.defaults.mlp * dim)


def parameters(module: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def flops(task: Task, model: Any) -> float:
    """Forward FLOPs per token of a task's model, as the module docstring says."""
    device = next(model.parameters()).device
    training = model.training
    with FlopCounter() as counter:  # without no_grad, which its count by modules cannot bear
        model.eval()(*(x.to(device) for x in task.example()))
    model.train(training)
    total, counts = counter.get_total_flops() / task.tokens, counter.get_flop_counts()
    for name, module in model.named_modules():
        if any(module is mixer for mixer in model.mixers):
            seen = sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) / task.tokens
            total += max(0.0, 2.0 * parameters(module) - seen)
    return total


def cost(task: Task, mechanism: Mechanism, size: Size, match: Match) -> float:
    """What a model of this size costs in the currency of `match`."""
    model = task.model(mechanism, size)
    return parameters(model) if match == "params" else flops(task, model)


def matched(task: Task, mechanism: Mechanism, size: Size, match: Match) -> Size:
    """`size` with the MLP width at which the model costs what it costs with the baseline and the width given."""
    baseline = parse(task.baseline)
    if mechanism == baseline:
        return size
    with torch.random.fork_rng(devices=[]):
        goal = cost(task, baseline, size, match)
        one, two = (cost(task, mechanism, replace(size, mlp_dim=width), match) for width in (1, 2))
        width = 1 + round((goal - one) / (two - one))
        found = cost(task, mechanism, replace(size, mlp_dim=max(width, 1)), match)
    if width < 1 or abs(found - goal) > TOLERANCE * goal:
        raise ValueError(
            f"{mechanism} cannot be matched in {match}: {one:,.0f} at least, and {baseline} has {goal:,.0f}; "
            "widen the model, or match the other quantity"
        )
    return replace(size, mlp_dim=width)
