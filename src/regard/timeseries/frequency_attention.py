"""Frequency attention: the strongest frequencies of each feature, which also say how it goes on.

The season is one linear map for all features that keep the same bins: attention by phase. The gradient flows through
the amplitudes and phases, not through the choice. Frequencies 0 and T / 2 are never kept.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import checked, refuse, whole
from regard.kernels.blocks import among
from regard.masks import Mask, full
from regard.mixers.exponential import work_dtype
from regard.pipeline.tokens import quarantine, spoil
from regard.timeseries.exponential_smoothing import PAPERS
from regard.tracing import as_it_is, exporting

CARD = Card(
    "frequency_attention",
    equation="""X = DFT of x over time,   kept: the K bins of largest |X_f| among f = 1 .. (T - 1) / 2, for each feature
season_t = sum over kept f of (2 |X_f| / T) cos(2 pi f t / T + arg X_f),   t = 0 .. T - 1, and on to T + P - 1""",
    papers=PAPERS,
    supports={"bidirectional", "compile"},
    cost=Cost("2.5*B*T*M*log2(T)", ""),
    claim="Goes on with a sum of K sines of whole cycles without error: "
    "tests/timeseries/test_frequency_attention.py::test_sines_go_on_exactly.",
    differs=(
        "A series too short for K frequencies keeps those it has.",
        "The layer has value and output projections, to stand in attention's place; the function has none.",
    ),
    verified="third-party",
    example={"top_k": 2},
    exceptions={"L43 training": "a season has neither a mean nor the shortest wave, so it cannot fit random targets"},
    defaults={"top_k": "code"},
)


@checked()
def frequency_attention(x: Float[Tensor, "B T M"], top_k: int, horizon: int = 0) -> Float[Tensor, "B T_P M"]:
    """The season of x and of the `horizon` tokens after it. A series too short for K frequencies keeps what it has."""
    whole("frequency_attention", top_k=top_k)
    whole("frequency_attention", 0, horizon=horizon)
    T = x.shape[1]
    if T == 0 and horizon:
        refuse("frequency_attention", "x", "has 0 tokens", f"horizon = {horizon}", "some tokens to go on from")
    if exporting() and horizon == 0:
        return _season(x, top_k)
    bins = max(0, (T - 1) // 2)
    if bins == 0 or x.numel() == 0:
        return 0 * x[:, torch.arange(T + horizon, device=x.device) % max(T, 1)]
    with as_it_is(x.device):
        spectrum = torch.fft.rfft(x.to(work_dtype(x)), dim=1)
        strength = spectrum.detach()[:, 1 : bins + 1].abs()
        kept = 1 + strength.topk(min(top_k, bins), dim=1).indices
        chosen = torch.zeros_like(spectrum).scatter(1, kept, spectrum.gather(1, kept))
        season = torch.fft.irfft(chosen, n=T, dim=1).to(x.dtype)
    # Every kept frequency runs through whole cycles in T tokens: the season starts anew after them.
    return season if horizon == 0 else season[:, torch.arange(T + horizon, device=x.device) % T]


def _season(x: Float[Tensor, "B T M"], top_k: int) -> Float[Tensor, "B T M"]:
    """The season in steps that are the same for few and many, odd and even T: from all frequencies, twice as many."""
    T = x.shape[1]
    with as_it_is(x.device):
        spectrum = torch.fft.fft(x.to(work_dtype(x)), dim=1)
        f = torch.arange(T, device=x.device)[:, None]
        may = (f > 0) & (2 * f < T)
        kept = may & among(spectrum.detach().abs().masked_fill(~may, -torch.inf).mT, top_k).mT
        return 2 * torch.fft.ifft(spectrum * kept, dim=1).real.to(x.dtype)


@CARD.module
class FrequencyAttention(nn.Module):
    """The season of every value feature, in the place of attention: W_o season(W_v x).

    Args:
        dim: M, and the number of value features.
        top_k: K, frequencies kept of each.
    """

    def __init__(self, dim: int, *, top_k: int = 1) -> None:
        super().__init__()
        whole(self, dim=dim, top_k=top_k)
        self.dim, self.top_k = dim, top_k
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def extra_repr(self) -> str:
        return f"{self.dim}, top_k={self.top_k}"

    def receptive_field(self) -> Mask:
        """Everything: a frequency is one of the whole series."""
        return full()

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        x, bad = quarantine(x)
        return spoil(self.o_proj(frequency_attention(self.v_proj(x), self.top_k)), bad, bad, full())
