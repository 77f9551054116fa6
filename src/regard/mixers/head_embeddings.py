"""Multiple head embeddings: all heads share one head's projections, and differ by an embedding each.

By algebra the `add` form is one head with a learned preference for keys, a head: q . k + a_h . k are the terms that
depend on the key, so c_h has no effect and no gradient, and e_h adds a constant. `multiply` gives each head a diagonal
metric (1 + a_h) (1 + c_h).
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, number
from regard.kernels import Problem
from regard.pipeline.layer import Attention

CARD = Card(
    "head_embeddings",
    equation="""q = x W_q,   k = x W_k,   v = x W_v     of one head's width D, shared by all heads
add:        q_h = q + a_h,   k_h = k + c_h,   v_h = v + e_h
multiply:   q_h = q (1 + a_h),   k_h = k (1 + c_h),   v_h = v (1 + e_h)
y = concat_h(softmax(q_h k_h^T / sqrt(D)) v_h) W_o""",
    papers=(
        Paper(
            "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention",
            "Xue, Aletras",
            2023,
            "2310.07911",
            "abstract, whose counts of parameters fit; the authors' repository holds no code",
        ),
    ),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "mask", "streaming", "dropout", "compile"},
    traits={"position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D", "2*S*D"),
    claim="Projections have 3 M D numbers and embeddings 3 M, and without embeddings all heads are one: "
    "tests/mixers/test_head_embeddings.py::test_heads_differ_by_their_embeddings_alone.",
    differs=(
        "The equations and the 1 + of the product are recalled, not read; they fit the paper's counts of parameters.",
        "A stream keeps the shared key and value, H times smaller than those of all heads, and derives the rest.",
        "No positions of its own: with rotation after the embeddings c_h would count in the add form, too.",
    ),
    verified="reconstructed",
    tries={"std": 0.5},
    defaults={
        "form": "ours, the first of the two",
        "std": "ours, as embeddings start",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)

Form = Literal["add", "multiply"]


def embed(z: Float[Tensor, "B 1 S D"], embedding: Float[Tensor, "H D"], form: Form) -> Float[Tensor, "B H S D"]:
    """What each head makes of the shared z."""
    mine = embedding.to(z.dtype)[:, None]
    return z + mine if form == "add" else z * (1 + mine)


@CARD.module
class MultiHeadEmbedding(Attention):
    """Attention whose heads share the projections of one.

    Args:
        dim, num_heads, head_dim, causal, dropout, bias, context_dim: as in `regard.Attention`.
        form: whether embeddings are added to queries, keys and values, or scale them.
        std: spread of the embeddings at the start; at 0 all heads would be one.
    """

    reads_as_kept = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: Form = "add",
        std: float = 0.02,
        head_dim: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        context_dim: int | None = None,
    ) -> None:
        choice(self, get_args(Form), form=form)
        number(self, least=0, std=std)
        sizes: dict[str, Any] = {"num_kv_heads": 1, "head_dim": head_dim, "context_dim": context_dim}
        super().__init__(dim, num_heads, causal=causal, dropout=dropout, bias=bias, **sizes)
        self.q_proj = nn.Linear(dim, self.head_dim, bias=bias)
        self.form, self.std = form, std
        for name in "qkv":
            setattr(self, f"{name}_embedding", nn.Parameter(torch.empty(num_heads, self.head_dim)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for embedding in (self.q_embedding, self.k_embedding, self.v_embedding):
            nn.init.normal_(embedding, std=self.std)

    def _project(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x)[:, None], self.k_proj(source)[:, None], self.v_proj(source)[:, None]
        return embed(q, self.q_embedding, self.form), k, v, x, source

    def _problem(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Problem:
        k, v = embed(k, self.k_embedding, self.form), embed(v, self.v_embedding, self.form)
        return super()._problem(q, k, v, *rest, **more)
