"""Forgetting attention: scores fall by learned forget gates of the tokens that came after the key."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import FEATURES, PLAIN, Card, Cost, Paper
from regard.checks import flag, refuse, tokens, whole
from regard.heads.gated import SigmoidGate
from regard.heads.qk_norm import QKNorm
from regard.positions._shared import work_dtype
from regard.stages import Gate, HeadMap, Made, Position, Rows, Tokens

CARD = Card(
    "forgetting",
    equation="""f[h,l] = sigmoid(w_h . x_l + b_h)
score[h,i,j] = q_i . k_j / sqrt(D) + sum_{j < l <= i} log f[h,l],   j <= i       (= + c_i - c_j, c = cumsum of log f)
qk_norm: q and k with root mean square 1 in each head first, times a weight per head and channel
output_gate: O'_h = O_h * sigmoid(x W_g)_h""",
    papers=(
        Paper(
            "Forgetting Transformer: Softmax Attention with a Forget Gate",
            "Lin, Nikishin, He, Courville",
            2025,
            "2503.02130",
            "abstract and introduction; the authors' layer (zhixuan-lin/forgetting-transformer); the layer of "
            "flash-linear-attention",
        ),
    ),
    supports=FEATURES - {"bidirectional", "cross"},
    lacks={
        "bidirectional": "gates stand between a key and a later query",
        "cross": "the tokens of a context stand in no order with those that ask",
    },
    traits=PLAIN - {"position_free"},
    cost=Cost("B*H*T*S*D + B*T*M*H + 3*B*H*T*S", "2*S*G*D + S*H"),
    claim="It learns gates that close at separators, so that only what stands since the last one counts: "
    "tests/positions/test_forgetting.py::test_learns_to_forget_at_separators.",
    differs=(
        "Gates are summed between each key and query, and not subtracted from running totals, which lose digits in "
        "long sequences; so a chunk of rows sees all its keys at once.",
        "Gates of tokens that a query may not see don't count, which is the same for padding, windows and documents.",
        "The authors also try gates without tokens (a bias each, trained or fixed), rotary positions (here "
        '"forgetting" has the slot to itself), and skip blocks whose weights vanish; all left out.',
        "Of the Pro block there are qk_norm and output_gate; the norm of outputs and the shifts of keys and values "
        "are left out.",
        "The authors tried no grouped keys; flash-linear-attention has them, with a gate for each query head.",
    ),
    verified="third-party",
    defaults={"qk_norm": "code", "output_gate": "code"},
)


def forget_bias(
    log_forget: Float[Tensor, "B H s"],
    i: Int[Tensor, " t"],
    j: Int[Tensor, " s"],
    allowed: Bool[Tensor, "#B #H t s"] | None = None,
) -> Float[Tensor, "B H t s"]:
    """The sum of log f over keys behind j, up to i: 0 for the own key, log f_i for the one before.

    Args:
        log_forget: log f of each key, <= 0; -inf forgets all before.
        i, j: positions of queries and keys; the keys are those between the first and the last, without a gap.
        allowed: keys whose gates count; None = all.
    """
    between = j <= i.unsqueeze(-1)
    if allowed is not None:
        between = between & allowed
    counted = torch.where(between, log_forget.unsqueeze(-2), 0.0)
    return F.pad(counted, (0, 1))[..., 1:].flip(-1).cumsum(-1).flip(-1)


def log_gates(logits: Float[Tensor, "B T H"]) -> Float[Tensor, "B H T"]:
    """log f = log sigmoid(logits), in float32 at least."""
    return F.logsigmoid(logits.to(work_dtype(logits))).transpose(1, 2)


class ForgetGate(nn.Linear):
    """The logit of each head's gate, from the tokens: (B, T, M) -> (B, T, H).

    It starts as the authors' does: weights normal with std 0.02, biases 0, so that gates are near 1/2.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        whole(self, dim=dim, num_heads=num_heads)
        super().__init__(dim, num_heads)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def open(self) -> None:
        """Set to forget next to nothing: half in some 2000 tokens."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, 8.0)


class Forgetting(Position):
    """Adds to each score the log forget gates of the tokens between key and query, the query's own among them.

    Args:
        dim: M.
        num_heads: H; each has a gate.
    """

    sees = "rows"

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        self.gate = ForgetGate(dim, num_heads)

    def reset_parameters(self) -> None:
        """As of `ForgetGate`."""
        self.gate.reset_parameters()

    def start_neutral(self) -> bool:
        """All gates nearly open."""
        self.gate.open()
        return True

    def prepare(self, given: Tokens) -> Made:
        tokens(self, "context", given.context, self.gate.in_features)
        return Made(key=log_gates(self.gate(given.context)).unsqueeze(-1))

    def bias(self, rows: Rows) -> Float[Tensor, "B H t s"]:
        if rows.made.key is None:
            wanted = "what prepare gives, as regard.Attention asks"
            refuse(self, "rows", "holds nothing made of the tokens", None, wanted)
        return forget_bias(rows.made.key.squeeze(-1), rows.i, rows.j, rows.allowed)


@CARD.fills()
def forgetting(
    dim: int,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
    *,
    qk_norm: bool = False,
    output_gate: bool = False,
) -> dict[str, Position | HeadMap | Gate]:
    """The forget gate as a position part, and what the authors' layers may have around it.

    Args:
        dim, num_heads, head_dim, num_kv_heads: of the layer.
        qk_norm: whether queries and keys are normed, with weights of their own in each head.
        output_gate: whether a sigmoid of the query's token scales each channel of the heads' outputs.
    """
    flag("forgetting", qk_norm=qk_norm, output_gate=output_gate)
    parts: dict[str, Position | HeadMap | Gate] = {"position": Forgetting(dim, num_heads)}
    if qk_norm:
        parts["heads"] = QKNorm(head_dim, num_heads, num_kv_heads, weights="per_head", eps=1e-5)
    if output_gate:
        parts["gate"] = SigmoidGate(dim, num_heads, head_dim=head_dim)
    return parts
