"""Shapes, protocols and the small types that every room shares.

Axes, everywhere: B batch, H query heads, G key/value heads, T queries, S keys, D query/key head width, V value head
width, M model width, Y X height and width of feature maps, N nodes, E edges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.masks import Mask


@dataclass(frozen=True)
class HeadShape:
    """The widths that a part is built for."""

    dim: int
    """M, the model width."""
    num_heads: int
    """H."""
    num_kv_heads: int
    """G; query head h reads key head h // (H / G)."""
    head_dim: int
    """D."""


@dataclass(frozen=True)
class Rows:
    """The rectangle of the T x S matrix that a stage is asked about: query rows `i` against keys `j`.

    Positions count from the first key, so the last query of a causal pass has i = S - 1 (bottom-right alignment).
    """

    q: Float[Tensor, "B H t D"]
    """Queries of these rows, after rotation."""
    k: Float[Tensor, "B G s D"]
    """Keys of these columns, after rotation."""
    scores: Float[Tensor, "B H t s"]
    """Scaled dot products, before any bias. Filled for stages with "scores" in `needs`, and for every mix."""
    i: Int[Tensor, "t"]
    j: Int[Tensor, "s"]
    allowed: Bool[Tensor, "#B #H t s"] | None = None
    """True = may attend; None = all may."""
    x: Float[Tensor, "B t M"] | None = None
    """The tokens behind the queries, for stages that say so in `needs`."""
    context: Float[Tensor, "B s M"] | None = None
    """The tokens behind the keys, likewise."""


class Stage(nn.Module):
    """One step of the pipeline between scores and outputs. The class attributes tell kernels how it may be cut up."""

    sees: Literal["tile", "rows"] = "tile"
    """`tile`: any rectangle of the score matrix can be computed alone. `rows`: needs every key of its rows at once."""
    halo: int = 0
    """How many earlier query rows it must see to compute a row (a convolution over queries; else 0)."""
    needs: frozenset[str] = frozenset()
    """Of {"scores", "tokens"}: what it reads of `Rows` beyond q, k and the positions."""


class Position(Stage):
    """How a mechanism knows where tokens stand. Override the hooks that the paper changes; the rest do nothing."""

    streams: bool = True
    """False where what a hook does to a token depends on how many tokens follow, so that nothing can be cached."""
    by_distance: bool = False
    """True where `bias` depends on i - j alone (and the head), so that one row of it tells all."""

    def embed(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B T M"]:
        """Change the tokens before projection (absolute schemes)."""
        return x

    def rotate(self, z: Float[Tensor, "B H T D"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B H T D"]:
        """Change queries and keys alike (rotary schemes)."""
        return z

    def bias(self, rows: Rows) -> Float[Tensor, "#B #H t s"]:
        """What is added to the scaled scores."""
        return rows.q.new_zeros(1, 1, 1, 1)

    def values(self, weights: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "#B #H #t #V"]:
        """What is added to weights @ v."""
        return weights.new_zeros(1, 1, 1, 1)

    @classmethod
    def changes(cls, hook: str) -> bool:
        """Whether this class overrides the hook of that name."""
        return getattr(cls, hook) is not getattr(Position, hook)


class Normalizer(Stage):
    """Turns scores into weights, row by row. Masked entries and fully masked rows get weight exactly 0."""

    sees = "rows"
    is_softmax = False
    """True where fused kernels may take its place."""

    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None
    ) -> Float[Tensor, "B H t S"]:
        raise NotImplementedError


class Mix(Stage):
    """Maps scores to scores (before the mask) or weights to weights (after normalising), across keys, rows or heads."""

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        raise NotImplementedError


class Selector(nn.Module):
    """Looks at queries and keys (after rotation) and says which pairs are worth computing. No gradient flows here."""

    streams: bool = True
    """False where what a query sees depends on later queries, so that steps could differ from the full pass."""

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        """What to keep, usually `masks.chosen`. The pipeline also applies `mask`; keys that it hides must not count."""
        raise NotImplementedError


class HeadMap(nn.Module):
    """Changes queries, keys and values after the projections and before rotation."""

    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S V"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


GateSite = Literal["query", "key", "value", "output", "dense"]


class Gate(nn.Module):
    """Scales features by a function of the token they belong to, at one site of the pipeline.

    The pipeline calls it at every site; at any site but its own it returns `z` unchanged. At `query`, `key`, `value`
    and `output` z is (B, heads, T, width); at `dense` (after the output projection) it is (B, T, M). `x` is (B, T, M),
    the tokens on the same side as z.
    """

    site: GateSite = "output"

    def forward(self, z: Tensor, x: Float[Tensor, "B T M"], at: GateSite) -> Tensor:
        raise NotImplementedError


@runtime_checkable
class TokenMixer(Protocol):
    """(B, T, M)[, context (B, S, M)][, mask] -> (B, T, M)."""

    def forward(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class StreamingMixer(TokenMixer, Protocol):
    """A TokenMixer that can also run token by token. The state is a value: handed in, handed back, never hidden."""

    def init_state(self, batch_size: int, capacity: int) -> object: ...

    def step(self, x: Tensor, state: object) -> tuple[Tensor, object]: ...


@runtime_checkable
class CrossMixer(Protocol):
    """(B, T, M), context (B, S, M)[, where things stand] -> (B, T, M)."""

    def forward(self, x: Tensor, context: Tensor, /) -> Tensor: ...


@runtime_checkable
class FeatureMixer(Protocol):
    """(B, C, *sizes) -> (B, C, *sizes), mostly (B, C, Y, X)."""

    def forward(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class GraphMixer(Protocol):
    """nodes (N, M), edge_index (2, E) of sources and targets -> nodes (N, M)."""

    def forward(self, nodes: Tensor, edge_index: Tensor, /) -> Tensor: ...


@runtime_checkable
class Pooler(Protocol):
    """(B, T, M) -> (B, M)."""

    def forward(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class Pointer(Protocol):
    """(B, T, M), context (B, S, M) -> log-probabilities (B, T, S) of pointing at each token of the context."""

    def forward(self, x: Tensor, context: Tensor, /) -> Tensor: ...


@runtime_checkable
class Loss(Protocol):
    """Tensors -> a scalar to be minimised, or added to what is."""

    def forward(self, x: Tensor, /) -> Tensor: ...


Builder = Callable[..., object]
