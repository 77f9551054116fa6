"""Cards: everything that is known about a mechanism, as data, and the registry that holds them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from regard.kinds import HeadShape

FEATURES = frozenset({"causal", "bidirectional", "cross", "padding", "mask", "gqa", "streaming", "dropout", "compile"})
"""What a card may claim in `supports`. Claimed: tested to work. Not claimed: tested to raise.

causal / bidirectional  may be built with causal=True / False
cross                   forward(x, context) with S != T
padding                 keys hidden by a padding mask change nothing, whatever they hold
mask                    any boolean mask or regard.masks.Mask
gqa                     num_kv_heads < num_heads
streaming               init_state / step equal the full pass
dropout                 dropout > 0 in training
compile                 torch.compile(fullgraph=True)
"""

TRAITS = frozenset(
    {
        "normalised",
        "nonnegative",
        "linear_in_values",
        "position_free",
        "shift_invariant",
        "head_independent",
        "sparse",
        "routed",
    }
)
"""Mathematical properties that switch laws on.

normalised        weights of a row sum to 1 (v = 1 gives 1)
nonnegative       weights are >= 0 (outputs lie within the values' range, when also normalised)
linear_in_values  f(q, k, a v + b w) = a f(q, k, v) + b f(q, k, w)
position_free     without causality, permuting tokens permutes outputs
shift_invariant   adding a constant to all positions changes nothing
head_independent  a head's output depends on its own projections only
sparse            some allowed weights are exactly 0
routed            content decides which of the allowed keys a query sees
"""

PLAIN = frozenset(
    {"normalised", "nonnegative", "linear_in_values", "position_free", "shift_invariant", "head_independent"}
)
"""The traits of plain softmax attention, from which a mechanism's own are often a step away."""

SLOTS = (
    "mask",
    "position",
    "heads",
    "score_mix",
    "normalizer",
    "weight_mix",
    "selector",
    "gate",
    "num_kv_heads",
    "kernel",
)
"""What a slot builder may return keys of; each is a keyword of `regard.Attention`."""


Protocols = Literal["TokenMixer", "CrossMixer", "FeatureMixer", "GraphMixer", "Pooler", "Pointer", "Loss", "Analysis"]


@dataclass(frozen=True)
class Paper:
    title: str
    """The exact title."""
    authors: str
    """'Press, Smith, Lewis' or 'Su et al.'."""
    year: int
    ref: str
    """An arXiv id such as '2108.12409', or a venue such as 'NeurIPS 2017'."""
    equations: str = ""
    """Which equations or sections the code follows, e.g. 'eqs. 1-2; section 3'."""

    @property
    def url(self) -> str | None:
        """The arXiv page, where `ref` is an arXiv id."""
        return f"https://arxiv.org/abs/{self.ref}" if self.ref[:4].isdigit() and "." in self.ref else None


@dataclass(frozen=True)
class Cost:
    """Formulas in the axis letters (B H G T S D V M, and the mechanism's own option names)."""

    time: str
    """Multiply-adds of one forward pass, without the projections."""
    state: str
    """Numbers kept per sequence while streaming; '' where it can't stream."""


@dataclass(frozen=True)
class Card:
    """One mechanism. See CONTRIBUTING.md for how to write one."""

    name: str
    family: str
    """The room (sub-package) it stands in."""
    gist: str
    """One line, under 90 characters."""
    equation: str
    """The mechanism in one or a few lines of plain text, in the axis letters."""
    paper: Paper
    slots: Callable[..., dict[str, Any]] | None = None
    """For pipeline mechanisms: `f(shape: HeadShape, *, option=default, ...) -> {slot: part}` (keys of SLOTS)."""
    build: Callable[..., Any] | None = None
    """For all others: `f(shape: HeadShape, *, causal: bool, option=default, ...) -> nn.Module`.

    For an Analysis, which is no layer and is never built: the function itself.
    """
    protocol: Protocols = "TokenMixer"
    """What `forward` takes and gives; see `regard.kinds`."""
    inputs: Callable[[HeadShape], tuple[Tensor, ...]] | None = None
    """Small float64 examples of `forward`'s positional arguments, where the protocol alone does not say them."""
    supports: frozenset[str] = FEATURES
    traits: frozenset[str] = frozenset()
    cost: Cost = field(default_factory=lambda: Cost("2*B*H*T*S*D", "2*S*G*D"))
    claim: str = ""
    """What the paper claims, and which command or test shows it in small."""
    differs: tuple[str, ...] = ()
    """Where this code departs from the paper, one sentence each."""
    verified: Literal["equation", "third-party", "reconstructed"] = "equation"
    example: Mapping[str, Any] = field(default_factory=dict)
    """Options that make a small instance (dim 24, 6 heads, T of about 12) exercise the mechanism."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Law id -> why this mechanism is excepted. Counted and shown."""

    def __post_init__(self) -> None:
        for given, known, what in (
            (self.supports, FEATURES, "feature"),
            (self.traits, TRAITS, "trait"),
        ):
            if unknown := given - known:
                raise ValueError(f"card {self.name!r}: unknown {what} {sorted(unknown)}; known: {sorted(known)}")
        if (self.slots is None) == (self.build is None):
            raise ValueError(f"card {self.name!r}: give either slots= or build=, not both or neither")


_registry: dict[str, Card] = {}


def register(card: Card) -> Card:
    """Add a card to the catalogue. A name can be taken once."""
    if card.name in _registry and _registry[card.name] is not card:
        raise ValueError(
            f"register: a card named {card.name!r} already exists (family {_registry[card.name].family!r})"
        )
    _registry[card.name] = card
    return card
