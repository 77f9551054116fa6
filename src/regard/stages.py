"""The stages of the pipeline: the kinds of parts that fill its slots (`regard.slots`), and what they are told.

    x - project - position - score - bias - score mix - mask - normalise - weight mix - values - gate - project - y

What fills a slot is a part: a callable `nn.Module` of one of the kinds below, or a mask. Parts are told what they ask
for, in `Rows`: the tile of the T x S matrix at hand, the tokens behind it, and what the part itself made of the tokens
before the pipeline ran (`Stage.prepare`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.masks import Mask

# --- what stages are told -----------------------------------------------------------------------------------


class Made(NamedTuple):
    """What a stage made of the tokens, once a call. The pipeline cuts `query` and `key` to the tile at hand."""

    query: Float[Tensor, "B h T F"] | None = None
    """Per query token."""
    key: Float[Tensor, "B h S F"] | None = None
    """Per key token; kept in the cache while streaming."""
    whole: Any = None
    """What belongs to no token, such as a projected table."""


@dataclass(frozen=True)
class Tokens:
    """What `Stage.prepare` makes it from."""

    x: Float[Tensor, "B T M"]
    """The tokens behind the queries."""
    context: Float[Tensor, "B S M"]
    """The tokens behind the keys; x itself in self-attention."""
    positions: Int[Tensor, "*b T"]
    """Where the queries stand."""
    q_proj: Callable[[Tensor], Tensor]
    """The layer's own projection, (..., M) -> (..., H D)."""
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    past: Float[Tensor, "B h 1 F"] | None = None
    """While streaming, `Made.key` of the last token before these; None at the start."""
    coordinates: Float[Tensor, "#B T A"] | Int[Tensor, "#B T A"] | None = None
    """Where the queries stand, where the layer was told coordinates; then `positions` counts them."""


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
    i: Int[Tensor, " t"]
    j: Int[Tensor, " s"]
    allowed: Bool[Tensor, "#B #H t s"] | None = None
    """True = may attend; None = all may."""
    x: Float[Tensor, "B t M"] | None = None
    """The tokens behind the queries, for stages that say so in `needs`."""
    context: Float[Tensor, "B s M"] | None = None
    """The tokens behind the keys, likewise."""
    made: Made = field(default_factory=Made)
    """What the stage's own `prepare` gave, cut to these rows and columns."""
    positions: Int[Tensor, "*b t"] | None = None
    """Where these queries stand in their own sequences, where the layer was told; None = at `i`."""


class Near(NamedTuple):
    """What a heads part that reads earlier tokens is told."""

    sees: Bool[Tensor, "#B T reach"] | None = None
    """True at [..., j - 1] where a token may read the one j before it; None = all."""
    before: Float[Tensor, "B n M"] | None = None
    """The last tokens before these, with their absolute positions in them."""


# --- stages -------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """One step of the pipeline between scores and outputs. The class attributes tell kernels how it may be cut up."""

    sees: Literal["pair", "tile", "rows"] = "tile"
    """`tile`: any rectangle of the score matrix can be computed alone. `rows`: needs every key of its rows at once.
    `pair`: one entry can, told where it is; of a mix, that it reads no other head either, and that -inf masks."""
    halo: int = 0
    """How many earlier query rows it must see to compute a row (a convolution over queries; else 0)."""
    needs: frozenset[str] = frozenset()
    """Of {"scores", "tokens"}: what it reads of `Rows` beyond q, k and the positions."""
    tied: tuple[str, ...] = ()
    """Names of parameters and submodules that the paper has once for all layers; see `regard.share`."""
    placed: bool = False
    """True where it counts places from the first token of a row: packed documents are then run one by one."""

    def prepare(self, tokens: Tokens) -> Made:
        """What this stage makes of the tokens, before the pipeline runs; most need nothing."""
        return Made()

    @classmethod
    def prepares(cls) -> bool:
        """Whether this class overrides `prepare`."""
        return cls.prepare is not Stage.prepare

    def start_neutral(self) -> bool:
        """Set the parameters so that a trained model which takes this part in starts as it was, or as near to it as
        the part can be and still learn. False where nothing was changed."""
        return False


class Position(Stage):
    """How a mechanism knows where tokens stand. Override the hooks that the paper changes; the rest do nothing."""

    streams: bool = True
    """False where what a hook does to a token depends on how many tokens follow, so that nothing can be cached."""
    by_distance: bool = False
    """True where `bias` depends on i - j alone (and the head), so that one row of it tells all."""
    axes: int = 1
    """How many coordinates a token may stand at. Where there are several, `rotate` also takes positions of shape
    (B or 1, T, axes), in whole numbers or floats."""

    def embed(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B T M"]:
        """Change the tokens before projection (absolute schemes)."""
        return x

    def rotate(self, z: Float[Tensor, "B H T D"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B H T D"]:
        """Change queries and keys alike (rotary schemes)."""
        return z

    def turn(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        at: Int[Tensor, "*b T"],
        keys: Int[Tensor, "*b S"],
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G S D"]]:
        """`rotate` of both; for schemes that can share work between them, or do more to queries."""
        return self.rotate(q, at), self.rotate(k, keys)

    def sines(self, at: int) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]] | None:
        """(cos, sin) of one place, in fp32, where all that is done to queries and keys there is
        z * cos + z.roll(D / 2) * sin; None where it is not, or not known at once."""
        return None

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


class Score(Stage):
    """How well a query and a key match, in place of the scaled dot product."""

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        """The scores of these rows. `rows.scores` holds the dot products if `needs` has "scores"."""
        raise NotImplementedError


class Normalizer(Stage):
    """Turns scores into weights, row by row. Masked entries and fully masked rows get weight exactly 0."""

    sees: Literal["pair", "tile", "rows"] = "rows"
    is_softmax = False
    """True where fused kernels may take its place."""

    def share(self, lse: Float[Tensor, "B H t"]) -> Float[Tensor, "B H t"]:
        """Where the weights are softmax's, scaled row by row: by how much, given the logarithm of the row's sum of
        exponentials (-inf where nothing is seen). Kernels that tell this sum may then take this normaliser's place.
        """
        raise NotImplementedError

    @classmethod
    def scales_softmax(cls) -> bool:
        """Whether this class overrides `share`."""
        return cls.share is not Normalizer.share

    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None
    ) -> Float[Tensor, "B H t S"]:
        raise NotImplementedError


class Memory(Stage):
    """Keys and values that every query sees besides the sequence's. They stand nowhere: they aren't rotated, no bias is
    added to their scores, and no mask hides them."""

    sees = "rows"

    def forward(self) -> tuple[Float[Tensor, "G N D"], Float[Tensor, "G N V"]]:
        raise NotImplementedError


class Mix(Stage):
    """Maps scores to scores (before the mask) or weights to weights (after normalising), across keys, rows or heads."""

    cap: float | None = None
    """c, where it maps every score z to c tanh(z / c) and does nothing else: some kernels do that themselves."""

    def pair(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Of a mix that `sees` a "pair": the same of one entry, told which it is."""
        raise NotImplementedError

    def reads(self, z: Float[Tensor, "B H t s"], rows: Rows) -> list[Tensor] | None:
        """The tensors that take gradients from it besides the scores. None where they can't be told."""
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        raise NotImplementedError


class Selector(nn.Module):
    """Looks at queries and keys (after rotation) and says which pairs are worth computing. No gradient flows here."""

    streams: bool = True
    """False where what a query sees depends on later queries, so that steps could differ from the full pass."""

    def prepare(self, tokens: Tokens) -> Made:
        """What it makes of the tokens, before the pipeline runs; most need nothing. One that overrides this is given it
        as `forward(q, k, mask, made)`, uncut, `made.key` of all keys."""
        return Made()

    @classmethod
    def prepares(cls) -> bool:
        """Whether this class overrides `prepare`."""
        return cls.prepare is not Selector.prepare

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        """What to keep, usually `masks.chosen`. The pipeline also applies `mask`; keys that it hides must not count."""
        raise NotImplementedError


class HeadMap(nn.Module):
    """Changes queries, keys and values after the projections and before rotation."""

    reach: int = 0
    """How many tokens before each it reads. If any, the layer is causal, is told by `along` which of them count, and
    keeps its tokens in the cache."""

    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S V"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def along(
        self,
        q: Float[Tensor, "B H n D"],
        k: Float[Tensor, "B G n D"],
        v: Float[Tensor, "B G n V"],
        before: int = 0,
        sees: Bool[Tensor, "#B T reach"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a map with a `reach` makes of the tokens behind the first `before`, which it only reads.

        Args:
            sees: True at [..., j - 1] where a token may read the one j before it. None: all that there are.
        """
        return self(q[:, :, before:], k[:, :, before:], v[:, :, before:])

    start_neutral = Stage.start_neutral


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

    start_neutral = Stage.start_neutral


def share(*layers: nn.Module) -> None:
    """Give all layers the first one's parameters where a part says that the paper has them once for all layers.

    Where layers differ, as in a hybrid, those share whose parts are of one class and were told the same.
    """
    first: dict[str, list[Any]] = {}
    for layer in layers:
        parts: list[Any] = [m for m in layer.modules() if getattr(m, "tied", ())]
        alike = repr([(type(m), _told(m), [getattr(m, name).shape for name in m.tied]) for m in parts])
        for ours, theirs in zip(first.setdefault(alike, parts), parts):
            for name in theirs.tied:
                setattr(theirs, name, getattr(ours, name))


def _told(module: nn.Module) -> dict[str, Any]:
    """What a module was told, as far as it keeps that: its plain attributes."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
