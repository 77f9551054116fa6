"""DeepSeek sparse attention: latent attention that sees the keys which a lightning indexer chooses.

The indexer makes its queries of the same latent as the layer does, and its keys of the tokens. It learns from a loss of
its own: `layer.selector.divergence(layer, x)`.
"""

from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import whole
from regard.mixers._latents import Latents
from regard.mixers.mla import MultiHeadLatentAttention
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.streaming import MADE
from regard.positions.rotary import Scaling
from regard.routing.lightning_indexer import LightningIndexer
from regard.stages import Made

CARD = Card(
    "dsa",
    equation="""[c | k_r], q_h = [q_n | q_r], k_h = [c U_h | k_r], v_h = c W_h as in `mla`
q_h of z = rms_norm(x W_qa)
q~_t,i = rotated parts of z_t W_iq, one for each of H~ = num_index_heads;   k~_s = rotated LayerNorm(x_s W_ik)
I_ts = sum over i of w_t,i relu(q~_t,i . k~_s / sqrt(index_dim)),   w_t = x_t W_w / sqrt(H~)
S_t = the topk keys s <= t of largest I_ts,   the same for all heads
y_t = concat_h(sum over s in S_t of softmax_{S_t}(q_t,h . k_s,h / sqrt(N + R)) v_s,h) W_o""",
    papers=(
        Paper(
            "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention",
            "DeepSeek-AI",
            2025,
            "DeepSeek's report on V3.2-Exp",
            "transformers' code of the layer",
        ),
        Paper(
            "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
            "DeepSeek-AI",
            2024,
            "2405.04434",
            "its equations of queries, keys and values in a summary; the authors' inference code of V3; transformers",
        ),
    ),
    supports={"causal", "padding", "packed", "mask", "streaming", "dropout", "compile"},
    lacks={"cross": "the indexer's queries and keys are rotated by places in one sequence"},
    traits={"normalised", "nonnegative", "shift_invariant", "sparse", "routed"},
    cost=Cost(
        "B*H*(nope_dim + rope_dim + value_dim)*(T*min(T, topk) - min(T, topk)**2/2)"
        " + B*S*(M*(kv_rank + rope_dim) + kv_rank*H*(nope_dim + value_dim))"
        " + B*T*(M*(num_index_heads + index_dim + 2*q_rank) + q_rank*num_index_heads*index_dim)"
        " + B*T*q_rank*H*(nope_dim + rope_dim)"
        " + min(1, floor(S/(topk + 1)))*B*T*S*num_index_heads*index_dim",
        "S*(kv_rank + rope_dim + index_dim)",
    ),
    claim="A step reads a small latent and a small key of each token behind it, sees no more than k of them, and gives "
    "the full pass: tests/mixers/test_dsa.py::test_steps_see_what_the_full_pass_sees.",
    differs=(
        "Turned features stay where they are, as in `mla`, and what is chosen is a mask of bytes, as in "
        "`lightning_indexer`: it spares no time yet.",
        "Numbers are as wide as the layer's, where the authors quantise the indexer's to 8 bits.",
        "Of equal scores, as relu's zeros, the latest keys are seen; the code leaves it to torch.topk.",
        "The latent of queries is made twice, for the layer and for the indexer, which gives it no gradient.",
    ),
    verified="third-party",
    exceptions={"L43": "the choice has no gradient: the indexer learns from its divergence alone"},
    example={
        **{"q_rank": 5, "kv_rank": 7, "nope_dim": 4, "rope_dim": 4, "value_dim": 5},
        **{"num_index_heads": 3, "index_dim": 6, "topk": 8},
    },
    tries={"absorb": ..., "q_rank": 4},
    defaults={
        **dict.fromkeys(("num_index_heads", "index_dim", "topk", "q_rank", "rope_dim", "base"), "code, transformers"),
        **dict.fromkeys(("kv_rank", "nope_dim", "value_dim", "interleaved", "eps", "bias"), "code, transformers"),
        "absorb": "code, the authors' inference code",
    },
)


@CARD.module(closed=("scaling", "scale", "kernel"))
class DeepseekSparseAttention(MultiHeadLatentAttention):
    """Causal attention from a latent of each token, over keys that its `selector` chooses.

    Args:
        dim, num_heads, dropout, kernel: as in `regard.Attention`.
        num_index_heads, index_dim, topk: as of `regard.routing.LightningIndexer`.
        q_rank: width that queries of the layer and of its indexer are made of.
        rope_dim, base, scaling: of both rotations; at most index_dim features turn.
        kv_rank, nope_dim, value_dim, interleaved, absorb, eps, bias, scale: as in `MultiHeadLatentAttention`.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    selector: LightningIndexer

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_index_heads: int = 64,
        index_dim: int = 128,
        topk: int = 2048,
        q_rank: int = 1536,
        rope_dim: int = 64,
        base: float = 10000.0,
        scaling: Scaling | None = None,
        **rest: Unpack[Latents],
    ) -> None:
        whole(self, index_dim=index_dim, q_rank=q_rank)
        whole(self, 0, most=index_dim, rope_dim=rope_dim)
        super().__init__(
            dim, num_heads, q_rank=q_rank, rope_dim=rope_dim, base=base, scaling=scaling, causal=True, **rest
        )
        self.selector = LightningIndexer(
            dim, num_index_heads=num_index_heads, index_dim=index_dim, topk=topk, rope_dim=rope_dim, base=base,
            q_dim=q_rank, scaling=scaling,
        )  # fmt: skip

    def init_state(  # type: ignore[override]
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty state: latents `c`, turned features `k_r`, and the indexer's keys (B, 1, capacity, index_dim)."""
        held = super().init_state(batch_size, capacity, device=device, dtype=dtype).buffers
        keys = held["c"].new_zeros(batch_size, 1, capacity, self.selector.index_dim)
        return KVCache({**held, MADE + "selector": keys})

    def _made(
        self,
        x: Float[Tensor, "B T M"],
        source: Tensor,
        where: Int[Tensor, "*b T"],
        past: dict[str, Tensor] | None = None,
        told: Tensor | None = None,
    ) -> dict[str, Made]:
        with torch.no_grad():  # what the layer computes is no concern of the indexer's loss
            latent = self._squeezed(x)
        return {"selector": self.selector.features(x.detach(), latent, where)}
