"""DiffiT's time-dependent attention: a diffusion step's time is added to queries, keys and values."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, flag, refuse, whole
from regard.masks import padding
from regard.pipeline.function import attention
from regard.shapes import HeadShape
from regard.vision.davit import window_attention
from regard.vision.maps import differences, in_windows, to_map, to_tokens


def _inputs(shape: HeadShape) -> tuple[Tensor, Tensor]:
    """A map of 4 x 6, and a time."""
    generator = torch.Generator().manual_seed(2)
    x, time = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((2, shape.dim, 4, 6), (2, shape.dim))
    )
    return x, time


CARD = Card(
    "time_dependent",
    equation="""[q | k | v] = x W + b + time W_t + b_t      the same for all tokens of a sample
out = softmax(q k^T / sqrt(D) + R) v W_o      R_ij = table[y_i - y_j, x_i - x_j] for each head, in windows of w x w""",
    papers=(
        Paper(
            "DiffiT: Diffusion Vision Transformers for Image Generation",
            "Hatamizadeh, Song, Liu, Kautz, Vahdat",
            2023,
            "2312.02139",
            "abstract; official code, which is of the latent model",
        ),
    ),
    protocol="FeatureMixer",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*ceil(Y/window)*ceil(X/window)*window**4*M + 3*B*M*M", ""),
    claim="Time enters through attention alone, as one score a key, head and time and as one value for all tokens: "
    "tests/vision/test_time_dependent.py::test_time_is_a_score_of_keys_and_a_constant.",
    differs=(
        "The released model's window covers the whole grid; windows that don't are those of the paper's model of "
        "images, whose code is not published.",
        "A map that windows don't divide is filled up on the right and below by pixels that nobody attends to.",
        "Without a time its term is left out; the released code scrambles queries, keys and values there.",
        "Left out: dropout of weights and outputs, the U-shaped model of images, and guidance.",
    ),
    verified="third-party",
    example={"window": 2},
    tries={"window": 3, "time_dim": 8},
    defaults={
        "window": "ours, a latent grid of 8 x 8",
        "time_dim": "code, as wide as dim",
        "qkv_bias": "code",
        "relative_bias": "code",
    },
)


class TimeDependentAttention(nn.Module):
    """Attention among the tokens of one window, in row-major order: (B, w^2, M) and a time (B, Mt) -> (B, w^2, M).

    Args:
        dim, num_heads: M and H.
        window: w.
        time_dim: Mt, of the time's vector (in the released model time and class, summed); default dim.
        qkv_bias: of queries, keys and values, beside the time's own.
        relative_bias: whether there is R.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 8,
        time_dim: int | None = None,
        qkv_bias: bool = True,
        relative_bias: bool = True,
    ) -> None:
        super().__init__()
        time_dim = dim if time_dim is None else time_dim
        whole(self, dim=dim, num_heads=num_heads, window=window, time_dim=time_dim)
        divides(self, num_heads=num_heads, dim=dim)
        flag(self, qkv_bias=qkv_bias, relative_bias=relative_bias)
        self.dim, self.num_heads, self.window, self.time_dim = dim, num_heads, window, time_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.time_proj, self.o_proj = nn.Linear(time_dim, 3 * dim), nn.Linear(dim, dim)
        side = 2 * window - 1
        self.table = nn.Parameter(torch.empty(num_heads, side, side)) if relative_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform for each linear map, those that the code stacks as one; the table truncated normal of 0.02."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.time_proj, self.o_proj):
            stacked = linear in (self.q_proj, self.k_proj, self.v_proj)
            bound = (6 / (linear.in_features + linear.out_features * (3 if stacked else 1))) ** 0.5
            nn.init.uniform_(linear.weight, -bound, bound)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.table is not None:
            nn.init.trunc_normal_(self.table, std=0.02)

    def heads(
        self, x: Float[Tensor, "B N M"], time: Float[Tensor, "B Mt"] | None
    ) -> tuple[Float[Tensor, "B H N D"], Float[Tensor, "B H N D"], Float[Tensor, "B H N D"]]:
        """Queries, keys and values."""
        made = [f(x) for f in (self.q_proj, self.k_proj, self.v_proj)]
        if time is not None:
            terms = self.time_proj(time)[:, None].chunk(3, -1)
            made = [z + term for z, term in zip(made, terms, strict=True)]
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in made)
        return q, k, v

    def bias(self, tall: int, wide: int) -> Float[Tensor, "H pixels pixels"] | None:
        """R of a window of these sides."""
        return None if self.table is None else differences(self.table, tall, wide)

    @checked(M="dim", Mt="time_dim")
    def forward(
        self,
        x: Float[Tensor, "B N M"],
        time: Float[Tensor, "B Mt"] | None,
        *,
        mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B N M"]:
        """`mask` is True at tokens that others may attend to; the others give 0."""
        if x.shape[1] != self.window**2:
            refuse(self, "x", "is no window", f"{x.shape[1]} tokens", f"{self.window} x {self.window}")
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        bias = self.bias(self.window, self.window)
        seen = None if mask is None else padding(mask)
        out = attention(*self.heads(x, time), bias=None if bias is None else bias[None], mask=seen)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return out if mask is None else out.masked_fill(~mask[..., None], 0.0)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, window={self.window}, time_dim={self.time_dim}"


@CARD.module
class TimeWindowAttention(nn.Module):
    """`TimeDependentAttention` in each window of a map. All windows of a sample have its time, projected once.

    Args:
        dim, num_heads, window, time_dim, qkv_bias, relative_bias: as there.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 8,
        time_dim: int | None = None,
        qkv_bias: bool = True,
        relative_bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.time_dim = dim, dim if time_dim is None else time_dim
        self.attention = TimeDependentAttention(
            dim, num_heads, window=window, time_dim=time_dim, qkv_bias=qkv_bias, relative_bias=relative_bias
        )

    @checked(M="dim", Mt="time_dim")
    def forward(self, x: Float[Tensor, "B M Y X"], time: Float[Tensor, "B Mt"] | None) -> Float[Tensor, "B M Y X"]:
        Y, X = x.shape[2:]
        w = self.attention.window
        tall, wide = (max(1, min(w, size)) for size in (Y, X))
        z = F.pad(x, (0, -X % wide, 0, -Y % tall))
        mask = None
        if Y % tall or X % wide:
            real = F.pad(x.new_ones(1, 1, Y, X, 1), (0, 0, 0, -X % wide, 0, -Y % tall))
            mask = (in_windows(real, (tall, wide))[:, 0] > 0).mT.expand(-1, tall * wide, -1)
        q, k, v = (one.unflatten(2, z.shape[2:]) for one in self.attention.heads(to_tokens(z), time))
        out = window_attention(q, k, v, window=(tall, wide), bias=self.attention.bias(tall, wide), mask=mask)
        tokens = out[:, :, :Y, :X].flatten(2, 3).transpose(1, 2).flatten(2)
        return to_map(self.attention.o_proj(tokens), (Y, X))
