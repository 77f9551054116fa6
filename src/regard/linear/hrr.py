"""Hrrformer: keys are bound to values by circular convolution; a query asks if it finds its own value.

Bound pairs are added up. A softmax over positions, of the cosines between a token's value and what its query unbinds,
weighs that value. All exchange of tokens is in one vector a head and in the softmax's denominator.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked
from regard.kernels.check import check_inputs
from regard.linear._shared import RecurrentMixer, hide

CARD = Card(
    "hrrformer",
    equation="""b = sum_s k_s # v_s,   (k # v)_i = sum_j k_j v_(i-j)                   indices mod D; one b a head
u_t = b # q_t^+,   q^+_i = q_(-i),   so that u_ti = sum_j q_tj b_(i+j)
a_t = u_t . v_t / (|u_t| |v_t|),   w = softmax of a over t,   y_t = w_t v_t
causal: b_t and the softmax's sum are over s <= t,   y_t = exp(a_t) v_t / sum_(s<=t) exp(a_s)""",
    papers=(
        Paper(
            "Recasting Self-Attention with Holographic Reduced Representations",
            "Alam et al.",
            2023,
            "2305.19534",
            "abstract; official code (FutureComputing4AI/Hrrformer, and the package hrr 1.2.3)",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "streaming", "compile"},
    lacks={"cross": "a query weighs the value of its own token"},
    traits={"position_free", "shift_invariant", "head_independent"},
    cost=Cost("B*H*T*5*D*log2(D)", "H*(2*(D//2 + 1) + 1)"),
    claim="A token gets its own value, times a weight that grows, at most e^2-fold, with how well its query finds that "
    "value among all that is bound: "
    "tests/linear/test_hrr.py::test_a_token_keeps_its_own_value_weighed_by_how_well_it_is_found.",
    differs=(
        "Hidden tokens are left out of the superposition too; in the authors' code they are bound like all others.",
        "A response is 0, with gradient 0, where the value or what is unbound is 0; in the code it is 0 / 0.",
        "Inferred, as the paper and the code only see whole sequences: the causal form, in which every response keeps "
        "the superposition of its own time.",
    ),
    verified="third-party",
    defaults={"bias": "code, all tasks but malware"},
)


class HRRState(NamedTuple):
    """All the past leaves behind."""

    spectrum: Float[Tensor, "B H F 2"]
    """Of the superposition: real and imaginary parts at F = D // 2 + 1 frequencies."""
    total: Float[Tensor, "B H"]
    """sum_s exp(a_s)."""


def bound(k: Float[Tensor, "*n D"], v: Float[Tensor, "*n D"]) -> Complex[Tensor, "*n F"]:
    """The spectrum of k # v, their circular convolution."""
    return torch.fft.rfft(k) * torch.fft.rfft(v)


def unbound(spectrum: Complex[Tensor, "*n F"], q: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    """What q finds: the circular correlation of the two, q's approximate inverse bound to what has this spectrum."""
    return torch.fft.irfft(spectrum * torch.fft.rfft(q).conj(), n=q.shape[-1])


def response(u: Float[Tensor, "*n D"], v: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
    """Their cosine; 0 where one of them is 0."""
    sizes = u.square().sum(-1), v.square().sum(-1)
    none = (sizes[0] == 0) | (sizes[1] == 0)
    lengths = [torch.where(none, 1.0, size).sqrt() for size in sizes]
    return ((u * v).sum(-1) / lengths[0] / lengths[1]).masked_fill(none, 0.0)


@checked()
def hrr_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    *,
    causal: bool = False,
    keep: Bool[Tensor, "B T"] | None = None,
    state: HRRState | None = None,
) -> tuple[Float[Tensor, "B H T D"], HRRState]:
    """Outputs, and the state after these tokens. Hand it back in to go on causally; hidden tokens get 0."""
    check_inputs(q, k, v)
    # Not by promote_types: transforms in half precision don't exist everywhere, for a plain computation neither.
    q, k, v = (z.to(torch.float64 if z.dtype == torch.float64 else torch.float32) for z in (q, k, v))
    B, H, _, D = v.shape
    if v.numel() == 0:  # transforms of nothing are refused on some machines
        empty = HRRState(v.new_zeros(B, H, D // 2 + 1, 2), v.new_zeros(B, H))
        return q * v, empty if state is None else state
    each = bound(hide(k, keep), hide(v, keep))
    if not causal:
        spectrum = each.sum(2, keepdim=True)
    else:
        spectrum = each.cumsum(2)
        if state is not None:
            spectrum = spectrum + torch.view_as_complex(state.spectrum.to(v.dtype))[:, :, None]
    grown = response(unbound(spectrum, q), v).exp()  # of numbers from -1 to 1
    if keep is not None:
        grown = grown.masked_fill(~keep[:, None], 0.0)
    total = grown.cumsum(2) if causal else grown.sum(2, keepdim=True)
    if causal and state is not None:
        total = total + state.total.to(v.dtype)[:, :, None]
    weights = grown / torch.where(total == 0, 1.0, total)
    after = HRRState(torch.view_as_real(spectrum[:, :, -1].resolve_conj()).clone(), total[:, :, -1].clone())
    return weights[..., None] * hide(v, keep), after


@CARD.module
class Hrrformer(RecurrentMixer):
    """Multi-head attention by holographic reduced representations.

    Args:
        dim, num_heads, head_dim, causal, bias: as of `HeadMixer`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, head_dim: int | None = None, causal: bool = False, bias: bool = False
    ) -> None:
        super().__init__(dim, num_heads, head_dim=head_dim, causal=causal, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun's normal cut off at two deviations, and biases 0, as flax starts."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            std = layer.in_features**-0.5 / 0.8796256610342398  # what is cut off made up for
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: HRRState | None
    ) -> tuple[Tensor, HRRState]:
        return hrr_attention(q, k, v, causal=self.causal, keep=keep, state=state)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> HRRState:
        B, H = batch_size, self.num_heads
        spectrum = torch.zeros(B, H, self.head_dim // 2 + 1, 2, device=device, dtype=dtype)
        return HRRState(spectrum, torch.zeros(B, H, device=device, dtype=dtype))
