"""Cards: everything that is known about a mechanism, as data, and the registry that holds them.

A card stands at the head of its mechanism's file and decorates what builds it:

    CARD = Card("kerple", equation=..., papers=(Paper(...),), ...)

    @CARD.fills("position")             # a class or function whose result fills that slot of regard.Attention
    @CARD.module                        # a class of its own: an nn.Module that is no softmax pipeline
    @CARD.function                      # a function that is called as it is, such as an analysis

The rest follows from the code: the family is the folder, the gist the first line of the file's docstring, the options
what the decorated signature takes beyond the names in `GIVEN`.
"""

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from regard import weights
from regard.checks import flag

T = TypeVar("T", bound=Callable[..., Any])

GIVEN = ("dim", "num_heads", "num_kv_heads", "head_dim", "causal", "dropout")
"""What `create` hands to every class or function that names it; all other arguments are the mechanism's options."""

FEATURES = frozenset(
    {"causal", "bidirectional", "cross", "padding", "packed", "mask", "gqa", "streaming", "dropout", "compile"}
)
"""What a card may claim in `supports`. Claimed: tested to work. Not claimed: tested to raise.

causal / bidirectional  may be built with causal=True / False
cross                   forward(x, context) with S != T
padding                 keys hidden by a padding mask change nothing, whatever they hold
packed                  several documents in a row (`masks.packed`) give what each gives by itself
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
        "straight_through",
        "nan_safe",
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
straight_through  some gradient passes a bound or a rounding as if it weren't there, so that it is no slope there
nan_safe          what a mask hides may hold NaN; every card is held to it, other code where it claims it
"""

PLAIN = frozenset(
    {"normalised", "nonnegative", "linear_in_values", "position_free", "shift_invariant", "head_independent"}
)
"""The traits of plain softmax attention, from which a mechanism's own are often a step away."""

Protocols = Literal[
    "TokenMixer",
    "CrossMixer",
    "FeatureMixer",
    "PyramidMixer",
    "GraphMixer",
    "Pooler",
    "Pointer",
    "Loss",
    "Model",
    "CachePolicy",
    "Training",
    "Steer",
    "Distributed",
    "Analysis",
]
"""What a mechanism takes and gives; see `regard.stages`."""


SOURCES = ("paper", "code", "ours")
"""Where an option's default comes from: the paper's own setting, published code (its authors', unless it names others),
or this library's choice."""


@dataclass(frozen=True)
class Paper:
    title: str
    """The exact title."""
    authors: str
    """'Press, Smith, Lewis' or 'Su et al.'."""
    year: int
    ref: str
    """An arXiv id such as '2108.12409', or a venue such as 'NeurIPS 2017'."""
    read: str = ""
    """What was read of it, e.g. 'eqs. 1-2; section 3' or 'abstract; official code'."""

    @property
    def url(self) -> str | None:
        """The arXiv page, where `ref` is an arXiv id."""
        return f"https://arxiv.org/abs/{self.ref}" if self.ref[:4].isdigit() and "." in self.ref else None


@dataclass(frozen=True)
class Cost:
    """Formulas in the axis letters (B H G T S D V M, and the mechanism's own option names)."""

    time: str
    """Multiply-adds of one forward pass, as `regard.kernels.flops` counts them, without q_proj, k_proj, v_proj, o_proj;
    bidirectional, where a mechanism is both. Elementwise work, which no counter sees, may be added."""
    state: str
    """Numbers kept per sequence while streaming; '' where it can't stream."""


@dataclass(frozen=True)
class Made:
    """What a card's decorator found: who builds the mechanism, and which arguments are its options."""

    builder: Callable[..., Any]
    slot: str | None
    """The slot that the result fills; "" for a function that gives several as a mapping; None for no part."""
    form: Literal["part", "module", "function"]
    signature: inspect.Signature
    closed: frozenset[str]


@dataclass(frozen=True, eq=False)
class Card:
    """One mechanism. See CONTRIBUTING.md for how to write one."""

    name: str
    equation: str
    """The mechanism in one or a few lines of plain text, in the axis letters."""
    papers: tuple[Paper, ...]
    """Every paper that it realises, the one that it follows first."""
    gist: str = ""
    """One line; default the first line of the file's docstring."""
    protocol: Protocols = "TokenMixer"
    inputs: Callable[..., tuple[Any, ...]] | None = None
    """f(shape: HeadShape) -> small float64 examples of `forward`'s positional arguments, where the protocol alone does
    not say them."""
    supports: AbstractSet[str] = FEATURES
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Feature -> why it is not supported, for the refusal, where that doesn't show at once."""
    traits: AbstractSet[str] = frozenset()
    cost: Cost = field(default_factory=lambda: Cost("2*B*H*T*S*D", "2*S*G*D"))
    claim: str = ""
    """What the paper claims, and which test shows it in small, as `tests/FAMILY/test_NAME.py::test_IT`: one that fails
    with plain softmax in the mechanism's place, or is listed in `tests/laws/claims_not_telling.txt`. A command besides
    stands in backticks."""
    differs: tuple[str, ...] = ()
    """Where this code departs from the paper, one sentence each."""
    verified: Literal["equation", "third-party", "reconstructed"] = "equation"
    example: Mapping[str, Any] = field(default_factory=dict)
    """Options that make a small instance (dim 24, 6 heads, T of about 12) exercise the mechanism."""
    tries: Mapping[str, Any] = field(default_factory=dict)
    """Option -> another value that makes a difference at that size, where a test could not guess one; or all options
    that must change together, as a mapping; or `...` where the option says how something is computed or kept, and so
    changes no output."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Option -> where its default comes from (SOURCES), and after a comma the place there, as "paper, section 4.1"."""
    auxiliary: str = ""
    """A method of the module that takes what `forward` takes and gives a loss; training adds it, times the module's
    option `auxiliary_weight`."""
    tasks: tuple[str, ...] = ()
    """Tasks of `regard compare` that show this mechanism when none is named."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Law id, or id and name as 'L10 batch_rows_do_not_meet' -> why this mechanism is excepted. Counted and shown."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Options that are fixed, where one class stands under several cards."""
    base: "Card | None" = None
    """Whose class this card builds, with the preset."""

    def __post_init__(self) -> None:
        for name in ("supports", "traits"):  # plain sets will do when one writes a card
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        for given, known, what in ((self.supports, FEATURES, "feature"), (self.traits, TRAITS, "trait")):
            if unknown := given - known:
                told = f"expected some of {sorted(known)}"
                raise ValueError(f"card {self.name!r}: {what} is unknown (got {sorted(unknown)}); {told}")
        if both := self.lacks.keys() & self.supports or self.lacks.keys() - FEATURES:
            told = "expected features that are not in supports"
            raise ValueError(f"card {self.name!r}: lacks names what it can't (got {sorted(both)}); {told}")
        for option, source in self.defaults.items():
            if source.partition(",")[0] not in SOURCES:
                where = f"card {self.name!r}: the default of {option!r} comes from"
                raise ValueError(
                    f"{where} an unknown source {source!r}; expected one of the known: {', '.join(SOURCES)}"
                )
        if self.protocol not in typing.get_args(Protocols):
            told = f"expected one of {Protocols}"
            raise ValueError(f"card {self.name!r}: protocol is unknown (got {self.protocol!r}); {told}")
        if not self.papers or not all(isinstance(paper, Paper) for paper in self.papers):
            raise ValueError(f"card {self.name!r}: papers must be a tuple of at least one Paper (got {self.papers!r})")

    # --- decorators

    def fills(self, slot: str = "", *, closed: Iterable[str] = ()) -> Callable[[T], T]:
        """Mark the class or function whose result fills `slot`; a function for several gives {slot: part}.

        Args:
            closed: arguments that are no options of the mechanism.
        """
        return lambda builder: self._bind(builder, slot, "part", closed)

    @typing.overload
    def module(self, builder: T) -> T: ...

    @typing.overload
    def module(self, *, closed: Iterable[str] = ()) -> Callable[[T], T]: ...

    def module(self, builder: Any = None, *, closed: Iterable[str] = ()) -> Any:
        """Mark the class, or function that makes one, which is the mechanism; `closed` as in `fills`."""
        if builder is None:
            return lambda made: self._bind(made, None, "module", closed)
        return self._bind(builder, None, "module", closed)

    def function(self, builder: T) -> T:
        """Mark the function that is the mechanism: it is called, never built."""
        return self._bind(builder, None, "function", ())

    def loads(self, library: str, *classes: str) -> Callable[[weights.C], weights.C]:
        """Mark the function that says how this mechanism is loaded from modules of these classes of a library.

        Args:
            library: the package, or a module of it, that defines the classes: "transformers", "timm.layers".
        """
        return lambda convert: weights.register(self, library, classes, convert)

    def variant(self, name: str, gist: str, *, preset: Mapping[str, Any], **changes: Any) -> "Card":
        """Another card of the same class, with some of its options fixed.

        Args:
            preset: what is fixed besides this card's own preset.
            changes: what its card says differently; all else is this card's, but for `exceptions`, `tries` and `tasks`.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self)} | {"exceptions": {}, "tries": {}, "tasks": ()}
        fixed = {**self.preset, **preset}
        card = Card(**{**own, "name": name, "gist": gist, "preset": fixed, "base": self, **changes})
        self._variants.append(card)
        if self.made is not None:
            card._settle()
        return card

    def _bind(self, builder: T, slot: str | None, form: Any, closed: Iterable[str]) -> T:
        if self.made is not None and self.base is None and not _again(self, builder):
            raise ValueError(f"card {self.name!r} decorates {self.made.builder.__qualname__} already")
        signature = _signature(builder)
        closed = frozenset(closed)
        if unknown := closed - signature.parameters.keys():
            raise ValueError(f"card {self.name!r}: closed names unknown arguments {sorted(unknown)}")
        object.__setattr__(self, "_made", Made(builder, slot, form, signature, closed))
        builder.__doc__ = _documented(self, builder)
        if inspect.isclass(builder) and signature != inspect.signature(builder) and "__init__" in vars(builder):
            # What `**rest` stands for, spelled out for whoever looks. Not on the class, whose heirs would inherit it.
            own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *signature.parameters.values()]
            builder.__init__.__signature__ = signature.replace(parameters=own)  # type: ignore[misc]
        if form == "module" and inspect.isclass(builder):
            # What it refuses, also when it is built by hand.
            builder.supports, builder.lacks = self.supports, self.lacks
        self._settle()
        return builder

    def _settle(self) -> None:
        """Complete what follows from the code, check it, and register; the variants likewise."""
        made = _required(self.made, self)
        text = (_file_says(made.builder) or (made.builder.__doc__ or "").partition(MARK)[0]).strip()
        object.__setattr__(self, "gist", self.gist or text.partition("\n")[0].strip())
        for name in self.defaults.keys() - made.signature.parameters.keys():
            raise ValueError(f"card {self.name!r}: says where the default of an unknown option {name!r} comes from")
        for name in self.preset.keys() - made.signature.parameters.keys():
            raise ValueError(f"card {self.name!r}: the preset names an unknown option {name!r}")
        register(self)
        for variant in self._variants:
            if variant.made is made:  # else it stands over code of its own
                variant._settle()

    # --- what follows from the code

    @functools.cached_property
    def _variants(self) -> "list[Card]":
        return []

    @property
    def made(self) -> Made | None:
        """Who builds it; None while nothing is decorated."""
        return self.__dict__.get("_made") or (self.base.made if self.base is not None else None)

    @property
    def builder(self) -> Callable[..., Any]:
        """The class or function that stands under the card."""
        return _required(self.made, self).builder

    @property
    def family(self) -> str:
        """The room (first folder under the package) that its file stands in."""
        parts = self.builder.__module__.split(".")
        return parts[1] if len(parts) > 1 else parts[0]

    @property
    def paper(self) -> Paper:
        """The paper that it follows."""
        return self.papers[0]

    @property
    def is_part(self) -> bool:
        """Whether it fills slots of `regard.Attention`, rather than being a module or a function of its own."""
        return _required(self.made, self).form == "part"

    @property
    def is_function(self) -> bool:
        """Whether it is called as it is, and never built."""
        return _required(self.made, self).form == "function"

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """The mechanism's own options and their defaults; `inspect.Parameter.empty` where there is none."""
        made = _required(self.made, self)
        own = {
            name: parameter
            for name, parameter in made.signature.parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY or made.form == "function"
        }
        hidden = (set() if made.form == "function" else set(GIVEN)) | made.closed | self.preset.keys()
        return {name: parameter.default for name, parameter in own.items() if name not in hidden}

    def takes(self, name: str) -> bool:
        """Whether the class or function has an argument of that name, and the card leaves it open."""
        made = _required(self.made, self)
        return name in made.signature.parameters and name not in made.closed | self.preset.keys()

    def build(self, given: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
        """The part or module, with `given` (see GIVEN) as far as it is asked for, and the options `own`."""
        made = _required(self.made, self)
        asked = {name: value for name, value in given.items() if self.takes(name)}
        arguments = made.signature.parameters
        flag(self.name, **{n: v for n, v in own.items() if arguments[n].annotation in (bool, "bool")})
        return made.builder(**{**asked, **self.preset, **own})

    def parts(self, given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """{slot: part}, for a card whose parts fill slots."""
        made = _required(self.made, self)
        built = self.build(given, own)
        return dict(built) if made.slot == "" else {str(made.slot): built}


def _required(made: Made | None, card: Card) -> Made:
    if made is None:
        raise ValueError(
            f"card {card.name!r} decorates nothing; put @CARD.fills(...), .module or .function on its code"
        )
    return made


def _again(card: Card, builder: Callable[..., Any]) -> bool:
    """Whether the same code is run once more, as in a notebook."""
    old = _required(card.made, card).builder
    return (old.__module__, old.__qualname__) == (builder.__module__, builder.__qualname__)


def _signature(builder: Callable[..., Any]) -> inspect.Signature:
    """The arguments, those of `**rest: Unpack[SomeTypedDict]` spelled out with the defaults of the parent class."""
    signature = inspect.signature(builder)
    found: dict[str, inspect.Parameter] = {}
    for parameter in signature.parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            found[parameter.name] = parameter
            continue
        named = _unpacked(parameter.annotation, builder)
        parents = inspect.getmro(builder)[1:] if inspect.isclass(builder) else ()
        above: Mapping[str, inspect.Parameter] = next(
            (_signature(p).parameters for p in parents if "__init__" in vars(p)), {}
        )
        found |= {name: above[name] for name in named if name in above and name not in found}
    return signature.replace(parameters=list(found.values()))


def _unpacked(annotation: Any, builder: Callable[..., Any]) -> tuple[str, ...]:
    """The keys of `Unpack[SomeTypedDict]`; none for any other annotation."""
    if isinstance(annotation, str):  # as `from __future__ import annotations` leaves it
        code = inspect.unwrap(builder.__init__ if inspect.isclass(builder) else builder)
        try:
            annotation = eval(annotation, getattr(code, "__globals__", {}))
        except (NameError, AttributeError) as error:
            raise ValueError(
                f"{builder.__qualname__}: the annotation {annotation!r} can't be read ({error}); expected names that "
                "its file imports when it runs"
            ) from None
    if typing.get_origin(annotation) is not typing.Unpack:
        return ()
    (inner,) = typing.get_args(annotation)
    return tuple(getattr(inner, "__annotations__", ()))


MARK = "\n\nThe mechanism `"
"""Where in a docstring begins what the card adds to it."""


def _file_says(builder: Callable[..., Any]) -> str:
    """The docstring of the file that the code stands in; that of a script or notebook, only if it has a file."""
    module = sys.modules.get(builder.__module__)
    return getattr(module, "__doc__", None) or "" if hasattr(module, "__file__") else ""


def _documented(card: Card, builder: Callable[..., Any]) -> str:
    """The docstring, with what `help()` should say of where the code comes from."""
    own = vars(builder).get("__doc__") if inspect.isclass(builder) else builder.__doc__
    head = inspect.cleandoc(own or _file_says(builder).partition("\n")[0]).partition(MARK)[0]
    papers = "\n".join(f"    {p.authors} {p.year}, {p.title}, {p.url or p.ref}" for p in card.papers)
    lines = "\n".join(f"    {line}" for line in card.equation.splitlines())
    return f"{head}{MARK}{card.name}` of `regard.create`:\n\n{lines}\n\n{papers}\n"


_registry: dict[str, Card] = {}


def register(card: Card) -> Card:
    """Add a card to the catalogue. A name can be taken once, but by the same code run again."""
    other = _registry.get(card.name)
    if other is not None and other is not card and not _again(other, card.builder):
        raise ValueError(f"register: a card named {card.name!r} already exists (family {other.family!r})")
    _registry[card.name] = card
    return card
