"""FFTNet: filter tokens in the frequency domain, by a filter that the mean token adapts, and shrink small coefficients.

    X = rfft over tokens (orthonormal),  c = mean_t x_t
    modReLU:  Z = X f,  f = f0 + tanh(MLP(c));   Y = Z relu(|Z| + b) / max(|Z|, 1e-3)
    GELU:     Z = X f0 (1 + a_s) + (b + a_b),  (a_s, a_b) = MLP(c);   Y = Z gelu(|Z|) / (|Z| + 1e-6)
    y = irfft(Y);  f0, b, a: one number for each head and frequency

Fein-Ashley 2025, "The FFT Strikes Back: An Efficient Alternative to Self-Attention", https://arxiv.org/abs/2502.18394:
abstract read, the author's released code followed (modReLU fits the abstract; GELU is the later ImageNet code).
Differs from the paper: norm and residual around the filter are left to the model; sequences shorter than the filter's
length are filled up with zeros.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.checks import tokens as check_tokens
from regard.masks import Mask, full, padding
from regard.pipeline.tokens import key_padding, quarantine, spoil
from regard.shapes import HeadShape

Activation = Literal["modrelu", "gelu"]


def modrelu(z: Complex[Tensor, "*n"], bias: Float[Tensor, "*n"]) -> Complex[Tensor, "*n"]:
    """Shift the magnitude, keep the phase; what would become negative is 0."""
    size = z.abs()
    return z * (F.relu(size + bias) / size.clamp(min=1e-3))


def spectral_filter(
    x: Float[Tensor, "B T M"],
    factor: Float[Tensor, "#B H F"],
    offset: Float[Tensor, "#B H F"],
    *,
    length: int,
    activation: Activation = "modrelu",
) -> Float[Tensor, "B T M"]:
    """y as above, with x filled up to `length` tokens, F = length // 2 + 1; head h owns the h-th block of features."""
    _check(activation)
    (T, M), (H, bins) = x.shape[1:], factor.shape[1:]
    if length < T or bins != length // 2 + 1 or M % H or offset.shape[1:] != factor.shape[1:]:
        raise ValueError(
            f"fftnet: {T} tokens of width {M} do not fit filters {tuple(factor.shape)} and {tuple(offset.shape)} of "
            f"length {length}; expected at most {length} tokens, heads dividing {M} and {length // 2 + 1} frequencies"
        )
    if x.numel() == 0:
        return x.clone()  # transforms of nothing are refused on some machines
    # Not by promote_types: transforms in half precision don't exist everywhere, for a plain computation neither.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
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


def _check(activation: str) -> None:
    if activation not in ("modrelu", "gelu"):
        raise ValueError(f"fftnet: unknown activation {activation!r}; expected 'modrelu' or 'gelu'")


class FFTNet(nn.Module):
    """Bidirectional mixing in O(N log N), N = max_length.

    Args:
        dim: M.
        num_heads: H, how many filters share the features between them.
        max_length: N. Its filters have N // 2 + 1 frequencies, whatever the length of the sequence at hand.
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
        _check(activation)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"fftnet: num_heads must divide dim (got {num_heads} and {dim})")
        if max_length < 1:
            raise ValueError(f"fftnet: max_length must be at least 1 (got {max_length})")
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

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Filter x. `mask` hides tokens: they count as zeros, and not in the mean."""
        check_tokens("fftnet", "x", x, self.dim)
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"fftnet: got {x.shape[1]} tokens; max_length is {self.max_length}, build it with a greater one"
            )
        keep = key_padding("fftnet", mask, x)
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


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    max_length: int = 512,
    activation: Activation = "modrelu",
) -> FFTNet:
    if causal:
        raise ValueError("fftnet: the Fourier transform and the mean see all tokens (got causal=True)")
    if shape.num_kv_heads != shape.num_heads or shape.head_dim * shape.num_heads != shape.dim:
        raise ValueError(
            f"fftnet: has no key heads, and heads of width dim / num_heads (got {shape.num_kv_heads} key heads of "
            f"width {shape.head_dim} for {shape.num_heads} heads, dim {shape.dim})"
        )
    return FFTNet(shape.dim, shape.num_heads, max_length=max_length, activation=activation)


CARD = register(
    Card(
        name="fftnet",
        family="mixers",
        gist="An adaptive filter over frequencies, with a modReLU, in place of attention.",
        equation="y = irfft(modReLU(rfft(x) (f0 + tanh(MLP(mean x)))))",
        paper=Paper(
            "The FFT Strikes Back: An Efficient Alternative to Self-Attention",
            "Fein-Ashley",
            2025,
            "2502.18394",
            "abstract; the author's code",
        ),
        build=_build,
        supports=frozenset({"bidirectional", "padding", "compile"}),
        cost=Cost("B*M*max_length*log(max_length) + B*M*H*max_length/2", ""),
        claim="O(N log N), and the transform keeps energy (Parseval): tests/mixers/test_fftnet.py.",
        differs=(
            "The norm and residual of the author's module belong to the model around it.",
            "Sequences shorter than max_length are filled up with zeros; the author's filters fit one length only.",
            "The filter always adapts; without adaptation call `spectral_filter` with fixed filters.",
        ),
        verified="third-party",
        example={"max_length": 48},
        exceptions={
            "L43": "no projections: a real factor for each head and frequency cannot fit any target whatever",
        },
    )
)
