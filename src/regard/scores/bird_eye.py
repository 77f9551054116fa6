"""Bird-eye attention: each key's weight is multiplied by an importance of its own, whatever the query."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import fits, flag, whole
from regard.stages import Mix, Rows

CARD = Card(
    "bird_eye",
    equation="""u[h,j] = w_h . tanh(U_h k_j + c_h),   r = sigmoid(u)           k_j as scores see it, of the head's group
A = softmax(P + log r),   P = q k^T / sqrt(D)                 the same as softmax(P) r, each row divided by its sum
renormalise=False: A = softmax(P) r, whose rows sum to less than 1""",
    papers=(
        Paper(
            "Bird-Eye Transformers for Text Generation Models",
            "Sha, Song, Yordanov, Salvatori, Lukasiewicz",
            2022,
            "2210.03985",
            "abstract and the first lines of the introduction; the method section not seen, the code not found",
        ),
    ),
    traits=PLAIN,
    cost=Cost("2*B*H*T*S*D + B*H*S*hidden*(D + 1)", "2*S*G*D"),
    claim="A rare token that decides what follows is found by every query, however unlike: "
    "tests/scores/test_bird_eye.py::test_important_tokens_are_found_by_queries_unlike_them.",
    differs=(
        "The formula is reconstructed from the abstract: important history is weighed up by what it is, not by its "
        "likeness to the query.",
        "Importance is of the key alone; one that also reads the mean of the history, and one taught by syntax, are "
        "left out, as nothing of them could be read.",
        "Steps compute the importance of the keys that are kept anew.",
    ),
    verified="reconstructed",
    defaults={"hidden": "ours", "renormalise": "ours"},
)


def importance(
    k: Float[Tensor, "B G s D"],
    inner: Float[Tensor, "H E D"],
    shift: Float[Tensor, "H E"],
    outer: Float[Tensor, "H E"],
) -> Float[Tensor, "B H s"]:
    """u: w_h . tanh(U_h k_j + c_h), key head h // (H / G) for head h."""
    k = k.repeat_interleave(inner.shape[0] // k.shape[1], 1)
    hidden = torch.tanh(k @ inner.mT + shift[:, None])
    return (hidden @ outer[..., None])[..., 0]


class BirdEye(Mix):
    """Adds log sigmoid(u) to the scores of each key, or multiplies weights by sigmoid(u)."""

    def __init__(self, num_heads: int, head_dim: int, *, hidden: int = 16, renormalise: bool = True) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, head_dim=head_dim, hidden=hidden)
        flag(self, renormalise=renormalise)
        self.num_heads, self.head_dim, self.renormalise = num_heads, head_dim, renormalise
        self.inner = nn.Parameter(torch.empty(num_heads, hidden, head_dim))
        self.shift = nn.Parameter(torch.empty(num_heads, hidden))
        self.outer = nn.Parameter(torch.empty(num_heads, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U and c as torch's linear layers, w = 0: all keys are equally important."""
        bound = self.head_dim**-0.5
        nn.init.uniform_(self.inner, -bound, bound)
        nn.init.uniform_(self.shift, -bound, bound)
        nn.init.zeros_(self.outer)

    def start_neutral(self) -> bool:
        """w = 0, which is plain attention where rows are divided by their sums."""
        if self.renormalise:
            nn.init.zeros_(self.outer)
        return self.renormalise

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        fits(self, "B H t D", {"H": self.num_heads, "D": self.head_dim}, q=rows.q)
        k = rows.k
        if rows.allowed is not None:  # what nobody may see must not reach the parameters, not even as 0 * NaN
            k = k.masked_fill(~rows.allowed.any(1).any(1)[:, None, :, None], 0)
        u = importance(*(p.to(z.dtype) for p in (k, self.inner, self.shift, self.outer))).to(z.dtype)[:, :, None]
        return z - F.softplus(-u) if self.renormalise else z * torch.sigmoid(u)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, hidden={self.inner.shape[1]}, renormalise={self.renormalise}"


@CARD.fills()
def bird_eye(num_heads: int, head_dim: int, *, hidden: int = 16, renormalise: bool = True) -> dict[str, Mix]:
    """Before the softmax, or after it.

    Args:
        hidden: E, the width within the importance.
        renormalise: whether rows are divided by their sums again.
    """
    part = BirdEye(num_heads, head_dim, hidden=hidden, renormalise=renormalise)
    return {"score_mix" if renormalise else "weight_mix": part}
