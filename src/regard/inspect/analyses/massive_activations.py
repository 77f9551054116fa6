"""Massive activations: the few hidden values far above all others, and the attention sinks they mark.

Interventions set chosen values after one block to 0 or to their mean over data, and see whether the model survives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, number, refuse, whole
from regard.inspect.analyses._maps import floats

CARD = Card(
    "massive_activations",
    equation="""massive: |h_tm| > 100 and |h_tm| > 1000 median |h|      h (T, M): the residual stream after a block
sinks: weight on the marked tokens C       output_t = sum_(s in C) A_ts v_s (a bias) + sum_(s not in C) A_ts v_s""",
    papers=(
        Paper(
            "Massive Activations in Large Language Models",
            "Sun, Chen, Kolter, Liu",
            2024,
            "2402.17762",
            "abstract; the authors' code (main_llm.py, lib/hook.py), whose median is over the whole hidden state of a "
            'sequence; the two thresholds as others quote them, the second as "about" 1000',
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*T*M", ""),
    claim="Attention concentrates on the tokens of massive activations: with a planted one it does, and without it no "
    "more: tests/inspect/analyses/test_massive_activations.py::test_sinks_of_a_model.",
    verified="reconstructed",
)

Hidden = Sequence[Float[Tensor, "B T M"]]
"""The residual stream after each block: `output_hidden_states` of transformers, or what `block_outputs` collects."""


class Massive(NamedTuple):
    """N of them, by layer, sequence, token, width."""

    layer: Int[Tensor, " N"]
    sequence: Int[Tensor, " N"]
    token: Int[Tensor, " N"]
    width: Int[Tensor, " N"]
    value: Float[Tensor, " N"]
    times_median: Float[Tensor, " N"]
    """How many times the median magnitude of its sequence at that layer."""


@CARD.function
def massive_activations(hidden: Hidden, *, floor: float = 100.0, ratio: float = 1000.0) -> Massive:
    """All massive activations.

    Args:
        hidden: (B, T, M) after each block.
        floor: magnitudes up to this are none.
        ratio: nor are those up to so many times the median magnitude of their sequence.

    NaN and infinity are always found, and the median is that of what is finite.
    """
    h = _stacked("massive_activations", hidden)
    number("massive_activations", least=0, floor=floor, ratio=ratio)
    size = h.abs()
    finite = size.isfinite()
    median = size.masked_fill(~finite, torch.nan).flatten(2).nanmedian(-1).values[..., None, None]
    at = ((size > floor) & (size > ratio * median) | ~finite).nonzero(as_tuple=True)
    layer, sequence, token, width = at
    return Massive(layer, sequence, token, width, h[at], (size / median)[at])


def magnitude_profile(hidden: Hidden, *, top: int = 3) -> tuple[Float[Tensor, "L B K"], Float[Tensor, "L B"]]:
    """The greatest magnitudes and the median one after each block: massive activations rise early and stay."""
    size = _stacked("magnitude_profile", hidden).abs().flatten(2)
    whole("magnitude_profile", most=size.shape[-1], top=top)
    return size.topk(top).values, size.median(-1).values


def marked_tokens(found: Massive, batch: int, length: int) -> Bool[Tensor, "B T"]:
    """The tokens that hold a massive activation at some layer: what `attention_mass` asks for as keys."""
    marked = torch.zeros(batch, length, dtype=torch.bool, device=found.token.device)
    marked[found.sequence, found.token] = True
    return marked


@checked()
def attention_bias(
    weights: Float[Tensor, "B H T S"], values: Float[Tensor, "B H S V"], tokens: Bool[Tensor, "B S"]
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T V"]]:
    """Head outputs in two parts: what the marked tokens add, nearly the same for all queries, and the rest."""
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
        refuse(
            "blocks_of", "model", "has no list of like modules", type(model).__name__, "its blocks, named by yourself"
        )
    return max(lists, key=len)


@contextmanager
def block_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Float[Tensor, "B T M"]]]:
    """Inside the `with` block, a list that each forward pass fills with what the blocks put out, anew each time."""
    if not blocks:
        refuse("block_outputs", "blocks", "is empty", blocks, "one at least, say blocks_of(model)")
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
@checked()
def replace_activations(
    block: nn.Module, places: Int[Tensor, "N 2"], values: Float[Tensor, " N"] | float | int
) -> Iterator[None]:
    """Inside the `with` block, the chosen values after this block are others.

    Args:
        block: whose output (B, T, M) is changed, in all sequences alike.
        places: (token, width) of each value.
        values: what they become: 0, or their means over data.
    """

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
    if not len(hidden):
        refuse(name, "hidden", "is empty", hidden, "(B, T, M) of each block")
    sizes: dict[str, int] = {}
    for block, h in enumerate(hidden):
        sizes = floats(name, "B T M", sizes, **{f"hidden[{block}]": h})
    return torch.stack([h.to(torch.promote_types(h.dtype, torch.float32)) for h in hidden])
