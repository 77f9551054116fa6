"""Subsampled self-attention: training leaves most sources out, anew each step; evaluation is dense.

Several passes with subsampling="always" make the paper's self-ensemble.
"""

from typing import Literal, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, number, whole
from regard.kernels.check import check_inputs
from regard.masks import causal as causal_mask
from regard.masks import padding
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import HeadMixer, Projections

CARD = Card(
    "ssa",
    equation="""unbiased   all targets attend to the same S / r sources, drawn at random
local      target i attends to {pi(m): floor(m / w) = floor(i / w)}, w = S / r, pi a shuffle that moves little
else       (in eval, and for the last training steps) dense attention""",
    papers=(
        Paper(
            "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
            "Hussain, Zaki, Subramanian",
            2023,
            "2306.01705",
            "abstract; introduction; figure 3; no code is public",
        ),
    ),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "gqa", "compile"},
    traits=PLAIN - {"shift_invariant"},
    cost=Cost("2*B*H*T*S*D", ""),
    claim="A training step computes exactly 1/r of the scores, and a model so trained is as good dense: "
    "tests/training/test_ssa.py::test_computes_a_ratio_of_the_scores, "
    "tests/training/test_ssa.py::test_a_model_trained_on_subsamples_is_as_good_dense.",
    differs=(
        "Inferred: the local shuffle sorts m + spread * w * noise.",
        "Inferred: one draw serves batch and heads.",
        "Inferred: causally, a target attends to those of its sources that are not later, and gives 0 if none is.",
    ),
    verified="reconstructed",
    exceptions={"L29": "training draws the sources from torch's generator, as dropout does"},
    defaults={
        "ratio": "paper, abstract",
        "kind": "ours, the authors' project page prefers it",
        "spread": "ours",
        "subsampling": "paper",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)


Keep = Bool[Tensor, "B S"] | None


def local_shuffle(S: int, spread: float, *, device: torch.device | str | None = None) -> Int[Tensor, " S"]:
    """A random order in which a source moves by about `spread` places."""
    return torch.argsort(torch.arange(S, device=device) + spread * torch.randn(S, device=device))


def attend_to_some(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    kept: Int[Tensor, " N"],
    *,
    causal: bool = False,
    keep: Keep = None,
) -> Float[Tensor, "B H T V"]:
    """Unbiased: all targets attend to the sources `kept`; the others are not computed."""
    check_inputs(q, k, v)
    mask = None
    if causal:
        T, S = q.shape[2], k.shape[2]
        mask = (kept <= torch.arange(S - T, S, device=q.device)[:, None])[None, None]
    if keep is not None:
        hidden = keep[:, None, None, kept]
        mask = hidden.expand(-1, -1, q.shape[2], -1) if mask is None else mask & hidden
    return attention(q, k[:, :, kept], v[:, :, kept], mask=mask)


def attend_in_windows(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    order: Int[Tensor, " S"],
    count: int,
    *,
    causal: bool = False,
    keep: Keep = None,
) -> Float[Tensor, "B H T V"]:
    """Local: the n-th of `count` windows of targets attends to the n-th window of the sources in their new order."""
    check_inputs(q, k, v)
    B, (T, S) = len(q), (q.shape[2], k.shape[2])
    s = -(-S // count)
    count = -(-S // s)  # no window of sources is empty
    t = -(-T // count)

    def cut(z: Tensor, size: int) -> Tensor:
        """(B, H, N, D) -> (B * count, H, size, D), the end filled with zeros."""
        z = pad(z, (0, 0, 0, size * count - z.shape[2])).unflatten(2, (count, size))
        return z.transpose(1, 2).flatten(0, 1)

    mask = None
    if causal or keep is not None or s * count > S:
        real = torch.ones(1, S, dtype=torch.bool, device=q.device) if keep is None else keep
        mask = pad(real[:, order], (0, s * count - S)).view(-1, count, 1, s)
        if causal:
            i = pad(torch.arange(S - T, S, device=q.device), (0, t * count - T)).view(count, t, 1)
            mask = mask & (pad(order, (0, s * count - S)).view(count, 1, s) <= i)
        mask = mask.expand(B, count, t, s).flatten(0, 1)[:, None]
    out = attention(cut(q, t), cut(k[:, :, order], s), cut(v[:, :, order], s), mask=mask)
    return out.unflatten(0, (B, count)).transpose(1, 2).flatten(2, 3)[:, :, :T]


@CARD.module
class SubsampledAttention(HeadMixer):
    """Dense attention whose sources are subsampled in training.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        ratio: r; a layer computes 1 / r of the scores. The paper has 4 to 8.
        kind: "local" windows of sources shuffled a little, or "unbiased": the same random sources for all.
        spread: how far local shuffling moves a source, in windows; the default is this library's.
        subsampling: "training" or "always"; set the attribute to "never" for the dense steps at the end of training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ratio: int = 4,
        kind: Literal["local", "unbiased"] = "local",
        spread: float = 0.5,
        subsampling: Literal["training", "always", "never"] = "training",
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        whole(self, ratio=ratio)
        number(self, least=0, spread=spread)
        choice(self, ("local", "unbiased"), kind=kind)
        choice(self, ("training", "always", "never"), subsampling=subsampling)
        self.ratio, self.kind, self.spread, self.subsampling = ratio, kind, spread, subsampling

    def mix(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"], keep: Keep
    ) -> Float[Tensor, "B H T D"]:
        S, device = k.shape[2], k.device
        if self.subsampling == "never" or (self.subsampling == "training" and not self.training):
            masks = ([causal_mask()] if self.causal else []) + ([] if keep is None else [padding(keep)])
            seen = masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None
            return attention(q, k, v, mask=seen)
        if self.kind == "unbiased":
            kept = torch.randperm(S, device=device)[: -(-S // self.ratio)]
            return attend_to_some(q, k, v, kept, causal=self.causal, keep=keep)
        order = local_shuffle(S, self.spread * S / self.ratio, device=device)
        return attend_in_windows(q, k, v, order, self.ratio, causal=self.causal, keep=keep)
