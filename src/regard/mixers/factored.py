"""Factored attention: weights are learned numbers of two positions, whatever stands there; no softmax."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, flag, refuse, whole
from regard.linear._shared import RecurrentMixer, hide, widened
from regard.normalizers.softmax import softmax
from regard.pipeline.weighted import weighed

PAPER = Paper(
    "Are queries and keys always relevant? A case study on Transformer wave functions",
    "Rende, Viteritti",
    2024,
    "2405.18874",
    "abstract; the authors' code (a tutorial of NetKet), whose text has the formulas",
)

CARD = Card(
    "factored",
    equation="""y_i = W_o concat_h(sum_j alpha_ij^h v_j^h) + b,   v = W_v x + c      alpha (H, n, n): free, of any sign
translation_invariant:   alpha_ij^h = a^h[(y_j - y_i) mod Y, (x_j - x_i) mod X],   i = y_i X + x_i      a (H, n)
normalizer="softmax":   softmax_j(alpha_ij^h) in its place""",
    papers=(PAPER,),
    supports={"causal", "bidirectional", "padding", "packed", "gqa", "streaming", "compile"},
    lacks={"mask": "its weights sum to nothing in particular, so that hiding single pairs is another table"},
    traits={"linear_in_values"},
    cost=Cost("B*H*T*S*D", "S*(G*D + 1)"),
    claim="Weights are the same for every input and may be negative, with half the projections; a small ground state "
    "is learned: tests/mixers/test_factored.py::test_weights_do_not_depend_on_the_input, "
    "tests/mixers/test_wave_function.py::test_learns_a_ground_state_with_fewer_parameters.",
    differs=(
        "Shorter sequences are as if later places were hidden: they take the table's first rows and columns.",
        "Causal and streaming forms, padding, grouped values and the softmax are ours.",
        "Places count from the first token of a row, padding among them: pad on the right.",
        "A ring (no grid) and grids that are no squares are ours; the authors' code has squares.",
        "Variational Monte Carlo, which the paper trains with, is left to libraries of physics; the model that it "
        "trains is `WaveFunction`.",
        "The weights of all pairs are formed, for all sequences together, as in the authors' code.",
    ),
    verified="third-party",
    example={"max_length": 64},
    tries={"max_length": 80, "grid": {"grid": (4, 16), "translation_invariant": True}},
    defaults={
        "max_length": "ours",
        "grid": "ours, one dimension",
        "translation_invariant": "code",
        "normalizer": "paper",
        "num_kv_heads": "code, as many as heads",
        "bias": "code",
    },
)

Normalize = Literal["softmax"]


class FactoredState(NamedTuple):
    """The past: values, and which of them are real."""

    v: Float[Tensor, "B G S D"]
    held: Bool[Tensor, "B S"]


def offsets(i: Int[Tensor, " t"], j: Int[Tensor, " s"], grid: tuple[int, int]) -> Int[Tensor, "t s"]:
    """Where in a table of Y X offsets each pair of places of a periodic grid looks; 0 for a place and itself."""
    Y, X = grid
    i = i[:, None]
    return (j // X - i // X) % Y * X + (j % X - i % X) % X


@CARD.module()
class FactoredAttention(RecurrentMixer):
    """Attention by position alone.

    Args:
        dim, num_heads, num_kv_heads, causal: as in `regard.Attention`; num_kv_heads counts heads of values.
        max_length: n, the most tokens; default 1024, or what the grid holds.
        grid: (Y, X), for tokens that lie row by row on a grid; default (1, n), a line.
        translation_invariant: one weight an offset, periodic in both directions, in place of one a pair.
        normalizer: None leaves weights as they are; "softmax" over keys makes them positive, with sum 1.
        bias: whether both projections have one.

    Shapes: x (B, T, M) -> (B, T, M), T <= max_length.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int | None = None,
        grid: tuple[int, int] | None = None,
        translation_invariant: bool = False,
        normalizer: Normalize | None = None,
        num_kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        flag(self, translation_invariant=translation_invariant)
        choice(self, (None, *get_args(Normalize)), normalizer=normalizer)
        n = _places(self, max_length, grid)
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, causal=causal, bias=bias)
        del self.q_proj, self.k_proj
        self.max_length, self.grid = n, (1, n) if grid is None else (grid[0], grid[1])
        self.translation_invariant, self.normalizer = translation_invariant, normalizer
        self.alpha = nn.Parameter(torch.empty(num_heads, *([n] if translation_invariant else [n, n])))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform, zero biases. Of n x n tables it counts all heads' together, as the authors' code does."""
        H, n = self.num_heads, self.max_length
        bound = (6 / (H + n) if self.translation_invariant else 3 / (H * n)) ** 0.5
        nn.init.uniform_(self.alpha, -bound, bound)
        for proj in (self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(proj.weight)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)

    def scores(self, T: int, past: int = 0) -> Float[Tensor, "H {T} S"]:
        """alpha of T queries behind `past` tokens, with all S = past + T keys."""
        S = past + T
        if self.max_length < S:
            refuse(self, "x", "is longer than the table", S, f"at most max_length = {self.max_length} tokens")
        at = torch.arange(S, device=self.alpha.device)
        if self.translation_invariant:
            return self.alpha[:, offsets(at[past:], at, self.grid)]
        return self.alpha[:, at[past:, None], at] if torch.compiler.is_exporting() else self.alpha[:, past:S, :S]

    def weights(self, T: int, past: int = 0, keep: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, "#B H {T} S"]:
        """What values are multiplied by. Hidden keys only count for a softmax; else their values must be 0."""
        (alpha,) = widened(self.scores(T, past)[None])
        seen = torch.ones(T, past + T, dtype=torch.bool, device=alpha.device).tril(past) if self.causal else None
        if self.normalizer is None:
            return alpha if seen is None else alpha.masked_fill(~seen, 0)
        allowed = None if keep is None else keep[:, None, None]
        if seen is not None:
            allowed = seen if allowed is None else allowed & seen
        return softmax(alpha if keep is None else alpha.expand(len(keep), -1, -1, -1), allowed)

    def split(self, x: Float[Tensor, "B T M"], source: Float[Tensor, "B S M"]) -> tuple[Tensor, Tensor, Tensor]:
        v = self.v_proj(source).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        return v, v, v  # nobody asks for queries and keys

    def run(
        self,
        q: Float[Tensor, "B G T D"],
        k: Float[Tensor, "B G T D"],
        v: Float[Tensor, "B G T D"],
        keep: Bool[Tensor, "B T"] | None,
        state: FactoredState | None,
    ) -> tuple[Float[Tensor, "B H T D"], FactoredState]:
        (values,), T, past = widened(v), v.shape[2], 0
        held = v.new_ones(len(v), T, dtype=torch.bool) if keep is None else keep
        values = hide(values, keep)
        if state is not None:
            past = state.v.shape[2]
            values, held = torch.cat([state.v.to(values.dtype), values], 2), torch.cat([state.held, held], 1)
        weights = self.weights(T, past, None if keep is None and state is None else held)
        return weighed(weights.to(values.dtype), values), FactoredState(values, held)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> FactoredState:
        v = torch.zeros(batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        return FactoredState(v, v[:, 0, :, 0].bool())

    def extra_repr(self) -> str:
        how = f"grid={self.grid}, translation_invariant={self.translation_invariant}, normalizer={self.normalizer!r}"
        return f"{super().extra_repr()}, {how}"


def _places(who: object, max_length: int | None, grid: tuple[int, int] | None) -> int:
    """n, from either of both."""
    if grid is None:
        n = 1024 if max_length is None else max_length
        whole(who, max_length=n)
        return n
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        refuse(who, "grid", "is no pair of sizes", grid, "(Y, X)")
    Y, X = grid
    whole(who, Y=Y, X=X)
    if max_length not in (None, Y * X):
        refuse(who, "max_length", "is not what the grid holds", max_length, f"{Y * X}, or none")
    return Y * X
