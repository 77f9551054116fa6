"""Super attention: a learned matrix mixes the values across positions, before each query weighs them.

Queries alone are projected; keys are a head's features of the tokens themselves, and so is what the matrix mixes.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import choice, divides, flag, refuse, whole
from regard.linear._shared import RecurrentMixer, hide, widened
from regard.masks import Mask, causal, padding
from regard.mixers.sliced import PAPER, start
from regard.pipeline.function import attention
from regard.tracing import autocasts, exporting

CARD = Card(
    "super",
    equation="""x_h: features h D .. (h + 1) D of the tokens,   q_h = x W_q,h
y = concat_h(softmax(q_h x_h^T / sqrt(D)) (W_A x_h)) W_o,   W_A (L, L), of which the first S rows and columns count
causal:   W_A lower triangular,   padding:   its columns of hidden tokens cut""",
    papers=(PAPER,),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "streaming", "compile"},
    lacks={"mask": "what the matrix has mixed can't be hidden from single queries"},
    cost=Cost("2*B*H*T*S*D + B*S*S*H*D", "2*S*H*D + S"),
    claim="The matrix moves information between positions whatever the queries: of tokens that all look alike to them, "
    "it brings any single one out: tests/mixers/test_super.py::test_the_matrix_picks_any_token.",
    differs=(
        "Softmax runs over keys, as the formulas have it; the third party's code runs it over queries.",
        "Shorter sequences take the matrix's first rows and columns, as another third-party decoder does.",
        "Inferred: columns of hidden tokens are cut, and what is left is not scaled up.",
        "Triangular under causality, as a reader of the paper reports; that decoder leaves it whole, and so leaks.",
    ),
    verified="third-party",
    example={"max_length": 64, "shared_alignment": False},
    tries={"max_length": 70},
    defaults={
        "max_length": "ours",
        "shared_alignment": "paper, as a reader tells",
        "alignment_bias": "code, third-party, in Keras",
        "alignment_start": "code, third-party",
        "bias": "ours",
    },
)

Start = Literal["glorot", "identity"]


class Own(nn.Identity):
    """In a projection's place: the tokens themselves, in the dtype that autocast projects to."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_features = self.out_features = dim

    def forward(self, x: Tensor) -> Tensor:
        narrow = autocasts(x.device) and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(x.device.type)) if narrow else x


class SuperState(NamedTuple):
    """The past: tokens by heads, what the matrix made of them, and which are real."""

    x: Float[Tensor, "B H S D"]
    aligned: Float[Tensor, "B H S D"]
    held: Bool[Tensor, "B S"]


def aligned(
    x: Float[Tensor, "B H S D"],
    matrix: Float[Tensor, "*h t S"],
    bias: Float[Tensor, "*h t"] | None = None,
    keep: Bool[Tensor, "B S"] | None = None,
    *,
    triangular: bool = False,
) -> Float[Tensor, "B H t D"]:
    """The last t rows of W_A x. Hidden tokens count as 0; `triangular` cuts what is to the right of the diagonal."""
    t, S = matrix.shape[-2:]
    out = (matrix.tril(S - t) if triangular else matrix) @ hide(x, keep)
    return out if bias is None else out + bias[..., None]


@CARD.module
class SuperAttention(RecurrentMixer):
    """Attention with an alignment matrix on the left of its values.

    Args:
        dim, num_heads, causal: as in `regard.Attention`.
        max_length: L, the most tokens.
        shared_alignment: one matrix for all heads, instead of one each.
        alignment_bias: whether it adds a number of each position to all features.
        alignment_start: "glorot" uniform, or the "identity", with which it is efficient attention (`sliced`) at first.
        bias: whether both projections have one.

    Shapes: x (B, T, M), context (B, S, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int = 2048,
        shared_alignment: bool = True,
        alignment_bias: bool = False,
        alignment_start: Start = "glorot",
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        whole(self, dim=dim, num_heads=num_heads, max_length=max_length)
        divides(self, num_heads=num_heads, dim=dim)
        flag(self, shared_alignment=shared_alignment, alignment_bias=alignment_bias)
        choice(self, get_args(Start), alignment_start=alignment_start)
        super().__init__(dim, num_heads, causal=causal, bias=bias)
        self.k_proj, self.v_proj = Own(dim), Own(dim)  # type: ignore[assignment]
        self.max_length, self.alignment_start = max_length, alignment_start
        heads = () if shared_alignment else (num_heads,)
        self.alignment = nn.Parameter(torch.empty(*heads, max_length, max_length))
        self.alignment_bias = nn.Parameter(torch.empty(*heads, max_length)) if alignment_bias else None
        start(self.q_proj)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.alignment_start == "identity":
            self.alignment.copy_(torch.eye(self.max_length))
        else:
            bound = (3 / self.max_length) ** 0.5
            nn.init.uniform_(self.alignment, -bound, bound)
        if self.alignment_bias is not None:
            nn.init.zeros_(self.alignment_bias)

    def run(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B H S D"],
        v: Float[Tensor, "B H S D"],
        keep: Bool[Tensor, "B S"] | None,
        state: SuperState | None,
    ) -> tuple[Float[Tensor, "B H T D"], SuperState]:
        sees: Mask | None = causal() if self.causal else None
        plain = keep is None and state is None
        keep = k.new_ones(len(k), k.shape[2], dtype=torch.bool) if keep is None else keep
        past = 0
        if state is not None:
            past = state.x.shape[2]
            q, k, v = widened(q, k, v)
            k, v = (torch.cat([state.x.to(z.dtype), z], 2) for z in (k, v))  # both are the tokens
            keep = torch.cat([state.held, keep], 1)
        S = k.shape[2]
        if self.max_length < S:
            refuse(
                self, "x", "is longer than the alignment matrix", S, f"at most max_length = {self.max_length} tokens"
            )
        if exporting():  # whether a slice is the whole would tie the graph to other lengths
            at = torch.arange(S, device=k.device)
            matrix = self.alignment[..., at[past:, None], at].to(k.dtype)
        else:
            matrix = self.alignment[..., past:S, :S].to(k.dtype)
        bias = None if self.alignment_bias is None else self.alignment_bias[..., past:S].to(k.dtype)
        v = aligned(v, matrix, bias, keep, triangular=self.causal)
        if state is not None:
            v = torch.cat([state.aligned.to(v.dtype), v], 2)
        if not plain:
            sees = padding(keep) if sees is None else padding(keep) & sees
        return attention(q, k, v, mask=sees), SuperState(k, v, keep)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> SuperState:
        z = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        return SuperState(z, z.clone(), z[:, 0, :, 0].bool())
