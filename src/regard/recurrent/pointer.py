"""Pointer network: additive attention over the inputs is itself the output distribution.

No context vector is formed: what was pointed at is the decoder's next input.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, whole
from regard.masks import Mask
from regard.pipeline.tokens import quarantine, spoil
from regard.recurrent._aligner import Aligner

CARD = Card(
    "pointer",
    equation="u_ij = v . tanh(W_1 e_j + W_2 d_i)        p(i points at j) = softmax_j(u_ij)",
    papers=(
        Paper(
            "Pointer Networks",
            "Vinyals, Fortunato, Jaitly",
            2015,
            "1506.03134",
            "abstract; the score as quoted by others; two public implementations",
        ),
    ),
    protocol="Pointer",
    supports={"bidirectional", "padding", "compile"},
    traits={"position_free"},
    cost=Cost("2*B*T*S*M", ""),
    claim="The output vocabulary is the input's length, so that one network sorts lists: "
    "tests/recurrent/test_pointer_network.py::test_learns_to_sort.",
    differs=("Hidden inputs, and those pointed at before, can be forbidden before the softmax.",),
    verified="third-party",
    tries={"hidden": 5},
    defaults={"context_dim": "ours, as wide as dim", "hidden": "code, rl4co"},
)


def pointer_log_probs(
    queries: Float[Tensor, "B T A"],
    keys: Float[Tensor, "B S A"],
    score: Float[Tensor, " A"],
    allowed: Bool[Tensor, " B #T S"] | None = None,
) -> Float[Tensor, "B T S"]:
    """log softmax_j(score . tanh(keys_j + queries_i)); -inf where not allowed (everywhere, if nothing is)."""
    u = torch.tanh(queries[:, :, None] + keys[:, None]) @ score
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    if allowed is None:
        return u.log_softmax(-1).to(queries.dtype)
    hidden = ~allowed
    # The second fill is for rows without any input: their softmax is NaN, and its gradient stops at the first.
    return u.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, -torch.inf).to(queries.dtype)


@CARD.module
class PointerAttention(Aligner):
    """The pointer head alone: decoder states x (B, T, dim) and encoder states (B, S, context_dim) -> (B, T, S).

    Args:
        dim, context_dim: widths of decoder and encoder states.
        hidden: A, the width in which they are compared; default dim.
    """

    def __init__(self, dim: int, *, context_dim: int | None = None, hidden: int | None = None) -> None:
        super().__init__(dim, context_dim)
        hidden = dim if hidden is None else hidden
        whole(self, hidden=hidden)
        self.k_proj = nn.Linear(self.context_dim, hidden, bias=False)
        self.q_proj = nn.Linear(dim, hidden, bias=False)
        self.score = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layers as ever; the score vector to match."""
        self.k_proj.reset_parameters()
        self.q_proj.reset_parameters()
        nn.init.uniform_(self.score, -(len(self.score) ** -0.5), len(self.score) ** -0.5)

    @checked(M="dim", C="context_dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"],
        *,
        mask: Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | Bool[Tensor, "B T S"] | None = None,
    ) -> Float[Tensor, "B T S"]:
        """Log-probabilities of pointing at each token. `mask` hides tokens, for all steps or (B, T, S) for each."""
        pairs = None
        if isinstance(mask, Tensor) and mask.dim() == 3:
            pairs, mask = mask, None
        context, keep = self.source(x, context, mask)
        allowed = pairs if keep is None else keep[:, None]
        x, bad = quarantine(x)
        context, bad_source = quarantine(context)
        out = pointer_log_probs(self.q_proj(x), self.k_proj(context), self.score, allowed)
        if bad is None and bad_source is None:
            return out
        if bad_source is not None and pairs is not None:
            hit = (pairs & bad_source[:, None]).any(-1)
            bad, bad_source = hit if bad is None else bad | hit, None
        out = spoil(out, bad, bad_source, None)
        return out if allowed is None else out.masked_fill(~allowed, -torch.inf)
