"""Linear log-normal attention (LLN): exp of scaled queries and keys, spread as softmax's weights are.

For Gaussian queries and keys the logarithm of softmax's weights has variance sigma_q^2 sigma_k^2. That of LLN's is, by
the authors' fit, a (alpha^2 sigma_q^2 + beta^2 sigma_k^2) + b; alpha and beta make them equal, with equal shares.
"""

from typing import Any, Literal, NamedTuple, Unpack, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits, number, refuse
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import linear_scan
from regard.kernels.sums import over_keys
from regard.linear._shared import RecurrentMixer, hide, repeat_heads, widened, with_ones
from regard.pipeline.head_mixer import Projections
from regard.pipeline.tokens import key_mask, quarantine

PAPER = Paper(
    "Linear Log-Normal Attention with Unbiased Concentration",
    "Nahshan, Kampeas, Haleva",
    2024,
    "2311.13541",
    "abstract; the authors' code",
)
CARD = Card(
    "lln",
    equation="""phi_q = exp(alpha q - max_d alpha q_d),   phi_k = exp(beta k - max_sd beta k_sd)      elementwise
out_i = phi_q(q_i) sum_j phi_k(k_j)^T v_j / (phi_q(q_i) . sum_j phi_k(k_j) + eps),   j <= i when causal
alpha = s / sigma_q,   beta = s / sigma_k,   s^2 = (sigma_q^2 sigma_k^2 - b) / (2 a),   a = 0.1486,  b = -0.3549""",
    papers=(PAPER,),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits={"nonnegative", "linear_in_values", "position_free", "shift_invariant", "head_independent"},
    cost=Cost("B*H*(T + S)*D*(D + 1)", "H*D*(D + 1) + G"),
    claim="Log-weights vary as softmax's do, which they don't with alpha = beta = 1: "
    "tests/linear/test_lln.py::test_weights_are_spread_as_softmax_s.",
    differs=(
        "sigma_q and sigma_k are fixed numbers, which `calibrate` measures; the authors' code takes them of each batch "
        "anew (statistics='batch'), so that its samples, and past and future, touch each other.",
        "The causal maximum of keys is a running one, so that no output depends on later keys; beside eps that differs "
        "from the authors' maximum of all.",
        "Hidden keys count in no maximum and no sigma; the authors' code takes no padding.",
    ),
    verified="third-party",
    defaults={
        "statistics": "ours, samples of a batch don't touch",
        "sigma": "ours, of normalised queries and keys",
        "eps": "code",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)

Statistics = Literal["fixed", "batch"]
SLOPE, OFFSET = 0.14855178144710912, -0.35487039130661086
"""a and b, the authors' fit."""


class LLNState(NamedTuple):
    """All the past leaves behind."""

    sums: Float[Tensor, "B H D V1"]
    """sum_j phi(k_j)^T [v_j, 1], phi relative to `top`."""
    top: Float[Tensor, "B G"]
    """The largest entry of beta k so far; -inf before the first key."""


def matched(sigma_q: Tensor, sigma_k: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and beta for queries and keys of these standard deviations, both > 0."""
    shared = ((sigma_q**2 * sigma_k**2 - OFFSET) / (2 * SLOPE)).sqrt()
    return shared / sigma_q, shared / sigma_k


def spread(x: Float[Tensor, "B H T D"], keep: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, ""]:
    """The standard deviation of all entries of real tokens, without gradient; 1 where it is 0 or there are too few."""
    (x,) = widened(x.detach())
    real = torch.ones_like(x) if keep is None else keep[:, None, :, None].expand_as(x).to(x.dtype)
    n = real.sum()
    mean = (hide(x, keep)).sum() / n.clamp(min=1)
    variance = ((x - mean) * real).square().sum() / (n - 1).clamp(min=1)
    return torch.where(variance > 0, variance, 1.0).sqrt()


def lln_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    alpha: float | Float[Tensor, ""],
    beta: float | Float[Tensor, ""],
    *,
    causal: bool = False,
    keep: Bool[Tensor, "B S"] | None = None,
    eps: float = 1e-8,
    state: LLNState | None = None,
) -> tuple[Float[Tensor, "B H T V"], LLNState]:
    """Outputs, and the state after the keys. Hand it back in to go on causally.

    Args:
        alpha, beta: what queries and keys are multiplied by, as `matched` gives it.
        keep: True at real keys.
        eps: added to the denominator.
    """
    check_inputs(q, k, v)
    q, k, v = widened(q, k, v)
    (B, H), G = q.shape[:2], k.shape[1]
    zq, zk = alpha * q, beta * k
    top = q.new_full((B, G), -torch.inf) if state is None else state.top
    if keep is not None:
        zk = zk.masked_fill(~keep[:, None, :, None], -torch.inf)
    peaks = zk.amax(-1)  # in the graph: beside eps it doesn't cancel
    peaks = torch.cat([top.unsqueeze(-1), peaks], -1)  # one before the first key, so that it is never empty
    tops = peaks.cummax(-1).values if causal else peaks.amax(-1, keepdim=True).expand_as(peaks)
    top, largest = tops[..., -1].clone(), tops[..., 1:, None]
    phi_k = (zk - torch.where(largest == -torch.inf, 0.0, largest)).exp()
    phi_k, v = repeat_heads(phi_k, H), with_ones(repeat_heads(v, H))
    phi_q = (zq - zq.amax(-1, keepdim=True)).exp()
    if causal:
        decay = torch.where(tops[..., :-1] == -torch.inf, 0.0, tops[..., :-1] - tops[..., 1:])
        out, sums = linear_scan(phi_q, phi_k, v, repeat_heads(decay, H), state=None if state is None else state.sums)
    else:
        sums = over_keys(phi_k.mT, v)
        out = phi_q @ sums
    total = out[..., -1:] + eps
    return out[..., :-1] / torch.where(total == 0, 1.0, total), LLNState(sums, top)


class Concentration(NamedTuple):
    """How far attention is from even, in the two measures of the paper."""

    entropy: Float[Tensor, "*b T"]
    """Of each row of weights, in nats."""
    spectral_gap: Float[Tensor, "*b"]
    """1 - |lambda_2|: 1 where all rows are equal, 0 where two sets of tokens see only themselves."""


def concentration(weights: Float[Tensor, "*b T T"]) -> Concentration:
    """Entropy of each row and spectral gap of square matrices of weights whose rows sum to 1.

    Raises:
        ValueError: what is no square matrix.
    """
    fits("concentration", "*b T T", {}, weights=weights)
    (wide,) = widened(weights)
    if wide.shape[-1] < 2:
        refuse("concentration", "weights", "has too few tokens", wide.shape[-1], "at least 2")
    sizes = torch.linalg.eigvals(wide).abs().sort(-1, descending=True).values
    return Concentration(torch.special.entr(wide).sum(-1), 1 - sizes[..., 1])


@CARD.module
class LLN(RecurrentMixer):
    """Multi-head linear log-normal attention.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        statistics: where sigma_q and sigma_k come from: "fixed", the buffers of these names; "batch", all real queries
            and keys of a call, for bidirectional layers.
        sigma: what the buffers start as; `calibrate` measures them.
        eps: added to the denominator.
    """

    sigma_q: Tensor
    sigma_k: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        statistics: Statistics = "fixed",
        sigma: float = 1.0,
        eps: float = 1e-8,
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        choice(self, get_args(Statistics), statistics=statistics)
        number(self, above=0, sigma=sigma)
        number(self, least=0, eps=eps)
        if self.causal and statistics == "batch":
            refuse(self, "statistics", "shows later tokens to earlier ones", repr(statistics), "'fixed' where causal")
        self.statistics: Statistics = statistics
        self.sigma, self.eps = sigma, eps
        for name in ("sigma_q", "sigma_k"):
            self.register_buffer(name, torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.sigma_q.fill_(self.sigma)
        self.sigma_k.fill_(self.sigma)

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "B T M"], context: Tensor | None = None, *, mask: Any = None) -> None:
        """Set sigma_q and sigma_k to those of these tokens, of which `mask` hides some as in `forward`."""
        source = x if context is None else context
        keep, _ = key_mask(self, mask, source)
        q, k, _ = self.split(quarantine(x)[0], quarantine(source)[0])
        self.sigma_q.copy_(spread(q, keep if context is None else None))
        self.sigma_k.copy_(spread(k, keep))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, alone: bool) -> Tensor:
        if self.statistics == "fixed":
            return self.mix(q, k, v, keep)
        alpha, beta = matched(spread(q, keep if alone else None), spread(k, keep))
        return lln_attention(q, k, v, alpha, beta, keep=keep, eps=self.eps)[0].to(q.dtype)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: LLNState | None
    ) -> tuple[Tensor, LLNState]:
        (q,) = widened(q)
        alpha, beta = matched(self.sigma_q.to(q.dtype), self.sigma_k.to(q.dtype))
        return lln_attention(
            q, k.to(q.dtype), v.to(q.dtype), alpha, beta, causal=self.causal, keep=keep, eps=self.eps, state=state
        )

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LLNState:
        B, D = batch_size, self.head_dim
        sums = torch.zeros(B, self.num_heads, D, D + 1, device=device, dtype=dtype)
        return LLNState(sums, torch.full((B, self.num_kv_heads), -torch.inf, device=device, dtype=dtype))
