"""Massive activations: the few hidden values far above all others, the tokens they mark, and what attends to those.

    massive: |h_tm| > 100 and |h_tm| > 1000 median |h|      h (T, M): the residual stream after a block
    sinks: weight on the marked tokens C        output_t = sum_(s in C) A_ts v_s (a bias) + sum_(s not in C) A_ts v_s

Sun, Chen, Kolter, Liu 2024, "Massive Activations in Large Language Models" (https://arxiv.org/abs/2402.17762): abstract
and the authors' code read (main_llm.py, lib/hook.py); the two thresholds are the paper's as others quote it, and it
says "about" 1000. The median is over the whole hidden state of a sequence, as in the code.
Interventions set chosen values after one block to 0 or to their mean over data, and see whether the model survives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register

Hidden = Sequence[Float[Tensor, "B T M"]]
"""The residual stream after each block: `output_hidden_states` of transformers, or what `block_outputs` collects."""


class Massive(NamedTuple):
    """N of them, by layer, sequence, token, width."""

    layer: Int[Tensor, "N"]
    sequence: Int[Tensor, "N"]
    token: Int[Tensor, "N"]
    width: Int[Tensor, "N"]
    value: Float[Tensor, "N"]
    times_median: Float[Tensor, "N"]
    """How many times the median magnitude of its sequence at that layer."""


def massive_activations(hidden: Hidden, *, floor: float = 100.0, ratio: float = 1000.0) -> Massive:
    """All massive activations.

    Args:
        hidden: (B, T, M) after each block.
        floor: magnitudes up to this are none.
        ratio: nor are those up to so many times the median magnitude of their sequence.
    """
    h = _stacked("massive_activations", hidden)
    if floor < 0 or ratio < 0:
        raise ValueError(f"massive_activations: floor and ratio must not be negative (got {floor}, {ratio})")
    size = h.abs()
    median = size.flatten(2).median(-1).values[..., None, None]
    at = ((size > floor) & (size > ratio * median)).nonzero(as_tuple=True)
    layer, sequence, token, width = at
    return Massive(layer, sequence, token, width, h[at], (size / median)[at])


def magnitude_profile(hidden: Hidden, *, top: int = 3) -> tuple[Float[Tensor, "L B K"], Float[Tensor, "L B"]]:
    """The greatest magnitudes and the median one after each block: massive activations rise early and stay."""
    size = _stacked("magnitude_profile", hidden).abs().flatten(2)
    if not 1 <= top <= size.shape[-1]:
        raise ValueError(f"magnitude_profile: top must be from 1 to {size.shape[-1]} (got {top})")
    return size.topk(top).values, size.median(-1).values


def marked_tokens(found: Massive, batch: int, length: int) -> Bool[Tensor, "B T"]:
    """The tokens that hold a massive activation at some layer: what `attention_mass` asks for as keys."""
    marked = torch.zeros(batch, length, dtype=torch.bool, device=found.token.device)
    marked[found.sequence, found.token] = True
    return marked


def attention_bias(
    weights: Float[Tensor, "B H T S"], values: Float[Tensor, "B H S V"], tokens: Bool[Tensor, "B S"]
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T V"]]:
    """Head outputs in two parts: what the marked tokens add, nearly the same for all queries, and the rest."""
    if weights.dim() != 4 or values.shape[:3] != (*weights.shape[:2], weights.shape[3]):
        raise ValueError(
            f"attention_bias: weights {tuple(weights.shape)} and values {tuple(values.shape)} do not fit; expected "
            "(B, H, T, S) and (B, H, S, V)"
        )
    if tokens.dtype != torch.bool or tokens.shape != (weights.shape[0], weights.shape[3]):
        raise ValueError(f"attention_bias: tokens is {tokens.dtype} {tuple(tokens.shape)}; expected bool (B, S)")
    bias = weights.masked_fill(~tokens[:, None, None], 0) @ values
    return bias, weights.masked_fill(tokens[:, None, None], 0) @ values


# --- In a model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks: its longest list of like modules, lists within lists (experts, say) left out."""
    lists: list[list[nn.Module]] = []
    inner: set[nn.Module] = set()
    for module in model.modules():  # outer lists come first
        if isinstance(module, nn.ModuleList) and module not in inner:
            inner.update(module.modules())
            if len({type(block) for block in module}) == 1:
                lists.append(list(module))
    if not lists:
        raise ValueError(f"blocks_of: {type(model).__name__} has no list of like modules; name its blocks yourself")
    return max(lists, key=len)


@contextmanager
def block_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Float[Tensor, "B T M"]]]:
    """Inside the `with` block, a list that each forward pass fills with what the blocks put out, anew each time."""
    if not blocks:
        raise ValueError("block_outputs: no blocks; expected one at least, say blocks_of(model)")
    found: list[Tensor] = []

    def keep(number: int) -> Any:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            if number == 0:
                found.clear()
            found.append((out if isinstance(out, Tensor) else out[0]).detach().clone())

        return hook

    handles = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replace_activations(
    block: nn.Module, places: Int[Tensor, "N 2"], values: Float[Tensor, "N"] | float
) -> Iterator[None]:
    """Inside the `with` block, the chosen values after this block are others.

    Args:
        block: whose output (B, T, M) is changed, in all sequences alike.
        places: (token, width) of each value.
        values: what they become: 0, or their means over data.
    """
    if places.dim() != 2 or places.shape[1] != 2 or places.is_floating_point():
        raise ValueError(f"replace_activations: places are {places.dtype} {tuple(places.shape)}; expected whole (N, 2)")

    def hook(module: nn.Module, given: Any, out: Any) -> Any:
        h = out if isinstance(out, Tensor) else out[0]
        token, width = places.to(h.device).unbind(1)
        changed = h.clone()
        changed[:, token, width] = torch.as_tensor(values, dtype=h.dtype, device=h.device)
        return changed if isinstance(out, Tensor) else (changed, *out[1:])

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _stacked(name: str, hidden: Hidden) -> Float[Tensor, "L B T M"]:
    shapes = {tuple(h.shape) for h in hidden}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ValueError(
            f"{name}: hidden states have shapes {sorted(shapes)}; expected (B, T, M) of each block, all alike"
        )
    return torch.stack([h.to(torch.promote_types(h.dtype, torch.float32)) for h in hidden])


CARD = register(
    Card(
        name="massive_activations",
        family="inspect",
        gist="The few hidden values far above all others, and the attention sinks they mark.",
        equation="massive: |h_tm| > 100 and |h_tm| > 1000 median |h|        bias_t = sum_(s marked) A_ts v_s",
        paper=Paper(
            "Massive Activations in Large Language Models",
            "Sun, Chen, Kolter, Liu",
            2024,
            "2402.17762",
            "abstract; the authors' code; thresholds quoted by others",
        ),
        build=massive_activations,
        protocol="Analysis",
        supports=frozenset(),
        cost=Cost("B*T*M", ""),
        claim="Attention concentrates on the tokens of massive activations: with a planted one it does, and without it "
        "no more, in tests/inspect/analyses/test_massive_activations.py.",
        verified="reconstructed",
    )
)
