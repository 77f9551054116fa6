"""Extractors: sums over past tokens whose learned weights know how far back, and nothing of contents."""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits, flag, refuse, tokens, whole
from regard.masks import Mask, causal, padding
from regard.pipeline.tokens import apart, key_mask, quarantine, shown, spoil
from regard.tracing import exporting

CARD = Card(
    "extractor",
    equation="""e_t = sum_{i = 0 .. t} W_i z_{t - i} + b,   y_t = e_t * (W_a x_t + b_a)     adjustment; * by element
she   z = x,       W_i: M x M for each offset i          we   z = W_v x,   W_i: a number
he    z = W_v x,   W_i: a number for each feature        me   z = x,       W_i: a number, and no adjustment
index="pair": W_ts for each pair of places in place of W_{t - s}""",
    papers=(
        Paper(
            "Attention Is Not All You Need Anymore",
            "Chen",
            2023,
            "2308.07661",
            "abstract and start of the introduction; a public file by someone else, of SHE alone",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    cost=Cost("B*T*M*(T + M)", "T*M"),
    claim="Weights are the same for every input, and the adjustment alone multiplies two tokens, which is enough for "
    "what the last two decide: tests/mixers/test_extractor.py::test_weights_know_no_contents, "
    "tests/mixers/test_extractor.py::test_learns_what_the_last_two_tokens_decide.",
    differs=(
        "The paper's formulas could not be read. From its abstract are: learned weights of positions, previous tokens "
        "alone, an adjustment, and four levels of falling cost.",
        "Inferred are: which weights each level has, the biases, and weights by offset rather than by pair; without an "
        "activation on the adjustment and without an output projection it stands in the public file, too.",
        "The public file gives a past token the weights of its own place, which are a case of pairs, and multiplies "
        "the sum by 1 / sqrt(t + 1), from a later paper of the author; the factor is left out.",
        "Padding, packed documents and streaming are ours.",
    ),
    verified="reconstructed",
    example={"max_length": 48},
    tries={"max_length": 40},
    defaults={
        "max_length": "ours",
        "level": "ours, the dearest that costs less than attention",
        "index": "ours",
        "adjust": "paper, abstract",
        "project": "ours",
    },
)

Level = Literal["she", "he", "we", "me"]
Index = Literal["offset", "pair"]


class ExtractorState(NamedTuple):
    """z of all tokens so far, zeros where they were hidden."""

    z: Float[Tensor, "B S M"]


def extract(
    z: Float[Tensor, "B S M"], weights: Float[Tensor, "N ..."], *, index: Index = "offset", first: int = 0
) -> Float[Tensor, "B T M"]:
    """sum_{s <= t} W z_s for t from `first` on.

    Args:
        weights: for each offset (N, ...), or for each pair (N, N, ...), of which what lies above the diagonal is not
            read. What follows is (M, M) for maps, (M,) for a number a feature, and nothing for a number.

    Raises:
        ValueError: more tokens than N, or weights of another shape.
    """
    choice("extract", get_args(Index), index=index)
    fits("extract", "B S M", z=z)
    (_, S, M), places = z.shape, 1 if index == "offset" else 2
    rank, N = weights.dim() - places, weights.shape[0]
    if not 0 <= rank <= 2 or weights.shape != (N,) * places + (M,) * rank:
        wanted = f"({', '.join(['N'] * places)}), and after that nothing, {M} or {M}, {M}"
        refuse("extract", "weights", "have the wrong shape", tuple(weights.shape), wanted)
    if S > N:
        refuse("extract", "z", "is too long", f"{S} tokens", f"at most {N}")
    if first == S or z.shape[0] == 0:
        return z[:, first:] * 1
    if index == "pair":
        at = torch.arange(S, device=z.device)
        table = weights[at[first:, None], at] if exporting() else weights[first:S, :S]
        later = (at > at[first:, None]).view(S - first, S, *(1,) * rank)
        table = table.masked_fill(later, 0)
        return torch.einsum(("ts,bsm->btm", "tsm,bsm->btm", "tsmn,bsn->btm")[rank], table, z)
    taps = weights[torch.arange(S - 1, -1, -1, device=z.device)]  # the farthest first, as convolutions have it
    rows = F.pad(z.mT, (S - first - 1, 0))
    if rank == 2:
        return F.conv1d(rows, taps.permute(1, 2, 0)).mT
    if rank == 1:
        return F.conv1d(rows, taps.mT[:, None], groups=M).mT
    return F.conv1d(rows.flatten(0, 1)[:, None], taps[None, None]).unflatten(0, (-1, M))[:, :, 0].mT


@CARD.module
class Extractor(nn.Module):
    """A causal sum over at most `max_length` tokens, without queries and keys.

    Args:
        dim: M.
        max_length: N; there are no weights for longer ways back.
        level: "she", "he", "we" or "me", from the dearest to the cheapest.
        index: whether weights belong to an "offset" or to a "pair" of places.
        adjust: whether each output is multiplied by a map of its own token; "me" never is.
        project: whether an output projection follows.

    Shapes: x (B, T, M) -> (B, T, M), T <= max_length.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        *,
        max_length: int = 512,
        level: Level = "he",
        index: Index = "offset",
        adjust: bool = True,
        project: bool = False,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, max_length=max_length)
        choice(self, get_args(Level), level=level)
        choice(self, get_args(Index), index=index)
        flag(self, adjust=adjust, project=project)
        self.dim, self.max_length, self.level = dim, max_length, level
        self.index: Index = index
        each = {"she": (dim, dim), "he": (dim,), "we": (), "me": ()}[level]
        self.weights = nn.Parameter(torch.empty((max_length,) * (1 if index == "offset" else 2) + each))
        self.bias = nn.Parameter(torch.empty(dim))
        self.v_proj = nn.Linear(dim, dim) if level in ("he", "we") else nn.Identity()
        self.adjustment = nn.Linear(dim, dim) if adjust and level != "me" else None
        self.o_proj = nn.Linear(dim, dim) if project else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A token starts as itself, with a little of each before it: normal numbers of deviation 1 / max_length."""
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.weights, std=1 / self.max_length)
        with torch.no_grad():
            own = self.weights[:1] if self.index == "offset" else self.weights.diagonal().movedim(-1, 0)
            own.copy_(torch.eye(self.dim) if self.level == "she" else torch.ones(()))

    def receptive_field(self) -> Mask:
        return causal()

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix x. `mask` hides tokens from the others; ways back count them all the same."""
        tokens(self, "x", x, self.dim)
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        self._fits(x.shape[1])
        x, bad = quarantine(x)
        out = self._out(x, self._in(x, keep), 0)
        field = self.receptive_field()
        return spoil(out, bad, bad, field if keep is None else field & padding(keep))

    def _in(self, x: Tensor, keep: Tensor | None) -> Tensor:
        z = self.v_proj(x)
        return z if keep is None else z.masked_fill(~keep[..., None], 0)

    def _out(self, x: Tensor, z: Tensor, first: int) -> Tensor:
        e = extract(z, self.weights, index=self.index, first=first)
        e = e + self.bias.to(e.dtype)
        return self.o_proj(e if self.adjustment is None else e * self.adjustment(x))

    def _fits(self, length: int) -> None:
        if length > self.max_length:
            refuse(self, "x", "is too long", f"{length} tokens", f"at most max_length = {self.max_length}")

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ExtractorState:
        """The state before the first token. It grows with the tokens seen, up to max_length."""
        whole(self, 0, batch_size=batch_size)
        whole(self, 0, most=self.max_length, capacity=capacity)
        return ExtractorState(self.weights.new_zeros(batch_size, 0, self.dim, device=device, dtype=dtype))

    def step(
        self, x: Float[Tensor, "B t M"], state: ExtractorState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], ExtractorState]:
        """The outputs of the next tokens, and the state after them. `mask`: True = a real one, of these t."""
        tokens(self, "x", x, self.dim)
        if not isinstance(state, ExtractorState):
            wanted = "the ExtractorState of init_state"
            refuse(self, "state", "has the wrong type", type(state).__name__, wanted, error=TypeError)
        if len(state.z) != len(x):
            refuse(self, "x", "has another batch than the state", len(x), f"{len(state.z)} sequences")
        first = state.z.shape[1]
        self._fits(first + x.shape[1])
        x = shown(self, x, mask)
        new = self._in(x, mask)
        z = torch.cat([state.z.to(new.dtype), new], 1)
        return self._out(x, z, first), ExtractorState(z)

    def extra_repr(self) -> str:
        return f"{self.dim}, max_length={self.max_length}, level={self.level!r}, index={self.index!r}"
