"""Selective attention: earlier tokens mark keys as no longer needed, and later queries see these less.

What is marked most can be forgotten for good: with a budget, a layer holds no more keys than that.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.cards import Card, Cost, Paper
from regard.checks import number, refuse, tokens, whole
from regard.kernels.check import check_inputs
from regard.kernels.problem import chunk_rows, combine, dots, softmax
from regard.linear._shared import RecurrentMixer, widened
from regard.masks import Mask
from regard.pipeline.head_mixer import Projections
from regard.pipeline.tokens import key_padding, quarantine
from regard.tracing import exporting, transformed

CARD = Card(
    "selective",
    equation="""P[h,t,s] = q_t . k_s / sqrt(D)                       s <= t
S[t,s] = max(P[0,t,s], 0),   but 0 for s = t and for the first token
F[t,s] = sum_{u < t} S[u,s],   A = softmax_s(P - F) in every head
budget: where a layer holds more keys, the one with the greatest F goes for good, never the first
memory loss: max_t sum_{s < t} (1 - min(F[t,s], tau) / tau), as a share of the tokens""",
    papers=(
        Paper(
            "Selective Attention Improves Transformer",
            "Leviathan, Kalman, Matias",
            2024,
            "2410.02703",
            "abstract; introduction; x-transformers; a reproduction (context-compression); the method not read",
        ),
    ),
    supports={"causal", "padding", "gqa", "streaming", "compile"},
    traits={"normalised", "nonnegative", "linear_in_values", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D", "S*(2*G*D + 2)"),
    claim="What a token selects loses weight in every head for later tokens, and only for them: "
    "tests/mixers/test_selective.py::test_what_one_query_selects_loses_weight_for_later_ones_alone.",
    differs=(
        "The memory loss follows the reproduction, and its largest value over tokens the paper as remembered.",
        "Inferred: a key goes before the query attends that made it one too many; of equals, the oldest goes.",
        "Inferred: the first real token is the one never selected, and hidden tokens select nothing.",
        "How budgets are shared out among layers is left to the user.",
    ),
    verified="third-party",
    tries={"budget": 4, "auxiliary_weight": 0.1, "tau": {"tau": 0.5, "auxiliary_weight": 0.1}},
    auxiliary="memory_loss",
    defaults={
        "budget": "paper, trained without",
        "tau": "code, context-compression",
        "auxiliary_weight": "paper, trained without",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)

TILE_BYTES = 16 * 2**20
"""Scores formed at once."""


class SelectiveState(NamedTuple):
    """The keys held, in order."""

    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S V"]
    selected: Float[Tensor, "B S"]
    """F of the next query."""
    held: Bool[Tensor, "B S"]
    """False for hidden tokens, and places not in use."""


def soft_mask(
    scores: Float[Tensor, "B t S"], counts: Bool[Tensor, "B t S"], before: Float[Tensor, "B S"]
) -> tuple[Float[Tensor, "B t S"], Float[Tensor, "B S"]]:
    """F of these queries from that of the first, and of the query after them."""
    chosen = scores.relu().masked_fill(~counts, 0)
    F = torch.cat([before[:, None], before[:, None] + chosen.cumsum(1)], 1)
    return F[:, :-1], F[:, -1]


def pruned(
    F: Float[Tensor, "B t S"],
    held: Bool[Tensor, "B S"],
    new: Bool[Tensor, "B t S"],
    first: Bool[Tensor, "B S"],
    budget: int,
) -> tuple[Bool[Tensor, "B t S"], Bool[Tensor, "B S"]]:
    """Which keys each query still sees, and what is held after them."""
    at, seen = torch.arange(held.shape[1], device=held.device), []
    for marks, own in zip(F.detach().unbind(1), new.unbind(1), strict=True):
        held = held | own
        worst = marks.masked_fill(~held | first, -1).argmax(-1, keepdim=True)  # of equals, the oldest
        over = held.sum(-1, keepdim=True) > budget
        held = held & ~(over & (at == worst))
        seen.append(held)
    return torch.stack(seen, 1) if seen else new, held


def by_rows(T: int, rows: int, run: Callable[..., tuple[Tensor, ...]], *carried: Tensor) -> tuple[Tensor, ...]:
    """`run(slice, *carried)` on so many query rows at a time, one chunk after another: what it gives for all of them,
    and what it carries on. Each chunk is computed again in backward."""
    if exporting() or rows >= T:
        return run(slice(0, T), *carried)
    outs = []
    for start in range(0, T, rows):
        at = slice(start, min(start + rows, T))
        if torch.is_grad_enabled() and not transformed(*carried):
            out, *after = checkpoint(run, at, *carried, use_reentrant=False, preserve_rng_state=False)
        else:
            out, *after = run(at, *carried)
        carried = tuple(after)
        outs.append(out)
    return torch.cat(outs, -2), *carried


class _Places(NamedTuple):
    """Which keys are real, which of them is the first, and where queries stand among them."""

    real: Bool[Tensor, "B S"]
    first: Bool[Tensor, "B S"]
    selects: Bool[Tensor, "B T"]
    past: int

    def at(self, rows: slice) -> tuple[Bool[Tensor, "B t S"], Bool[Tensor, "B t S"], Bool[Tensor, "B t S"]]:
        """What these queries may see, what they may select, and their own keys."""
        j = torch.arange(self.real.shape[1], device=self.real.device)
        i = j[self.past :][rows, None]
        sees = (j <= i) & self.real[:, None]
        return sees, sees & (j != i) & ~self.first[:, None] & self.selects[:, rows, None], (j == i) & sees


def _places(held: Tensor, keep: Tensor, selects: Tensor | None = None) -> _Places:
    real = torch.cat([held, keep], 1)
    return _Places(real, real & (real.cumsum(1) == 1), keep if selects is None else selects, held.shape[1])


def selective_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    keep: Bool[Tensor, "B T"] | None = None,
    *,
    budget: int | None = None,
    selects: Bool[Tensor, "B T"] | None = None,
    state: SelectiveState | None = None,
    rows: int | None = None,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B S"] | SelectiveState]:
    """Causal self-attention, and F of the query to come; from a `state`, the state after these tokens.

    Args:
        keep: True = a real token.
        budget: most keys held; None = all.
        selects: whose selections count; default those of real tokens.
        rows: queries worked on at a time.
    """
    check_inputs(q, k, v)
    if k.shape[2] != q.shape[2]:
        refuse("selective_attention", "k", "has another length than q", k.shape[2], f"{q.shape[2]} tokens")
    q, k, v = widened(q, k, v)
    B, H, T, D = q.shape
    keep = q.new_ones(B, T, dtype=torch.bool) if keep is None else keep
    held, marks = q.new_ones(B, 0, dtype=torch.bool), q.new_zeros(B, T)
    if state is not None:
        k, v = torch.cat([state.k.to(k.dtype), k], 2), torch.cat([state.v.to(v.dtype), v], 2)
        held, marks = state.held, torch.cat([state.selected.to(q.dtype), marks], 1)
    places, S = _places(held, keep, selects), k.shape[2]
    held = torch.cat([held, torch.zeros_like(keep)], 1)

    def run(at: slice, marks: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        end = S if exporting() else places.past + at.stop
        sees, counts, own = (m[..., :end] for m in places.at(at))
        scores = dots(q[:, :, at], k[:, :, :end]) * D**-0.5
        F, after = soft_mask(scores[:, 0], counts, marks[:, :end])
        if budget is None:
            held = places.real
        else:
            sees, now = pruned(F, held[:, :end], own, places.first[:, :end], budget)
            held = torch.cat([now, held[:, end:]], 1)
        out = combine(softmax(scores - F[:, None], sees[:, None]), v[:, :, :end])
        return out, torch.cat([after, marks[:, end:]], 1), held

    out, marks, held = by_rows(T, rows or chunk_rows(T, TILE_BYTES // (4 * B * H * S or 1)), run, marks, held)
    if state is None:
        return out, marks
    return out, _kept(SelectiveState(k, v, marks, held), budget)


def _kept(state: SelectiveState, budget: int | None) -> SelectiveState:
    """The state without the places that nothing is held in, as far as the budget asks for."""
    if budget is None or state.k.shape[2] <= budget:
        return state
    order = (~state.held).to(torch.int8).argsort(stable=True, dim=-1)[:, :budget].sort(-1).values
    k, v = (z.take_along_dim(order[:, None, :, None], 2) for z in (state.k, state.v))
    return SelectiveState(k, v, state.selected.gather(1, order), state.held.gather(1, order))


@CARD.module
class Selective(RecurrentMixer):
    """Multi-head selective attention, causal alone; arguments as of `HeadMixer`.

    Args:
        budget: most keys that a query sees, and a state holds; None = all.
        tau: where F counts as forgotten, in the memory loss.
        auxiliary_weight: what training multiplies `memory_loss` by; 0.1 for models to be pruned, as remembered.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        budget: int | None = None,
        tau: float = 1.0,
        auxiliary_weight: float = 0.0,
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        if budget is not None:
            whole(self, budget=budget)
        number(self, above=0, tau=tau)
        number(self, least=0, auxiliary_weight=auxiliary_weight)
        self.budget, self.tau, self.auxiliary_weight = budget, tau, auxiliary_weight

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        return selective_attention(q, k, v, keep, budget=self.budget, state=state)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> SelectiveState:
        z = torch.zeros(batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        none = z[:, 0, :, 0]
        return SelectiveState(z, z.clone(), none, none.bool())

    def memory_loss(self, x: Float[Tensor, "B T M"], *, mask: Mask | Tensor | None = None) -> Float[Tensor, ""]:
        """The most keys that any query of a sequence still needs, as a share of its tokens; the batch's mean."""
        tokens(self, "x", x, self.dim)
        keep = key_padding(self, mask, x)
        x, _ = quarantine(x)
        q, k, _ = widened(*self.split(x, x))
        (B, _, T, D), keep = q.shape, x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        places = _places(keep[:, :0], keep)

        def run(at: slice, marks: Tensor) -> tuple[Tensor, Tensor]:
            sees, counts, own = places.at(at)
            F, after = soft_mask(dots(q[:, :1, at], k[:, :1])[:, 0] * D**-0.5, counts, marks)
            needed = (1 - (F / self.tau).clamp(max=1)).masked_fill(~(sees & ~own), 0).sum(-1, keepdim=True)
            return needed.masked_fill(~keep[:, at, None], 0), after

        needed = by_rows(T, chunk_rows(T, TILE_BYTES // (4 * B * T or 1)), run, q.new_zeros(B, T))[0]
        return (needed.flatten(1).amax(1) / keep.sum(1).clamp(min=1)).mean()
