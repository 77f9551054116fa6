"""DAS: a deformable convolution looks where it is worth it, and what it finds gates the features.

Offsets and gate come from few channels, so that both are cheap; the work is linear in pixels, however far it looks.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, refuse, whole
from regard.detection.sampling import weighted_rows

CARD = Card(
    "deformable_gate",
    equation="""z = gelu(InstanceNorm(P (D * x)))             D depthwise, P pointwise, C channels to c = ratio C
d = O * z + o                                 offsets (dy, dx) of each tap, from a 3 x 3 convolution; 0 at the start
v(p) = sum_n W_n z(p + p_n + d_n(p)) + w      taps p_n of k x k; bilinear, and zero outside; back to C channels
y = sigmoid(LayerNorm(v)) . x""",
    papers=(
        Paper(
            "DAS: A Deformable Attention to Capture Salient Information in CNNs",
            "Salajegheh, Asadi, Saryazdi, Mudur",
            2023,
            "2311.12091",
            "abstract; four third-party modules of its name, which differ",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*(kernel**2*M + floor(ratio*M)*M + floor(ratio*M)*kernel**2*(18 + M))", ""),
    claim="It looks at what lies outside of every kernel, at a cost linear in pixels: "
    "tests/vision/test_deformable_gate.py::test_looks_where_its_offsets_say, "
    "tests/vision/test_deformable_gate.py::test_cost_is_linear_in_pixels.",
    differs=(
        "The abstract has the deformable and separable convolutions, the gate and the cost; GELU, the ratio, what is "
        "gated, and that W leads back to C channels are recalled, and offsets that start at 0 are inferred.",
        "Which axes the LayerNorm is over is an option, `norm`, since third parties have channels as well as the whole "
        "map; with channels, about half of the gates of a pixel are above 1/2 until its weights have learned.",
    ),
    verified="reconstructed",
    example={"ratio": 0.3},
    defaults={
        "ratio": "ours, as the paper's is recalled",
        "kernel": "ours, as third parties",
        "norm": "ours, as one of the third parties",
    },
)

Norm = Literal["channels", "map"]


@checked()
def deformable_conv(
    x: Float[Tensor, "B C Y X"],
    offsets: Float[Tensor, "B offsets Y X"],
    weight: Float[Tensor, "O C k k"],
    bias: Float[Tensor, " O"] | None = None,
) -> Float[Tensor, "B O Y X"]:
    """A convolution whose taps stand elsewhere at each pixel; no modulation, stride or groups. k is odd.

    Args:
        offsets: of each tap, row by row of the kernel, dy and then dx, in pixels, (B, 2 k k, Y, X).

    Raises:
        ValueError: shapes that do not fit, or an even kernel.
    """
    (B, C, Y, X), k = x.shape, weight.shape[-1]
    if k % 2 == 0:
        refuse("deformable_conv", "weight", "has no tap in its middle", tuple(weight.shape), "odd sides")
    if offsets.shape[1] != 2 * k * k:
        refuse("deformable_conv", "offsets", "are not of these taps", offsets.shape[1], f"2 k k = {2 * k * k}")
    wide = torch.promote_types(offsets.dtype, torch.float32)
    by = offsets.to(wide).view(B, k * k, 2, Y, X).permute(0, 3, 4, 1, 2)  # (B, Y, X, taps, 2)
    spoilt = (0 * by.detach()).sum(-1, keepdim=True)  # NaN where an offset is none, so that the output is
    far = max(Y, X) + k  # from there on all is outside
    by = by.nan_to_num(0, far, -far).clamp(-far, far)
    corner = by.detach().floor()  # of the offsets, not the places: float32 has fewer digits left for those
    below, right = (by - corner).unbind(-1)
    at_y, at_x = (torch.arange(n, device=x.device) for n in (Y, X))
    tap = torch.arange(k, device=x.device) - k // 2
    down, across = corner.long().unbind(-1)
    top = down + (at_y[:, None] + tap.repeat_interleave(k))[:, None]
    left = across + (at_x[:, None] + tap.repeat(k))
    rows, columns = torch.stack([top, top, top + 1, top + 1], -1), torch.stack([left, left + 1] * 2, -1)
    share = torch.stack([1 - below, 1 - below, below, below], -1) * torch.stack([1 - right, right] * 2, -1) + spoilt
    inside = (rows >= 0) & (rows < Y) & (columns >= 0) & (columns < X)
    batch = torch.arange(B, device=x.device)[:, None, None, None, None]
    index = torch.where(inside, (batch * Y + rows) * X + columns, B * Y * X)
    pixels = x.permute(0, 2, 3, 1).reshape(B * Y * X, C)
    found = weighted_rows(pixels, index.flatten(0, 3), share.flatten(0, 3)).reshape(B, Y, X, k * k * C)
    out = found @ weight.permute(2, 3, 1, 0).reshape(k * k * C, -1)
    return (out if bias is None else out + bias).permute(0, 3, 1, 2)


def _instance_norm(z: Float[Tensor, "B C Y X"], eps: float = 1e-5) -> Float[Tensor, "B C Y X"]:
    """Each map of each image by itself, in at least float32; torch's has wrong gradients under vmap."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    centred = wide - wide.mean((2, 3), keepdim=True)
    return (centred * (centred.square().mean((2, 3), keepdim=True) + eps).rsqrt()).to(z.dtype)


@CARD.module
class DeformableGate(nn.Module):
    """The gate on feature maps; in a ResNet it stands after the blocks of a stage.

    Args:
        dim: C.
        ratio: c / C, of the channels that offsets and gate are made of; at least one.
        kernel: sides of D and W, odd.
        norm: over the channels of each pixel, or over all channels of a whole map.
    """

    def __init__(self, dim: int, *, ratio: float = 0.2, kernel: int = 3, norm: Norm = "channels") -> None:
        super().__init__()
        whole(self, dim=dim, kernel=kernel)
        number(self, above=0, most=1, ratio=ratio)
        choice(self, get_args(Norm), norm=norm)
        if kernel % 2 == 0:
            refuse(self, "kernel", "is even", kernel, "an odd one, which has a centre")
        c = max(1, math.floor(ratio * dim))
        self.dim, self.ratio, self.kernel, self.norm = dim, ratio, kernel, norm
        self.depth = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        self.point = nn.Conv2d(dim, c, 1, bias=False)
        self.offset = nn.Conv2d(c, 2 * kernel * kernel, 3, padding=1)
        self.look = nn.Conv2d(c, dim, kernel, padding=kernel // 2)  # its weights; where it looks is told
        self.weight, self.bias = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's convolutions, whose taps stand where they always do."""
        for zero in (self.offset.weight, self.offset.bias, self.bias):
            if zero is not None:
                nn.init.zeros_(zero)
        nn.init.ones_(self.weight)

    def _reduced(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B c Y X"]:
        if x.shape[2] * x.shape[3] == 1:
            refuse(self, "x", "is one pixel, which has no statistics", tuple(x.shape), "two pixels or more")
        return F.gelu(_instance_norm(self.point(self.depth(x))))

    @checked(C="dim")
    def offsets(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B offsets Y X"]:
        """How far each tap is moved, dy and dx in turn."""
        return self.offset(self._reduced(x))

    @checked(C="dim")
    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """In (0, 1), for each channel of each pixel."""
        z = self._reduced(x)
        v = deformable_conv(z, self.offset(z), self.look.weight, self.look.bias)
        if self.norm == "map":
            return F.group_norm(v, 1, self.weight, self.bias).sigmoid()
        v = F.layer_norm(v.movedim(1, -1), (self.dim,), self.weight, self.bias)
        return v.movedim(-1, 1).sigmoid()

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return self.gate(x) * x

    def extra_repr(self) -> str:
        return f"{self.dim}, ratio={self.ratio}, kernel={self.kernel}, norm={self.norm!r}"
