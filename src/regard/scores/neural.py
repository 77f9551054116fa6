"""Neural attention: a small network on each pair of a query and a key gives their score."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import whole
from regard.scores._pairs import in_pieces
from regard.stages import Rows, Score

CARD = Card(
    "neural",
    equation="""q' = P_q q + b_q,   k' = P_k k + b_k                         of width P, the same for all heads
score[t,s] = w3 . relu(W2 relu(W1 [q'_t; k'_s] + b1) + b2)      W1 (P, 2P), W2 (P // 2, P), not scaled
W1 [q'; k'] = W1_q q' + W1_k k', so that only what follows is done for each pair""",
    papers=(
        Paper(
            "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
            "DiGiugno, Mahmood",
            2025,
            "2502.17206",
            "abstract; introduction; official code",
        ),
    ),
    traits=PLAIN,
    cost=Cost("B*H*T*S*D + B*H*T*S*(width*width + width)/2 + B*(H*T + G*S)*(D + width)*width", "2*S*G*D"),
    claim="It fits a distance of queries and keys that no product of as many numbers does: "
    "tests/scores/test_neural.py::test_fits_a_distance_that_no_product_of_as_many_numbers_does.",
    differs=(
        "The last layer's bias, which softmax takes away again, is left out.",
        "Which layers of a model have it is the model's choice.",
    ),
    verified="third-party",
    example={"width": 8},
    defaults={"width": "code, of heads 64 wide"},
)


def pair_scores(
    q: Float[Tensor, "B H t P"],
    k: Float[Tensor, "B G s P"],
    weight: Float[Tensor, "P2 P"],
    bias: Float[Tensor, " P2"],
    last: Float[Tensor, "1 P2"],
    *,
    rows: int | None = None,
) -> Float[Tensor, "B H t s"]:
    """last . relu(weight relu(q_t + k_s) + bias), on some `rows` queries at a time: hidden layers of all pairs would be
    far more than their scores."""
    (B, H, _, P), s = q.shape, k.shape[2]
    k = k.repeat_interleave(H // k.shape[1], 1)

    def run(some: Tensor) -> Tensor:
        hidden = (some[..., :, None, :] + k[..., None, :, :]).relu()
        return ((hidden @ weight.mT + bias).relu() @ last.mT)[..., 0]

    return in_pieces(run, q, B * H * s * P, rows=rows)


@CARD.fills("score")
class NeuralScore(Score):
    """Scores of a network with two hidden layers, one for all heads of a layer.

    Args:
        width: P, what queries and keys are brought down to; D // 32 in the authors' code, which is 2 for D = 64.
    """

    def __init__(self, head_dim: int, *, width: int = 2) -> None:
        super().__init__()
        whole(self, head_dim=head_dim)
        whole(self, 2, width=width)
        self.head_dim, self.width = head_dim, width
        self.q_down, self.k_down = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.first = nn.Linear(2 * width, width)
        self.second = nn.Linear(width, width // 2)
        self.third = nn.Parameter(torch.empty(1, width // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's linear layers."""
        for layer in (self.q_down, self.k_down, self.first, self.second):
            layer.reset_parameters()
        bound = self.third.shape[1] ** -0.5
        nn.init.uniform_(self.third, -bound, bound)

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        wide = torch.promote_types(rows.q.dtype, torch.float32)
        given = (rows.q, rows.k, self.first.weight, self.first.bias, *self.second.parameters(), self.third)
        q, k, first, bias, weight, add, last = (z.to(wide) for z in given)
        q, k = (
            nn.functional.linear(z, p.weight.to(wide), p.bias.to(wide)) for z, p in ((q, self.q_down), (k, self.k_down))
        )
        q, k = q @ first[:, : self.width].mT + bias, k @ first[:, self.width :].mT
        return pair_scores(q, k, weight, add, last) * (scale * self.head_dim**0.5)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, width={self.width}"
