"""Attention lens: what each attention head says, in the words of the vocabulary.

W_h starts as the model's unembedding, and a lens is fitted for one layer at a time; then W_h o_h + b_h is what head h
says. A lens has H M V weights: 0.5 billion for GPT-2's 12 heads.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, fits, number, whole

CARD = Card(
    "attention_lens",
    equation="""logits = sum_h (W_h o_h + b_h)        o_h (M,): head h's part of the output, after the output projection
loss = KL(model's softmax || softmax(logits)) at the last position""",
    papers=(
        Paper(
            "Attention Lens: A Tool for Mechanistically Interpreting the Attention Head Information Retrieval "
            "Mechanism",
            "Sakarvadia et al.",
            2023,
            "2310.16270",
            "abstract; the authors' code (lensA.py, lightning_lens.py)",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*T*H*M*V", ""),
    claim="Heads play specialised roles that a lens reveals: where one head of three copies, its lens names the "
    "token: tests/inspect/analyses/test_attention_lens.py::test_reads_out_a_copying_head.",
    differs=("Which positions count is up to the caller (`mask`); the code takes the last, be it padding or not.",),
    verified="reconstructed",
)


@checked()
def head_contributions(outputs: Float[Tensor, "B H T V"], weight: Float[Tensor, "M N"]) -> Float[Tensor, "B T H M"]:
    """What each head adds to the residual stream, but for the projection's bias.

    Args:
        outputs: of the heads, before the output projection (`LayerTrace.outputs()`).
        weight: of the output projection, as nn.Linear has it: N = H V columns, head by head.
    """
    H, V = outputs.shape[1], outputs.shape[3]
    fits("head_contributions", "M N", {"N": H * V}, weight=weight)
    return torch.einsum("bhtv,mhv->bthm", outputs, weight.unflatten(1, (H, V)).to(outputs.dtype))


class AttentionLens(nn.Module):
    """A linear map to the vocabulary for each head of one layer; forward sums over heads.

    Args:
        num_heads: H.
        unembedding: where every head starts, (V, M): the weight of the model's output layer.
        bias: likewise, (V,); default 0.
    """

    @checked()
    def __init__(
        self, num_heads: int, unembedding: Float[Tensor, "V M"], *, bias: Float[Tensor, " V"] | None = None
    ) -> None:
        super().__init__()
        whole(self, num_heads=num_heads)
        start = unembedding.new_zeros(len(unembedding)) if bias is None else bias
        self.weight = nn.Parameter(unembedding.detach().repeat(num_heads, 1, 1))
        self.bias = nn.Parameter(start.detach().repeat(num_heads, 1))

    def heads(self, contributions: Float[Tensor, "*b H M"]) -> Float[Tensor, "*b H V"]:
        """The logits of each head by itself."""
        H, _, M = self.weight.shape
        fits(self, "*b H M", {"H": H, "M": M}, contributions=contributions)
        return torch.einsum("...hm,hvm->...hv", contributions.to(self.weight.dtype), self.weight) + self.bias

    def forward(self, contributions: Float[Tensor, "*b H M"]) -> Float[Tensor, "*b V"]:
        """The logits of all heads together."""
        return self.heads(contributions).sum(-2)

    def words(self, contributions: Float[Tensor, "*b H M"], *, top: int = 5) -> Int[Tensor, "*b H K"]:
        """The vocabulary's entries that each head speaks for most."""
        whole(self, most=self.weight.shape[1], top=top)
        with torch.no_grad():
            return self.heads(contributions).topk(top).indices


@checked()
def lens_loss(
    logits: Float[Tensor, "*b V"], model: Float[Tensor, "*b V"], *, mask: Bool[Tensor, "*b"] | None = None
) -> Float[Tensor, ""]:
    """KL(model || lens), mean over the positions that `mask` keeps."""
    lens, wanted = logits.log_softmax(-1), model.to(logits).log_softmax(-1)
    each = F.kl_div(lens, wanted, reduction="none", log_target=True).sum(-1)
    return each.mean() if mask is None else each[mask].mean()


@CARD.function
def fit_lens(
    lens: AttentionLens,
    batches: Iterable[tuple[Float[Tensor, "*b H M"], Float[Tensor, "*b V"]]],
    *,
    epochs: int = 1,
    lr: float = 1e-3,
) -> list[float]:
    """Adam on the loss, over batches of (head contributions, the model's own logits); the losses of all steps.

    Args:
        lens: what is trained, in place.
        epochs: times that all batches are seen.
        lr: of Adam.
    """
    whole("fit_lens", epochs=epochs)
    number("fit_lens", above=0, lr=lr)
    data, adam, losses = list(batches), torch.optim.Adam(lens.parameters(), lr=lr), []
    for _ in range(epochs):
        for contributions, model in data:
            adam.zero_grad()
            loss = lens_loss(lens(contributions), model)
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
    return losses
