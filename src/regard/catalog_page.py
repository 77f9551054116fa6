"""Cards as people read them: the table of `regard list`, the page of `regard show`, and plain data."""

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter
from typing import Any

import torch
from rich.table import Table
from torch import nn

from regard import terminal
from regard.cards import Card
from regard.catalog import create
from regard.masks import Mask
from regard.shapes import HeadShape
from regard.stages import Position, Rows

MARKS = {
    "causal": "c",
    "bidirectional": "b",
    "cross": "x",
    "padding": "p",
    "mask": "m",
    "gqa": "g",
    "streaming": "s",
    "dropout": "d",
    "compile": "t",
}
"""One letter for each feature, in the order of the table."""

MEANING = {
    "causal": "causal=True: no query sees a later key",
    "bidirectional": "causal=False: queries see keys on both sides",
    "cross": "attends to another sequence: forward(x, context)",
    "padding": "hidden padding keys change nothing",
    "mask": "takes any mask",
    "gqa": "fewer key heads than query heads: num_kv_heads",
    "streaming": "token by token: init_state and step",
    "dropout": "dropout of weights in training",
    "compile": "torch.compile(fullgraph=True)",
}

KINDS = {
    "TokenMixer": ("T", "tokens (B, T, M) -> (B, T, M)"),
    "CrossMixer": ("X", "tokens (B, T, M) and what they look at (B, S, M) -> (B, T, M)"),
    "FeatureMixer": ("F", "feature maps (B, C, Y, X) -> (B, C, Y, X)"),
    "GraphMixer": ("G", "nodes (N, M) and edges (2, E) -> nodes (N, M)"),
    "Pooler": ("P", "tokens (B, T, M) -> one vector each (B, M)"),
    "Pointer": ("N", "tokens (B, T, M) and what they point at (B, S, M) -> log-probabilities (B, T, S)"),
    "Loss": ("L", "tensors -> a scalar to train on"),
    "Analysis": ("A", "a model's attention maps (B, H, T, S), one a layer -> what they tell"),
}
"""One letter for each protocol, and what a module of that kind takes and gives."""

VERIFIED = {"equation": "E", "third-party": "T", "reconstructed": "R"}

LEGEND = (
    "supports: " + "  ".join(f"{mark} {name}" for name, mark in MARKS.items()),
    "k, kind: T tokens  X across  F feature maps  G graph  P pooling  N pointing  L loss  A analysis",
    "v, verified against: E the paper's equations  T code of others  R a reconstruction of the paper",
)

SMALL = {"dim": 24, "num_heads": 6}
"""The instance that pictures are taken of, with the options of the card's example."""


def marks(card: Card) -> str:
    """'cbxpmgsdt' with '-' for what is not supported."""
    return "".join(mark if name in card.supports else "-" for name, mark in MARKS.items())


def table(cards: Sequence[Card]) -> Table:
    """Name, family, kind, marks and gist."""
    grid = terminal.grid("name", "family", "k", "supports", "v", "what it does")
    for card in cards:
        kind = KINDS[card.protocol][0]
        grid.add_row(card.name, card.family, kind, marks(card), VERIFIED[card.verified], card.gist)
    return grid


def count(cards: Sequence[Card], *, families: bool) -> str:
    """'3 mechanisms, 1 analysis, 2 families'."""
    analyses = sum(card.protocol == "Analysis" for card in cards)
    counted = [
        (len(cards) - analyses, "mechanism", "mechanisms"),
        (analyses, "analysis", "analyses"),
        (len({card.family for card in cards}) if families else 0, "family", "families"),
    ]
    return ", ".join(f"{number} {one if number == 1 else many}" for number, one, many in counted if number)


def markdown(cards: Sequence[Card]) -> str:
    """The table as GitHub shows it."""
    lines = ["| name | family | k | what it does | paper | supports | v |", "|---|---|---|---|---|---|---|"]
    for card in cards:
        paper = f"{card.paper.authors} {card.paper.year}"
        cells = (
            f"`{card.name}`",
            card.family,
            KINDS[card.protocol][0],
            card.gist,
            f"[{paper}]({card.paper.url})" if card.paper.url else f"{paper}, {card.paper.ref}",
            f"`{marks(card)}`",
            VERIFIED[card.verified],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", *(f"{text}<br>" for text in LEGEND)])


def data(card: Card) -> dict[str, Any]:
    """The card as what JSON can hold."""
    paper = {name: getattr(card.paper, name) for name in ("title", "authors", "year", "ref", "read", "url")}
    return {
        "name": card.name,
        "family": card.family,
        "gist": card.gist,
        "equation": card.equation,
        "paper": paper,
        "fills": fills(card),
        "protocol": card.protocol,
        "supports": {name: name in card.supports for name in MARKS},
        "traits": sorted(card.traits),
        "cost": {"time": card.cost.time, "state": card.cost.state},
        "options": {name: _literal(default) for name, default in card.options.items()},
        "example": {name: _literal(value) for name, value in card.example.items()},
        "claim": card.claim,
        "differs": list(card.differs),
        "verified": card.verified,
        "exceptions": dict(card.exceptions),
    }


def _literal(value: object) -> object:
    """The value itself where JSON has it; None for an option without default."""
    if value is Parameter.empty:
        return None
    return value if isinstance(value, str | int | float | bool | None) and not _infinite(value) else repr(value)


def _infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def fills(card: Card) -> list[str]:
    """The slots that the mechanism fills; none for a layer of its own."""
    if not card.is_part:
        return []
    H, D = SMALL["num_heads"], SMALL["dim"] // SMALL["num_heads"]
    return list(card.parts(vars(HeadShape(SMALL["dim"], H, H, D)), card.example))


def small(card: Card, own: Mapping[str, Any]) -> nn.Module | None:
    """A small instance, causal where the card can be; None for an analysis, which is a function."""
    if card.protocol == "Analysis":
        if own:
            raise ValueError(f"show: {card.name} is an analysis, a function; leave its options {sorted(own)} out")
        return None
    causal = "causal" in card.supports
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the page of trained biases should read the same every time
        return create(card.name, **SMALL, causal=causal, **{**card.example, **own})


def field(module: nn.Module | None) -> Mask | None:
    """Its receptive field, where it has one that can be drawn."""
    ask = getattr(module, "receptive_field", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, Mask) else None


# --- Cost


def evaluate(formula: str, values: Mapping[str, Any]) -> float:
    """The number behind a card's formula. ValueError where it says what `values` does not hold."""
    try:
        return float(_value(ast.parse(formula, mode="eval").body, values))
    except (SyntaxError, ArithmeticError, TypeError) as error:
        raise ValueError(f"cost {formula!r} cannot be computed: {error}") from error


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Pow: math.pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "log": math.log,
    "log2": math.log2,
    "sqrt": math.sqrt,
    "ceil": math.ceil,
    "floor": math.floor,
}


def _value(node: ast.expr, values: Mapping[str, Any]) -> float:
    match node:
        case ast.Constant(value=int() | float()):
            return node.value  # type: ignore[return-value]
        case ast.Name(id=name):
            if isinstance(values.get(name), bool | int | float):
                return values[name]
            raise ValueError(f"no number for {name}")
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, values)
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(node.left, values), _value(node.right, values))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(a, values) for a in node.args))
    raise ValueError(f"no number for {ast.unparse(node)}")


def costs(card: Card, own: Mapping[str, Any], *, batch: int, heads: int, length: int, width: int) -> dict[str, Any]:
    """Time and state at one size: {'time': number or why not, 'state': ..., 'at': the size in words}."""
    sizes = {
        "B": batch,
        "H": heads,
        "G": heads,
        "T": length,
        "S": length,
        "D": width,
        "V": width,
        "M": heads * width,
        "C": heads * width,
        "Y": math.isqrt(length),
        "X": math.isqrt(length),
        "N": length,
        "E": 8 * length,
        "L": 4,
    }
    values = {**sizes, **card.options, **own}
    found: dict[str, Any] = {"at": f"B={batch}, H=G={heads}, T=S={length}, D=V={width}"}
    if card.protocol == "FeatureMixer":
        found["at"] = f"B={batch}, H={heads}, Y=X={sizes['Y']}, C={sizes['C']}"
    elif card.protocol == "GraphMixer":
        found["at"] = f"N={length}, E={sizes['E']}, H={heads}, M={sizes['M']}"
    for name, formula in (("time", card.cost.time), ("state", card.cost.state)):
        try:
            found[name] = evaluate(formula, values) if formula else None
        except ValueError as error:
            found[name] = str(error)
    return found


def amount(number: float) -> str:
    """1234567 -> '1.23 million'."""
    for size, word in ((1e15, "quadrillion"), (1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


# --- Pictures

DISTANCES = 64
LEVELS = "▁▂▃▄▅▆▇█"


def picture(module: nn.Module | None, length: int = 24) -> list[str]:
    """What the mechanism adds by distance if that is free of the data, else which keys a query may see."""
    lines = [] if module is None else bias_picture(module)
    if lines:
        return lines
    mask = field(module)
    if mask is None:
        return []
    return mask.picture(length).splitlines()


def bias_picture(module: nn.Module) -> list[str]:
    """One line a head: the bias by distance, from 0; [] where there is none, or it reads the data."""
    position = getattr(module, "position", None)
    if not isinstance(position, Position) or not position.changes("bias") or position.needs:
        return []
    bias = _bias(module, position, 0)
    if bias is None or not torch.equal(bias, other if (other := _bias(module, position, 1)) is not None else -bias):
        return []
    if float(bias.amin()) == float(bias.amax()):
        return []
    # How much of a key's weight is left, on one scale for all heads; the bias itself has no natural bounds.
    left = (bias - bias.amax(1, keepdim=True)).exp()
    lines = [f"share of a key's weight left at distance 0 .. {DISTANCES - 1} ({LEVELS[0]} none, {LEVELS[-1]} all)"]
    for head, row in enumerate(left.tolist()):
        lines.append(f"head {head}  " + "".join(LEVELS[min(7, int(8 * x))] for x in row))
    return lines


def _bias(module: nn.Module, position: Position, seed: int) -> torch.Tensor | None:
    """(H, distance), for the last of DISTANCES queries and random data."""
    H, G, D = (int(getattr(module, name)) for name in ("num_heads", "num_kv_heads", "head_dim"))
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(1, H, 1, D, generator=draw), torch.randn(1, G, DISTANCES, D, generator=draw)
    j = torch.arange(DISTANCES)
    with torch.no_grad():
        bias = position.bias(Rows(q=q, k=k, scores=q.new_empty(0), i=j[-1:], j=j))
    return None if bias is None else bias.expand(1, H, 1, DISTANCES)[0, :, 0].flip(-1)


# --- The page


def page(
    card: Card, own: Mapping[str, Any], cost: Mapping[str, Any], drawing: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """(heading, lines) in the order in which they are shown."""
    yield "equation", card.equation.splitlines()
    year = f"{card.paper.authors} {card.paper.year}"
    ref = card.paper.url or card.paper.ref
    read = [f"read: {card.paper.read}"] if card.paper.read else []
    yield "paper", [card.paper.title, f"{year}, {ref}", *read]
    if card.differs:
        yield "differs", [f"- {text}" for text in card.differs]
    yield "verified", [_VERIFIED_WORDS[card.verified]]
    slots = fills(card)
    if card.is_function:
        yield "kind", [f"an analysis, {card.builder.__module__}.{card.builder.__name__}: {KINDS[card.protocol][1]}"]
    else:
        of_its_own = f"a {card.protocol} of its own: {KINDS[card.protocol][1]}"
        yield "kind", [f"fills the slot{'s' * (len(slots) > 1)} {', '.join(slots)}" if slots else of_its_own]
        yield (
            "supports",
            [f"{'yes' if name in card.supports else 'no ':3} {name:13}  {MEANING[name]}" for name in MARKS],
        )
        yield "traits", [", ".join(sorted(card.traits)) or "none claimed"]
    yield "options", [_option(name, default, own) for name, default in card.options.items()] or ["none"]
    yield "cost", list(_cost(card, cost))
    if card.claim:
        yield "claim", [card.claim]
    if card.exceptions:
        yield "exceptions", [f"- {law}: {why}" for law, why in card.exceptions.items()]
    if drawing:
        yield "picture", list(drawing)


_VERIFIED_WORDS = {
    "equation": "against the paper's equations, written out in a test",
    "third-party": "against the formula, written out in a test, and the code or numbers of others",
    "reconstructed": "against a reconstruction: the paper's own text could not be read",
}


def _option(name: str, default: object, own: Mapping[str, Any]) -> str:
    words = f"{name} (required)" if default is Parameter.empty else f"{name} = {default!r}"
    return f"{words}  (here {own[name]!r})" if name in own else words


def _cost(card: Card, cost: Mapping[str, Any]) -> Iterator[str]:
    for name, unit in (("time", "multiply-adds"), ("state", "numbers a sequence")):
        formula, number = getattr(card.cost, name), cost[name]
        if not formula:
            yield f"{name:5}  none: it does not stream"
            continue
        yield f"{name:5}  {formula}"
        words = number if isinstance(number, str) else f"{amount(number)} {unit}"
        yield f"       = {words} at {cost['at']}"
