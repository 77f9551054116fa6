"""Attention as a marginal: a weight is the probability that a hidden edge is there, given the scores.

Which edges a query may have at once is known beforehand, by a structure; how likely each is, by a prior, whose
logarithm is added to the scores: causal masks and relative biases are priors. Softmax is what one edge a query gives.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Paper
from regard.checks import checked, choice, number, refuse, whole
from regard.normalizers._structures import (
    AtMostOne,
    Chain,
    ExactlyK,
    Independent,
    OneEdge,
    Structure,
)
from regard.stages import Normalizer

CARD = Card(
    "marginal",
    equation="""A_ts = p(phi_ts = 1 | x) = d log Z_t / d theta_ts,   Z_t = sum_phi exp(sum_s phi_ts theta_ts)
theta = q k^T / sqrt(D) + log_odds;   sets phi: no edge or one; any; exactly k; any, with a chain along s
y_t = E[sum_s phi_ts v_s] = sum_s A_ts v_s""",
    papers=(
        Paper(
            "Attention: Marginal Probability is All You Need?",
            "Singh, Buckley",
            2023,
            "2304.04556",
            "abstract and first page; the equations are the usual ones of structured attention",
        ),
        Paper("Attention as Implicit Structural Inference", "Singh, Buckley", 2023, "NeurIPS 2023", "abstract"),
    ),
    traits=PLAIN - {"normalised"},
    claim="Attention with no edge, with k edges and with edges that bring on others are the exact marginals of one "
    "posterior under several priors: "
    "tests/normalizers/test_marginal.py::test_a_layer_gives_the_expectation_over_all_sets.",
    differs=(
        "Which structures the paper itself lists is not known here: those built are softmax's and its usual kin.",
        "A hidden key is not in the chain: its neighbours meet, so that padding and later keys change nothing.",
        "Where a query sees fewer than k keys, which no set fits, each counts in full in a layer; functions give 0.",
        "Trees couple queries, so they are the function `tree_marginals` and no normaliser.",
        "The hyper-prior of the later paper is not built; the most likely set is the limit of great scores.",
    ),
    verified="reconstructed",
    tries={
        "count": {"structure": "exactly_k", "count": 3},
        "stay": {"structure": "chain", "stay": 2.0},
    },
    defaults={"structure": "ours", "count": "ours", "stay": "ours", "log_odds": "ours"},
)

Name = Literal["at_most_one", "one", "independent", "exactly_k", "chain"]


def _ready(theta: Tensor, keep: Tensor | None, log_prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """In at least fp32, with the prior; edges of probability 0 are hidden."""
    z = theta.to(torch.promote_types(theta.dtype, torch.float32))
    if log_prior is not None:
        z = z + log_prior.to(z.dtype)
    shown = z != -math.inf
    if keep is not None:
        shown = shown & keep
    return z.masked_fill(~shown, 0.0), shown


@checked()
def edge_marginals(
    theta: Float[Tensor, "... S"],
    structure: Structure,
    keep: Bool[Tensor, "..."] | None = None,
    *,
    log_prior: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "... S"]:
    """p(phi_ts = 1 | x) of each edge; 0 for those hidden, and where there is no set of edges at all.

    Args:
        keep: False = the edge is not there.
        log_prior: added to theta; of structures with no edge or several it is the logarithm of prior odds.
    """
    if theta.shape[-1] == 0:
        return theta
    return structure.marginals(*_ready(theta, keep, log_prior)).to(theta.dtype)


@checked()
def log_partition(
    theta: Float[Tensor, "... S"],
    structure: Structure,
    keep: Bool[Tensor, "..."] | None = None,
    *,
    log_prior: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """log Z of each row, whose gradients are the marginals."""
    if theta.shape[-1] == 0:
        refuse("log_partition", "theta", "has no edges", tuple(theta.shape), "(..., S) with S >= 1")
    return structure.log_partition(*_ready(theta, keep, log_prior)).to(theta.dtype)


def expected_value(
    theta: Float[Tensor, "... T S"], structure: Structure, v: Float[Tensor, "... S V"], **rest: Any
) -> Float[Tensor, "... T V"]:
    """E[sum_s phi_ts v_s]; `rest` as of `edge_marginals`. Values that are no such sum need `brute_force`."""
    return edge_marginals(theta, structure, **rest) @ v


def brute_force(
    theta: Float[Tensor, "... S"],
    structure: Structure,
    value: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "... V"]:
    """The expectation over all 2^S sets, for S <= 10.

    Args:
        value: of sets (N, S) of 0 and 1 -> (N, V); default the sets themselves, whose expectation are the marginals.
    """
    S = theta.shape[-1]
    if not 1 <= S <= 10:
        refuse("brute_force", "theta", "has another number of edges than can be gone through", S, "1 to 10")
    numbers = torch.arange(2**S, device=theta.device)
    sets = (numbers[:, None] >> torch.arange(S, device=theta.device)) & 1
    weight = theta @ sets.T.to(theta.dtype) + structure.weigh(sets).to(theta)
    values = sets.to(theta.dtype) if value is None else value(sets.to(theta.dtype))
    empty = (weight.detach() == -math.inf).all(-1, keepdim=True)
    return weight.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ values


@torch.no_grad()
def sample_edges(
    theta: Float[Tensor, "... S"],
    structure: Structure,
    keep: Bool[Tensor, "... S"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "... S"]:
    """A set of edges (0 and 1) as likely as it is, drawn edge by edge given those before: S times the marginals' work.
    Hard attention; the mean of many is `edge_marginals`."""
    z, shown = _ready(theta.double(), keep, None)
    for s in range(z.shape[-1]):
        p = structure.marginals(z, shown)[..., s]
        there = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device) < p
        z[..., s] = torch.where(there, 1e4, -1e4)  # as good as certain
    return ((z > 0) & shown).to(theta.dtype)


@checked()
def tree_marginals(
    theta: Float[Tensor, "*b T T"],
    root: Float[Tensor, "*b T"] | None = None,
    keep: Bool[Tensor, "*b T T"] | None = None,
) -> tuple[Float[Tensor, "*b T T"], Float[Tensor, "*b T"], Float[Tensor, "*b"]]:
    """Every token has another token or the root as its head, without circles: by the matrix-tree theorem.

    Args:
        theta: [t, s] is the score of s being t's head; the diagonal counts for nothing.
        root: of the root being t's head, which several tokens may have; default 0.

    Returns:
        Marginals of the edges, those of the root's, and log Z.
    """
    T = theta.shape[-1]
    z, shown = _ready(theta, keep, None)
    shown = shown & ~torch.eye(T, dtype=torch.bool, device=theta.device)
    r = z.new_zeros(z.shape[:-1]) if root is None else root.to(z.dtype)
    top = torch.maximum(z.masked_fill(~shown, -math.inf).amax(-1), r).detach()  # every token has one head: drops out
    w, w_root = (z - top[..., None]).masked_fill(~shown, -math.inf).exp(), (r - top).exp()
    laplacian = torch.diag_embed(w.sum(-1) + w_root) - w
    inverse = torch.linalg.inv(laplacian)
    own = inverse.diagonal(dim1=-2, dim2=-1)
    log_z = torch.linalg.slogdet(laplacian).logabsdet + top.sum(-1)
    edges = w * (own[..., None] - inverse.mT)
    return edges.to(theta.dtype), (w_root * own).to(theta.dtype), log_z.to(theta.dtype)


def geometric_log_prior(
    T: int, rate: float | Float[Tensor, ""], S: int | None = None, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "T S"]:
    """log of (1 - rate)^(t - s), and -inf for later keys: a linear bias of slope -log(1 - rate). The last query stands
    where the last key stands."""
    S = T if S is None else S
    whole("geometric_log_prior", T=T, S=S)
    if not isinstance(rate, Tensor):
        number("geometric_log_prior", above=0, below=1, rate=rate)
    r = torch.as_tensor(rate, dtype=dtype)
    back = torch.arange(S - T, S, device=r.device)[:, None] - torch.arange(S, device=r.device)
    return ((1 - r).log() * back.clamp(min=0)).masked_fill(back < 0, -math.inf)


@checked()
def slot_means(theta: Float[Tensor, "*b T S"], v: Float[Tensor, "*b S V"]) -> Float[Tensor, "*b T V"]:
    """One edge for every key, to one of the queries as slots, and the mean of the values that each is given."""
    m = edge_marginals(theta.mT, OneEdge()).mT
    total = m.sum(-1, keepdim=True)
    return m @ v / torch.where(total == 0, 1.0, total)


@CARD.fills("normalizer")
class Marginal(Normalizer):
    """Marginals of edges as weights.

    Args:
        structure: which edges a query may have: none or one, exactly one (softmax), any, exactly `count`, or any with a
            chain of keys, whose four log potentials are learned.
        count: k, for "exactly_k"; all keys where a query sees fewer.
        stay: for "chain", where the log potentials of one key's state like the last one's start; the others start at 0.
        log_odds: added to the scores: of an edge, without any score.
    """

    def __init__(
        self, *, structure: Name = "at_most_one", count: int = 2, stay: float = 1.0, log_odds: float = 0.0
    ) -> None:
        super().__init__()
        choice(self, get_args(Name), structure=structure)
        whole(self, count=count)
        number(self, stay=stay, log_odds=log_odds)
        self.structure: Name = structure
        self.count, self.stay, self.log_odds = count, float(stay), float(log_odds)
        self.transition = nn.Parameter(torch.empty(2, 2)) if structure == "chain" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.transition is not None:
            with torch.no_grad():
                self.transition.copy_(self.stay * torch.eye(2))

    def known(self) -> Structure:
        """The structure, with what is learned of it."""
        if self.transition is not None:
            return Chain(self.transition)
        simple = {"at_most_one": AtMostOne(), "one": OneEdge(), "independent": Independent()}
        return simple[self.structure] if self.structure in simple else ExactlyK(self.count)

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        keep = None if allowed is None else allowed.expand(scores.shape)
        weights = edge_marginals(scores + self.log_odds, self.known(), keep)
        if self.structure != "exactly_k":
            return weights
        shown = scores != -math.inf if keep is None else keep & (scores != -math.inf)
        few = shown.sum(-1, keepdim=True) < self.count
        return torch.where(few, shown.to(weights.dtype), weights)

    def extra_repr(self) -> str:
        return f"{self.structure!r}, count={self.count}, log_odds={self.log_odds}"
