"""The two blocks of LadaGAN around linear additive attention: the discriminator's and the generator's.

The paper, and what was read of it, stand on the card of `regard.linear.lada`.
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import checked, number, whole
from regard.linear.lada import LinearAdditiveAttention
from regard.masks import Mask


def _mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Ladaformer(nn.Module):
    """The discriminator's: x + attention(LN x), then x + MLP(LN x).

    Args:
        dim, num_heads: M and H.
        hidden: width of the MLP.
        eps: of the norms; 1e-5 in the authors' PyTorch code, 1e-6 in their TensorFlow code.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(self, dim: int, num_heads: int = 4, *, hidden: int = 512, eps: float = 1e-5) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, hidden=hidden)
        number(self, above=0, eps=eps)
        self.dim = dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attention, self.mlp = LinearAdditiveAttention(dim, num_heads), _mlp(dim, hidden)

    @checked(M="dim")
    def forward(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T M"]:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class ModulatedNorm(nn.Module):
    """gamma(h) * (x - mean) / std + beta(h), with h = relu(z W + b) and both linear in h; no 1 is added to gamma.

    Args:
        dim, cond_dim: widths of the tokens and of z.
        eps: of the norm.
    """

    def __init__(self, dim: int, cond_dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.hidden = nn.Sequential(nn.Linear(cond_dim, dim), nn.ReLU())
        self.gamma, self.beta = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B T M"], z: Float[Tensor, "B Z"]) -> Float[Tensor, "B T M"]:
        h = self.hidden(z)[:, None]
        return self.norm(x) * self.gamma(h) + self.beta(h)


class SelfModulatedLadaformer(nn.Module):
    """The generator's: x' = x + attention(norm(x, z)), then MLP(norm(x', z)), with no residual around the MLP.

    Args:
        dim, num_heads: M and H.
        cond_dim: width of z, which sets scale and shift of both norms.
        hidden: width of the MLP.

    Shapes: x (B, T, M), z (B, cond_dim) -> (B, T, M).
    """

    def __init__(self, dim: int, cond_dim: int, num_heads: int = 4, *, hidden: int = 512) -> None:
        super().__init__()
        whole(self, dim=dim, cond_dim=cond_dim, num_heads=num_heads, hidden=hidden)
        self.dim, self.cond_dim = dim, cond_dim
        self.norm1, self.norm2 = ModulatedNorm(dim, cond_dim), ModulatedNorm(dim, cond_dim)
        self.attention, self.mlp = LinearAdditiveAttention(dim, num_heads), _mlp(dim, hidden)

    @checked(M="dim", Z="cond_dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        z: Float[Tensor, "B Z"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        x = x + self.attention(self.norm1(x, z), mask=mask)
        return self.mlp(self.norm2(x, z))
