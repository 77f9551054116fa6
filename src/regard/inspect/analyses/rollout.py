"""Attention rollout: how much of each input token reaches each position through all layers.

Row i of P_l tells where position i after layer l has it from; rows sum to 1, and what causality hides stays 0.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import choice, number
from regard.inspect.analyses._maps import each_layer

CARD = Card(
    "attention_rollout",
    equation="""R_l = rows of (1 - r) A_l + r I, divided by their sum        A_l the mean of layer l's heads, r = 1/2
P_0 = R_0        P_l = R_l P_(l-1)""",
    papers=(
        Paper(
            "Quantifying Attention Flow in Transformers",
            "Abnar, Zuidema",
            2020,
            "2005.00928",
            "abstract; the authors' code (attention_graph_util.py)",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*T**3", ""),
    claim="Finds what raw attention misses: on a path 3 -> 1 -> 0 it lifts token 3 about 9 times over unrelated "
    "tokens: tests/inspect/analyses/test_rollout.py::test_finds_a_path_that_raw_attention_does_not_show.",
    differs=(
        "The greatest or the least head may stand for a layer, as in later uses on images; a query that sees nothing "
        "keeps itself alone.",
    ),
    verified="third-party",
)

Heads = Literal["mean", "max", "min"]


def passed_on(
    name: str, attention: Sequence[Float[Tensor, "B _H T T"]], residual: float, heads: Heads
) -> list[Float[Tensor, "B T T"]]:
    """R_l for every layer, in the name of the caller."""
    maps = each_layer(name, attention, "B _H T T")
    number(name, least=0, most=1, residual=residual)
    merge = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}
    choice(name, merge, heads=heads)
    steps = []
    for one in maps:
        mixed = (1 - residual) * merge[heads](one)
        mixed.diagonal(dim1=-2, dim2=-1).add_(residual)
        total = mixed.sum(-1, keepdim=True)
        steps.append(mixed / total.masked_fill(total == 0, 1))
    return steps


@CARD.function
def attention_rollout(
    attention: Sequence[Float[Tensor, "B _H T T"]], *, residual: float = 0.5, heads: Heads = "mean"
) -> Float[Tensor, "L B T T"]:
    """How much of input token j is in position i after each layer.

    Args:
        attention: the weights of each layer, the one next to the input first.
        residual: the share that goes around the attention; 0 leaves the residual stream out.
        heads: what stands for a layer's heads. The paper's is "mean".

    Raises:
        ValueError, TypeError: maps that are not (B, H, T, T) floats, options out of range.
    """
    reached: list[Tensor] = []
    for step in passed_on("attention_rollout", attention, residual, heads):
        reached.append(step @ reached[-1] if reached else step)
    return torch.stack(reached)
