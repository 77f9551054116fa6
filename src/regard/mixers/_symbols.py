"""Symbols: vectors that tell whom a message is from, and not what its sender looks like."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.checks import divides, refuse, whole
from regard.pipeline.function import attention
from regard.tracing import readable


class Symbols(nn.Module):
    """Makes the symbols of tokens. One may serve all layers of a model: hand it to each, or `regard.share` them."""

    dim: int

    def forward(self, x: Float[Tensor, "B S M"], positions: Int[Tensor, "*b S"]) -> Float[Tensor, "#B S M"]:
        """Those of the senders x, which stand at these positions."""
        raise NotImplementedError


class SymbolicAttention(Symbols):
    """Looked up in a library: softmax over how well a token's features match the template of each entry.

    Args:
        dim: M.
        num_heads: how many parts of a symbol are looked up by themselves.
        num_symbols: entries of the library.
    """

    tied = ("weight", "bias", "templates", "library")

    def __init__(self, dim: int, num_heads: int = 4, num_symbols: int = 512) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, num_symbols=num_symbols)
        divides(self, num_heads=num_heads, dim=dim)
        self.dim, self.num_heads = dim, num_heads
        self.weight, self.bias = nn.Parameter(torch.empty(dim, dim)), nn.Parameter(torch.empty(dim))
        self.templates = nn.Parameter(torch.empty(num_symbols, dim))
        self.library = nn.Parameter(torch.empty(num_symbols, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in (self.weight, self.bias):  # as torch's linear layers
            nn.init.uniform_(p, -(self.dim**-0.5), self.dim**-0.5)
        for p in (self.templates, self.library):
            nn.init.normal_(p)

    def forward(self, x: Float[Tensor, "B S M"], positions: Int[Tensor, "*b S"]) -> Float[Tensor, "#B S M"]:
        q = F.linear(x, self.weight, self.bias)
        heads = (self.num_heads, -1)
        k, v = (
            z.to(q.dtype).unflatten(-1, heads).transpose(0, 1).expand(len(x), -1, -1, -1)
            for z in (self.templates, self.library)
        )
        return attention(q.unflatten(-1, heads).transpose(1, 2), k, v).transpose(1, 2).flatten(2)


class PositionalSymbols(Symbols):
    """Row p of a table for the token at position p; later positions are refused.

    Args:
        dim: M.
        max_length: rows.
    """

    tied = ("table",)

    def __init__(self, dim: int, max_length: int = 512) -> None:
        super().__init__()
        whole(self, dim=dim, max_length=max_length)
        self.dim = dim
        self.table = nn.Parameter(torch.empty(max_length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table)

    def forward(self, x: Float[Tensor, "B S M"], positions: Int[Tensor, "*b S"]) -> Float[Tensor, "#B S M"]:
        # Compiled code can't branch on data; there the lookup itself fails out of range.
        if positions.numel() and readable(positions):
            low, high = (int(p) for p in positions.aminmax())
            if low < 0 or high >= len(self.table):
                expected = f"0 to {len(self.table) - 1}; build it with a larger max_length"
                refuse(self, "positions", "reach where there is no symbol", f"{low} to {high}", expected)
        rows = F.embedding(positions, self.table).to(x.dtype)
        return rows if rows.dim() == 3 else rows[None]


class RelativeSymbols(Symbols):
    """A symbol for each pair of tokens: row clip(j - i, -m, m) + m of a table, which layers read by way of its rows.

    Args:
        dim: M.
        max_distance: m.
    """

    tied = ("table",)

    def __init__(self, dim: int, max_distance: int = 16) -> None:
        super().__init__()
        whole(self, dim=dim)
        whole(self, 0, max_distance=max_distance)
        self.dim, self.max_distance = dim, max_distance
        self.table = nn.Parameter(torch.empty(2 * max_distance + 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.table)

    def index(self, i: Int[Tensor, " t"], j: Int[Tensor, " s"]) -> Int[Tensor, "t s"]:
        """Which row each pair has."""
        return (j - i[:, None]).clamp(-self.max_distance, self.max_distance) + self.max_distance

    def forward(self, x: Float[Tensor, "B S M"], positions: Int[Tensor, "*b S"]) -> Float[Tensor, "#B S M"]:
        """Of the senders alone: nothing."""
        return x.new_zeros(1, x.shape[1], self.dim)
