"""Routers of experts whose choice tokens make together, and the experts."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.checks import choice, fits, flag, whole
from regard.masks import Mask
from regard.pipeline.function import attention
from regard.tracing import readable

Vote = Callable[[Float[Tensor, "B T F"]], Float[Tensor, "B T F"]]
"""From what each token says to what those whom it listens to say, on average."""


class Routes(NamedTuple):
    """Where tokens go."""

    experts: Int[Tensor, "B T k"]
    """The best first; of equals the first."""
    weights: Float[Tensor, "B T k"]
    probs: Float[Tensor, "B T E"]
    """Over all experts, smoothed."""


def balance(routes: Routes, keep: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, ""]:
    """E times the sum over experts of the share of choices that fell on each and its mean probability; 1 at best."""
    probs, E = routes.probs, routes.probs.shape[2]
    used = F.one_hot(routes.experts, E).to(probs.dtype).mean(2)
    real = probs.new_ones(probs.shape[:2]) if keep is None else keep.to(probs.dtype)
    share, mean = ((z * real[..., None]).sum((0, 1)) / real.sum().clamp(min=1) for z in (used, probs))
    return E * (share * mean).sum()


def voting(q: Tensor, k: Tensor, mask: Mask | None, scale: float | None = None) -> Vote:
    """The mean over heads of these queries' attention, to values that are handed to it; its own where it sees none."""

    def vote(said: Float[Tensor, "B S F"]) -> Float[Tensor, "B T F"]:
        values = torch.cat([said, torch.ones_like(said[..., :1])], -1)[:, None].to(q.dtype)
        out = attention(q, k, values.expand(-1, k.shape[1], -1, -1), mask=mask, scale=scale).mean(1)
        heard, sum_of_weights = out.split([said.shape[2], 1], -1)
        return heard + (sum_of_weights == 0) * said[:, said.shape[1] - q.shape[2] :].to(q.dtype)

    return vote


class SmoothedRouter(nn.Module):
    """Which experts tokens go to.

    Args:
        dim: M.
        num_experts, top_k: E, and how many of them a token uses.
        space: "probs" are averaged, or "logits" before the softmax.
        renormalise: whether weights of the experts that a token uses sum to 1.
        weigh: outputs by the "smoothed" probabilities, or by the token's "own".

    Shapes: u (B, T, M) -> Routes.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        space: Literal["probs", "logits"] = "probs",
        renormalise: bool = True,
        weigh: Literal["smoothed", "own"] = "smoothed",
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_experts=num_experts)
        whole(self, most=num_experts, top_k=top_k)
        choice(self, ("probs", "logits"), space=space)
        choice(self, ("smoothed", "own"), weigh=weigh)
        flag(self, renormalise=renormalise)
        self.top_k, self.space, self.renormalise, self.weigh = top_k, space, renormalise, weigh
        self.gate = nn.Linear(dim, num_experts)

    def says(self, u: Float[Tensor, "B T M"]) -> Float[Tensor, "B T E"]:
        """What a token gives others to average."""
        z = self.gate(u)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z if self.space == "logits" else z.softmax(-1)

    def forward(
        self,
        u: Float[Tensor, "B T M"],
        vote: Vote | Float[Tensor, "B H T T"] | None = None,
        *,
        said: Float[Tensor, "B S E"] | None = None,
    ) -> Routes:
        """Route u.

        Args:
            vote: weights by which tokens listen to one another, whose heads count alike, or what averages by them.
            said: what all tokens say, where `vote` is about more than these.
        """
        own = self.says(u)
        if isinstance(vote, Tensor):
            fits(self, "B H T T", {"B": u.shape[0], "T": u.shape[1]}, vote=vote)
            probs = vote.mean(1).to(own.dtype) @ own
        else:
            probs = own if vote is None else vote(own if said is None else said).to(own.dtype)
        if self.space == "logits":
            own, probs = own.softmax(-1), probs.softmax(-1)
        experts = probs.detach().argsort(stable=True, dim=-1, descending=True)[..., : self.top_k]
        weights = (probs if self.weigh == "smoothed" else own).gather(-1, experts)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routes(experts, weights, probs)


class Experts(nn.Module):
    """E feed-forward networks of one hidden layer."""

    def __init__(self, dim: int, num_experts: int, hidden: int) -> None:
        super().__init__()
        whole(self, hidden=hidden)
        self.up = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.up_bias, self.down_bias = (nn.Parameter(torch.empty(num_experts, n)) for n in (hidden, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p, fan in ((self.up, self.up.shape[2]), (self.down, self.down.shape[2])):
            nn.init.uniform_(p, -1 / math.sqrt(fan), 1 / math.sqrt(fan))
        for p in (self.up_bias, self.down_bias):
            nn.init.zeros_(p)

    def forward(self, u: Float[Tensor, "B T M"], routes: Routes) -> Float[Tensor, "B T M"]:
        """Each expert runs on the tokens that it is given; where none may be counted, on all of them."""
        flat, weights = u.flatten(0, 1), routes.weights.flatten(0, 1).to(u.dtype)
        chosen, out = routes.experts.flatten(0, 1), torch.zeros_like(flat)
        for e in range(self.up.shape[0]):
            weight = (weights * (chosen == e)).sum(1, keepdim=True)
            if readable(u):
                at = (chosen == e).any(1).nonzero()[:, 0]
                out = out.index_add(0, at, weight[at] * self._run(e, flat[at]))
            else:
                out = out + weight * self._run(e, flat)
        return out.view_as(u)

    def _run(self, e: int, z: Float[Tensor, "n M"]) -> Float[Tensor, "n M"]:
        return F.linear(F.gelu(F.linear(z, self.up[e], self.up_bias[e])), self.down[e], self.down_bias[e])
