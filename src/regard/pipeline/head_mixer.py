"""The projections around any function of queries, keys and values that is not the softmax pipeline."""

from typing import TypedDict

from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import fits, flag, refuse, tokens, whole
from regard.masks import Mask, causal, full, padding
from regard.masks.tensors import Packed
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.shapes import head_shape


class Projections(TypedDict, total=False):
    """The keywords that every `HeadMixer` has: `def __init__(self, dim, num_heads, *, mine, **rest: Unpack[...])`."""

    num_kv_heads: int | None
    head_dim: int | None
    causal: bool
    bias: bool
    context_dim: int | None


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
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who=type(self).__name__)
        flag(type(self).__name__, causal=causal, bias=bias)
        G, D = shape.num_kv_heads, shape.head_dim
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim, self.causal = dim, num_heads, G, D, causal
        context_dim = dim if context_dim is None else context_dim
        whole(type(self).__name__, context_dim=context_dim)
        self.context_dim = context_dim
        self.q_proj = nn.Linear(dim, num_heads * D, bias=bias)
        self.k_proj = nn.Linear(context_dim, G * D, bias=bias)
        self.v_proj = nn.Linear(context_dim, G * D, bias=bias)
        self.o_proj = nn.Linear(num_heads * D, dim, bias=bias)

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

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, alone: bool) -> Tensor:
        """`mix`, for who does something else where queries and keys are of the same tokens (`alone`)."""
        return self.mix(q, k, v, keep)

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix x, or what `context` holds for x. `mask` hides keys: `regard.masks.padding`, or True = a real key."""
        tokens(self, "x", x, self.dim)
        if context is not None:
            self._check_context(x, context)
        elif self.context_dim != self.dim:
            refuse(self, "context", "is missing, and x is of another width", "none", f"(B, S, {self.context_dim})")
        source = x if context is None else context
        if mask is not None and "padding" not in self.supports:
            refuse(
                self, "mask", "is not taken by this mechanism", type(mask).__name__, "none (no 'padding' on its card)"
            )
        keep, packed = key_mask(self, mask, source)
        if packed is not None and context is not None:
            refuse(self, "mask", "packs documents of x, not of a context", "both", "one of them")
        if packed is not None:
            return self.by_document(x, packed, keep)
        x, bad = quarantine(x)
        clean, bad_source = (x, bad) if context is None else quarantine(context)
        out = self.merge(self.mixed(*self.split(x, clean), keep, alone=context is None))
        if bad is None and bad_source is None:
            return out
        allowed = self.receptive_field()
        return spoil(out, bad, bad_source, allowed if keep is None else allowed & padding(keep))

    def by_document(
        self, x: Float[Tensor, "B T M"], packed: Packed, keep: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T M"]:
        """What `forward` gives for packed documents; a mechanism that can start anew within a row does it there."""
        return apart(self, x, packed, keep)

    def split(self, x: Float[Tensor, "B T M"], source: Float[Tensor, "B S C"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of source: (B, H, T, D), (B, G, S, D), (B, G, S, D)."""
        projected = (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = (z.unflatten(-1, (n, self.head_dim)).transpose(1, 2) for z, n in zip(projected, heads))
        return q, k, v

    def merge(self, out: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T M"]:
        """Heads side by side, and the output projection."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _check_context(self, x: Tensor, context: Tensor) -> None:
        if "cross" not in self.supports:
            refuse(
                self,
                "context",
                "is not taken by this mechanism",
                type(context).__name__,
                "none (no 'cross' on its card)",
            )
        if self.causal:
            refuse(
                self,
                "context",
                "is not taken by a causal layer, whose order it does not share",
                type(context).__name__,
                "none, or a layer built with causal=False",
            )
        fits(self, "B S context_dim", {"context_dim": self.k_proj.in_features}, context=context)
        if context.shape[0] != x.shape[0]:
            refuse(self, "context", "has another batch than x", context.shape[0], f"{x.shape[0]} sequences")
