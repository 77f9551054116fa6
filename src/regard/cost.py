"""What the formulas on cards come to at a size. No torch is needed."""

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

from regard.cards import Card


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
    side = math.isqrt(length)
    sizes = {
        **{"B": batch, "H": heads, "G": heads, "T": length, "S": length, "D": width, "V": width},
        **{"M": heads * width, "C": heads * width, "Y": side, "X": side, "N": length, "E": 8 * length, "L": 4},
    }
    values = {**sizes, **card.options, **card.preset, **own}
    found: dict[str, Any] = {"at": f"B={batch}, H=G={heads}, T=S={length}, D=V={width}"}
    if card.protocol in ("FeatureMixer", "PyramidMixer"):
        found["at"] = f"B={batch}, H={heads}, Y=X={side}, C={sizes['C']}"
    elif card.protocol == "GraphMixer":
        found["at"] = f"N={length}, E={sizes['E']}, H={heads}, M={sizes['M']}"
    for name, formula in (("time", card.cost.time), ("state", card.cost.state)):
        try:
            found[name] = evaluate(formula, values) if formula else None
        except ValueError as error:
            found[name] = str(error)
    return found
