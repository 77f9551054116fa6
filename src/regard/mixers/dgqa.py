"""Dynamic grouped-query attention: training moves query heads to where keys change in length.

Like `kdgqa`, from which it has no causal form; but what decides is how keys differ from a memory that training keeps.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cards import Card, Cost
from regard.checks import choice, number, tokens, whole
from regard.masks import Mask
from regard.mixers.kdgqa import LATER, PAPER, KeyDrivenAttention, allocate, key_norms
from regard.pipeline.tokens import key_padding, quarantine
from regard.tracing import as_it_is, recomputing

CARD = Card(
    "dgqa",
    equation="""n_g = sum over the batch of ||k_g||,   c_g its memory, at first 0
z_g = |c_g - n_g|   (kind "diff")   or   beta n_g + (1 - beta) c_g   (kind "ema")
a_g = round(H z_g / sum z),   made to add up to H by single heads drawn at random
training, every `window` steps: a is set anew, then c <- (c + n) / window;   evaluation: a of the batch at hand
query heads a_1 + .. + a_(g-1) + 1 .. a_1 + .. + a_g read key head g:   o_h = softmax(q_h k_g^T / sqrt(D)) v_g""",
    papers=(PAPER,),
    supports={"bidirectional", "cross", "padding", "gqa", "dropout", "compile"},
    lacks={
        "causal": LATER,
        "streaming": LATER,
        "packed": "documents of one row would decide together",
        "mask": "a key that only some queries see would count for all",
    },
    traits={"normalised", "nonnegative", "linear_in_values", "position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D", ""),
    claim="Query heads go to where keys have changed most since the memory was written: "
    "tests/mixers/test_dgqa.py::test_query_heads_follow_the_keys_that_change.",
    differs=(
        "As in the authors' code the keys of the whole batch decide together, so that one row may change another's "
        "answer by a jump; evaluation='trained' keeps rows apart.",
        "In evaluation nothing is written and nothing drawn: heads too many or too few are taken as `kdgqa` does. The "
        "authors' code writes n into c there, so that one call changes the next; `remember` does that when asked.",
        "Where all z are 0 the authors' code divides 0 by 0; here query heads are shared out evenly.",
        "c is no running average, as in the authors' code: with window = 1 it sums up, and is raw n after evaluation.",
        "Steps count calls in training since `restart`, to be called where an epoch starts, as their counter does.",
        "Padding counts for nothing in the lengths. num_kv_heads is H unless said; the authors' code has H / 2.",
    ),
    verified="third-party",
    tries={
        "kind": ...,
        "window": ...,
        "beta": ...,
        "evaluation": {"context_dim": 1, "head_dim": 1},
    },  # memories begin empty
    exceptions={
        "L13 grouped_keys_are_repeated": "G key heads share H query heads in other numbers than H key heads that are "
        "equal in groups",
        "L29": "training draws which heads make up for rounding from torch's generator, as the authors' code does",
    },
    defaults={
        "kind": "code",
        "window": "code",
        "beta": "code",
        "evaluation": "code",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)

Kind = Literal["diff", "ema"]
Evaluation = Literal["batch", "trained"]
CALLS = 8
"""Passes in training whose allocations are kept for checkpoints, which run passes once more, the last one first."""


def evolved_shares(
    norms: Float[Tensor, " G"], cache: Float[Tensor, " G"], kind: Kind, beta: float
) -> Float[Tensor, " G"]:
    """How far each key head's length is from its memory, or both weighed together."""
    return (cache - norms).abs() if kind == "diff" else beta * norms + (1 - beta) * cache


@CARD.module
class DynamicKeyDrivenAttention(KeyDrivenAttention):
    """Grouped-query attention with groups that move in training.

    Args:
        dim, num_heads, num_kv_heads, head_dim, dropout, bias, context_dim: as of `KeyDrivenAttention`.
        kind: whether the change since the memory decides, or the two weighed together.
        window: every how many steps of training groups are set anew; 300 in the authors' example.
        beta: weight of the batch at hand in "ema".
        evaluation: groups of the "batch" at hand, as coded, or as "trained" last, which no input changes.
    """

    cache: Tensor
    groups: Tensor
    steps: Tensor
    _before: tuple[Tensor, ...] = ()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kind: Kind = "diff",
        window: int = 1,
        beta: float = 0.9,
        evaluation: Evaluation = "batch",
        dropout: float = 0.0,
        bias: bool = False,
        context_dim: int | None = None,
    ) -> None:
        sizes: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "context_dim": context_dim}
        super().__init__(dim, num_heads, dropout=dropout, bias=bias, **sizes)
        choice(self, get_args(Kind), kind=kind)
        choice(self, get_args(Evaluation), evaluation=evaluation)
        whole(self, window=window)
        number(self, least=0, most=1, beta=beta)
        self.kind, self.window, self.beta, self.evaluation = kind, window, beta, evaluation
        self.register_buffer("cache", torch.empty(self.num_kv_heads))
        self.register_buffer("groups", torch.empty(self.num_kv_heads, dtype=torch.long))
        self.register_buffer("steps", torch.empty((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """An empty memory, and groups of one size."""
        with torch.no_grad():
            self.cache.zero_()
            self.groups.fill_(self.num_heads // self.num_kv_heads)
            self.restart()

    def restart(self) -> None:
        """Count steps from 0 again: the next one in training sets the groups anew."""
        self.steps.zero_()

    @torch.no_grad()
    def remember(self, x: Float[Tensor, "B S C"], *, mask: Mask | Bool[Tensor, "B S"] | None = None) -> None:
        """Set the memory to the lengths of these tokens' keys."""
        tokens(self, "x", x, self.k_proj.in_features)
        k = self.k_proj(quarantine(x)[0]).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        self.cache.copy_(key_norms(k, key_padding(self, mask, x)).sum(0))

    def allocation(self, k: Float[Tensor, "B G S D"], keep: Bool[Tensor, "B S"] | None = None) -> Int[Tensor, "*b G"]:
        if not self.training and self.evaluation == "trained":
            return self.groups
        if self.training and self._before and recomputing():
            *rest, again = self._before
            self._before = tuple(rest)
            return again
        with as_it_is(k.device), torch.no_grad():
            norms = key_norms(k, keep).sum(0)
            cache = self.cache.to(norms.dtype)
            shares = evolved_shares(norms, cache, self.kind, self.beta)
            if not self.training:
                return allocate(shares, self.num_heads)
            drawn = torch.rand(self.num_kv_heads // 2 + 1, self.num_kv_heads, device=k.device, dtype=norms.dtype)
            due = self.steps % self.window == 0
            counts = torch.where(due, allocate(shares, self.num_heads, drawn), self.groups)
            self.groups.copy_(counts)
            self.cache.copy_(torch.where(due, (cache + norms) / self.window, cache))
            self.steps.add_(1)
        self._before = (*self._before[1 - CALLS :], counts)
        return counts
