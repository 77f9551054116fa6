"""What this room's recurrent mechanisms share: attention through features, repeated key heads, and streaming."""

import itertools
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import refuse, tokens, whole
from regard.kernels.linear_scan import Scan, linear_scan
from regard.kernels.sums import over_keys
from regard.masks import causal, padding
from regard.masks.tensors import Packed
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.tokens import quarantine, shown, spoil
from regard.tracing import as_it_is


def widened(*tensors: Tensor) -> list[Tensor]:
    """In at least float32: sums over thousands of keys need it."""
    return [z.to(torch.promote_types(z.dtype, torch.float32)) for z in tensors]


def repeat_heads(z: Float[Tensor, "B G S D"], heads: int) -> Float[Tensor, "B H S D"]:
    """Each key head as many times as there are query heads that read it."""
    return z if z.shape[1] == heads else z.repeat_interleave(heads // z.shape[1], 1)


def hide(z: Tensor, keep: Bool[Tensor, "B S"] | None) -> Tensor:
    """Zero where a key (third axis) is not real, for whatever stood there."""
    return z if keep is None else z.masked_fill(~keep[:, None, :, None], 0.0)


def feature_attention(
    phi_q: Float[Tensor, "B H T K"],
    phi_k: Float[Tensor, "B H S K"],
    v: Float[Tensor, "B H S V"],
    decay: Tensor | None = None,
    *,
    causal: bool,
    state: Float[Tensor, "B H K V1"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    normalise: bool = True,
) -> Scan:
    """sum_j w_ij v_j / sum_j w_ij with w_ij = phi_q_i . phi_k_j, in time and memory linear in T and S.

    The denominator is one more column of v, full of ones, in the state too. A row whose weights are all 0 gives 0.
    Not to `normalise` is to leave denominator and column out.
    """
    v = with_ones(v) if normalise else v
    if causal:
        out, state = linear_scan(phi_q, phi_k, v, decay, state=state, starts=starts)
    else:
        state = over_keys(phi_k.mT, v)
        out = phi_q @ state
    return Scan(ratio(out) if normalise else out, state)


def with_ones(v: Float[Tensor, "B H S V"]) -> Float[Tensor, "B H S V1"]:
    """One more column of values, whose weighted sum is the sum of weights."""
    return torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)


def ratio(out: Float[Tensor, "B H T V1"], eps: float = 0.0) -> Float[Tensor, "B H T V"]:
    """Weighted sums over the sum of weights and eps; 0 where no weight is left."""
    total = out[..., -1:] + eps
    return out[..., :-1] / torch.where(total == 0, 1.0, total)


def pair_products(x: Float[Tensor, "*n T D"]) -> Float[Tensor, "*n T P"]:
    """x_a x_b for all a <= b."""
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    rows = x.mT.contiguous()  # whole rows of tokens are quicker to gather than single numbers
    return (rows.index_select(-2, a) * rows.index_select(-2, b)).mT


def value_conv(who: object, heads: int, width: int) -> nn.Conv2d:
    """A depthwise convolution over tokens, one kernel a head, for values (B, H, T, D)."""
    whole(who, conv_width=width)
    if width % 2 == 0:
        refuse(who, "conv_width", "is even", width, "an odd int, or None")
    return nn.Conv2d(heads, heads, (width, 1), padding=(width // 2, 0), groups=heads, bias=False)


def first_state(
    layer: Any, batch_size: int, capacity: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> Any:
    """What `init_state` of a layer with `empty_state` gives, in float32 at least, else as the parameters."""
    whole(layer, 0, batch_size=batch_size)
    whole(layer, capacity=capacity)
    weight = next(itertools.chain(layer.parameters(), layer.buffers()))
    wide = torch.promote_types(dtype or weight.dtype, torch.float32)
    return layer.empty_state(batch_size, device=torch.device(device or weight.device), dtype=wide)


def next_tokens(layer: Any, x: Float[Tensor, "B t M"], state: Any, mask: Tensor | None) -> Float[Tensor, "B t M"]:
    """What `step` of such a layer goes on with: x without its hidden tokens' numbers. Refuses what fits no state."""
    tokens(layer, "x", x, layer.dim)
    x = shown(layer, x, mask)
    expected = type(layer.empty_state(0, device=x.device, dtype=torch.float32))
    if not isinstance(state, expected):
        wanted = f"the {expected.__name__} of init_state"
        refuse(layer, "state", "has the wrong type", type(state).__name__, wanted, error=TypeError)
    if state[0].shape[0] != x.shape[0]:
        refuse(layer, "state", "has another batch than x", state[0].shape[0], f"{x.shape[0]} sequences")
    return x


class RecurrentMixer(HeadMixer):
    """A HeadMixer whose causal form carries a state of constant size. Subclasses give `run` and `empty_state`."""

    resets = False
    """Whether `run` also takes `starts=`, as `linear_scan` does; else packed documents are run apart."""

    def run(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        keep: Bool[Tensor, "B S"] | None,
        state: Any,
    ) -> tuple[Float[Tensor, "B H T D"], Any]:
        """The mechanism, from `state` (None = nothing seen) to the state after these tokens."""
        raise NotImplementedError

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        """What `run` has seen before any token; a named tuple, its first entry with the batch first."""
        raise NotImplementedError

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        with as_it_is(q.device):
            return self.run(q, k, v, keep, None)[0].to(q.dtype)

    def by_document(
        self, x: Float[Tensor, "B T M"], packed: Packed, keep: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T M"]:
        if not (self.causal and self.resets):
            return super().by_document(x, packed, keep)
        T, keep = x.shape[1], packed.real(len(x), x.shape[1], keep)
        x, bad = quarantine(x, always=True)
        q, k, v = self.split(x, x)
        with as_it_is(q.device):
            anew: Any = {"starts": packed.places(T) == 0}
            out = self.run(q, k, v, keep, None, **anew)[0].to(q.dtype)
        return spoil(self.merge(out), bad, bad, causal() & packed & padding(keep))

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The state before any token. Its size is the same for every `capacity`; sums are kept in float32 at least."""
        self._check_streams()
        return first_state(self, batch_size, capacity, device, dtype)

    def step(
        self, x: Float[Tensor, "B t M"], state: Any, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], Any]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask: True = a real token, of these t. Hidden ones leave nothing behind.
        """
        self._check_streams()
        x = next_tokens(self, x, state, mask)
        q, k, v = self.split(x, x)
        with as_it_is(q.device):
            out, state = self.run(q, k, v, mask, state)
        return self.merge(out.to(q.dtype)), state

    def _check_streams(self) -> None:
        if not self.causal:
            wrong = "is off, and this layer sees later tokens: streaming needs it"
            refuse(self, "causal", wrong, False, "a layer built with causal=True")
