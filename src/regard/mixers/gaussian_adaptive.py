"""GAAM: entries of a line are weighed by learned Gaussian densities of where they lie in it."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits, number, refuse, whole
from regard.masks import Mask, full, padding, window
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.positions._shared import work_dtype
from regard.tracing import autocasts

CARD = Card(
    "gaam",
    equation="""along an axis, for each head by itself, which owns a stretch of it:
mu = mean(x),  s^2 = sum (x - mu)^2 / (n - 1) + eps
p_i = exp(-(x - mu - d_i)^2 / (2 s^2 c_i^2)) / sqrt(2 pi c_i^2)        d_i, c_i: learned, i = 1 .. num_gaussians
w = prod_i p_i / max(sum prod_i p_i, eps),   y = w x""",
    papers=(
        Paper(
            "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities",
            "Ioannides, Chadha, Elkins",
            2024,
            "2401.11143",
            "abstract and start of the introduction; official code (GaussianBlock.py)",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "compile"},
    lacks={"causal": "its statistics are those of a whole line"},
    cost=Cost("0", ""),
    claim="A learned offset and width are all there is: 2 numbers a Gaussian and head whatever the width; weights of a "
    "head sum to 1 and follow a shift of its input: "
    "tests/mixers/test_gaussian_adaptive.py::test_weights_sum_to_one_and_follow_shifts.",
    differs=(
        "Several Gaussians of a head are multiplied, as in the authors' code, which makes one Gaussian of them; the "
        'sum of combine="sum" is ours, for the mixture that the paper speaks of.',
        "Hidden tokens are left out of statistics and sums, and heads along the tokens cut real ones alone; "
        "padding_value is the authors' way, where padding counts as zeros and in the sum.",
        "eps is used; the authors' layer of several heads drops what it is given, for the default.",
        "Heads of a single entry are refused, where the code gives NaN; one that a mask leaves has no variance.",
        "Left out: the importance factor, whose formula could not be read, and the layers of the paper that put "
        "the gate around attention.",
    ),
    verified="third-party",
    tries={"padding_value": ..., "eps": 0.3},
    exceptions={"L43 training": "two numbers for each head and Gaussian cannot fit any target whatever"},
    defaults={
        "axis": "ours, features; in the authors' example it is 1, tokens",
        "num_gaussians": "ours, more than one in a product is again one",
        "combine": "code",
        "padding_value": "code",
        "eps": "code",
    },
)

Combine = Literal["product", "sum"]


def gaussian_weights(
    x: Float[Tensor, "*n"],
    axis: int,
    offsets: Float[Tensor, " K"],
    widths: Float[Tensor, " K"],
    *,
    keep: Bool[Tensor, "..."] | None = None,
    combine: Combine = "product",
    padding_value: float | None = None,
    eps: float = 1e-8,
) -> Float[Tensor, "*n"]:
    """The weights w of one head, which owns the whole axis. Densities are multiplied as logarithms.

    Args:
        keep: True = an entry that counts, for all or broadcast to x; others get the weight 0.
        combine: "product" of the densities, or "sum".
        padding_value: entries of this value count as 0 in mean and variance.
    """
    choice("gaussian_weights", get_args(Combine), combine=combine)
    fits("gaussian_weights", "K", offsets=offsets, widths=widths)
    work = work_dtype(x)
    keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep.expand(x.shape)
    x = x.to(work).masked_fill(~keep, 0)
    used = x if padding_value is None else x.masked_fill(x == padding_value, 0)
    n = keep.sum(axis, keepdim=True)
    mean = used.sum(axis, keepdim=True) / n.clamp(min=1)
    off = (used - mean).square().masked_fill(~keep, 0)
    spread = (off.sum(axis, keepdim=True) / (n - 1).clamp(min=1) + eps).sqrt()
    logs = torch.stack([_log_density((x - mean - d) / spread, c) for d, c in zip(offsets.to(work), widths.to(work))])
    log = (logs.sum(0) if combine == "product" else logs.logsumexp(0)).masked_fill(~keep, torch.finfo(work).min)
    return (log - log.logsumexp(axis, keepdim=True).clamp(min=math.log(eps))).exp()


def _log_density(z: Tensor, width: Tensor) -> Tensor:
    return -(z / width).square() / 2 - (2 * math.pi * width.square()).log() / 2


class GaussianGate(nn.Module):
    """The gate on tensors of any shape, with stretches of one axis for its heads.

    Args:
        num_heads: H; the last one takes what H doesn't divide.
        axis, num_gaussians, combine, padding_value, eps: as in `GaussianAdaptiveAttention`.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        axis: int = -1,
        num_gaussians: int = 1,
        combine: Combine = "product",
        padding_value: float | None = None,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, num_gaussians=num_gaussians)
        whole(self, -8, axis=axis)
        choice(self, get_args(Combine), combine=combine)
        number(self, above=0, eps=eps)
        if padding_value is not None:
            number(self, padding_value=padding_value)
        self.num_heads, self.axis, self.padding_value = num_heads, axis, padding_value
        self.how: dict[str, Any] = {"combine": combine, "padding_value": padding_value, "eps": eps}
        self.offsets = nn.Parameter(torch.empty(num_heads, num_gaussians))
        self.widths = nn.Parameter(torch.empty(num_heads, num_gaussians))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: no offset, and widths whose logarithm is normal."""
        nn.init.zeros_(self.offsets)
        with torch.no_grad():
            self.widths.normal_().exp_()

    def weights(self, x: Float[Tensor, "*n"], *, keep: Bool[Tensor, "..."] | None = None) -> Float[Tensor, "*n"]:
        """All heads' weights, in float32 at least. `keep` as in `gaussian_weights`; heads share what it shows evenly.

        Raises:
            ValueError: an axis that x doesn't have, or fewer than two entries for a head.
        """
        if not -x.dim() <= self.axis < x.dim() or x.dim() < 2:
            refuse(self, "x", f"has no line along axis {self.axis}", tuple(x.shape), "two axes, this among them")
        axis, H, how = self.axis % x.dim(), self.num_heads, self.how
        n = x.shape[axis]
        if n == 0:
            return x.to(work_dtype(x))
        if n < 2 * H:
            got = f"{n} along axis {self.axis}"
            refuse(self, "x", "has too few entries for a variance", got, f"2 or more for each of {H} heads")
        parts = list(zip(self.offsets, self.widths, strict=True))
        if keep is None:
            sizes = [n // H] * (H - 1) + [n - n // H * (H - 1)]
            lines = zip(x.split(sizes, axis), parts, strict=True)
            return torch.cat([gaussian_weights(z, axis, *p, **how) for z, p in lines], axis)
        keep = keep.expand(x.shape)
        size = keep.sum(axis, keepdim=True).div(H, rounding_mode="floor").clamp(min=1)
        owner = (keep.cumsum(axis) - 1).div(size, rounding_mode="floor").clamp(max=H - 1)
        each = (gaussian_weights(x, axis, *p, keep=keep & (owner == h), **how) for h, p in enumerate(parts))
        return torch.stack(list(each)).sum(0)

    def forward(self, x: Float[Tensor, "*n"], *, keep: Bool[Tensor, "..."] | None = None) -> Float[Tensor, "*n"]:
        """w x, and 0 where `keep` hides."""
        shown = x if keep is None else x.masked_fill(~keep.expand(x.shape), 0)
        out = (shown * self.weights(x, keep=keep)).to(x.dtype)
        return out if self.padding_value is None else torch.where(shown == self.padding_value, shown, out)


@CARD.module
class GaussianAdaptiveAttention(GaussianGate):
    """`GaussianGate` on tokens.

    Args:
        dim: M.
        num_heads: H, which share the axis between them, with two entries for each at least.
        axis: -1 for features, 1 for tokens.
        num_gaussians: of each head.
        combine: "product" or "sum" of their densities.
        padding_value: entries of this value count as 0 in mean and variance and come out as they are.
        eps: the least sum of densities, and what is added to the variance.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        axis: Literal[-1, 1] = -1,
        num_gaussians: int = 1,
        combine: Combine = "product",
        padding_value: float | None = None,
        eps: float = 1e-8,
    ) -> None:
        whole(self, dim=dim)
        choice(self, (-1, 1), axis=axis)
        how: dict[str, Any] = {"combine": combine, "padding_value": padding_value, "eps": eps}
        super().__init__(num_heads, axis=axis, num_gaussians=num_gaussians, **how)
        if axis == -1 and dim < 2 * num_heads:
            refuse(self, "num_heads", "leaves a head without variance", num_heads, f"2 or more of dim = {dim} for each")
        self.dim = dim

    def receptive_field(self) -> Mask:
        """Along the features a token sees itself; along the tokens those of its head, which depend on their number."""
        return window(1) if self.axis == -1 else full()

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Weigh x. `mask` hides tokens: `regard.masks.padding`, or True = a real token."""
        fits(self, "B T M", {"M": self.dim}, x=x)
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        x, bad = quarantine(x)
        x = x if keep is None else x.masked_fill(~keep[..., None], 0)
        out = super().forward(x, keep=None if keep is None or self.axis == -1 else keep[..., None])
        if autocasts(x.device) and x.dtype != torch.float64:  # no projection does it
            out = out.to(torch.get_autocast_dtype(x.device.type))
        field = self.receptive_field()
        return spoil(out, bad, bad, field if keep is None else field & padding(keep))


class GaussianBlock(nn.Module):
    """x <- x + gate(x) for one gate after the other, each with its own axis, heads and Gaussians."""

    def __init__(self, gates: Iterable[GaussianGate]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(gates)

    def forward(self, x: Float[Tensor, "*n"], *, keep: Bool[Tensor, "..."] | None = None) -> Float[Tensor, "*n"]:
        for layer in self.layers:
            x = x + layer(x, keep=keep)
        return x
