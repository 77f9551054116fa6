"""PADRe on sequences: a polynomial of the tokens, by short convolutions and elementwise products."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import checked, flag, refuse
from regard.kernels.short_conv import short_conv
from regard.linear._recurrence import torch_taps
from regard.linear._shared import first_state, next_tokens
from regard.masks import Mask, window
from regard.masks import causal as causal_mask
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.vision.padre import PAPER, check_polynomial, polynomial_recursion

CARD = Card(
    "padre_tokens",
    equation="""Y_i = conv_K(X B_i),   i = 1 .. d:   Z_1 = Y_1,   Z_{i+1} = conv_K(Z_i D_i) * Y_{i+1},   y = Z_d
conv_K: each feature by itself along K tokens, around each, or with causal=True up to each""",
    papers=(PAPER,),
    supports={"causal", "bidirectional", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost("(2*degree - 1)*B*T*M*(M + kernel_size)", "(2*degree - 1)*(kernel_size - 1)*M"),
    claim="A polynomial of degree d in the tokens: its differences of order d + 1 along any line are 0: "
    "tests/mixers/test_padre_tokens.py::test_is_a_polynomial_of_its_degree.",
    differs=(
        "The channels are mixed before the tokens, as in the third-party code.",
        "Causal and streaming forms, packed documents and hidden tokens are ours: these count as zeros in each "
        "convolution, and keep their places.",
        "The account names no starting values: they are torch's.",
        "The residual and the norm before it belong to the block around it.",
    ),
    verified="reconstructed",
    example={"kernel_size": 3},
    tries={"degree": 2},
    defaults={
        "degree": "paper, by account",
        "kernel_size": "paper, by account of the form for voxels",
        "bias": "paper, by account",
        "out_proj": "paper, by account",
    },
)


class PolynomialState(NamedTuple):
    """What the past leaves behind: the last K - 1 inputs of each of the n = 2 d - 1 convolutions."""

    past: Float[Tensor, "B n K1 M"]


class TokenMap(nn.Module):
    """Features are mixed, then the K tokens around each, or up to each."""

    def __init__(self, dim: int, kernel_size: int, *, bias: bool, causal: bool) -> None:
        super().__init__()
        self.ahead = 0 if causal else kernel_size // 2
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.weight = nn.Parameter(torch.empty(dim, kernel_size))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch_taps(self.weight, self.bias)

    def forward(
        self, x: Float[Tensor, "B T M"], keep: Bool[Tensor, "B T"] | None, past: Float[Tensor, "B K1 M"] | None
    ) -> tuple[Float[Tensor, "B T M"], Float[Tensor, "B K1 M"]]:
        u = self.proj(x)
        u = F.pad(u if keep is None else u.masked_fill(~keep[..., None], 0), (0, 0, 0, self.ahead))
        weight, bias = self.weight.to(u.dtype), None if self.bias is None else self.bias.to(u.dtype)
        out, past = short_conv(u, weight, bias, state=past)
        return out[:, self.ahead :], past


@CARD.module
class PolynomialTokenMixer(nn.Module):
    """A polynomial of a sequence.

    Args:
        dim: M.
        degree: d; the paper's are 2 and 3.
        kernel_size: K; odd, unless causal.
        bias: whether the maps have biases, which bring all lower degrees.
        out_proj: whether a linear map follows the last product.
        causal: whether convolutions end at each token.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        *,
        degree: int = 3,
        kernel_size: int = 11,
        bias: bool = True,
        out_proj: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_polynomial(self, dim, degree, kernel_size, bias, out_proj)
        flag(self, causal=causal)
        if kernel_size % 2 == 0 and not causal:
            refuse(self, "kernel_size", "is even, and has no centre", kernel_size, "an odd int, or causal=True")
        self.dim, self.degree, self.kernel_size, self.causal = dim, degree, kernel_size, causal
        self.first = nn.ModuleList(TokenMap(dim, kernel_size, bias=bias, causal=causal) for _ in range(degree))
        self.between = nn.ModuleList(TokenMap(dim, kernel_size, bias=bias, causal=causal) for _ in range(degree - 1))
        self.o_proj = nn.Linear(dim, dim, bias=bias) if out_proj else None

    def receptive_field(self) -> Mask:
        """As far as d convolutions reach."""
        if self.causal:
            return causal_mask() & window(self.degree * (self.kernel_size - 1) + 1)
        return window(self.degree * (self.kernel_size // 2) + 1)

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens, which count as zeros: `regard.masks.padding`, or True = a real token."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        x, bad = quarantine(x)
        out = self._run(x, keep, None)[0]
        return out if bad is None else spoil(out, self._reached(bad, keep), None, None)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> PolynomialState:
        shape = (batch_size, 2 * self.degree - 1, self.kernel_size - 1, self.dim)
        return PolynomialState(torch.zeros(shape, device=device, dtype=dtype))

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PolynomialState:
        """Nothing seen yet. The state has one size for every length, so `capacity` limits nothing."""
        self._check_streams()
        state: PolynomialState = first_state(self, batch_size, capacity, device, dtype)
        return state

    def step(
        self, x: Float[Tensor, "B t M"], state: PolynomialState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], PolynomialState]:
        """The next t tokens. `mask`: True = a real one, of these t; hidden ones count as zeros, now and later."""
        self._check_streams()
        return self._run(next_tokens(self, x, state, mask), mask, state)

    def _check_streams(self) -> None:
        if not self.causal:
            refuse(self, "streaming", "needs causal=True", "a layer that sees later tokens", "one built causal")

    def _run(self, x: Tensor, keep: Tensor | None, state: PolynomialState | None) -> tuple[Tensor, PolynomialState]:
        past, left = iter([None] * (2 * self.degree - 1) if state is None else state.past.unbind(1)), []

        def run(each: nn.Module, z: Tensor) -> Tensor:
            out, last = each(z, keep, next(past))
            left.append(last)
            return out

        ys = [run(f, x) for f in self.first]
        y = polynomial_recursion(ys, [partial(run, f) for f in self.between])[-1]
        return y if self.o_proj is None else self.o_proj(y), PolynomialState(torch.stack(left, 1))

    def _reached(self, bad: Bool[Tensor, "B T"], keep: Bool[Tensor, "B T"] | None) -> Bool[Tensor, "B T"]:
        """What a bad token reaches, on paths of which hidden ones are no part."""
        ahead, T = 0 if self.causal else self.kernel_size // 2, bad.shape[1]

        def spread(hit: Tensor) -> Tensor:
            seen = F.pad(hit if keep is None else hit & keep, (self.kernel_size - 1 - ahead, ahead))
            return torch.stack([seen.narrow(1, j, T) for j in range(self.kernel_size)]).any(0)

        first = hit = spread(bad)
        for _ in self.between:
            hit = spread(hit) | first
        return hit | bad
