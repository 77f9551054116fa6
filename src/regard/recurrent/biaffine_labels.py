"""The label of each arc, by products that also count both sides by themselves, and the loss of arcs and labels.

The paper, and what was read of it, stand on the card of `regard.recurrent.biaffine`.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.checks import checked, refuse, whole
from regard.recurrent.biaffine import Biaffine, Sides
from regard.tracing import readable


class BiaffineLabels(Sides):
    """Scores of the label of each arc: x (B, T, dim)[, context] -> (B, T, S, num_labels).

    Args:
        num_labels: how many there are.
        label_dim, dropout, context_dim: as of `BiaffineArcs`.
        rank_one: as of `Biaffine`.
    """

    def __init__(
        self,
        dim: int,
        num_labels: int,
        *,
        label_dim: int = 100,
        context_dim: int | None = None,
        rank_one: bool = False,
        dropout: float = 0.0,
    ) -> None:
        whole("BiaffineLabels", num_labels=num_labels, label_dim=label_dim)
        super().__init__(dim, context_dim, label_dim, dropout)
        self.label = Biaffine(label_dim, label_dim, num_labels, rank_one=rank_one)

    @checked(M="dim", C="context_dim")
    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"] | None = None
    ) -> Float[Tensor, "B T S N"]:
        return self.label(*self.sides(x, x if context is None else context)).movedim(1, -1)


@checked()
def arc_label_loss(
    arcs: Float[Tensor, "B T S"],
    labels: Float[Tensor, "B T S N"],
    heads: Int[Tensor, "B T"],
    kinds: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the head, and of the label at the right head, each a mean over the tokens of `mask`.

    Args:
        arcs: scores or log-probabilities, hidden heads hidden.
        mask: True = a real token, and not the root.
    """
    who = "arc_label_loss"
    heads, kinds = heads[mask].long(), kinds[mask].long()
    for name, given, most in (("heads", heads, arcs.shape[2]), ("kinds", kinds, labels.shape[3])):
        if given.is_cpu and readable(given) and bool(((given < 0) | (given >= most)).any()):
            refuse(who, name, "is out of range", f"{int(given.min())} to {int(given.max())}", f"0 to {most - 1}")
    at = labels[mask].gather(1, heads[:, None, None].expand(-1, -1, labels.shape[3]))[:, 0]
    of_heads, of_labels = (
        F.cross_entropy(s, y, reduction="sum") / max(1, len(y)) for s, y in ((arcs[mask], heads), (at, kinds))
    )
    return of_heads + of_labels
