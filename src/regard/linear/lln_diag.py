"""LLN+Diag: linear log-normal attention for far tokens, softmax attention within blocks for near ones."""

from typing import Any, Literal, NamedTuple, Unpack, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard import masks
from regard.cards import Card, Cost
from regard.checks import choice, whole
from regard.linear.lln import LLN, PAPER, LLNState, Statistics
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import Projections
from regard.tracing import as_it_is

CARD = Card(
    "lln_diag",
    equation="""far = linear log-normal attention (`lln`),   near = softmax attention within blocks of n tokens
average:          out = (far + near) / 2
learnable_scale:  out = r * far + p * near
learnable_ratio:  out = r * far + (1 - r) * near        r and p one number for each feature of each head""",
    papers=(PAPER,),
    supports={"causal", "bidirectional", "padding", "packed", "gqa", "streaming", "compile"},
    lacks={"cross": "blocks hold queries and keys of the same tokens"},
    traits={"nonnegative", "linear_in_values", "head_independent"},
    cost=Cost("2*B*H*T*D*(D + 1) + 2*B*H*T*D*block", "H*D*(D + 1) + G + (2*G*D + 1)*block + 1"),
    claim="Near tokens are read as by softmax, far ones by LLN alone, in linear time: "
    "tests/linear/test_lln_diag.py::test_only_the_block_is_read_sharply.",
    differs=(
        "The size of a block is an option; in the authors' code it is the width of a head, which is the default.",
        "Where LLN itself differs, `lln` says.",
    ),
    verified="third-party",
    example={"block": 3},
    defaults={
        "mixing": "code",
        "block": "code",
        "statistics": "ours, samples of a batch don't touch",
        "sigma": "ours, of normalised queries and keys",
        "eps": "code",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)

Mixing = Literal["average", "learnable_scale", "learnable_ratio"]
MOST = 4096
"""Tokens a block: so many keys and values are kept while streaming, and larger blocks are plain attention."""


class LLNDiagState(NamedTuple):
    """All the past leaves behind: the sums of LLN, and the last tokens."""

    sums: Float[Tensor, "B H D V1"]
    top: Float[Tensor, "B G"]
    k: Float[Tensor, "B G n D"]
    v: Float[Tensor, "B G n V"]
    real: Bool[Tensor, "B n"]
    place: Int[Tensor, " B"]
    """Of the next token."""


@CARD.module
class LLNDiag(LLN):
    """Multi-head linear log-normal attention beside softmax attention within blocks.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        mixing: how the two are put together. r and p start at 1/2 and are not bounded.
        block: n, at most 4096; default head_dim. Blocks count from the first token, hidden or not.
        statistics, sigma, eps: as of `LLN`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mixing: Mixing = "average",
        block: int | None = None,
        statistics: Statistics = "fixed",
        sigma: float = 1.0,
        eps: float = 1e-8,
        **rest: Unpack[Projections],
    ) -> None:
        choice("LLNDiag", get_args(Mixing), mixing=mixing)
        super().__init__(dim, num_heads, statistics=statistics, sigma=sigma, eps=eps, **rest)
        self.mixing: Mixing = mixing
        self.block = self.head_dim if block is None else block
        whole(self, most=MOST, block=self.block)
        shape = (1, num_heads, 1, self.head_dim)
        self.r = None if mixing == "average" else nn.Parameter(torch.full(shape, 0.5))
        self.p = None if mixing != "learnable_scale" else nn.Parameter(torch.full(shape, 0.5))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for parameter in (getattr(self, "r", None), getattr(self, "p", None)):
            if parameter is not None:
                nn.init.constant_(parameter, 0.5)

    def put_together(self, far: Tensor, near: Tensor) -> Tensor:
        """The card's last lines."""
        if self.r is None:
            return 0.5 * (far + near)
        r = self.r.to(far.dtype)
        return r * far + (1 - r if self.p is None else self.p.to(far.dtype)) * near

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, alone: bool) -> Tensor:
        return self.put_together(super().mixed(q, k, v, keep, alone=alone), self.near(q, k, v, keep))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        with as_it_is(q.device):
            return super().run(q, k, v, keep, None)[0].to(q.dtype)

    def near(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        """Softmax attention within blocks."""
        mask = masks.blocks(self.block) & masks.causal() if self.causal else masks.blocks(self.block)
        return attention(q, k, v, mask=mask if keep is None else mask & masks.padding(keep))

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        far, past = super().run(q, k, v, keep, LLNState(state.sums, state.top))
        T, n = q.shape[2], self.block
        new = torch.ones(len(q), T, dtype=torch.bool, device=q.device) if keep is None else keep
        keys, values = torch.cat([state.k, k.to(state.k.dtype)], 2), torch.cat([state.v, v.to(state.v.dtype)], 2)
        real = torch.cat([state.real, new], 1)
        # Places of the cached tokens, some of them before the first, which are not real, and of the new ones.
        at = state.place[:, None] + torch.arange(-n, T, device=q.device)
        i, j = at[:, n:, None], at[:, None]
        seen = (i.div(n, rounding_mode="floor") == j.div(n, rounding_mode="floor")) & (j <= i) & real[:, None]
        near = attention(q.to(keys.dtype), keys, values, mask=seen[:, None])
        k, v = (z[:, :, T:].clone() for z in (keys, values))
        return self.put_together(far, near.to(far.dtype)), LLNDiagState(
            *past, k, v, real[:, T:].clone(), state.place + T
        )

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        far = super().empty_state(batch_size, device=device, dtype=dtype)
        kv = torch.zeros(batch_size, self.num_kv_heads, self.block, self.head_dim, device=device, dtype=dtype)
        real = torch.zeros(batch_size, self.block, dtype=torch.bool, device=device)
        return LLNDiagState(*far, kv, kv.clone(), real, torch.zeros(batch_size, dtype=torch.long, device=device))
