"""What a mechanism changes in one layer of a trained model: its slots, filled for that layer and used on its calls."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import FEATURES
from regard.catalog import card, told_each
from regard.catalog import slots as filled_by
from regard.checks import refuse
from regard.index import unknown
from regard.integrations.transformers_call import Call
from regard.kernels import Problem
from regard.kernels.check import check_beside_memory
from regard.masks import Mask
from regard.masks.algebra import Index
from regard.pipeline.function import unless_softmax
from regard.shapes import HeadShape
from regard.slots import IN_KERNELS, SLOTS, slot_of
from regard.spec import parse
from regard.stages import Gate, HeadMap, Memory, Mix, Position, Selector


@dataclass(frozen=True)
class About:
    """What a layer showed of itself while the model ran on a few tokens."""

    shape: HeadShape
    causal: bool
    windowed: bool
    cross: bool
    rotary: bool
    capped: bool
    sinks: bool


class Parts(nn.Module):
    """A mechanism's slots in one layer."""

    mask: Mask | None
    heads: HeadMap | None
    position: Position | None
    selector: Selector | None
    score_mix: Mix | None
    weight_mix: Mix | None
    memory: Memory | None
    gate: Gate | None

    def __init__(self, slots: Mapping[str, Any]) -> None:
        super().__init__()
        for name in SLOTS:
            setattr(self, name, slots.get(name))
        self.kernel: str = slots.get("kernel", "auto")
        self.supports = FEATURES
        """What kinds of calls the mechanism takes; of drop-ins, for those of swapped models are checked in advance."""
        self.x: Tensor | None = None

    def filled(self) -> dict[str, Any]:
        """What stands in which slot; empty ones are left out."""
        found = {name: getattr(self, name) for name in SLOTS}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def sparse(self) -> bool:
        """Whether it leaves pairs out."""
        return self.mask is not None or self.selector is not None

    def applied(self, call: Call) -> Problem:
        """The call with this mechanism in it."""
        p = call.problem
        _, _, _, T, S = p.shape
        q, k, v = (p.q, p.k, p.v) if self.heads is None else self.heads(p.q, p.k, p.v)
        if self.position is not None and self.position.changes("rotate"):
            p = p if self.memory is None else replace(p, unturned=q)
            q, k = self.position.turn(q, k, p.i, p.j)
        filled = {name: part for name, part in self.filled().items() if name in IN_KERNELS}
        if unless_softmax(filled.get("normalizer")) is None:
            filled.pop("normalizer", None)
        p = replace(p, q=q, k=k, v=v, **filled)
        stale = self.position is not None and not self.position.streams
        if T < S and (p.halo or stale) and call.causal:
            raise ValueError(
                f"swap: {self._names()} needs earlier queries or the whole length, which a cache does not keep; "
                "generate with use_cache=False"
            )
        pattern = None if self.mask is None else from_first_token(self.mask, call.keep)
        if self.selector is not None and not self.dense_now(call):
            with torch.no_grad():
                chosen = self.selector(p.q.detach(), p.k.detach(), p.mask)
            pattern = chosen if pattern is None else pattern & chosen
        return p if pattern is None else replace(p, mask=pattern if p.mask is None else p.mask & pattern)

    @property
    def placeless(self) -> bool:
        """Whether nothing in it asks where queries and keys stand."""
        return self.filled().keys() <= {"heads", "normalizer", "memory", "gate"}

    def dense_now(self, call: Call) -> bool:
        """Whether the selector leaves this call alone: one that judges blocks of queries together can't judge one."""
        _, _, _, T, S = call.problem.shape
        return self.selector is not None and not self.selector.streams and T == 1 < S

    def gated(self, out: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T H V"]:
        """The output after the gate, which reads the tokens that came into the layer."""
        if self.gate is None:
            return out
        if self.x is None:
            raise ValueError("swap: the gate reads the layer's tokens, and none were found among its arguments")
        return self.gate(out.transpose(1, 2), self.x, "output").transpose(1, 2)

    def _names(self) -> str:
        return ", ".join(type(part).__name__ for part in self.children())


@dataclass(frozen=True, eq=False)
class FromFirstToken(Mask):
    """A mask whose positions count from each batch entry's first token: `start` tokens of padding stand before it."""

    part: Mask
    start: Int[Tensor, " B"]

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        start = self.start.to(j.device)[b if len(self.start) > 1 else 0]
        return self.part(b, h, i - start, j - start)

    @property
    def batch(self) -> int:
        return len(self.start)

    @property
    def heads(self) -> int:
        return self.part.heads

    @property
    def span(self) -> tuple[int | float, int | float]:
        return self.part.span

    def to(self, device: torch.device | str) -> Mask:
        return FromFirstToken(self.part.to(device), self.start.to(device))


def from_first_token(mask: Mask, keep: Bool[Tensor, "B S"] | None) -> Mask:
    """The mask where left padding, if there is any, moves all tokens on."""
    if keep is None or mask.is_shift_invariant:
        return mask
    start = keep.int().argmax(1)
    return FromFirstToken(mask, start) if bool(start.any()) else mask


def slots_of(mechanism: Any, shape: HeadShape, options: Mapping[str, Any]) -> dict[str, Any]:
    """The mechanism's slots for a layer of this shape. Parts that are handed in are copied if they hold parameters."""
    if isinstance(mechanism, str):
        spec = parse(mechanism)
        cards = [card(name) for name in spec.names]
        told, rest = told_each("swap", spec, cards, options, {"kernel"})
        return {**filled_by(cards, vars(shape), told), **rest}
    if options.keys() - {"kernel"}:
        raise ValueError(f"swap: options {sorted(options)} need a mechanism's name; parts carry their own")
    slots = mechanism if isinstance(mechanism, Mapping) else {only_slot(mechanism): mechanism}
    return {**{slot: _own(part) for slot, part in slots.items()}, **options}


def check_mechanism(mechanism: Any) -> frozenset[str]:
    """What the mechanism supports. Raises ValueError or TypeError, with the reason, where no layer could take it."""
    if isinstance(mechanism, str):
        cards = [card(name) for name in parse(mechanism).names]
        for c in cards:
            if not c.is_part:
                raise ValueError(
                    f"swap: {c.name!r} ({c.protocol}, family {c.family!r}) is no softmax pipeline over given queries, "
                    "keys and values, so it can't take over a trained layer's projections; train a model with it"
                )
        return frozenset.intersection(*(frozenset(c.supports) for c in cards))
    slots = mechanism if isinstance(mechanism, Mapping) else {only_slot(mechanism): mechanism}
    for slot, part in slots.items():
        if slot not in SLOTS:
            raise ValueError(unknown("slot", str(slot), list(SLOTS), who="swap"))
        if not isinstance(part, SLOTS[slot].kind):
            wanted = f"a {SLOTS[slot].kind.__name__}"
            refuse("swap", f"slot {slot!r}", "has the wrong type", type(part).__name__, wanted, error=TypeError)
    return FEATURES


def why_not(slots: Mapping[str, Any], about: About, supports: frozenset[str]) -> list[str]:
    """Reasons why these slots can't serve this layer; empty if they can."""
    reasons = []
    position, gate = slots.get("position"), slots.get("gate")
    stages = [slots[name] for name in IN_KERNELS if slots.get(name) is not None]
    if slots.get("num_kv_heads") not in (None, about.shape.num_kv_heads):
        reasons.append("it needs other key and value projections than the trained ones")
    if position is not None and position.changes("embed"):
        reasons.append("it adds positions to tokens before they are projected, and the model has done that in its way")
    if about.rotary and ("heads" in slots or (position is not None and position.changes("rotate"))):
        reasons.append("it works on queries and keys before rotation, and the model has rotated them already")
    if "heads" in slots and slots["heads"].reach:
        reasons.append("it reads queries, keys and values of the tokens before, which a model's cache doesn't hold")
    if slots.get("memory") is not None:
        check_beside_memory("swap", slots)
        if about.rotary:
            reasons.append("its memory is read by queries before rotation, and the model has rotated them already")
    selector = slots.get("selector")
    reads = selector is not None and selector.prepares()
    if reads or any("tokens" in stage.needs or stage.prepares() for stage in stages):
        reasons.append("it reads the tokens behind the keys, which a layer with a cache no longer has")
    if gate is not None and gate.site != "output":
        reasons.append(f"its gate sits at {gate.site!r}, and only the heads' output is in reach")
    if about.capped and "score_mix" in slots:
        reasons.append("the model caps its scores already, and the order of the two is not defined")
    if about.sinks and "normalizer" in slots:
        reasons.append("the model has learned sinks in its softmax, which no other normalizer has")
    if about.cross and (position is not None or "mask" in slots or "cross" not in supports):
        reasons.append("this is cross-attention, whose queries and keys share no positions")
    elif ("causal" if about.causal else "bidirectional") not in supports:
        reasons.append(f"it does not support {'causal' if about.causal else 'bidirectional'} attention")
    if about.windowed and "selector" in slots:
        reasons.append("this layer sees only a window of tokens, of which nothing is left to select")
    return reasons


@torch.no_grad()
def start_as_original(part: nn.Module) -> None:
    """Set a new part's parameters to where the layer puts out what it did before, as nearly as the part can."""
    ask = getattr(part, "start_neutral", None)
    if ask is not None:
        ask()


def only_slot(part: Any) -> str:
    """The slot that a part fills, where its kind fills only one."""
    if (slot := slot_of(part)) is not None:
        return slot
    able = [name for name, kind in SLOTS.items() if isinstance(part, kind.kind)]
    hint = f"; say which slot: {{{able[0]!r}: part}}" if able else ""
    kinds = ", ".join(sorted({slot.kind.__name__ for slot in SLOTS.values()}))
    wanted = f"a name, a part ({kinds}) or a mapping of slots ({', '.join(SLOTS)}) to parts{hint}"
    refuse("swap", "mechanism", "has the wrong type", type(part).__name__, wanted, error=TypeError)


def _own(part: Any) -> Any:
    return copy.deepcopy(part) if isinstance(part, nn.Module) and any(True for _ in part.parameters()) else part
