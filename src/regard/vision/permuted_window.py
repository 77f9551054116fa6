"""Permuted self-attention: large windows, whose keys are cells of several pixels side by side.

A cell's pixels are laid side by side in its channels, so that it is as wide as a query. Heads are cut out of these
channels: where the cell's pixels are as many as heads, or fewer and divide them, each head reads one of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, flag, number, refuse, whole
from regard.pipeline.function import attention
from regard.vision.maps import in_windows, to_map
from regard.vision.swin import regions

CARD = Card(
    "permuted_window",
    equation="""Q = W_q x (M channels);   k0, v0 = W_k x, W_v x (M / r^2 channels)      for each window of w x w pixels
K[i, j, (r dy + dx) M / r^2 + c] = k0[r i + dy, r j + dx, c],   V likewise:   (w / r)^2 cells of M channels
softmax(Q K^T / sqrt(D) + R + mask) V      for each head, D of the channels of Q, K and V
R_(y, x), (i, j) = table[h, y // r - i + w / r - 1, x // r - j + w / r - 1]
the mask is that of shifted windows, where a cell stands for its pixels""",
    papers=(
        Paper(
            "SRFormer: Permuted Self-Attention for Single Image Super-Resolution",
            "Zhou, Li, Guo, Bai, Cheng, Hou",
            2023,
            "2303.09735",
            "abstract; official code (srformer_arch.py)",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "dropout", "compile"},
    cost=Cost(
        "2*B*M/reduction**2"
        "*(ceil(Y/min(window, Y))*min(window, Y)**2 - 2*min(1, max(0, Y - window))*shift*(window - shift))"
        "*(ceil(X/min(window, X))*min(window, X)**2 - 2*min(1, max(0, X - window))*shift*(window - shift))",
        "",
    ),
    claim="A quarter of the keys, of a quarter of their channels, at the same reach: "
    "tests/vision/test_permuted_window.py::test_windows_cost_a_quarter, "
    "tests/vision/test_permuted_window.py::test_a_pixel_is_read_by_the_heads_of_its_phase_alone.",
    differs=(
        "What the shift brought together from opposite borders is hidden, where the code's -100 leaks at large scores.",
        "A map that windows don't divide is padded with zeros before it is rolled; the code's network pads its image.",
        "A side that is not longer than the window is one window without shift, and reads the middle of the table, for "
        "which the code makes a smaller one.",
        "A shift that splits cells is refused; the code gives such a cell to one of its two regions.",
    ),
    verified="third-party",
    example={"window": 4, "shift": 2},
    tries={"shift": 0},
    defaults={
        "window": "code, the larger models",
        "shift": "code, of every other block",
        "reduction": "code",
        "bias": "code",
    },
)


def cells(z: Float[Tensor, "B Y X c"], reduction: int) -> Float[Tensor, "B down across C"]:
    """Pixels of each r x r cell side by side in its channels, row by row."""
    r, (B, Y, X, c) = reduction, z.shape
    return z.reshape(B, Y // r, r, X // r, r, c).transpose(2, 3).reshape(B, Y // r, X // r, r * r * c)


@checked()
def permuted_window_attention(
    q: Float[Tensor, "B H Y X D"],
    k: Float[Tensor, "B H down across D"],
    v: Float[Tensor, "B H down across V"],
    *,
    window: int | tuple[int, int],
    bias: Float[Tensor, "H pixels cells"] | None = None,
    mask: Bool[Tensor, "windows pixels cells"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H Y X V"]:
    """Attention of a window's pixels to its cells; `window`, its sides or both of them, in pixels, divides Y and X.

    Args:
        k, v: of r x r pixels each, r = Y / down = X / across; `cells` makes them, before heads are cut out.
        bias: added to the scores of every window.
        mask: of each window, row by row, True = may attend.
        dropout: of weights.

    Raises:
        ValueError: maps and windows that don't fit together.
    """
    (B, H, Y, X, _), (down, across) = q.shape, k.shape[2:4]
    tall, wide = window if isinstance(window, tuple) else (window, window)
    r = Y // down if down else 1
    if (r * down, r * across) != (Y, X):
        expected = "a map of which both sides are one multiple of its own"
        refuse("permuted_window_attention", "k", "has another map than q", tuple(k.shape), expected)
    if Y % tall or X % wide or tall % r or wide % r:
        expected = f"sides that divide {(Y, X)}, and are multiples of {r}"
        refuse("permuted_window_attention", "window", "does not fit", (tall, wide), expected)
    queries = in_windows(q, (tall, wide))
    keys, values = (in_windows(z, (tall // r, wide // r)) for z in (k, v))
    seen = None if mask is None else mask.repeat(B, 1, 1)[:, None]
    added = None if bias is None else bias[None]
    out = attention(queries, keys, values, bias=added, mask=seen, dropout=dropout)
    parts = out.view(B, Y // tall, X // wide, H, tall, wide, v.shape[-1])
    return parts.permute(0, 3, 1, 4, 2, 5, 6).reshape(B, H, Y, X, v.shape[-1])


@CARD.module
class PermutedSelfAttention(nn.Module):
    """`permuted_window_attention` with projections, shift and bias.

    Args:
        dim, num_heads: M and H.
        window: w, in pixels; a multiple of r.
        shift: s, less than w and a multiple of r. Every other layer has w // 2.
        reduction: r, the side of a cell; r^2 divides dim.
        bias: of queries, keys and values.
        dropout: of weights, and of outputs.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 24,
        shift: int = 0,
        reduction: int = 2,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, window=window, reduction=reduction)
        whole(self, 0, most=window - 1, shift=shift)
        flag(self, bias=bias)
        number(self, least=0, below=1, dropout=dropout)
        divides(self, num_heads=num_heads, dim=dim)
        r = reduction
        for name, value in (("window", window), ("shift", shift)):
            if value % r:
                refuse(self, name, "splits cells", value, f"a multiple of reduction = {r}")
        if dim % r**2:
            refuse(self, "dim", "is no multiple of the pixels of a cell", dim, f"a multiple of {r**2}")
        self.dim, self.num_heads, self.window, self.shift, self.reduction = dim, num_heads, window, shift, r
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, dim // r**2, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.empty(num_heads, 2 * window // r - 1, 2 * window // r - 1))
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02, the table too, and no bias."""
        nn.init.trunc_normal_(self.table, std=0.02)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        r, (Y, X) = self.reduction, x.shape[2:]
        tall, wide = (max(r, min(self.window, size + -size % r)) for size in (Y, X))
        down, right = (0 if size <= self.window else self.shift for size in (Y, X))
        z = F.pad(x, (0, -X % wide, 0, -Y % tall))
        sizes = z.shape[2:]
        z = (z.roll((-down, -right), (2, 3)) if down or right else z).movedim(1, -1)
        q = self.q_proj(z).unflatten(-1, (self.num_heads, -1)).movedim(3, 1)
        k, v = (cells(f(z), r).unflatten(-1, (self.num_heads, -1)).movedim(3, 1) for f in (self.k_proj, self.v_proj))
        told: dict[str, Any] = {"window": (tall, wide), "bias": self._differences(tall, wide)}
        if down or right:
            told["mask"] = cell_mask(sizes, (tall, wide), (down, right), r, x.device)
        if self.training:
            told["dropout"] = self.dropout
        out = permuted_window_attention(q, k, v, **told)
        out = out.roll((down, right), (2, 3)) if down or right else out
        tokens = self.o_proj(out[:, :, :Y, :X].flatten(2, 3).transpose(1, 2).flatten(2))
        return to_map(F.dropout(tokens, self.dropout, self.training), (Y, X))

    def _differences(self, tall: int, wide: int) -> Float[Tensor, "H pixels cells"]:
        """The table's entries of each of a window's pixels and cells."""
        r, middle = self.reduction, self.window // self.reduction - 1
        dy, dx = (
            torch.arange(n, device=self.table.device)[:, None] // r
            - torch.arange(n // r, device=self.table.device)
            + middle
            for n in (tall, wide)
        )
        return self.table[:, dy[:, None, :, None], dx[:, None]].flatten(3).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, window={self.window}, shift={self.shift}, reduction={self.reduction}"


def cell_mask(
    sizes: tuple[int, ...], window: tuple[int, int], shift: tuple[int, int], reduction: int, device: torch.device
) -> Bool[Tensor, "windows pixels cells"]:
    """Which cells were neighbours of a window's pixels before the map was rolled by `shift`."""
    pixels = regions(sizes, window, shift, device)
    area, side, rolled = ((given[0] // reduction, given[1] // reduction) for given in (sizes, window, shift))
    return pixels[:, :, None] == regions(area, side, rolled, device)[:, None]
