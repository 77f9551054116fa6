"""Global context: one softmax over all places gathers a vector, which is added to each place, or gates the channels."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number
from regard.vision.gating import Bottleneck, inner_width

CARD = Card(
    "global_context",
    equation="""c = sum_n softmax_n(w . x_n + b) x_n,   t = W2 relu(LN(W1 c + b1)) + b2      W1 (R, C)
"add": y_n = x_n + t,   W2 starts at 0            "scale": y_n = x_n sigmoid(t)""",
    papers=(
        Paper(
            "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond",
            "Cao, Xu, Lin, Wei, Hu",
            2019,
            "1904.11492",
            "third-party code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*Y*X*M + 2*B*M*inner_dim", ""),
    claim="All places share one gathering, so that the cost is linear in pixels: "
    "tests/vision/test_global_context.py::test_every_place_gets_the_same_at_linear_cost.",
    verified="third-party",
    example={"inner_dim": 3},
    tries={"reduction": {"inner_dim": None, "reduction": 4}, "eps": 0.1},
    defaults={
        "fuse": "code, of the authors as the account has it",
        "reduction": "ours, the authors' as it is remembered; 8 in timm",
        "inner_dim": "code, timm: C / reduction",
        "eps": "ours, torch's own; 1e-6 in timm",
    },
)


def context_pool(
    x: Float[Tensor, "B C N"], weight: Float[Tensor, "1 C"], bias: Float[Tensor, "1"] | None
) -> Float[Tensor, "B C"]:
    """The mean of all places by softmax(w . x + b)."""
    scores = weight @ x if bias is None else weight @ x + bias
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ scores.softmax(-1, dtype=wide).mT)[..., 0].to(x.dtype)


@CARD.module
class GlobalContext(nn.Module):
    """`context_pool` and what becomes of it, on a map of any number of axes.

    Args:
        dim: C.
        fuse: whether it is added, or gates the channels.
        reduction: C / R.
        inner_dim: R itself.
        eps: of the norm.
    """

    def __init__(
        self,
        dim: int,
        *,
        fuse: Literal["add", "scale"] = "add",
        reduction: float = 16,
        inner_dim: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        choice(self, ("add", "scale"), fuse=fuse)
        number(self, above=0, eps=eps)
        self.dim, self.fuse = dim, fuse
        self.inner_dim = inner_width(self, dim, inner_dim, reduction)
        self.score = nn.Linear(dim, 1)
        self.mlp = Bottleneck(dim, self.inner_dim, norm=nn.LayerNorm(self.inner_dim, eps=eps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As timm; where it is added b2 starts at 0 too, so that the layer starts as the identity."""
        nn.init.kaiming_normal_(self.score.weight, nonlinearity="relu")
        if self.fuse == "add":
            nn.init.zeros_(self.mlp.up.weight)
            nn.init.zeros_(self.mlp.up.bias)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C X *sizes"]) -> Float[Tensor, "B C X *sizes"]:
        t = self.mlp(context_pool(x.flatten(2), self.score.weight, self.score.bias))
        t = t.reshape(*t.shape, *[1] * (x.dim() - 2))
        return x + t if self.fuse == "add" else x * t.sigmoid()

    def extra_repr(self) -> str:
        return f"{self.dim}, fuse={self.fuse!r}, inner_dim={self.inner_dim}"
