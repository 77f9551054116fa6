"""Causal generation: each feature is compared with the previous token's; nothing is learned."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, whole
from regard.linear._shared import first_state, next_tokens
from regard.masks import Mask, causal, padding, window
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.tracing import autocasts

CARD = Card(
    "causal_generative",
    equation="""p_t = op(x_t, x_{t-1}) for each feature, op: min, max or mean;   p_0 = x_0
context="none":  y_t = p_t
context="mean":  y_t = p_t + (1 / (t + 1)) sum_{s <= t} x_s
context="min":   y_t = min(p_t, min_{s <= t} x_s)""",
    papers=(
        Paper(
            "Breaking the Attention Bottleneck",
            "Hilsenbek",
            2024,
            "2406.10906",
            "abstract; an account of the author's code by a reader",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost("0", "2*M + 1"),
    claim="A model without queries, keys, values and their projections reaches a smaller loss with fewer parameters, "
    "early in training: tests/mixers/test_causal_generative.py::test_a_smaller_model_has_a_smaller_loss.",
    differs=(
        "Reconstructed: neither the paper's text nor its code could be read; no line is taken from that code, which "
        "stands under the AGPL.",
        "Inferred: the first token is compared with itself, the average is added to the pair, and it is that of "
        "tokens up to now. The account has a mean over all tokens, which would show a language model the future.",
        'So read, context="min" is the running minimum alone, whatever the pair: no pair is below it.',
        "Where its loss is smaller: on a chain of second order that is nearly certain, in 80 steps. On prose it was a "
        "tie, and on words of five letters attention was better (1.61 against 1.84 nats at 120 steps).",
        "That the average lowers the loss further does not hold in our small trainings, so that it is off.",
        "Hidden tokens are passed over: the token before is the last real one.",
        "Streaming keeps the sum in float32 at least.",
    ),
    verified="reconstructed",
    exceptions={"L43 training": "there is nothing to train; with out_proj there is a map alone"},
    tries={"context": "mean"},
    defaults={
        "pair": "code, by an account of it",
        "context": "code, by an account of it",
        "out_proj": "paper, abstract: a smaller model",
    },
)

Pair = Literal["min", "max", "mean"]
Context = Literal["none", "mean", "min"]


class GenerativeState(NamedTuple):
    """What the past leaves behind, whatever its length."""

    last: Float[Tensor, "B M"]
    """The last real token."""
    gathered: Float[Tensor, "B M"]
    """The sum of all real ones, or their minimum (context="min")."""
    seen: Int[Tensor, " B"]


@checked()
def pair_previous(
    x: Float[Tensor, "B T M"],
    op: Pair = "min",
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    state: GenerativeState | None = None,
) -> Float[Tensor, "B T M"]:
    """op(x_t, x_{t-1}), where x_{t-1} is the last real token (`keep`: True = a real one), and x_t where there is none.

    It may stand in an activation's place, too. `state`: what came before.

    Raises:
        ValueError: an unknown op, or shapes that don't fit together.
    """
    choice("pair_previous", get_args(Pair), op=op)
    T = x.shape[1]
    before = x.new_zeros(len(x), x.shape[2]) if state is None else state.last.to(x)
    held = x.new_zeros(len(x), dtype=torch.bool) if state is None else state.seen.to(x.device) > 0
    seen = torch.cat([before[:, None], x], 1)
    if keep is None:
        back, none = seen[:, :T], torch.arange(T, device=x.device).eq(0) & ~held[:, None]
    else:
        at = torch.arange(1, T + 1, device=x.device) * keep
        at = F.pad(at.cummax(1).values, (1, 0))[:, :T]  # 0: before the first real one
        back, none = seen.gather(1, at[..., None].expand_as(x)), at.eq(0) & ~held[:, None]
    back = torch.where(none[..., None], x, back)
    if op == "mean":
        return (x + back) / 2
    return torch.minimum(x, back) if op == "min" else torch.maximum(x, back)


@checked()
def running_mean(
    x: Float[Tensor, "B T M"], *, keep: Bool[Tensor, "B T"] | None = None, state: GenerativeState | None = None
) -> Float[Tensor, "B T M"]:
    """The mean of the real tokens up to each, itself among them; 0 where there is none."""
    total, count = _sums(x, keep, state)
    return (total / count.clamp(min=1)[..., None]).to(x.dtype)


@checked()
def running_minimum(
    x: Float[Tensor, "B T M"], *, keep: Bool[Tensor, "B T"] | None = None, state: GenerativeState | None = None
) -> Float[Tensor, "B T M"]:
    """The least of each feature among the real tokens up to each; inf where there is none."""
    real = x if keep is None else x.masked_fill(~keep[..., None], torch.inf)
    if state is not None:
        seen = torch.where(state.seen.to(x.device)[:, None] > 0, state.gathered.to(x), torch.inf)
        real = torch.cat([seen[:, None], real], 1)
    return real.cummin(1).values[:, real.shape[1] - x.shape[1] :] if real.shape[1] else real


def _sums(x: Tensor, keep: Tensor | None, state: GenerativeState | None) -> tuple[Tensor, Tensor]:
    """Sums (B, T, M) and counts (B, T) of real tokens so far."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    real = x.new_ones(x.shape[:2], dtype=torch.long) if keep is None else keep.long()
    total, count = (wide if keep is None else wide.masked_fill(~keep[..., None], 0)).cumsum(1), real.cumsum(1)
    if state is None:
        return total, count
    return total + state.gathered.to(total)[:, None], count + state.seen.to(x.device)[:, None]


@CARD.module
class CausalGenerative(nn.Module):
    """Each token beside the one before, and what all so far have in common. Causal alone; no parameters.

    Args:
        dim: M.
        pair: how a feature is compared with the one before.
        context: what is joined to the pair.
        out_proj: whether a linear map follows, as in attention.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    causal = True

    def __init__(self, dim: int, *, pair: Pair = "min", context: Context = "none", out_proj: bool = False) -> None:
        super().__init__()
        whole(self, dim=dim)
        choice(self, get_args(Pair), pair=pair)
        choice(self, get_args(Context), context=context)
        flag(self, out_proj=out_proj)
        self.dim, self.pair, self.context = dim, pair, context
        self.o_proj = nn.Linear(dim, dim, bias=False) if out_proj else None
        self.register_buffer("place", torch.empty(0), persistent=False)  # states begin where the layer is

    def receptive_field(self) -> Mask:
        """The token before and itself; with a context every earlier one."""
        return causal() & window(2) if self.context == "none" else causal()

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens from all others: `regard.masks.padding`, or True = a real token."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        x, bad = quarantine(x)
        out = self._run(x, keep, None)
        if bad is not None and self.context == "none":  # the token before may stand behind hidden ones
            reached = pair_previous(bad[..., None].to(x.dtype), "max", keep=keep)[..., 0]
            return spoil(out, reached > 0, None, None)
        return spoil(out, bad, bad, causal() if keep is None else causal() & padding(keep))

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> GenerativeState:
        last, gathered = torch.zeros(2, batch_size, self.dim, device=device, dtype=dtype)
        return GenerativeState(last, gathered, torch.zeros(batch_size, device=device, dtype=torch.long))

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GenerativeState:
        """Nothing seen yet. The state has one size for every length, so `capacity` limits nothing."""
        state: GenerativeState = first_state(self, batch_size, capacity, device, dtype)
        return state

    def step(
        self, x: Float[Tensor, "B t M"], state: GenerativeState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], GenerativeState]:
        """The next t tokens. `mask`: True = a real one, of these t; hidden ones leave nothing behind."""
        x = next_tokens(self, x, state, mask)
        if x.shape[1] == 0:
            return self._run(x, mask, state), state
        total, count = _sums(x, mask, state)
        gathered = running_minimum(x, keep=mask, state=state) if self.context == "min" else total
        # What the token behind these would see before it.
        at = x.new_full((len(x),), x.shape[1]).long() if mask is None else _last(mask)
        seen = torch.cat([state.last.to(total)[:, None], x.to(total.dtype)], 1)
        last = seen.gather(1, at[:, None, None].expand(-1, 1, self.dim))[:, 0]
        return self._run(x, mask, state), GenerativeState(last, gathered[:, -1].to(total.dtype), count[:, -1])

    def _run(self, x: Tensor, keep: Tensor | None, state: GenerativeState | None) -> Tensor:
        y = pair_previous(x, self.pair, keep=keep, state=state)
        if self.context == "mean":
            y = y + running_mean(x, keep=keep, state=state)
        elif self.context == "min":
            y = torch.minimum(y, running_minimum(x, keep=keep, state=state))
        if self.o_proj is not None:
            return self.o_proj(y)
        return y.to(torch.get_autocast_dtype(y.device.type)) if autocasts(y.device) and y.dtype != torch.float64 else y

    def extra_repr(self) -> str:
        return f"{self.dim}, pair={self.pair!r}, context={self.context!r}"


def _last(keep: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """1 + where the last real token stands; 0 without one."""
    return (torch.arange(1, keep.shape[1] + 1, device=keep.device) * keep).amax(1)
