"""Swin's shifted windows: attention in windows, which every other layer moves by half a window."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, whole
from regard.vision.davit import WindowAttention, window_attention
from regard.vision.maps import differences, in_windows, to_tokens

CARD = Card(
    "swin",
    equation="""softmax(Q K^T / sqrt(D) + R + M) V      for each head and window (w x w) of the map rolled by -s
R_ij = table[h, y_i - y_j + w - 1, x_i - x_j + w - 1];  M_ij = -inf where i and j were no neighbours before the roll,
that is where they differ by [0, L - w), [L - w, L - s), [L - s, L) on an axis of length L""",
    papers=(
        Paper(
            "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
            "Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo",
            2021,
            "2103.14030",
            "timm's code",
        ),
        Paper(
            "Flash Window Attention: speedup the attention computation for Swin Transformer",
            "Zhang",
            2025,
            "2501.06480",
            "abstract; official code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost(
        "2*B*M*(ceil(Y/window)*window**2 - 2*(window//2)*(window - window//2))"
        "*(ceil(X/window)*window**2 - 2*(window//2)*(window - window//2))",
        "",
    ),
    claim="Windows meet in the second layer, which is shifted, at a cost linear in pixels, without a matrix of scores: "
    "tests/vision/test_swin.py::test_windows_meet_through_the_shift, "
    "tests/vision/test_swin.py::test_cost_is_linear_in_pixels, "
    "tests/vision/test_swin.py::test_no_score_matrix_is_made.",
    differs=(
        "What the shift brought together from opposite borders is hidden, where timm's -100 leaks at large scores.",
        "A map that windows don't divide is padded with zeros before it is rolled, as in transformers; timm rolls "
        "first, so that its mask and what it hides do not fit there.",
        "A side that is not longer than the window is one window without shift, as in timm, and reads the middle of "
        "the table, for which timm makes a smaller one.",
        "Flash Window Attention's own kernel is for GPUs. Here many short sequences with one bias run on the kernels "
        "that there are. Its backward lacks the scale in the gradients of queries and keys, and it takes no mask of "
        "shifts; here neither is so.",
    ),
    verified="third-party",
    example={"window": 3},
    tries={"shift": 0},
    defaults={"window": "code, timm", "shift": "code, timm: of every other block", "bias": "code, timm"},
)


@CARD.module
class ShiftedWindowAttention(WindowAttention):
    """Attention in windows of the shifted map, with a bias for each difference of place.

    Args:
        dim, num_heads: M and H.
        window: w, in pixels.
        shift: s, less than w; default w // 2. With 0 it is the layer between two shifted ones.
        bias: of queries, keys and values.
    """

    def __init__(
        self, dim: int, num_heads: int, *, window: int = 7, shift: int | None = None, bias: bool = True
    ) -> None:
        super().__init__(dim, num_heads, window=window, bias=bias)
        self.shift = window // 2 if shift is None else shift
        whole(self, 0, most=window - 1, shift=self.shift)
        self.table = nn.Parameter(torch.empty(num_heads, 2 * window - 1, 2 * window - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02, the table too, and no bias."""
        super().reset_parameters()
        if hasattr(self, "table"):  # the parent resets what it has made
            nn.init.trunc_normal_(self.table, std=0.02)

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        Y, X = x.shape[2:]
        tall, wide = (max(1, min(self.window, size)) for size in (Y, X))
        down, right = (0 if size <= self.window else self.shift for size in (Y, X))
        z = F.pad(x, (0, -X % wide, 0, -Y % tall))
        sizes = z.shape[2:]
        z = z.roll((-down, -right), (2, 3)) if down or right else z
        q, k, v = (one.unflatten(2, sizes) for one in self._heads(to_tokens(z)))
        mask = shift_mask(sizes, (tall, wide), (down, right), x.device) if down or right else None
        out = window_attention(q, k, v, window=(tall, wide), bias=differences(self.table, tall, wide), mask=mask)
        out = out.roll((down, right), (2, 3)) if down or right else out
        return self._merged(out[:, :, :Y, :X].flatten(2, 3), (Y, X))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift={self.shift}"


def shift_mask(
    sizes: Sequence[int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Bool[Tensor, "windows pixels pixels"]:
    """Which pixels of a window of the rolled map were neighbours before it was rolled by `shift`."""
    found = regions(sizes, window, shift, device)
    return found[:, :, None] == found[:, None]


def regions(
    sizes: Sequence[int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Int[Tensor, "windows pixels"]:
    """Pixels of a window of the rolled map that have one number were neighbours before it was rolled by `shift`."""
    parts = []
    for size, w, s in zip(sizes, window, shift, strict=True):
        at = torch.arange(size, device=device)
        parts.append((at >= size - w).long() + (at >= size - s))
    return in_windows((3 * parts[0][:, None] + parts[1])[None, None, ..., None], window)[:, 0, :, 0]
