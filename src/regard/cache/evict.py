"""Caches that keep less: what is common to all policies that score the keys held and drop the lowest.

A policy is a scorer: a function of queries, keys and values that says how much each key is worth keeping. `Evicting`
does the rest, once for all: it appends, has keys judged when there are too many, drops the lowest and keeps the others
in the order of their positions, which stay what they were in the text.
"""

import copy
from dataclasses import dataclass, replace
from typing import Self, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cache.stores import Makes, Padded, Ragged, Store, joined, picked
from regard.checks import number, refuse, whole
from regard.kinds import Kept, Turn

Scores = Float[Tensor, "B G n"]


@dataclass(frozen=True, eq=False)
class Asked:
    """What a scorer may read: all keys held, those of this call last, and this call's queries."""

    k: Float[Tensor, "B G n D"]
    v: Float[Tensor, "B G n V"]
    positions: Int[Tensor, "B G n"]
    """-1 = an empty place, whose score counts for nothing."""
    q: Float[Tensor, "B H t D"] | None
    at: Int[Tensor, "B t"]
    """Where the queries stand; -1 = padding, which asks nothing."""
    seen: int | Int[Tensor, " B"]
    """How many tokens there were, these included."""
    target: int | Int[Tensor, " B"]
    """How many keys a head will be kept."""
    carried: Scores | None
    """What the scorer had carried along of the keys before; 0 for the new ones."""
    scale: float
    turn: Turn | None

    def newest(self, n: int | Tensor) -> Bool[Tensor, "B G n"]:
        """Which are the last n tokens seen."""
        last = self.seen - n
        return self.positions >= (last[:, None, None] if isinstance(last, Tensor) else last)


class Limits(TypedDict, total=False):
    """The options of all policies."""

    budget: int | float
    every: int | None


LIMITS = {"budget": "ours", "every": "ours, a 32nd of the budget"}
"""Where their defaults come from, for cards."""
TRIES = {"every": 3}


@dataclass(frozen=True, eq=False)
class Held:
    """The state of a policy in one layer."""

    store: Store | None
    length: int
    """Tokens taken in, padding included."""
    seen: int | Int[Tensor, " B"]
    """Those that were no padding, of each row where rows may differ."""
    count: int | Int[Tensor, " B"]
    """Keys kept, on the average over heads."""
    carried: Scores | None
    shape: tuple[int, int, int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        others = [z for z in (self.seen, self.count, self.carried) if isinstance(z, Tensor)]
        own = sum(z.element_size() * z.numel() for z in others)
        return own + (0 if self.store is None else self.store.nbytes)


class Evicting:
    """A CachePolicy that drops the keys which `judge` scores lowest. Subclasses say `judge`.

    Args:
        budget: how many keys a head are kept: a number, or as a float the share of the tokens seen.
        every: when there are too many, so many are dropped at once, so that the next steps need drop none. 1 is what
            papers do; default a 32nd of the budget.
    """

    needs_queries = False
    """Whether `judge` reads queries."""
    needs_turn = False
    """Whether it must know how queries were rotated, where they were."""
    judges_always = False
    """Whether it is asked at each call, for what it carries along, not only when keys are to be dropped."""
    floor: float | None = None
    """None: as many keys for every head. Else heads share a layer's budget, but for this part of each one's own."""

    def __init__(self, *, budget: int | float = 1024, every: int | None = None) -> None:
        if isinstance(budget, float):
            number(self, above=0, most=1, budget=budget)
        else:
            whole(self, budget=budget)
        if every is not None:
            whole(self, every=every)
        self.budget, self.every = budget, every
        self.makes: Makes = Padded.of

    def judge(self, asked: Asked) -> tuple[Scores, Scores | None]:
        """How much each key is worth keeping, and what to carry along with it."""
        raise NotImplementedError

    def limit(self, seen: int | Tensor) -> int | Tensor:
        """How many keys may be kept of so many tokens."""
        if isinstance(self.budget, int):
            return self.budget
        if isinstance(seen, int):
            return max(1, int(seen * self.budget))
        return (seen.double() * self.budget).long().clamp(min=1)

    def at_layer(self, n: int, layers: int) -> Self:
        """The same policy in every layer."""
        return self

    def with_budget(self, budget: int | float) -> Self:
        """The same with another budget."""
        other = copy.copy(self)
        other.budget = budget
        return other

    def init_state(self, batch_size: int, num_kv_heads: int, head_dim: int, *, value_dim: int | None = None) -> Held:
        return Held(None, 0, 0, 0, None, (batch_size, num_kv_heads, head_dim, value_dim or head_dim))

    def update(
        self,
        state: Held,
        k: Float[Tensor, "B G t D"],
        v: Float[Tensor, "B G t V"],
        q: Float[Tensor, "B H t D"] | None = None,
        *,
        keep: Bool[Tensor, "B t"] | None = None,
        scale: float | None = None,
        turn: Turn | None = None,
    ) -> tuple[Kept, Held]:
        B, G, t, D = k.shape
        if (B, G, D, v.shape[3]) != state.shape:
            refuse(self, "k", "does not fit the state", tuple(k.shape), f"(B, G, t, D, V) = {state.shape}")
        if q is None and self.needs_queries:
            refuse(self, "q", "is missing", None, "the queries of these tokens, by which keys are judged")
        at, seen = _placed(state.seen, keep, B, t, k.device)
        new = Kept(k, v, at[:, None].expand(B, G, t).int(), full=keep is None)
        count = state.count + (t if isinstance(seen, int) else (at >= 0).sum(1))
        limit = self.limit(seen)
        over = count > limit
        must, attended, store = bool(over.any() if isinstance(over, Tensor) else over), None, None
        if not must and state.store is not None and (keep is None or (t == 1 and not state.store.full)):
            attended, store = state.store.append(k, v, new.positions) or (None, None)
        kept = attended = attended or (new if state.store is None else joined(state.store.read(), new))
        carried = state.carried
        if carried is not None:
            carried = torch.nn.functional.pad(carried, (kept.k.shape[2] - t - carried.shape[2], t))
        if keep is not None and t > 1:  # judged as if padding stood in front, wherever it does
            kept, q, at, carried = _leftward(kept, q, at, carried)
        if must or self.judges_always:
            target = count
            if must:
                slack = 0 if t > 1 else self._every(limit) - 1
                least = (limit - slack).clamp(min=1) if isinstance(limit, Tensor) else max(1, limit - slack)
                target = torch.where(over, least, count) if isinstance(over, Tensor) else least
            scale = D**-0.5 if scale is None else scale
            asked = Asked(*kept[:3], q, at, seen, target, carried, scale, turn)
            with torch.no_grad():
                scores, carried = self.judge(asked)
            if must:
                if t == 1:
                    scores = torch.cat([scores[..., :-1], torch.full_like(scores[..., -1:], torch.inf)], -1)
                index = keep_best(scores.masked_fill(kept.positions < 0, -torch.inf), target, floor=self.floor)
                full = kept.full and isinstance(target, int) and self.floor is None
                kept, count = picked(kept, index, full=full), target
                carried = None if carried is None else carried.gather(2, index.clamp(min=0))
                store = None
        if store is None:
            store = self._stored(kept, limit)
            if t == 1:
                attended = store.read()
        return attended, replace(state, store=store, length=state.length + t, seen=seen, count=count, carried=carried)

    def reorder(self, state: Held, index: Int[Tensor, " B2"]) -> Held:
        """The state of batch rows `index`, such as beams."""
        at = index.to(state.carried.device) if state.carried is not None else index
        return replace(
            state,
            store=None if state.store is None else state.store.reorder(index),
            seen=state.seen if isinstance(state.seen, int) else state.seen[index],
            count=state.count if isinstance(state.count, int) else state.count[index],
            carried=None if state.carried is None else state.carried.index_select(0, at),
            shape=(len(index), *state.shape[1:]),
        )

    def _every(self, limit: int | Tensor) -> int | Tensor:
        if self.every is not None:
            return self.every
        return (limit // 32).clamp(min=1) if isinstance(limit, Tensor) else max(1, limit // 32)

    def _stored(self, kept: Kept, limit: int | Tensor) -> Store:
        """With room up to the budget, but no more than an eighth of what there is."""
        n = kept.k.shape[2]
        most = max(limit.tolist(), default=0) if isinstance(limit, Tensor) else limit
        if self.floor is not None:
            most = most if isinstance(self.budget, int) and n > most else max(most, n)
        room = min(max(most - n, 0), n // 8 + 8) + (n // 32 if isinstance(self.budget, float) else 0)
        return self.makes(kept, room)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(budget={self.budget})"


def keep_best(scores: Scores, n: int | Int[Tensor, " B"], *, floor: float | None = None) -> Int[Tensor, "B G m"]:
    """The places of the n highest scores of each head, in order; of equals the newest. What scores -inf is never kept.

    Rows and heads that have fewer than others have places -1 in front.

    Args:
        floor: heads share G n places among them by their scores, but for the floor's part of n, which each has.
    """
    B, G, S = scores.shape
    number_ = torch.as_tensor(n, device=scores.device).expand(B)
    if floor is not None:
        safe = (number_ * floor).long()
        ranks = _ranks(scores)
        scores = scores.masked_fill((ranks < safe[:, None, None]) & (scores > -torch.inf), torch.inf)
        # Newest first among equals of all heads, so that the heads are laid side by side in time.
        ranks = _ranks(scores.mT.flatten(1)).view(B, S, G).mT
        chosen = ranks < (G * number_)[:, None, None]
    elif isinstance(n, int):
        return _ranked(scores)[..., :n].sort(-1).values
    else:
        chosen = _ranks(scores) < number_[:, None, None]
    chosen = chosen & (scores > -torch.inf)
    most = int(chosen.sum(-1).max()) if chosen.numel() else 0
    places = torch.where(chosen, torch.arange(S, device=scores.device), -1).sort(-1).values
    return places[..., S - most :]


def _ranked(scores: Tensor) -> Tensor:
    """Places by falling score, of equals the newest first."""
    return scores.shape[-1] - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)


def _ranks(scores: Tensor) -> Tensor:
    """Which place in that order each has."""
    order = _ranked(scores)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def _placed(
    seen: int | Tensor, keep: Tensor | None, B: int, t: int, device: torch.device
) -> tuple[Int[Tensor, "B t"], int | Tensor]:
    """Where t more tokens stand, -1 for padding, and how many there are with them."""
    if keep is None:
        first = seen[:, None] if isinstance(seen, Tensor) else seen
        return (first + torch.arange(t, device=device)).expand(B, t), seen + t
    keep = keep.to(device)
    before = seen if isinstance(seen, Tensor) else torch.full((B,), seen, device=device)
    at = before[:, None] + keep.long().cumsum(1) - 1
    return at.masked_fill(~keep, -1), before + keep.sum(1)


def _leftward(
    kept: Kept, q: Tensor | None, at: Tensor, carried: Tensor | None
) -> tuple[Kept, Tensor | None, Tensor, Tensor | None]:
    """Empty places and padding in front, tokens in order behind them."""
    real = at >= 0
    if bool((real[:, 1:] >= real[:, :-1]).all()) and kept.k.shape[2] == at.shape[1]:
        return kept, q, at, carried
    places = (kept.positions >= 0).long().argsort(dim=-1, stable=True)
    order = real.long().argsort(dim=-1, stable=True)
    if q is not None:
        q = q.gather(2, order[:, None, :, None].expand_as(q))
    carried = None if carried is None else carried.gather(2, places)
    return picked(kept, places, full=False), q, at.gather(1, order), carried


def ragged(policy: Evicting, floor: float) -> None:
    """Have heads share a layer's budget, each with its own number of keys."""
    policy.floor, policy.makes = floor, Ragged.of
