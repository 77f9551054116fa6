"""Equal budgets: how wide the host's MLP is, so that a model costs what it costs with softmax attention.

    params   parameters of the whole model are equal within 1%
    flops    forward FLOPs per token at the training length are equal within 1%

What is counted as FLOPs: two per multiply-add of every matrix product, convolution and fused attention that
really runs (torch's own counter), for one sequence of the training length, divided by that length. The
counter charges the full T x T square for fused attention, causal or not. It sees neither elementwise work nor
FFTs, nor a softmax; where it sees less of a mixer than one use of each of its parameters, two FLOPs per
parameter are counted instead. The embedding lookup is free, the prediction over the vocabulary is not.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regard.models.lm import LMConfig
from regard.models.mixer import build, parse

Match = Literal["params", "flops"]
TOLERANCE = 0.01


def parameters(module: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def mixer_flops(mixer: nn.Module, dim: int, length: int) -> float:
    """Forward FLOPs per token of one mixer at this length, as the module docstring says."""
    device = next((p.device for p in mixer.parameters()), torch.device("cpu"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(torch.zeros(1, length, dim, device=device))
    return max(counter.get_total_flops() / length, 2.0 * parameters(mixer))


def cost(config: LMConfig, mixer: nn.Module, match: Match) -> float:
    """What a model of this configuration costs in the currency of `match`."""
    mlp = 2 * config.dim * config.mlp_dim
    if match == "params":
        norms = (2 * config.depth + 1) * config.dim
        return config.vocab * config.dim + norms + config.depth * (parameters(mixer) + mlp)
    per_block = mixer_flops(mixer, config.dim, config.length) + 2 * mlp
    return 2 * config.vocab * config.dim + config.depth * per_block


def matched(config: LMConfig, match: Match, baseline: str = "softmax") -> LMConfig:
    """`config` with the MLP width at which it costs what `baseline` costs with the MLP width given."""
    with torch.random.fork_rng(devices=[]):
        mixer = build(parse(config.mechanism), config.dim, config.num_heads).eval()
        base = build(parse(baseline), config.dim, config.num_heads).eval()
        goal = cost(replace(config, mechanism=baseline), base, match)
        one = cost(replace(config, mlp_dim=1), mixer, match)
        two = cost(replace(config, mlp_dim=2), mixer, match)
    width = 1 + round((goal - one) / (two - one))
    least = cost(replace(config, mlp_dim=max(width, 1)), mixer, match)
    if width < 1 or abs(least - goal) > TOLERANCE * goal:
        raise ValueError(
            f"{config.mechanism} cannot be matched in {match}: it needs {one:,.0f} with the narrowest MLP, "
            f"and {baseline} has {goal:,.0f}; use a wider model, or match the other quantity"
        )
    return replace(config, mlp_dim=width)
