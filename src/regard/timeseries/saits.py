"""SAITS fills gaps in series by self-attention in which no time step may see itself."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, choice, divides, number, refuse, whole
from regard.masks import Mask, window
from regard.normalizers.softmax import softmax

CARD = Card(
    "diagonal_masked",
    equation="""allowed(i, j) = i != j
in the model around it:
DMSA:     softmax(q k^T / sqrt(D), diagonal hidden) v
block 1:  e = W_e [X ; O] + position,  N layers of DMSA and feed-forward,  X1 = W_z z     (O = 1 where observed)
block 2:  the same on X' = O X + (1 - O) X1,  X2 = W_g relu(W_b z)
combined: X3 = (1 - eta) X2 + eta X1,  eta = sigmoid(W_c [O ; mean over heads of the last attention weights])
output:   O X + (1 - O) X3
loss:     (MAE(X1) + MAE(X2) + MAE(X3)) / 3 on what was observed, + weight MAE(X3) on what was hidden on purpose""",
    papers=(
        Paper(
            "SAITS: Self-Attention-based Imputation for Time Series",
            "Du, Cote, Liu",
            2023,
            "Expert Systems with Applications 219",
            "eqs. 1-23 in a summary; official code",
        ),
    ),
    # Looking back only, the first token would see nothing; and so would every token that a mask leaves only itself.
    supports={"bidirectional", "padding", "packed", "gqa", "dropout", "compile"},
    traits=PLAIN,
    cost=Cost("2*B*H*T*S*D", ""),
    claim="A step is estimated from the others alone, its own value does not reach it: "
    "tests/timeseries/test_saits.py::test_no_step_reads_its_own_value.",
    differs=(
        "A sequence of one token sees nothing and gives 0, where the code lets it see itself.",
        "As in the code, the model's layers norm their input, eta weighs X1 (the paper's eq. 19: X2), and W_c reads "
        "the mask first.",
    ),
    verified="third-party",
    tasks=("imputation",),
)


Repeated = Literal["layers", "stack"]


@CARD.fills("mask")
def diagonal_mask() -> Mask:
    """Every token but the query's own."""
    return ~window(1)


class DiagonallyMaskedLayer(nn.Module):
    """One layer: attention to all other time steps, then a feed-forward network, each on normed input and added.

    Args:
        dim, num_heads, head_dim, value_dim, hidden_dim, diagonal: as of `SAITS`.

    Shapes: x (B, T, M) -> the same, and the weights (B, H, T, T).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        hidden_dim: int,
        *,
        value_dim: int | None = None,
        diagonal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        self.num_heads, self.diagonal = num_heads, diagonal
        self.norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim, eps=1e-6)
        self.q_proj, self.k_proj = (nn.Linear(dim, num_heads * head_dim, bias=False) for _ in "qk")
        self.v_proj = nn.Linear(dim, num_heads * value_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=False)
        self.hidden_proj, self.feed_proj = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B T M"]) -> tuple[Float[Tensor, "B T M"], Float[Tensor, "B H T T"]]:
        normed = self.norm(x)
        projected = (proj(normed) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in projected)
        others = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device) if self.diagonal else None
        weights = softmax(q @ k.mT * int(q.shape[-1]) ** -0.5, others)
        x = x + self.dropout(self.o_proj((weights @ v).transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_proj(F.relu(self.hidden_proj(self.feed_norm(x))))), weights


class Estimates(NamedTuple):
    """What the model thinks every value is, observed ones included: after block 1, after block 2, and both combined."""

    first: Float[Tensor, "B T C"]
    second: Float[Tensor, "B T C"]
    combined: Float[Tensor, "B T C"]


class SAITS(nn.Module):
    """Fills in what was not observed of multivariate series.

    Args:
        num_features: C.
        length: T, of every series.
        dim: M; even.
        num_heads, head_dim: H and D; D by default dim / num_heads.
        value_dim: width of a head's values; default D.
        num_layers: of each of the two blocks, each with weights of its own.
        repeats, repeated: how often each layer ("layers", the code's inner_group) or all of a block in turn ("stack",
            its between_group) runs with the same weights.
        hidden_dim: width of the feed-forward networks; default 2 dim.
        mask_input: whether the embeddings read O besides X.
        diagonal: whether steps are hidden from themselves; False is the paper's ablation.
        dropout: in training.

    Shapes: values (B, T, C), observed (B, T, C) bool -> (B, T, C).
    """

    def __init__(
        self,
        num_features: int,
        length: int,
        *,
        dim: int = 64,
        num_heads: int = 4,
        head_dim: int | None = None,
        num_layers: int = 2,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        value_dim: int | None = None,
        mask_input: bool = True,
        diagonal: bool = True,
        repeats: int = 1,
        repeated: Repeated = "layers",
    ) -> None:
        super().__init__()
        whole(self, num_features=num_features, length=length, dim=dim, num_heads=num_heads, num_layers=num_layers)
        whole(self, repeats=repeats)
        choice(self, get_args(Repeated), repeated=repeated)
        number(self, least=0, most=1, dropout=dropout)
        if dim % 2:
            refuse(self, "dim", "is odd", dim, "an even int, sines and cosines come in pairs")
        if head_dim is None:
            divides(self, num_heads=num_heads, dim=dim)
            head_dim = dim // num_heads
        hidden_dim = 2 * dim if hidden_dim is None else hidden_dim
        value_dim = head_dim if value_dim is None else value_dim
        whole(self, head_dim=head_dim, value_dim=value_dim, hidden_dim=hidden_dim)
        self.num_features, self.length, self.mask_input = num_features, length, mask_input
        self.repeats, self.repeated = repeats, repeated
        self.embeds = nn.ModuleList(nn.Linear((1 + mask_input) * num_features, dim) for _ in range(2))
        widths = (dim, num_heads, head_dim, hidden_dim)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                DiagonallyMaskedLayer(*widths, value_dim=value_dim, diagonal=diagonal, dropout=dropout)
                for _ in range(num_layers)
            )
            for _ in range(2)
        )
        self.first_proj, self.second_proj = (nn.Linear(dim, num_features) for _ in range(2))
        self.refine_proj = nn.Linear(num_features, num_features)
        self.combine_proj = nn.Linear(num_features + length, num_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Float[Tensor, "B T C"], observed: Bool[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """The observed values as they are, the others filled in. Whatever stands at the others is not read."""
        return torch.where(observed, values, self.estimates(values, observed).combined)

    @checked(T="length", C="num_features")
    def estimates(self, values: Float[Tensor, "B T C"], observed: Bool[Tensor, "B T C"]) -> Estimates:
        """The three estimates that the loss compares."""
        known = values.masked_fill(~observed, 0)
        first = self.first_proj(self._block(0, known, observed)[0])
        z, weights = self._block(1, torch.where(observed, known, first), observed)
        second = self.refine_proj(F.relu(self.second_proj(z)))
        eta = self.combine_proj(torch.cat([observed.to(z.dtype), weights.mean(1)], -1)).sigmoid()
        return Estimates(first, second, torch.lerp(second, first, eta))

    def _block(self, n: int, values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        z = self.embeds[n](torch.cat([values, observed.to(values.dtype)], -1) if self.mask_input else values)
        z = z + sinusoids(self.length, z.shape[-1], z.device).to(z.dtype)
        z = self.dropout(z) if n == 0 else z
        for layer in self.running(n):
            z, weights = layer(z)
        return z, weights

    def running(self, n: int) -> list[DiagonallyMaskedLayer]:
        """The layers of block n as they run, repeated ones several times."""
        layers = list(self.blocks[n])  # type: ignore[call-overload]
        if self.repeated == "stack":
            return layers * self.repeats
        return [layer for layer in layers for _ in range(self.repeats)]


def sinusoids(length: int, dim: int, device: torch.device) -> Float[Tensor, "{length} {dim}"]:
    """p[t, 2i] = sin(t / 10000^(2i / M)), p[t, 2i + 1] its cosine."""
    rate = 10000 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def saits_loss(
    estimates: Estimates,
    truth: Float[Tensor, "B T C"],
    observed: Bool[Tensor, "B T C"],
    hidden: Bool[Tensor, "B T C"],
    *,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Reconstruction of what the model saw (`observed`) plus `weight` times imputation of what was `hidden` from it."""
    if (observed & hidden).any():
        both = f"{int((observed & hidden).sum())} entries that are both"
        refuse("saits_loss", "hidden", "overlaps observed", both, "none: what the model saw can't test its imputation")
    reconstruction = sum(_mean_error(e, truth, observed) for e in estimates) / 3
    return reconstruction + weight * _mean_error(estimates.combined, truth, hidden)


def _mean_error(estimate: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """Mean absolute error over the entries `where`; 0 if there are none. The others may hold anything."""
    error = (estimate - truth.masked_fill(~where, 0)).abs().masked_fill(~where, 0)
    return error.sum() / (where.sum().to(error.dtype) + 1e-9)


def hide(
    observed: Bool[Tensor, "B T C"], fraction: float, *, generator: torch.Generator | None = None
) -> tuple[Bool[Tensor, "B T C"], Bool[Tensor, "B T C"]]:
    """Take a random part of the observed entries away, to be imputed in training: (what remains, what was hidden)."""
    number("hide", above=0, below=1, fraction=fraction)
    chance = torch.rand(observed.shape, generator=generator, device=observed.device)
    hidden = observed & (chance < fraction)
    return observed & ~hidden, hidden
