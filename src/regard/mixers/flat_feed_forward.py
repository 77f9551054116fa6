"""Shallow nets that stand for attention: a whole sentence in one row, through one hidden layer."""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost
from regard.checks import flag, refuse, tokens, whole
from regard.masks import Mask, full, padding
from regard.masks import causal as causal_mask
from regard.mixers._flat import PAPER, SIZES, FlatLayer, FlatNet, Size, flat
from regard.pipeline.tokens import apart, key_mask, quarantine, shown, spoil
from regard.tracing import as_it_is, exporting

CARD = Card(
    "flat_feed_forward",
    equation="""f = [x_1; ...; x_T; 0; ...; 0]                        W = max_length M numbers, hidden tokens 0
[y_1; ...] = W2 LN(leaky(W1 LN(f) + b1)) + b2         LN over the whole row; leaky: 0.01 below 0
causal    y_t = the same net, M outputs, on f with all tokens after t set to 0
per_head  a net for each head, max_length D outputs""",
    papers=(PAPER,),
    supports={"causal", "bidirectional", "padding", "packed", "streaming", "compile"},
    cost=Cost("2*B*max_length*M*hidden", "hidden + 2*T"),
    claim="Such a net learns what a layer of softmax attention does: "
    "tests/mixers/test_flat_feed_forward.py::test_a_net_is_taught_by_attention.",
    differs=(
        "All rows of the causal form are computed at once, from running sums of the first map and of the norm's "
        "moments; the authors' code calls the net for each row.",
        "Streaming and packed documents are ours, and a causal form with a net for each head.",
        "The whole layer's form and that with residual and norm are this net with another teacher.",
    ),
    verified="third-party",
    example={"max_length": 48, "hidden": 20},
    tries={"max_length": 56, "hidden": 12, "per_head": True},
    defaults={**SIZES, "per_head": "code, as in ALR", "project": "ours, for a net that stands for a whole layer"},
)


class FlatState(NamedTuple):
    """The past: each net's sum of the first map, and of each token the mean and the variance of its features."""

    sums: Float[Tensor, "B N hidden"]
    means: Float[Tensor, "B t"]
    variances: Float[Tensor, "B t"]


def running(
    nets: Iterable[FlatNet], x: Float[Tensor, "B T M"], state: FlatState, max_length: int
) -> tuple[list[Float[Tensor, "B T hidden"]], FlatState]:
    """up(norm(f)) of every prefix: LN(f) = (f - mu) / s, where zeros that follow count in mu and s too."""
    (_, T, M), past = x.shape, state.means.shape[1]
    wide = state.sums.dtype
    x = x.to(wide)
    mean = x.mean(-1)
    means = torch.cat([state.means, mean], 1)
    variances = torch.cat([state.variances, (x - mean[..., None]).square().mean(-1)], 1)
    order = torch.arange(past + T, device=x.device)
    seen = (order <= order[past:, None]).to(wide)
    mu = (means @ seen.mT) / max_length
    off = variances[:, None] + (means[:, None] - mu[..., None]).square()
    behind = (max_length - 1 - order[past:]) * mu.square()
    spread = (((off * seen).sum(-1) + behind) / max_length).unsqueeze(-1)
    sums, rows = [], []
    for n, net in enumerate(nets):
        scale, weight = net.norm.weight.to(wide).unflatten(0, (-1, M)), net.up.weight.to(wide).unflatten(1, (-1, M))
        at = order[past:] if exporting() else slice(past, past + T)
        part = torch.einsum("btm,htm->bth", x * scale[at], weight[:, at]).cumsum(1) + state.sums[:, n, None]
        whole_row = torch.einsum("hlm,lm->h", weight, scale)
        rows.append((part - mu[..., None] * whole_row) / (spread + net.norm.eps).sqrt())
        rows[-1] = rows[-1] + F.linear(net.norm.bias.to(wide), net.up.weight.to(wide), net.up.bias.to(wide))
        sums.append(part[:, -1] if T else state.sums[:, n])
    return rows, FlatState(torch.stack(sums, 1), means, variances)


@CARD.module
class FlatFeedForward(FlatLayer):
    """One net for a whole sentence, of at most `max_length` tokens; it has no queries and keys.

    Args:
        dim, num_heads: M and H; heads only count with per_head.
        max_length: tokens of the row. The same sentence is another input to a net of another length.
        hidden: numbers in the hidden layer, or a size of the paper's: W / 256, W / 128, W / 8, W / 2 or 2 W for "XS",
            "S", "M", "L" and "XL", and None for "XS"; with per_head W / 32, W / 16, W / 8 and W / 4 for the last two.
        per_head: a net for each head (ALSR).
        project: an output projection behind the nets, which may be the teacher's (ALR, ALSR).
        causal: no token sees a later one.

    Shapes: x (B, T, M) -> (B, T, M), T <= max_length.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        max_length: int = 50,
        hidden: Size | int | None = None,
        per_head: bool = False,
        project: bool = False,
        causal: bool = False,
    ) -> None:
        flag(self, causal=causal)
        how: dict[str, Any] = {"hidden": hidden, "per_head": per_head, "project": project}
        outputs = 1 if causal else max_length
        super().__init__(dim, num_heads, max_length=max_length, rows=1, outputs=outputs, **how)
        self.causal = causal

    def receptive_field(self) -> Mask:
        return causal_mask() if self.causal else full()

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix x. `mask` hides tokens: they are zeros in the row, and give 0 (before a projection)."""
        tokens(self, "x", x, self.dim)
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        self._fits("x", x)
        x, bad = quarantine(x)
        if self.causal:
            y, _ = self._next(x, keep, self._empty(len(x), x.device, x.dtype))
        else:
            y = self._rows(flat(x, keep, self.max_length), x.shape[1])
        field = self.receptive_field()
        return spoil(self._out(y, keep), bad, bad, field if keep is None else field & padding(keep))

    def _next(self, x: Tensor, keep: Tensor | None, state: FlatState) -> tuple[Tensor, FlatState]:
        nets = cast(list[FlatNet], list(self.nets))
        with as_it_is(x.device):
            x = x if keep is None else x.masked_fill(~keep[..., None], 0)
            rows, state = running(nets, x, state, self.max_length)
        narrow = nets[0].up.weight.dtype
        outs = [net.rest(z.to(narrow)) for net, z in zip(nets, rows, strict=True)]
        return torch.cat(outs, -1), state

    def _empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> FlatState:
        wide = torch.promote_types(dtype, torch.float32)
        sums = torch.zeros(batch, len(self.nets), self.hidden, device=device, dtype=wide)
        return FlatState(sums, sums[:, 0, :0], sums[:, 0, :0])

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FlatState:
        """The state before the first token; two numbers a token besides the sums, up to max_length."""
        if not self.causal:
            refuse(self, "streaming", "needs causal=True", "a layer that sees later tokens", "one built causal")
        whole(self, 0, batch_size=batch_size)
        whole(self, 0, most=self.max_length, capacity=capacity)
        weight = next(self.parameters())
        return self._empty(batch_size, torch.device(device or weight.device), dtype or weight.dtype)

    def step(
        self, x: Float[Tensor, "B t M"], state: FlatState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], FlatState]:
        """The outputs of the next tokens, and the state after them. `mask`: True = a real one, of these t."""
        tokens(self, "x", x, self.dim)
        if not isinstance(state, FlatState):
            wanted = "the FlatState of init_state"
            refuse(self, "state", "has the wrong type", type(state).__name__, wanted, error=TypeError)
        if len(state.sums) != len(x):
            refuse(self, "x", "has another batch than the state", len(x), f"{len(state.sums)} sequences")
        self._fits("x", x, state.means.shape[1])
        y, state = self._next(shown(self, x, mask), None, state)
        return self._out(y, mask), state
