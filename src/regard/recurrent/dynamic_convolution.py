"""Dynamic convolution attention: the next weights come from filters of the last, not from content.

The prior P, the probabilities of a beta-binomial distribution, reaches back only, so that moving backwards would have
to overcome a factor of up to 1e6.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import number, refuse, whole
from regard.recurrent._aligner import normalise
from regard.recurrent.location import LOCATION_PAPER, LocationAligner

CARD = Card(
    "dynamic_convolution_attention",
    equation="""f = F * alpha_{t-1}        g = G(s_t) * alpha_{t-1}        p = log max(P * alpha_{t-1}, 1e-6)
alpha_t = softmax_j(v . tanh(U f_j + T g_j + b) + p_j)     G(s) = V_G tanh(W_G s + b_G)     c_t = sum_j alpha_tj H_j
* is correlation with zeros outside""",
    papers=(replace(LOCATION_PAPER, read="abstract; equations of two public implementations"),),
    protocol="CrossMixer",
    supports={"bidirectional", "padding"},
    cost=Cost(
        "B*T*S*((static_filters + dynamic_filters)*(filter_length + hidden) + prior_length + hidden + M)"
        " + B*T*hidden*(M + dynamic_filters*filter_length)",
        "S",
    ),
    claim="Looks at no content, moves forward, and aligns sequences longer than any seen in training: "
    "tests/recurrent/test_dynamic_convolution.py::test_content_does_not_count_and_places_are_relative, "
    "tests/recurrent/test_dynamic_convolution.py::test_generalises_to_longer_sequences.",
    differs=("With padding, the alignment starts at the first real token.",),
    verified="reconstructed",
    example={"hidden": 8, "static_filters": 3, "dynamic_filters": 2, "filter_length": 5, "prior_length": 4},
    defaults={
        "hidden": "code, bshall/Tacotron",
        "static_filters": "paper",
        "dynamic_filters": "paper",
        "filter_length": "paper",
        "prior_length": "paper",
        "prior_alpha": "paper",
        "prior_beta": "paper",
    },
)


MOST = 1000
"""Of the prior's places: beyond 1030 a binomial coefficient is no float64 number."""


def beta_binomial(length: int, a: float, b: float) -> tuple[float, ...]:
    """Probabilities of 0 .. length - 1 moves; their mean is (length - 1) a / (a + b)."""
    n = length - 1

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    return tuple(math.comb(n, k) * math.exp(log_beta(k + a, n - k + b) - log_beta(a, b)) for k in range(length))


def windows(alpha: Float[Tensor, "B S"], before: int, after: int) -> Float[Tensor, "B S W"]:
    """alpha[j - before .. j + after] for each j; zeros outside."""
    return nn.functional.pad(alpha, (before, after)).unfold(1, before + after + 1, 1)


@CARD.module(closed=("context_dim",))
class DynamicConvolutionAttention(LocationAligner):
    """Static and dynamic filters of the last alignment, and a fixed prior that moves it forward.

    Args:
        dim, context_dim: widths of decoder states and of the context.
        hidden: A, of the energies and of the filter generator; the defaults are those of the public implementations.
        static_filters, dynamic_filters: how many.
        filter_length: odd.
        prior_length: the prior moves by 0 .. prior_length - 1 places a step; at most 1000.
        prior_alpha, prior_beta: of its beta-binomial distribution. With the defaults it moves by 1 a step on average.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        hidden: int = 128,
        static_filters: int = 8,
        dynamic_filters: int = 8,
        filter_length: int = 21,
        prior_length: int = 11,
        prior_alpha: float = 0.1,
        prior_beta: float = 0.9,
    ) -> None:
        super().__init__(dim, context_dim)
        whole(self, hidden=hidden, static_filters=static_filters, dynamic_filters=dynamic_filters)
        whole(self, filter_length=filter_length)
        whole(self, most=MOST, prior_length=prior_length)
        number(self, above=0, prior_alpha=prior_alpha, prior_beta=prior_beta)
        if filter_length % 2 == 0:
            refuse(self, "filter_length", "is even", filter_length, "an odd int")
        self.filter_length, self.prior = filter_length, beta_binomial(prior_length, prior_alpha, prior_beta)
        self.filter_hidden = nn.Linear(dim, hidden)
        self.filter_out = nn.Linear(hidden, dynamic_filters * filter_length, bias=False)
        self.static_filter = nn.Parameter(torch.empty(static_filters, filter_length))
        self.static_proj = nn.Linear(static_filters, hidden, bias=False)
        self.dynamic_proj = nn.Linear(dynamic_filters, hidden)
        self.score = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.filter_hidden, self.filter_out, self.static_proj, self.dynamic_proj):
            layer.reset_parameters()
        for filters in (self.static_filter, self.score):
            bound = int(filters.shape[-1]) ** -0.5
            nn.init.uniform_(filters, -bound, bound)

    def origin(self, x: Tensor, context: Tensor, keep: Tensor | None) -> Float[Tensor, "B S"]:
        """All weight on the first real token."""
        alpha = context.new_zeros(context.shape[:2], dtype=torch.promote_types(context.dtype, torch.float32))
        if not context.shape[1]:
            return alpha
        real = torch.ones_like(alpha) if keep is None else keep.to(alpha.dtype)
        return alpha.scatter(1, real.argmax(1, keepdim=True), 1.0)

    def advance(
        self, x: Tensor, context: Tensor, keep: Tensor | None, at: Float[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B t S"], Float[Tensor, "B S"]]:
        """One step needs the one before, so the steps are taken in turn; filters are made for all at once."""
        half, L = self.filter_length // 2, len(self.prior)
        filters = self.filter_out(torch.tanh(self.filter_hidden(x))).unflatten(-1, (-1, self.filter_length))
        seen, rows = None if keep is None else keep[:, None], []
        prior = at.new_tensor(self.prior[::-1])
        for dynamic in filters.unbind(1):
            near = windows(at, half, half).to(x.dtype)
            f, g = near @ self.static_filter.T, near @ dynamic.mT
            energy = torch.tanh(self.static_proj(f) + self.dynamic_proj(g)) @ self.score
            moved = windows(at, L - 1, 0) @ prior
            at = normalise((energy + moved.clamp_min(1e-6).log())[:, None], seen)[:, 0]
            rows.append(at)
        weights = torch.stack(rows, 1) if rows else at.new_zeros(len(at), 0, at.shape[1])
        return weights.to(x.dtype), at
