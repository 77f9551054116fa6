"""What layers share: head counts, key padding, NaN honesty, and the projections around any function of q, k and v."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.masks import Mask, causal, full, padding
from regard.masks.tensors import Kept, Lengths


def head_counts(dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """G and D for these widths; raises where they don't divide."""
    for name, n in (
        ("dim", dim),
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
    ):
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise ValueError(f"Attention: {name} must be an int >= 1, got {n!r}")
    if head_dim is None and dim % num_heads:
        raise ValueError(f"Attention: {num_heads} heads do not divide the width {dim}; change one or give head_dim")
    G = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % G:
        raise ValueError(f"Attention: {num_heads} query heads are not a multiple of {G} key heads")
    return G, dim // num_heads if head_dim is None else head_dim


def check_tokens(who: str, name: str, x: Tensor, width: int) -> None:
    """Raises ValueError unless x is (batch, tokens, width)."""
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"{who}: {name} must be (batch, tokens, {width}), got shape {tuple(x.shape)}")


def key_padding(who: str, mask: Mask | Tensor | None, x: Float[Tensor, "B S M"]) -> Bool[Tensor, "B S"] | None:
    """Whichever form the padding came in, as (B, S), True = a real key; a mask that hides more raises ValueError."""
    B, S = x.shape[:2]
    if mask is None:
        return None
    if isinstance(mask, Kept | Lengths) and mask.batch in (1, B):
        at = torch.arange(S, device=x.device)
        return mask.at(at[-1:], at)[:, 0, 0].expand(B, -1) if S else x.new_ones(B, 0, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape in ((B, S), (B, 1, 1, S)):
        return mask.reshape(B, S)
    got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
    raise ValueError(f"{who}: mask can only hide keys (got {got}); expected masks.padding or bool ({B}, {S})")


def quarantine(x: Float[Tensor, "B T M"]) -> tuple[Float[Tensor, "B T M"], Bool[Tensor, "B T"] | None]:
    """Tokens that hold NaN or inf set to zero, and which they were (None: none).

    Padding may hold anything, and 0 * NaN would reach every sum and weight gradient. Off the CPU and while compiling
    the test would cost a synchronisation or a graph break: there x goes through as it is.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return x, None
    with torch.no_grad():
        if math.isfinite(float(x.sum(dtype=torch.float64))):
            return x, None
    bad = ~x.detach().isfinite().all(-1)
    return x.masked_fill(bad[..., None], 0.0), bad


def spoil(
    out: Float[Tensor, "B T M"],
    bad: Bool[Tensor, "B T"] | None,
    bad_source: Bool[Tensor, "B S"] | None,
    allowed: Mask | None,
) -> Float[Tensor, "B T M"]:
    """NaN in every row that was bad itself or may see a bad token of its source. The last T of S positions ask."""
    if bad is None and bad_source is None:
        return out
    hit = out.new_zeros(out.shape[:2], dtype=torch.bool) if bad is None else bad
    if bad_source is None:
        return out.masked_fill(hit[..., None], math.nan)
    if allowed is None:
        hit = hit | bad_source.any(-1, keepdim=True)
    else:
        T, S = out.shape[1], bad_source.shape[1]
        j = torch.arange(S, device=out.device)
        seen = allowed.at(torch.arange(S - T, S, device=out.device), j) & bad_source[:, None, None]
        hit = hit | seen.any(-1).any(1)
    return out.masked_fill(hit[..., None], math.nan)


class HeadMixer(nn.Module):
    """Projections around a function of queries, keys and values that is not the softmax pipeline.

    A mechanism overrides `mix`; one that streams adds `init_state` and `step`, with `split` and `merge` at hand.

    Args:
        dim: M, the model width.
        num_heads: H.
        num_kv_heads: G, dividing H; default H. Query head h reads key head h // (H / G).
        head_dim: D; default dim / num_heads.
        causal: no query sees a later key.
        bias: whether the four projections have one.
        context_dim: width of `context`; default dim.

    Shapes: x (B, T, M), context (B, S, context_dim) -> (B, T, M).
    """

    supports: frozenset[str] = frozenset({"causal", "bidirectional", "padding", "cross"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        G, D = head_counts(dim, num_heads, num_kv_heads, head_dim)
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim, self.causal = dim, num_heads, G, D, causal
        context_dim = dim if context_dim is None else context_dim
        make: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, num_heads * D, **make)
        self.k_proj = nn.Linear(context_dim, G * D, **make)
        self.v_proj = nn.Linear(context_dim, G * D, **make)
        self.o_proj = nn.Linear(num_heads * D, dim, **make)

    def extra_repr(self) -> str:
        sizes = f"{self.dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}, causal={self.causal}"

    def receptive_field(self) -> Mask:
        """Which key positions may reach which query positions through this layer."""
        return causal() if self.causal else full()

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        keep: Bool[Tensor, "B S"] | None,
    ) -> Float[Tensor, "B H T D"]:
        """The mechanism. `keep` is True at real keys; q, k and v are finite."""
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix x, or what `context` holds for x. `mask` hides keys: `regard.masks.padding`, or True = a real key."""
        check_tokens(self._who, "x", x, self.dim)
        if context is not None:
            self._check_context(x, context)
        source = x if context is None else context
        if mask is not None and "padding" not in self.supports:
            raise ValueError(f"{self._who}: this mechanism takes no mask (no 'padding' on its card)")
        keep = key_padding(self._who, mask, source)
        x, bad = quarantine(x)
        clean, bad_source = (x, bad) if context is None else quarantine(context)
        out = self.merge(self.mix(*self.split(x, clean), keep))
        if bad is None and bad_source is None:
            return out
        allowed = self.receptive_field()
        return spoil(out, bad, bad_source, allowed if keep is None else allowed & padding(keep))

    def split(self, x: Float[Tensor, "B T M"], source: Float[Tensor, "B S C"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of source: (B, H, T, D), (B, G, S, D), (B, G, S, D)."""
        projected = (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = (z.unflatten(-1, (n, self.head_dim)).transpose(1, 2) for z, n in zip(projected, heads))
        return q, k, v

    def merge(self, out: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T M"]:
        """Heads side by side, and the output projection."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    @property
    def _who(self) -> str:
        return str(getattr(self, "name", type(self).__name__))

    def _check_context(self, x: Tensor, context: Tensor) -> None:
        if "cross" not in self.supports:
            raise ValueError(
                f"{self._who}: this mechanism attends only to its own tokens; call it without context "
                "(no 'cross' on its card)"
            )
        if self.causal:
            raise ValueError(
                f"{self._who}: a causal layer takes no context, whose order x does not share; build it causal=False"
            )
        check_tokens(self._who, "context", context, self.k_proj.in_features)
        if context.shape[0] != x.shape[0]:
            raise ValueError(f"{self._who}: x has batch {x.shape[0]} and context {context.shape[0]}; they must match")
