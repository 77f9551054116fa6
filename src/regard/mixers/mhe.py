"""Multiple head embeddings: heads share one head's projections, and differ by an embedding each.

With `form="add"` and no rotation, a key's embedding shifts all scores of a query alike, which softmax takes away: heads
then differ by a preference for keys, a_h . k / sqrt(D), alone, and the gradient of `k_embedding` is 0.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, number, refuse
from regard.kernels import Problem
from regard.pipeline.layer import Attention
from regard.positions.rotary import Rotary

CARD = Card(
    "mhe",
    equation="""q = x W_q,   k = x W_k,   v = x W_v                  W (M, D), of one head
form = "add":        q_h = q + a_h,          k_h = k + c_h,          v_h = v + e_h
form = "multiply":   q_h = q * (1 + a_h),    k_h = k * (1 + c_h),    v_h = v * (1 + e_h)
y = concat_h(softmax(q_h k_h^T / sqrt(D)) v_h) W_o""",
    papers=(
        Paper(
            "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention",
            "Xue, Aletras",
            2023,
            "2310.07911",
            "abstract; beginning of the introduction; reviews; the equations as remembered",
        ),
    ),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "mask", "streaming", "dropout", "compile"},
    traits={"position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D", "2*S*D"),
    claim="Heads that share every projection answer apart by their embeddings, 3 H D numbers more than a single head "
    "has, and a stream keeps one head's keys and values: "
    "tests/mixers/test_mhe.py::test_embeddings_alone_set_heads_apart.",
    differs=(
        "The authors' repository holds no code. That `multiply` has 1 + in it, so that embeddings of 0 give equal "
        "heads, and that W_o has all H D rows, is remembered; the abstract's counts fit.",
        "Inferred: embeddings start as N(0, 0.02), biases belong to the shared projections, dropout is of weights.",
        "A stream keeps what the heads share, H times less than multi-head attention, unless keys are rotated.",
        "The paper's models add positions to the tokens; `base` rotates behind the embeddings, where a key's counts.",
    ),
    verified="reconstructed",
    tries={"base": 100.0, "embedding_std": 0.5},
    defaults={
        "form": "ours",
        "base": "paper, which adds positions to the tokens",
        "embedding_std": "ours",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)

Form = Literal["add", "multiply"]


def embedded(z: Float[Tensor, "#B #H T D"], embedding: Float[Tensor, "H D"], form: Form = "add") -> Tensor:
    """What each head makes of queries, keys or values that they share: (B, H, T, D)."""
    own = embedding[:, None].to(z.dtype)
    return z + own if form == "add" else z * (1 + own)


class SharedProjection(nn.Linear):
    """One head's projection, handed to several heads, side by side."""

    def __init__(self, dim: int, head_dim: int, heads: int, *, bias: bool) -> None:
        super().__init__(dim, head_dim, bias=bias)
        self.heads = heads

    def forward(self, x: Float[Tensor, "*b M"]) -> Float[Tensor, "*b HD"]:
        z = super().forward(x)
        return z.repeat(*[1] * (z.dim() - 1), self.heads)


@CARD.module(closed=("kernel",))
class MultipleHeadEmbeddings(Attention):
    """Attention whose heads are one projection and an embedding each of its queries, keys and values.

    Args:
        dim, num_heads, head_dim, causal, dropout, bias, context_dim, kernel: as in `regard.Attention`.
        form: whether embeddings are added, or multiply as 1 + embedding.
        base: of rotary positions behind the embeddings; None for no positions.
        embedding_std: spread of the embeddings at the start; with 0 all heads are, and in `add` stay, one.

    Shapes: x (B, T, M), context (B, S, context_dim) -> (B, T, M).
    """

    reads_as_kept = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        form: Form = "add",
        base: float | None = None,
        embedding_std: float = 0.02,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        context_dim: int | None = None,
        kernel: str = "auto",
    ) -> None:
        choice(self, get_args(Form), form=form)
        number(self, least=0, embedding_std=embedding_std)
        kept = 1 if base is None else num_heads
        rest: dict[str, Any] = {"head_dim": head_dim, "causal": causal, "dropout": dropout, "context_dim": context_dim}
        super().__init__(dim, num_heads, num_kv_heads=kept, bias=bias, kernel=kernel, **rest)
        D = self.head_dim
        if base is not None:
            if D % 2:
                refuse(self, "head_dim", "is odd, and rotation turns pairs", D, "an even one, or base=None")
            self.position = Rotary(D, base=base)
        self.form, self.embedding_std = form, embedding_std
        self.q_proj = SharedProjection(dim, D, num_heads, bias=bias)
        self.k_proj = SharedProjection(self.context_dim, D, kept, bias=bias)
        self.v_proj = SharedProjection(self.context_dim, D, kept, bias=bias)
        self.q_embedding = nn.Parameter(torch.empty(num_heads, D))
        self.k_embedding = nn.Parameter(torch.empty(num_heads, D))
        self.v_embedding = nn.Parameter(torch.empty(num_heads, D))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for embedding in (self.q_embedding, self.k_embedding, self.v_embedding):
            nn.init.normal_(embedding, std=self.embedding_std)

    def _placeless(self, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v, x, source = super()._placeless(*given)
        q = embedded(q, self.q_embedding, self.form)
        if self.position is not None:  # rotation comes behind the embeddings, so that the past is of every head
            k, v = embedded(k, self.k_embedding, self.form), embedded(v, self.v_embedding, self.form)
        return q, k, v, x, source

    def _problem(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Problem:
        if self.position is None:
            k, v = embedded(k, self.k_embedding, self.form), embedded(v, self.v_embedding, self.form)
        return super()._problem(q, k, v, *rest, **more)
