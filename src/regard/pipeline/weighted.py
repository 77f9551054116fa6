"""The value half of a layer: weights made elsewhere (by position alone, by another stream, by an earlier layer)."""

from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import checked
from regard.kernels.problem import combine
from regard.kernels.sums import over_keys
from regard.shapes import head_shape


def weighed(weights: Float[Tensor, "#B H T S"], v: Float[Tensor, "B G S V"]) -> Float[Tensor, "B H T V"]:
    """sum_j weights_ij v_j, of each head with its group's values; one set of weights serves a whole batch uncopied."""
    B, G, S, V = v.shape
    _, H, T, _ = weights.shape
    if len(weights) == B:
        return combine(weights, v)
    side_by_side = v.to(weights.dtype).permute(1, 2, 0, 3).reshape(G, S, B * V)
    out = over_keys(weights.reshape(G, H // G * T, S), side_by_side)
    return out.view(H, T, B, V).permute(2, 0, 1, 3)


class Weighted(nn.Module):
    """Values weighted by what is handed in: y = concat_h(A_h V_h) W_o.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: as of `regard.Attention`.

    Shapes: x (B, S, M), weights (B or 1, H, T, S) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who="Weighted")
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, shape.num_kv_heads, shape.head_dim
        self.v_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)

    @checked(M="dim", H="num_heads")
    def forward(self, x: Float[Tensor, "B S M"], weights: Float[Tensor, "#B H T S"]) -> Float[Tensor, "B T M"]:
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        out = weighed(weights, v).to(x.dtype)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
