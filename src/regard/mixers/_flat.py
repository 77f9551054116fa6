"""What nets on whole sentences share: the row that tokens lie in, the net, and the layer around it."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Paper
from regard.checks import choice, divides, flag, refuse, tokens, whole
from regard.tracing import exporting

PAPER = Paper(
    "Rethinking Attention: Exploring Shallow Feed-Forward Neural Networks as an Alternative to Attention Layers in "
    "Transformers",
    "Bozic, Dordevic, Coppola, Thommes, Singh",
    2023,
    "2311.10642",
    "abstract; official code",
)

SIZES = {"max_length": "code", "hidden": "ours, the smallest of the code's sizes"}

Size = Literal["XS", "S", "M", "L", "XL"]


def hidden_width(size: Size | int, width: int, *, per_head: bool = False) -> int:
    """Numbers in the hidden layer for a row of `width` numbers; an int is itself."""
    if not isinstance(size, str):
        whole("hidden_width", hidden=size)
        return size
    choice("hidden_width", get_args(Size), hidden=size)
    if per_head:
        return max(1, width // {"XS": 32, "S": 16, "M": 8, "L": 4, "XL": 4}[size])
    return 2 * width if size == "XL" else max(1, width // {"XS": 256, "S": 128, "M": 8, "L": 2}[size])


class FlatNet(nn.Module):
    """Norm, map, leaky ReLU, norm, map: the paper's net on rows of `width` numbers."""

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.inner_norm, self.down = nn.LayerNorm(hidden), nn.Linear(hidden, outputs)

    def rest(self, z: Float[Tensor, "*b hidden"]) -> Float[Tensor, "*b outputs"]:
        """What follows the first map."""
        return self.down(self.inner_norm(F.leaky_relu(z)))

    def forward(self, f: Float[Tensor, "*b width"]) -> Float[Tensor, "*b outputs"]:
        return self.rest(self.up(self.norm(f)))


def flat(x: Float[Tensor, "B T M"], keep: Bool[Tensor, "B T"] | None, length: int) -> Float[Tensor, "B W"]:
    """Token after token in one row, filled up with zeros to `length` tokens; hidden ones are zeros."""
    x = x if keep is None else x.masked_fill(~keep[..., None], 0)
    if exporting():  # views would be another graph where nothing is missing
        at = torch.arange(x.shape[1], device=x.device)
        return x.new_zeros(x.shape[0], length, x.shape[2]).index_copy(1, at, x).flatten(1)
    return F.pad(x, (0, 0, 0, length - x.shape[1])).flatten(1)


class FlatLayer(nn.Module):
    """What both forms have: nets, and the projection behind them."""

    def __init__(
        self, dim: int, num_heads: int, *, max_length: int, hidden: Size | int | None, per_head: bool,
        project: bool, rows: int, outputs: int,
    ) -> None:  # fmt: skip
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, max_length=max_length)
        flag(self, per_head=per_head, project=project)
        divides(self, num_heads=num_heads, dim=dim)
        self.dim, self.num_heads, self.max_length, self.outputs = dim, num_heads, max_length, outputs
        width = rows * max_length * dim
        size = "XS" if hidden is None else hidden
        self.hidden, n = hidden_width(size, width, per_head=per_head), num_heads if per_head else 1
        self.nets = nn.ModuleList(FlatNet(width, self.hidden, outputs * dim // n) for _ in range(n))
        self.o_proj = nn.Linear(dim, dim) if project else nn.Identity()

    def _fits(self, name: str, x: Tensor, past: int = 0) -> None:
        tokens(self, name, x, self.dim)
        if past + x.shape[1] > self.max_length:
            got = f"{past + x.shape[1]} tokens"
            refuse(self, name, "is too long", got, f"at most max_length = {self.max_length}")

    def _rows(self, f: Float[Tensor, "B W"], length: int) -> Float[Tensor, "B T M"]:
        y = torch.cat([net(f).unflatten(-1, (self.max_length, -1)) for net in self.nets], -1)
        return y.index_select(1, torch.arange(length, device=y.device)) if exporting() else y[:, :length]

    def _out(self, y: Float[Tensor, "B T M"], keep: Tensor | None) -> Float[Tensor, "B T M"]:
        return self.o_proj(y if keep is None else y.masked_fill(~keep[..., None], 0))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, max_length={self.max_length}, hidden={self.hidden}"
