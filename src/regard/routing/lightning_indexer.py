"""Lightning indexer (DeepSeek sparse attention): small heads score keys, attention sees the best k.

The indexer is no part of what the layer computes, so it learns from its own loss: how far the softmax of its scores is
from the attention of all heads together, first over all keys, then over those chosen.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.cards import Card, Cost, Paper
from regard.checks import divides, flag, refuse, whole
from regard.kernels.native import build
from regard.kernels.native.listed import indexed, ready
from regard.kernels.problem import dots
from regard.masks import Mask, dense, full, listed
from regard.normalizers.softmax import softmax
from regard.positions.rotary import Rotary, Scaling
from regard.routing._indexing import PAIRS, best, index_scores, places
from regard.routing._shared import hides_keys_only, real_keys
from regard.stages import Made, Selector, Tokens
from regard.tracing import exporting, readable

if TYPE_CHECKING:
    from regard.pipeline.layer import Attention

CARD = Card(
    "lightning_indexer",
    equation="""q~_t,h = rotated parts of x_t W_q, one for each of H~ = num_index_heads;   w_t = x_t W_w / sqrt(H~)
k~_s = rotated LayerNorm(x_s W_k), one for all heads;   the first rope_dim features turn
I_ts = sum over h of w_t,h relu(q~_t,h . k~_s / sqrt(index_dim))
seen by query t in every head: the topk visible keys of largest I_ts; of equals, the latest
loss = mean over t of KL( attention of t summed over heads, / H  ||  softmax over s of I_ts )""",
    papers=(
        Paper(
            "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention",
            "DeepSeek-AI",
            2025,
            "DeepSeek's report on V3.2-Exp",
            "equations of scores and choice; accounts of the training; the authors' inference code; transformers",
        ),
    ),
    supports={"causal", "padding", "packed", "mask", "gqa", "streaming", "dropout", "compile"},
    lacks={"cross": "its queries and keys are rotated by places in one sequence"},
    traits={"normalised", "nonnegative", "linear_in_values", "shift_invariant", "sparse", "routed"},
    cost=Cost(
        "B*H*D*(2*T*min(T, topk) - min(T, topk)**2) + B*T*M*(num_index_heads*(index_dim + 1) + index_dim)"
        " + min(1, floor(S/(topk + 1)))*B*T*S*num_index_heads*index_dim",
        "2*S*G*D + S*index_dim",
    ),
    claim="Keys beyond the best k change nothing, and a short training finds the keys that attention reads: "
    "tests/routing/test_lightning_indexer.py::test_sees_the_best_keys_alone, "
    "tests/routing/test_lightning_indexer.py::test_training_finds_what_attention_reads.",
    differs=(
        "Choosing costs T^2 in the paper, too, for small heads. Compiled and exported, all that it chose is a byte for "
        "each pair, and attention to it runs as with any mask, which spares no time.",
        "In V3.2 queries are made of the latent of `mla`, as in `dsa`; over other layers they are made of the tokens.",
        "Numbers are as wide as the layer's, where the authors quantise queries and keys to 8 bits behind a Hadamard "
        "transform, which changes no exact score.",
        "Pairs are half of rope_dim apart, as in transformers and the authors' later code; the first had neighbours.",
        "Of equal scores, as relu's zeros, the latest keys are seen; the authors' code leaves it to torch.topk.",
        "Inferred: the loss is the mean over queries. Layers that do more than softmax of dot products have none.",
    ),
    verified="third-party",
    exceptions={"L43": "the choice has no gradient: the indexer learns from its divergence alone"},
    example={"num_index_heads": 3, "index_dim": 6, "topk": 4, "rope_dim": 4},
    tasks=("mqar(topk=16, num_index_heads=4, index_dim=16, rope_dim=8)",),
    defaults=dict.fromkeys(("num_index_heads", "index_dim", "topk", "rope_dim", "base"), "code"),
)


@CARD.fills("selector", closed=("q_dim", "scaling"))
class LightningIndexer(Selector):
    """Chooses keys for all heads of a layer alike.

    Args:
        dim: M, of the tokens.
        num_index_heads, index_dim: H~ and the width of each.
        topk: keys that a query sees.
        rope_dim: features that turn with their place, an even number of them; 0 for none.
        base: of the rotation.
        q_dim: width of what queries are made of in `features`, where it is not the tokens.
        scaling: of the rotation, as in `regard.positions.Rotary`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_index_heads: int = 64,
        index_dim: int = 128,
        topk: int = 2048,
        rope_dim: int = 64,
        base: float = 10000.0,
        q_dim: int | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_index_heads=num_index_heads, index_dim=index_dim, topk=topk)
        whole(self, 0, most=index_dim, rope_dim=rope_dim)
        divides(self, pair=2, rope_dim=rope_dim)
        q_dim = dim if q_dim is None else q_dim
        whole(self, q_dim=q_dim)
        self.num_index_heads, self.index_dim, self.topk = num_index_heads, index_dim, topk
        self.rotary = Rotary(rope_dim, base=base, scaling=scaling) if rope_dim else None
        self.wq_b = nn.Linear(q_dim, num_index_heads * index_dim, bias=False)
        self.wk = nn.Linear(dim, index_dim, bias=False)
        self.k_norm = nn.LayerNorm(index_dim, eps=1e-6)
        self.weights_proj = nn.Linear(dim, num_index_heads, bias=False)

    def extra_repr(self) -> str:
        return f"num_index_heads={self.num_index_heads}, index_dim={self.index_dim}, topk={self.topk}"

    def prepare(self, tokens: Tokens) -> Made:
        if self.wq_b.in_features != tokens.x.shape[2]:
            got, wanted = (
                tokens.x.shape[2],
                f"a layer that calls `features` with latents of width {self.wq_b.in_features}",
            )
            refuse(self, "q_dim", "is not the tokens' width", got, wanted)
        return self.features(tokens.context, tokens.x, tokens.positions)

    def features(
        self, x: Float[Tensor, "B T M"], latent: Float[Tensor, "B T C"], positions: Int[Tensor, "*b T"]
    ) -> Made:
        """Queries, each with its weight behind it, and keys; queries are made of the latent."""
        q = self._turned(self.wq_b(latent).unflatten(-1, (self.num_index_heads, -1)).transpose(1, 2), positions)
        w = self.weights_proj(x).mT.unsqueeze(-1) * self.num_index_heads**-0.5
        k = self._turned(self.k_norm(self.wk(x)).unsqueeze(1), positions)
        return Made(query=torch.cat([q, w.to(q.dtype)], -1).to(x.dtype), key=k.to(x.dtype))

    def _turned(self, z: Float[Tensor, "B h T D"], positions: Tensor) -> Tensor:
        if self.rotary is None:
            return z
        turning, still = z.tensor_split((self.rotary.head_dim,), -1)
        return torch.cat([self.rotary.rotate(turning, positions), still], -1)

    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None, made: Made | None = None
    ) -> Mask:
        S = k.shape[2]
        query, key = self._given(made)
        if q.numel() == 0 or k.numel() == 0 or (not exporting() and self.topk >= S):
            return full()
        # By torch's own operations single keys are gathered more slowly than all are seen through a mask.
        quick = readable(query, key) and key.is_cpu and not build.why_not()
        found = self._listed(query, key, mask) if quick else None
        if found is not None:
            return listed(found.unsqueeze(1), query.shape[2], S)
        scores = (self._scores(query, key, rows, mask) for rows in self._chunks(query, key))
        tiles = [best(I, self.topk) & (-math.inf != I) for I in scores]
        return dense(torch.cat(tiles, 1).unsqueeze(1))

    def _listed(self, query: Tensor, key: Tensor, mask: Mask | None) -> Int[Tensor, "B T n"] | None:
        """The chosen keys of each query, -1 where there are fewer; None where a score is NaN."""
        T, S = query.shape[2], key.shape[2]
        causal = mask is not None and mask.is_causal
        if hides_keys_only(mask) and ready(query) and ready(key):
            q, w = query.tensor_split((self.index_dim,), -1)
            real = real_keys(mask, S, key.device)
            keep = None if real is None else real[:, 0]
            scaled = q * self.index_dim**-0.5
            return indexed(scaled, w.squeeze(-1), key[:, 0], self.topk, causal=causal, keep=keep)
        lists = []
        for rows in self._chunks(query, key):
            end = min(S, max(1, int(rows[-1]) + 1 + S - T)) if causal else S
            I = self._scores(query, key[:, :, :end], rows, mask, first=S - T)
            top = I.topk(min(self.topk + 1, end), sorted=False)
            if bool(top.values.isnan().any()):
                return None
            some = places(I, top.values, top.indices, self.topk)
            lists.append(F.pad(some, (0, self.topk + 1 - some.shape[-1]), value=-1))
        return torch.cat(lists, 1)

    def divergence(
        self,
        layer: "Attention",
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "#B #H T T"] | None = None,
        chosen: bool = False,
    ) -> Float[Tensor, ""]:
        """The loss of the indexer in this layer, for these tokens. It has no gradient but for the indexer's parameters.

        Args:
            mask: as of the layer.
            chosen: over the keys that are chosen alone; else over all that may be seen, as in the warm-up.
        """
        flag(self, chosen=chosen)
        if getattr(layer, "selector", None) is not self:
            refuse(self, "layer", "has another selector", type(layer).__name__, "the layer that this one stands in")
        p, _, allowed, _ = layer._prepare(x.detach(), None, mask, None)
        if p.stages:
            names = ", ".join(type(stage).__name__ for stage in p.stages)
            refuse(self, "layer", "does more than softmax of dot products", names, "no stages but rotation")
        query, key = self._given((p.made or {}).get("selector"))
        seen, q, k = p.mask if chosen else allowed, p.q.detach(), p.k.detach()
        i, j = (torch.arange(n, device=x.device) for n in (q.shape[2], k.shape[2]))

        def run(rows: Tensor) -> tuple[Tensor, Tensor]:
            I = self._scores(query, key, rows, seen)
            sees = None if seen is None else seen.at(i[rows], j)
            target = softmax(dots(q[:, :, rows], k) * p.scale, sees).mean(1).to(I.dtype)
            alive = I.ne(-math.inf).any(-1, keepdim=True)
            guess = I.masked_fill(~alive, 0).log_softmax(-1)
            terms = torch.where(target > 0, target.clamp(min=torch.finfo(I.dtype).tiny).log() - guess, 0.0) * target
            return terms.masked_fill(~alive, 0).sum(), alive.sum()

        chunks = self._chunks(query, key)
        if torch.is_grad_enabled():  # scores of all index heads are formed again in backward
            sums = [checkpoint(run, rows, use_reentrant=False, preserve_rng_state=False) for rows in chunks]
        else:
            sums = [run(rows) for rows in chunks]
        total, count = (torch.stack(z).sum() for z in zip(*sums))
        return total / count.clamp(min=1)

    def _given(self, made: Made | None) -> tuple[Float[Tensor, "B h T D1"], Float[Tensor, "B 1 S D"]]:
        if made is None or made.query is None or made.key is None:
            refuse(self, "made", "is missing", made, "what prepare gives, as regard.Attention asks")
        return made.query, made.key

    def _chunks(self, query: Tensor, key: Tensor) -> list[Tensor]:
        """Query rows that are scored together."""
        (B, h, T, _), S = query.shape, key.shape[2]
        rows = torch.arange(T, device=key.device)
        return [rows] if exporting() else list(rows.split(max(1, PAIRS // max(1, B * h * S))))

    def _scores(
        self, query: Tensor, key: Tensor, rows: Tensor, mask: Mask | None, first: int | None = None
    ) -> Float[Tensor, "B t S"]:
        """I of these rows, the first of which stands at `first`; -inf where no head may see a key."""
        q, w = query[:, :, rows].tensor_split((self.index_dim,), -1)
        T, S = query.shape[2], key.shape[2]
        first = S - T if first is None else first
        scores = index_scores(q, key, w.squeeze(-1).mT)
        if mask is None:
            return scores
        return scores.masked_fill(~mask.at(rows + first, torch.arange(S, device=rows.device)).any(1), -math.inf)
