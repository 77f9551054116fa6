"""Dense Synthesizer: each token alone says where it looks, place by place, whatever stands there.

B_i = W2 relu(q_i) + b2,   score[i, j] = B_i[j]
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import FEATURES, PLAIN, Card, Cost, Paper
from regard.checks import divides, fits, refuse, whole
from regard.stages import Made, Rows, Score, Tokens
from regard.tracing import readable

PAPER = Paper(
    "Synthesizer: Rethinking Self-Attention in Transformer Models",
    "Tay et al.",
    2020,
    "2005.00743",
    "abstract; the authors' code in Mesh TensorFlow; other people's code",
)
SUPPORTS = FEATURES - {"cross"}
LACKS = {"cross": "its tables are of one sequence's places"}
TRAITS = PLAIN - {"position_free", "shift_invariant"}
DIFFERS = (
    "Places count from the first token of a row, padding among them: pad on the right. Told positions don't count.",
    "The layer's map of keys is there and not read; the paper has none, and the authors' code one for keys and values.",
)
UNREAD = {
    "L43 every_parameter_has_a_gradient": "the layer's map of keys, and of queries where no token is read, goes unused"
}
UNSCALED = {"L14 scale": "its scores are no products of queries and keys, and not scaled"}

CARD = Card(
    "synthesizer_dense",
    equation="""score[i, j] = w2_j . relu(W1 x_i + b1) + b2_j      for each head, j < max_length; not scaled
W1 x + b1: the head's query; or `width` numbers of a map of its own""",
    papers=(PAPER,),
    gist="Dense Synthesizer: each token alone says where it looks, place by place.",
    supports=SUPPORTS,
    lacks=LACKS,
    traits=TRAITS,
    cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
    claim="Where a token looks depends on itself alone: "
    "tests/scores/test_synthesizer.py::test_where_a_token_looks_depends_on_itself_alone.",
    differs=(
        *DIFFERS,
        "Each head has its own W2 and b2; the authors' code has one W2 for all heads, and no b2.",
    ),
    exceptions=UNREAD,
    verified="reconstructed",
    example={"max_length": 80},
    tries={"max_length": 90},
    defaults={"max_length": "code", "width": "code, the queries'"},
)


def inside(part: Score, rows: Rows, places: int) -> None:
    """Refuse sequences longer than the table. Compiled code can't look; there the lookup itself fails."""
    if rows.j.numel() and readable(rows.j) and int(rows.j[-1]) >= places:
        wanted = f"at most max_length = {places} tokens"
        refuse(part, "x", "is longer than the table", int(rows.j[-1]) + 1, wanted)


def glorot(weight: Tensor) -> None:
    """Uniform, each head a matrix by itself."""
    bound = math.sqrt(6 / (weight.shape[-1] + weight.shape[-2]))
    nn.init.uniform_(weight, -bound, bound)


def widened(*tensors: Tensor) -> list[Tensor]:
    return [z.to(torch.promote_types(z.dtype, torch.float32)) for z in tensors]


@CARD.fills("score")
class SynthesizerDense(Score):
    """Scores of a small network on each query's token.

    Args:
        max_length: N, the most tokens.
        width: of the hidden layer, a map of the tokens that each head has for itself. Default: it is the head's
            query, so that the layer's own map of queries is the first of the network.
    """

    placed = True

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, *, max_length: int = 512, width: int | None = None
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, head_dim=head_dim, max_length=max_length)
        if width is not None:
            whole(self, width=width)
        self.num_heads, self.max_length, self.width = num_heads, max_length, head_dim if width is None else width
        self.hidden = None if width is None else nn.Linear(dim, num_heads * width)
        self.weight = nn.Parameter(torch.empty(num_heads, max_length, self.width))
        self.bias = nn.Parameter(torch.empty(num_heads, max_length))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform, biases 0."""
        glorot(self.weight)
        nn.init.zeros_(self.bias)
        if self.hidden is not None:
            nn.init.xavier_uniform_(self.hidden.weight)
            nn.init.zeros_(self.hidden.bias)

    def prepare(self, tokens: Tokens) -> Made:
        if self.hidden is None:
            return Made()
        return Made(query=self.hidden(tokens.x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        inside(self, rows, self.max_length)
        before = rows.q if rows.made.query is None else rows.made.query
        fits(self, "B H t D", {"H": self.num_heads, "D": self.width}, q=before)
        hidden, weight, bias = widened(before.relu(), self.weight, self.bias)
        return hidden @ weight[:, rows.j].to(hidden.dtype).mT + bias[:, None, rows.j].to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, max_length={self.max_length}, width={self.width}"


FACTORIZED = Card(
    "synthesizer_dense_factorized",
    equation="""a = A q_i + c  (factor numbers),   b = B q_i + d  (max_length / factor numbers)      for each head
score[i, j] = a[j mod factor] b[j // factor]      not scaled""",
    papers=(PAPER,),
    gist="Factorized dense Synthesizer: each token says where it looks, by a product of two short rows.",
    supports=SUPPORTS,
    lacks=LACKS,
    traits=TRAITS,
    cost=Cost("B*H*T*D*(S + factor + max_length/factor)", "2*S*G*D"),
    claim="Where a token looks depends on itself alone: "
    "tests/scores/test_synthesizer.py::test_where_a_token_looks_depends_on_itself_alone.",
    differs=(
        *DIFFERS,
        "One row is tiled and the other has each number repeated, so that all places differ. Other people's code tiles "
        "both; the authors' code has no such form.",
        "Both maps read the head's query, as the dense form does in the authors' code.",
    ),
    exceptions=UNREAD | UNSCALED,
    verified="reconstructed",
    example={"max_length": 80, "factor": 8},
    tries={"max_length": 160, "factor": 5},
    defaults={"max_length": "code", "factor": "ours"},
)


@FACTORIZED.fills("score")
class SynthesizerDenseFactorized(Score):
    """Scores that are products of a number for the place within a block, and one for the block.

    Args:
        max_length: N, the most tokens.
        factor: length of a block; it divides N.
    """

    placed = True

    def __init__(self, num_heads: int, head_dim: int, *, max_length: int = 512, factor: int = 16) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, head_dim=head_dim, max_length=max_length, factor=factor)
        divides(self, factor=factor, max_length=max_length)
        self.num_heads, self.head_dim, self.max_length, self.factor = num_heads, head_dim, max_length, factor
        blocks = max_length // factor
        self.within_weight = nn.Parameter(torch.empty(num_heads, factor, head_dim))
        self.within_bias = nn.Parameter(torch.empty(num_heads, factor))
        self.block_weight = nn.Parameter(torch.empty(num_heads, blocks, head_dim))
        self.block_bias = nn.Parameter(torch.empty(num_heads, blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform, biases 0."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                glorot(p)

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        inside(self, rows, self.max_length)
        fits(self, "B H t D", {"H": self.num_heads, "D": self.head_dim}, q=rows.q)
        (q,) = widened(rows.q)
        maps = ((self.within_weight, self.within_bias), (self.block_weight, self.block_bias))
        within, block = (q @ w.to(q.dtype).mT + b.to(q.dtype)[:, None] for w, b in maps)
        return within[..., rows.j % self.factor] * block[..., rows.j // self.factor]

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, max_length={self.max_length}, factor={self.factor}"
