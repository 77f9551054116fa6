"""Masked mixer: one learned lower triangular matrix mixes the tokens, the same for every input."""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, refuse, whole
from regard.masks import Mask, full, padding
from regard.masks import causal as causal_mask
from regard.pipeline.tokens import apart, key_mask, quarantine, shown, spoil
from regard.tracing import exporting

CARD = Card(
    "masked_mixer",
    equation="""flat      y_t = sum_{s <= t} W_ts x_s + b_t        the same for every feature; position is in W and b
width K   y_tm = sum_{s <= t} sum_j W_tsj x_{s, m + j - (K-1)/2} + b_t
expanded  y = W2 gelu(W1 x + b1) + b2              both triangular
heads     y = concat_h(W_h (P_h x) + b_h) O        a projection and a matrix for each head""",
    papers=(
        Paper(
            "Masked Mixers for Language Generation and Retrieval",
            "Badger",
            2024,
            "2409.01482",
            "abstract; the author's code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "streaming", "compile"},
    cost=Cost("B*T*T*M", "T*M"),
    claim="What enters can be recovered from what comes out: "
    "tests/mixers/test_masked_mixer.py::test_what_enters_can_be_recovered.",
    differs=(
        "The triangle is cut out of W where it is used, so that what lies above it has no gradient; the author zeroes "
        "it in place at each use.",
        "Shorter sequences use the top left of the matrix; the author's code takes one length only.",
        "Norm, residual and feed-forward of the author's block belong to the model around it.",
    ),
    verified="third-party",
    example={"max_length": 48, "form": "heads"},
    defaults={"max_length": "ours", "form": "code", "kernel_width": "code"},
)

Form = Literal["flat", "expanded", "heads"]


class MixerState(NamedTuple):
    """What each map of the layer was given so far."""

    past: tuple[Float[Tensor, "B H t D"], ...]


def masked_mix(
    x: Float[Tensor, "B H S D"],
    weight: Float[Tensor, "H N N K"],
    bias: Float[Tensor, "H N"],
    *,
    causal: bool = True,
    first: int = 0,
) -> Float[Tensor, "B H T D"]:
    """Rows `first` .. S - 1 of W x + b; kernels of K taps run along the features."""
    S, K = x.shape[2], weight.shape[3]
    if exporting():  # a view would be another graph where it is all of W
        at = torch.arange(S, device=x.device)
        weight, bias = weight[:, at[first:, None], at], bias[:, at[first:], None]
    else:
        weight, bias = weight[:, first:S, :S], bias[:, first:S, None]
    if causal:
        # Cut out anew each time: a parameter with zeros in it would still be trained there.
        later = torch.ones(S - first, S, dtype=torch.bool, device=x.device).triu(first + 1)
        weight = weight.masked_fill(later[..., None], 0)
    if K == 1:
        return weight[..., 0] @ x + bias
    if first == S:
        return x[:, :, :0] + bias
    taps = weight.flatten(0, 1)
    mixed = F.conv1d(x.flatten(1, 2), taps, padding=K // 2, groups=len(weight))
    return mixed.unflatten(1, weight.shape[:2]) + bias


class TokenMap(nn.Module):
    """The parameters of one `masked_mix`: W (H, N, N, K) and b (H, N)."""

    def __init__(
        self,
        max_length: int,
        *,
        num_heads: int = 1,
        width: int = 1,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.causal = causal
        shape = (num_heads, max_length, max_length, width)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[:2]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's convolutions, whose channels are the tokens here."""
        _, _, N, K = self.weight.shape
        for p in self.parameters():
            nn.init.uniform_(p, -1 / math.sqrt(N * K), 1 / math.sqrt(N * K))

    def forward(self, x: Float[Tensor, "B H S D"], first: int = 0) -> Float[Tensor, "B H T D"]:
        return masked_mix(x, self.weight, self.bias, causal=self.causal, first=first)


@CARD.module
class MaskedMixer(nn.Module):
    """Learned token mixing without queries and keys, for at most `max_length` tokens.

    Args:
        dim: M.
        max_length: N; each map has N x N weights. The default is this library's.
        form: "flat" (the paper's main form), "expanded" or "heads".
        num_heads: of the form "heads"; the others have one matrix for all features.
        kernel_width: K, odd; more than 1 in the flat form only.
        causal: False leaves the triangle whole, as in the paper's encoders.
    """

    def __init__(
        self,
        dim: int,
        *,
        max_length: int = 512,
        form: Form = "flat",
        num_heads: int = 1,
        kernel_width: int = 1,
        causal: bool = True,
    ) -> None:
        super().__init__()
        choice(self, get_args(Form), form=form)
        whole(self, dim=dim, max_length=max_length, num_heads=num_heads, kernel_width=kernel_width)
        divides(self, num_heads=num_heads, dim=dim)
        if kernel_width % 2 == 0:
            refuse(self, "kernel_width", "is even", kernel_width, "an odd int")
        if kernel_width > 1 and form != "flat":
            refuse(self, "kernel_width", f"does not go with form {form!r}", kernel_width, "1 unless form='flat'")
        self.dim, self.max_length, self.form, self.causal = dim, max_length, form, causal
        self.num_heads = num_heads if form == "heads" else 1
        self.maps = nn.ModuleList(
            TokenMap(max_length, num_heads=self.num_heads, width=kernel_width, causal=causal)
            for _ in range(2 if form == "expanded" else 1)
        )
        self.v_proj = nn.Linear(dim, dim) if form == "heads" else nn.Identity()
        self.o_proj = nn.Linear(dim, dim) if form == "heads" else nn.Identity()

    def receptive_field(self) -> Mask:
        return causal_mask() if self.causal else full()

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix x. `mask` hides tokens from the others; positions count them all the same."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        self._fits(x.shape[1])
        x, bad = quarantine(x)
        hidden = None if keep is None else ~keep[:, None, :, None]
        y = self._split(x)
        for n, mixing in enumerate(self.maps):
            y = y if n == 0 else F.gelu(y)
            y = mixing(y if hidden is None else y.masked_fill(hidden, 0))
        field = self.receptive_field()
        return spoil(self._merge(y), bad, bad, field if keep is None else field & padding(keep))

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MixerState:
        """The state before the first token. It grows with the tokens seen, up to max_length."""
        if not self.causal:
            refuse(self, "streaming", "needs causal=True", "a layer that sees later tokens", "one built causal")
        whole(self, 0, batch_size=batch_size)
        whole(self, 0, most=self.max_length, capacity=capacity)
        shape = (batch_size, self.num_heads, 0, self.dim // self.num_heads)
        nothing = next(self.parameters()).new_zeros(shape, device=device, dtype=dtype)
        return MixerState((nothing,) * len(self.maps))

    @checked(M="dim")
    def step(
        self, x: Float[Tensor, "B t M"], state: MixerState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], MixerState]:
        """The outputs of the next tokens, and the state after them. `mask`: True = a real one, of these t."""
        if not isinstance(state, MixerState):
            wanted = "the MixerState of init_state"
            refuse(self, "state", "has the wrong type", type(state).__name__, wanted, error=TypeError)
        first, batch = state.past[0].shape[2], state.past[0].shape[0]
        self._fits(first + x.shape[1])
        if batch != x.shape[0]:
            refuse(self, "x", "has another batch than the state", x.shape[0], f"{batch} sequences")
        y, past = self._split(shown(self, x, mask)), []
        hidden = None if mask is None else ~mask[:, None, :, None]
        for n, (before, mixing) in enumerate(zip(state.past, self.maps, strict=True)):
            y = y if n == 0 else F.gelu(y)
            y = y if hidden is None else y.masked_fill(hidden, 0)
            past.append(torch.cat([before.to(y.dtype), y], 2))
            y = mixing(past[-1], first)
        return self._merge(y), MixerState(tuple(past))

    def _split(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T D"]:
        return self.v_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _merge(self, y: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T M"]:
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _fits(self, length: int) -> None:
        if length > self.max_length:
            refuse(self, "x", "is too long", f"{length} tokens", f"at most max_length = {self.max_length}")
