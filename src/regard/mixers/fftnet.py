"""FFTNet: an adaptive filter over frequencies, with a modReLU, in place of attention."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, refuse, whole
from regard.masks import Mask, full, padding
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.tracing import exporting

CARD = Card(
    "fftnet",
    equation="""X = rfft over tokens (orthonormal),  c = mean_t x_t
modReLU:  Z = X f,  f = f0 + tanh(MLP(c));   Y = Z relu(|Z| + b) / max(|Z|, 1e-3)
GELU:     Z = X f0 (1 + a_s) + (b + a_b),  (a_s, a_b) = MLP(c);   Y = Z gelu(|Z|) / (|Z| + 1e-6)
y = irfft(Y);  f0, b, a: one number for each head and frequency""",
    papers=(
        Paper(
            "The FFT Strikes Back: An Efficient Alternative to Self-Attention",
            "Fein-Ashley",
            2025,
            "2502.18394",
            "abstract, which modReLU fits; the author's code, whose later ImageNet part has GELU",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "compile"},
    cost=Cost("B*M*(2.5*max_length*log2(max_length) + M + H*(max_length/2 + 1))", ""),
    claim="The transform keeps energy (Parseval): tests/mixers/test_fftnet.py::test_energy_is_kept.",
    differs=(
        "The norm and residual of the author's module belong to the model around it.",
        "Sequences shorter than max_length are filled up with zeros; the author's filters fit one length only.",
        "The filter always adapts; without adaptation call `spectral_filter` with fixed filters.",
    ),
    verified="third-party",
    example={"max_length": 48},
    exceptions={
        "L43 training": "no projections: a real factor for each head and frequency cannot fit any target whatever"
    },
    defaults={"max_length": "ours", "activation": "paper, abstract"},
)

Activation = Literal["modrelu", "gelu"]


def modrelu(z: Complex[Tensor, "*n"], bias: Float[Tensor, "*n"]) -> Complex[Tensor, "*n"]:
    """Shift the magnitude, keep the phase; what would become negative is 0."""
    size = z.abs()
    return z * (F.relu(size + bias) / size.clamp(min=1e-3))


@checked()
def spectral_filter(
    x: Float[Tensor, "B T M"],
    factor: Float[Tensor, "#B H F"],
    offset: Float[Tensor, "#B H F"],
    *,
    length: int,
    activation: Activation = "modrelu",
) -> Float[Tensor, "B T M"]:
    """The card's y, with x filled up to `length` tokens; head h owns the h-th block of features.

    Args:
        factor, offset: f and b, or for GELU what stands in their place, at F = length // 2 + 1 frequencies.
    """
    choice("spectral_filter", get_args(Activation), activation=activation)
    (T, M), (H, bins) = x.shape[1:], factor.shape[1:]
    if length < T:
        refuse("spectral_filter", "x", "is too long", f"{T} tokens", f"at most length = {length}")
    if bins != length // 2 + 1:
        wanted = f"length // 2 + 1 = {length // 2 + 1}"
        refuse("spectral_filter", "factor", "has the wrong number of frequencies", bins, wanted)
    divides("spectral_filter", heads=H, features=M)
    if x.numel() == 0:
        return x.clone()  # transforms of nothing are refused on some machines
    # Not by promote_types: transforms in half precision don't exist everywhere, for a plain computation neither.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if exporting():  # else torch asks whether there is something to fill up
        x = F.pad(x, (0, 0, 0, length - T))
    spectrum = torch.fft.rfft(x.to(wide), n=length, dim=1, norm="ortho").unflatten(2, (H, -1))
    f, b = (z.to(wide).mT.unsqueeze(-1) for z in (factor, offset))
    if activation == "modrelu":
        shaped = modrelu(spectrum * f, b)
    else:
        # The offset is real: it moves the real part alone.
        shaped = spectrum * f + b
        size = shaped.abs()
        shaped = shaped * (F.gelu(size) / (size + 1e-6))
    return torch.fft.irfft(shaped.flatten(2), n=length, dim=1, norm="ortho")[:, :T].to(x.dtype)


@CARD.module
class FFTNet(nn.Module):
    """Bidirectional mixing in O(N log N), N = max_length.

    Args:
        dim: M.
        num_heads: H, how many filters share the features between them.
        max_length: N. Its filters have N // 2 + 1 frequencies, whatever the length of the sequence at hand. The
            default is this library's.
        activation: "modrelu" or "gelu".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int = 512,
        activation: Activation = "modrelu",
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, max_length=max_length)
        divides(self, num_heads=num_heads, dim=dim)
        choice(self, get_args(Activation), activation=activation)
        self.dim, self.num_heads, self.max_length = dim, num_heads, max_length
        self.activation: Activation = activation
        bins = max_length // 2 + 1
        outputs = num_heads * bins * (1 if activation == "modrelu" else 2)
        self.base_filter = nn.Parameter(torch.empty(num_heads, bins))
        self.base_bias = nn.Parameter(torch.empty(num_heads, bins))
        self.adapt = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.base_filter)
        nn.init.constant_(self.base_bias, -0.1)

    def receptive_field(self) -> Mask:
        return full()

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Filter x. `mask` hides tokens: they count as zeros, and not in the mean."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        if x.shape[1] > self.max_length:
            refuse(self, "x", "is too long", f"{x.shape[1]} tokens", f"at most max_length = {self.max_length}")
        x, bad = quarantine(x)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        count = max(x.shape[1], 1) if keep is None else keep.sum(1, keepdim=True).clamp(min=1)
        change = self.adapt(x.sum(1) / count)
        factor, offset = self._adapted(change.unflatten(-1, (self.num_heads, self.base_filter.shape[1], -1)))
        y = spectral_filter(x, factor, offset, length=self.max_length, activation=self.activation).to(change.dtype)
        return spoil(y, bad, bad, None if keep is None else padding(keep))

    def _adapted(self, change: Float[Tensor, "B H F n"]) -> tuple[Tensor, Tensor]:
        if self.activation == "modrelu":
            return self.base_filter + torch.tanh(change[..., 0]), self.base_bias[None]
        return self.base_filter * (1 + change[..., 0]), self.base_bias + change[..., 1]
