"""Key-driven grouped-query attention: the longer a head's keys, the more query heads read it.

The number of query heads that a key head serves is decided in each call, from the lengths of all its keys: those of
the whole batch, as the authors do it. So an answer depends on what else is in the batch, unless `counted="sequence"`.
Later tokens count as well, so there is no causal form: whatever order one attends in, an earlier output would depend,
by a jump, on what comes after it. Nothing of this passes gradients.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import choice, number
from regard.masks import padding
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import HeadMixer

PAPER = Paper(
    "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
    "Khan, Khaquan, Tafveez, Samiwala, Raza",
    2024,
    "2408.08454",
    "abstract; official code",
)
LATER = "how many query heads a key head serves depends on all tokens, later ones too"
TOGETHER = "as in the authors' code, the keys of the whole batch decide which key head a query head reads"
HALVES = "in half precision, lengths near the edge of a rounding may send a query head to another key head"

CARD = Card(
    "kdgqa",
    equation="""n_g = sum over the batch of ||k_g||,   over all tokens and channels
m_g = (n_g - min n) / (max n - min n),   a_g = round(H m_g / sum m),   made to add up to H
query heads a_1 + .. + a_(g-1) + 1 .. a_1 + .. + a_g read key head g:   o_h = softmax(q_h k_g^T / sqrt(D)) v_g
counted = "sequence": n_g, and so a_g, of each sequence by itself""",
    papers=(PAPER,),
    supports={"bidirectional", "cross", "padding", "gqa", "dropout", "compile"},
    lacks={
        "causal": LATER,
        "streaming": LATER,
        "packed": "documents of one row would decide together; put each in a row of its own, with counted='sequence'",
        "mask": "a key that only some queries see would count for all",
    },
    traits={"normalised", "nonnegative", "linear_in_values", "position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D", ""),
    claim="The longer a head's keys, the more query heads read it, H of them in all: "
    "tests/mixers/test_kdgqa.py::test_a_head_with_longer_keys_is_read_by_more.",
    differs=(
        "Where all lengths are equal the authors' code divides 0 by 0; here query heads are shared out evenly.",
        "Padding counts for nothing in the lengths.",
        "num_kv_heads is H unless said, as everywhere; the authors' code has H / 2.",
    ),
    verified="third-party",
    exceptions={
        "L2 bfloat16_precision": HALVES,
        "L5": TOGETHER,
        "L9": TOGETHER,
        "L10 batch_rows_do_not_meet": TOGETHER,
        "L10 batch_rows_do_not_meet_in_training": TOGETHER,
        "L49 padding_of_a_context": TOGETHER,
        "L50 mapped_over_the_batch": TOGETHER,
    },
    defaults={"counted": "code", "bias": "ours", "context_dim": "ours, as wide as dim"},
)
BY_SEQUENCE = CARD.variant(
    "kdgqa_sequence",
    "Key-driven grouped-query attention whose groups each sequence decides for itself.",
    preset={"counted": "sequence"},
)

Counted = Literal["batch", "sequence"]


def key_norms(k: Float[Tensor, "B G S D"], keep: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, "B G"]:
    """||k_g|| over all (real) tokens and channels, in at least float32; no gradient passes."""
    wide = k.detach().to(torch.promote_types(k.dtype, torch.float32))
    if keep is not None:
        wide = wide.masked_fill(~keep[:, None, :, None], 0)
    return wide.square().sum((-2, -1)).sqrt()


def key_shares(norms: Float[Tensor, "*b G"]) -> Float[Tensor, "*b G"]:
    """From 0 for the shortest to 1 for the longest; all 0 where none is longer."""
    least, most = norms.amin(-1, keepdim=True), norms.amax(-1, keepdim=True)
    return (norms - least) / torch.where(most > least, most - least, 1.0)


def allocate(
    shares: Float[Tensor, "*b G"], heads: int, order: Float[Tensor, "n G"] | None = None
) -> Int[Tensor, "*b G"]:
    """How many query heads each key head serves, H in all; evenly where all shares are 0.

    Rounding may leave too many or too few, by half a head for each key head at most, which are then taken one by one.

    Args:
        order: whose turn it is, the greatest first, at each such step; default from the one that has most, or to the
            one that has least, the first of equals.
    """
    G = shares.shape[-1]
    place, total = torch.arange(G, device=shares.device), shares.sum(-1, keepdim=True)
    even = (heads // G + (place < heads % G)).to(shares.dtype)
    counts = torch.where(total > 0, (shares / torch.where(total > 0, total, 1.0) * heads).round(), even)
    for n in range(G // 2 + 1):
        over = counts.sum(-1, keepdim=True) - heads
        if order is None:
            most, least = counts.argmax(-1, keepdim=True), counts.argmin(-1, keepdim=True)
        else:
            turn = order[n].expand(counts.shape)
            most = torch.where(counts > 0, turn, -1.0).argmax(-1, keepdim=True)
            least = turn.argmax(-1, keepdim=True)
        counts = counts - over.sign() * (place == torch.where(over > 0, most, least))
    return counts.long()


def read_by(counts: Int[Tensor, "*b G"], heads: int) -> Int[Tensor, "*b H"]:
    """Which key head each query head reads."""
    h = torch.arange(heads, device=counts.device)
    return (h[:, None] >= counts.cumsum(-1)[..., None, :]).sum(-1)


def handed_out(z: Float[Tensor, "B G S D"], which: Int[Tensor, "*b H"]) -> Float[Tensor, "B H S D"]:
    """Each query head's own copy of what it reads."""
    return (
        z.index_select(1, which)
        if which.dim() == 1
        else z.gather(1, which[..., None, None].expand(-1, -1, *z.shape[2:]))
    )


def pooled_heads(weight: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Of a multi-head k_proj or v_proj, weight or bias: the mean of each group's heads, (H D, M) to (G D, M)."""
    return weight.unflatten(0, (num_kv_heads, num_heads // num_kv_heads, -1)).mean(1).flatten(0, 1)


@CARD.module
class KeyDrivenAttention(HeadMixer):
    """Grouped-query attention with groups of as many query heads as each call's keys decide; some may be empty.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias, context_dim: as of `HeadMixer`.
        counted: whose keys decide: those of the whole "batch" for all, as coded, or of each "sequence" for itself.
        dropout: of the weights, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        counted: Counted = "batch",
        dropout: float = 0.0,
        bias: bool = False,
        context_dim: int | None = None,
    ) -> None:
        sizes: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "context_dim": context_dim}
        super().__init__(dim, num_heads, bias=bias, **sizes)
        choice(self, get_args(Counted), counted=counted)
        number(self, least=0, most=1, dropout=dropout)
        self.counted, self.dropout = counted, dropout

    def allocation(self, k: Float[Tensor, "B G S D"], keep: Bool[Tensor, "B S"] | None = None) -> Int[Tensor, "*b G"]:
        """How many query heads each key head serves in a call with these keys."""
        norms = key_norms(k, keep)
        return allocate(key_shares(norms.sum(0) if self.counted == "batch" else norms), self.num_heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        which = read_by(self.allocation(k, keep), self.num_heads)
        k, v = handed_out(k, which), handed_out(v, which)
        dropout = self.dropout if self.training else 0.0
        return attention(q, k, v, mask=None if keep is None else padding(keep), dropout=dropout)
