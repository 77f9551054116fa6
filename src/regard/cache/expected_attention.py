"""Expected attention: the keys that queries like those so far will attend to from positions to come."""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cache.evict import LIMITS, TRIES, Asked, Evicting, Limits, Scores
from regard.cards import Card, Cost, Paper
from regard.checks import whole
from regard.kinds import Turn

CARD = Card(
    "expected_attention",
    equation="""q ~ N(mu, C) over a prompt's queries before rotation
R: the mean rotation of the `future` positions ahead
score_j = |v_j| mean over the group's heads of softmax_j(k_j . R mu / sqrt(D) + k_j^T R C R^T k_j / (2 D))
kept: the first `sinks`, and the highest scores""",
    papers=(
        Paper(
            "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
            "Devoto, Jeblick, Jégou",
            2025,
            "2510.00636",
            "abstract; kvpress, by the authors",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*H*(T + S)*D*D", "budget*G*(2*D + 2)"),
    claim="Keys that the prompt's queries ask for on the average are kept: "
    "tests/cache/test_policies.py::test_what_is_expected_stays.",
    differs=(
        "The budget holds while tokens are generated too: the prompt's keys go by their scores, and generated ones "
        "stay while there are any of these.",
    ),
    verified="third-party",
    example={"budget": 5, "sinks": 1, "future": 4},
    tries={"sinks": 2, "future": ..., **TRIES},
    defaults={"sinks": "code", "future": "code", **LIMITS},
)


def mean_rotation(turn: Turn, at: Tensor, like: Tensor) -> Float[Tensor, "*b D D"]:
    """The mean of the rotations of positions `at`, (f,) or (B, f), as matrices that act on columns."""
    D = like.shape[-1]
    eye = torch.eye(D, dtype=like.dtype, device=like.device)
    at = at if at.dim() == 2 else at[None]
    z = eye[None, :, None].expand(len(at), D, at.shape[1], D)  # heads are the unit vectors
    return turn(z, at).mean(2).mT


def expected_scores(asked: Asked, *, sinks: int, future: int) -> Scores:
    """The scores of all keys; those of the first `sinks` are 1 more than any."""
    if asked.q is None:
        raise ValueError("expected_scores: q is missing (got None); expected the queries of this call")
    wide = torch.promote_types(asked.k.dtype, torch.float32)
    q, k = asked.q.to(wide), asked.k.to(wide)
    (B, H, _, D), G = q.shape, k.shape[1]
    if asked.turn is not None:
        q = asked.turn(q, -asked.at.clamp(min=0))
    counted = asked.at >= sinks
    if not bool(counted.any(1).all()):
        counted = asked.at >= 0
    w = counted[:, None, :, None].to(wide)
    total = w.sum(2, keepdim=True).clamp(min=1)
    mu = (q * w).sum(2, keepdim=True) / total
    off = (q - mu) * w
    mu, C = mu[:, :, 0], off.mT @ off / total
    if asked.turn is not None:
        ahead = torch.arange(future, device=q.device)
        seen = asked.seen
        R = mean_rotation(asked.turn, ahead + (seen[:, None] if isinstance(seen, Tensor) else seen), q)[:, None]
        mu, C = (R @ mu[..., None])[..., 0], R @ C @ R.mT
    group = (B, G, H // G)
    logits = torch.einsum("bgnd,bgrd->bgrn", k, mu.view(*group, D)) * D**-0.5
    logits = logits + torch.einsum("bgnd,bgrde,bgne->bgrn", k, C.view(*group, D, D), k) / (2 * D)
    first = (asked.positions >= 0) & (asked.positions < sinks)
    hidden = (first | (asked.positions < 0))[:, :, None]
    scores = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(2)
    scores = scores.masked_fill(hidden[:, :, 0], 0.0) * asked.v.to(wide).norm(dim=-1)
    return torch.where(first, scores.amax() + 1, scores)


@CARD.module
class ExpectedAttention(Evicting):
    """Keeps what future queries are expected to attend to.

    Args:
        sinks: the first tokens, which are kept, and whose queries are not counted.
        future: how many positions ahead are averaged over.
        limits: `budget` and `every`, as of `regard.cache.Evicting`.
    """

    needs_queries = needs_turn = judges_always = True

    def __init__(self, *, sinks: int = 4, future: int = 512, **limits: Unpack[Limits]) -> None:
        super().__init__(**limits)
        whole(self, 0, sinks=sinks)
        whole(self, future=future)
        self.sinks, self.future = sinks, future

    def judge(self, asked: Asked) -> tuple[Scores, Scores]:
        if asked.at.shape[1] > 1 or asked.carried is None:
            scores = expected_scores(asked, sinks=self.sinks, future=self.future)
        else:  # generated: kept while there are others
            scores = torch.cat([asked.carried[..., :-1], torch.full_like(asked.carried[..., -1:], torch.inf)], -1)
        return scores, scores
