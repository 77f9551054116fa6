"""Latte: queries choose among a few latents, latents choose among keys; both choices are softmaxes.

The causal form has one denominator for each latent and time. With A_tl = log sum_{s<=t} exp(b_sl) it is a recurrence on
averages of values, one decay for each latent and time, in which nothing exceeds 1:

    C_tl = exp(A_{t-1,l} - A_tl) C_{t-1,l} + exp(b_tl - A_tl) v_t,     y_t = sum_l p(l|t) C_tl
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, whole
from regard.kernels.channel_scan import channel_scan
from regard.kernels.linear_scan import linear_scan
from regard.linear._shared import RecurrentMixer, widened
from regard.normalizers.softmax import softmax
from regard.tracing import transformed

CARD = Card(
    "latte",
    equation="""y_t = sum_l p(l|t) sum_s p(s|l) v_s,   p(l|t) = softmax_l(a_tl),   p(s|l) = softmax_s(b_sl)
s <= t when causal
a = x W_q,   b = x W_k     (L latents a head: they are the columns of W_q and W_k)""",
    papers=(
        Paper(
            "Latte: Latent Attention for Linear Time Transformers",
            "Dolga et al.",
            2024,
            "2402.17512",
            "abstract; official code, in its stable forms",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "streaming", "compile"},
    traits=PLAIN,
    cost=Cost("B*H*(T + S)*num_latents*D", "H*num_latents*(D + 1)"),
    claim="Weights are a row-stochastic matrix of rank <= L, with a constant state: "
    "tests/linear/test_latte.py::test_weights_are_stochastic_and_of_low_rank, "
    "tests/linear/test_latte.py::test_the_state_does_not_grow.",
    differs=(
        "The recurrence carries averages and log-sums, not sums and a running maximum; equal in value.",
        "Projections start as torch's linear layers do, where the authors' code has LeCun's normal.",
    ),
    verified="reconstructed",
    example={"num_latents": 5},
    defaults={"bias": "code", "num_latents": "ours, as many as head_dim"},
)


class LatteState(NamedTuple):
    """All the past leaves behind: what each latent holds."""

    averages: Float[Tensor, "B H L V"]
    log_sums: Float[Tensor, "B H L"]
    """-inf before the first token."""


@checked()
def latte_attention(
    a: Float[Tensor, "B H T L"],
    b: Float[Tensor, "B H S L"],
    v: Float[Tensor, "B H S V"],
    *,
    keep: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H T V"]:
    """Every query sees every key through the latents. Without any real key the output is 0."""
    a, b, v = widened(a, b, v)
    return a.softmax(-1) @ (softmax(b.mT, None if keep is None else keep[:, None, None]) @ v)


@checked()
def causal_latte_attention(
    a: Float[Tensor, "B H T L"],
    b: Float[Tensor, "B H T L"],
    v: Float[Tensor, "B H T V"],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    state: LatteState | None = None,
) -> tuple[Float[Tensor, "B H T V"], LatteState]:
    """No query sees a later key. Hand `state` back in to go on with a sequence."""
    a, b, v = widened(a, b, v)
    past = b.new_full((*b.shape[:2], 1, b.shape[3]), -torch.inf) if state is None else state.log_sums.unsqueeze(2)
    if keep is not None:
        b = b.masked_fill(~keep[:, None, :, None], -torch.inf)
    log_sums = _log_sums(torch.cat([past, b], 2))
    earlier, now = log_sums[:, :, :-1], log_sums[:, :, 1:]
    started = now > -torch.inf  # before the first real key nothing is held, so nothing decays
    safe = torch.where(started, now, 0.0)
    decay = torch.where(earlier > -torch.inf, earlier, safe) - safe
    out, averages = linear_scan(
        a.softmax(-1), (b - safe).exp(), v, decay, state=None if state is None else state.averages
    )
    return out, LatteState(averages, log_sums[:, :, -1].clone())


def _log_sums(z: Float[Tensor, "B H T L"]) -> Float[Tensor, "B H T L"]:
    """log sum_{s<=t} exp(z_s)."""
    if not transformed(z):
        return z.logcumsumexp(2)
    # Forwards, torch's (2.13) is wrong where scores lie far apart, and behind a -inf; so the sums are a scan over what
    # is relative to the largest score so far, which has no gradient: it cancels.
    top = z.detach().cummax(2).values
    top = top.masked_fill(top == -torch.inf, 0.0)
    before = torch.cat([top[:, :, :1], top[:, :, :-1]], 2)
    added, decay = ((y.transpose(1, 2).flatten(2)) for y in ((z - top).exp(), (before - top).clamp(max=0)))
    sums = channel_scan(added, decay).out.unflatten(2, (z.shape[1], -1)).transpose(1, 2)
    held = sums > 0
    return torch.where(held, top + torch.where(held, sums, 1.0).log(), -torch.inf)


@CARD.module
class Latte(RecurrentMixer):
    """Multi-head latent attention.

    Args:
        dim, num_heads, head_dim, causal, bias: as of `HeadMixer`; `head_dim` is the width of the values.
        num_latents: L, the latents of each head; default head_dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        num_latents: int | None = None,
    ) -> None:
        super().__init__(dim, num_heads, head_dim=head_dim, causal=causal, bias=bias)
        self.num_latents = self.head_dim if num_latents is None else num_latents
        whole(self, num_latents=self.num_latents)
        self.q_proj, self.k_proj = (nn.Linear(dim, num_heads * self.num_latents, bias=bias) for _ in "qk")

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        a, b, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in projected)
        return a, b, v

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: LatteState | None
    ) -> tuple[Tensor, LatteState | None]:
        if self.causal:
            return causal_latte_attention(q, k, v, keep=keep, state=state)
        return latte_attention(q, k, v, keep=keep), None

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LatteState:
        shape = (batch_size, self.num_heads, self.num_latents)
        return LatteState(
            torch.zeros(*shape, self.head_dim, device=device, dtype=dtype),
            torch.full(shape, -torch.inf, device=device, dtype=dtype),
        )
