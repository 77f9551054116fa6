"""AttentionPredictor: a small network says which blocks of keys will be attended to next.

All keys are held, and a step reads the blocks that were predicted from the steps before it; they could be fetched while
the step before still runs. Now and then a step looks at all keys, so that the history learns of blocks it had lost.
"""

from dataclasses import dataclass, replace
from typing import Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cache.evict import Asked
from regard.cache.reading import Read, Reading
from regard.cache.received import rows
from regard.cards import Card, Cost, Paper
from regard.checks import divides, refuse, whole
from regard.kinds import Kept

CARD = Card(
    "attention_predictor",
    equation="""P(a)_c = max of a over block c;   X = P(last `history` rows), between sinks and local
p = conv1(mean over rows of relu(conv3x3(relu(conv3x3(X)))))          4,833 numbers, for every head
read: the first `sinks`, the last `local`, and the (budget - sinks - local) / block best blocks by p
X <- X without its oldest row, with P(a): a over what was read, or every `calibrate` steps over all""",
    papers=(
        Paper(
            "AttentionPredictor: Temporal Patterns Matter for KV Cache Compression",
            "Yang et al.",
            2025,
            "2502.04077",
            "abstract; the authors' code, which has no training",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*H*history*S/block*4800 + 2*B*H*budget*D", "2*S*G*D + H*history*S/block"),
    claim="What moves from block to block is found where blocks that got most so far are not: "
    "tests/cache/test_attention_predictor.py::test_what_moves_is_predicted.",
    differs=(
        "Heads that share keys share what they read, by the mean of their predictions; in the authors' code each reads "
        "its own.",
        "A step computes all scores only where it calibrates; in the authors' code, which simulates, always.",
        "Up to the budget all keys are read, and of a start without a prompt the history grows row by row.",
        "The loss, the squared error of the next row, is inferred; no weights come with it.",
    ),
    verified="third-party",
    example={"budget": 5, "block": 1, "history": 4, "sinks": 1, "local": 1, "calibrate": 2},
    tries={
        "budget": 4,
        "block": {"block": 2, "sinks": 2, "local": 2, "budget": 6},
        "history": 2,
        "sinks": 2,
        "local": 2,
        "calibrate": 3,
    },
    defaults={
        "history": "code",
        "block": "code",
        "sinks": "code",
        "local": "code",
        "calibrate": "code",
        "budget": "code",
    },
)


def pool_blocks(weights: Float[Tensor, "*b S"], block: int) -> Float[Tensor, "*b C"]:
    """The largest weight of each block; what the last one lacks counts as 0."""
    S = weights.shape[-1]
    return nn.functional.pad(weights, (0, -S % block)).unflatten(-1, (-1, block)).amax(-1)


class HistoryNet(nn.Module):
    """How much each block of keys will get, from what it got lately: (..., rows, C) -> (..., C)."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(1, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 32, 3, padding=1)
        self.last = nn.Conv1d(32, 1, 1)

    def forward(self, x: Float[Tensor, "*b N C"]) -> Float[Tensor, "*b C"]:
        z = x.reshape(-1, 1, *x.shape[-2:])
        z = self.wide(self.near(z).relu()).relu().mean(2)
        out: Tensor = self.last(z)[:, 0]
        return out.reshape(*x.shape[:-2], x.shape[-1])

    def loss(self, x: Float[Tensor, "*b N C"], after: Float[Tensor, "*b C"]) -> Float[Tensor, ""]:
        """Squared error for the row that came next."""
        return (self(x) - after).square().mean()


@dataclass(frozen=True, eq=False)
class History:
    """What blocks got lately."""

    rows: Float[Tensor, "B H N C"] | None = None
    step: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return 0 if self.rows is None else self.rows.element_size() * self.rows.numel()

    def with_rows(self, new: Float[Tensor, "B H t C"], most: int) -> "History":
        """Newer rows behind those there are, of which the last `most` stay."""
        if self.rows is not None:
            new = torch.cat([nn.functional.pad(self.rows, (0, new.shape[3] - self.rows.shape[3])), new], 2)
        return replace(self, rows=new[:, :, -most:])


@CARD.module(closed=("network",))
class AttentionPredictor(Reading):
    """Reads the blocks of keys that a small network expects to be attended to.

    Args:
        history: N, how many rows the network sees.
        block: keys in a block; divides `sinks` and `local`.
        sinks: the first tokens, always read.
        local: the last tokens, always read.
        calibrate: every so many steps all keys are scored for the history; None = never.
        network: what predicts; default a `HistoryNet` that nobody has trained.
        limits: `budget`, as of `regard.cache.Reading`.
    """

    def __init__(
        self,
        *,
        history: int = 64,
        block: int = 16,
        sinks: int = 64,
        local: int = 64,
        calibrate: int | None = 5,
        network: nn.Module | None = None,
        **limits: Unpack[Read],
    ) -> None:
        super().__init__(**limits)
        whole(self, history=history, block=block, local=local)
        whole(self, 0, sinks=sinks)
        divides(self, block=block, sinks=sinks)
        divides(self, block=block, local=local)
        if calibrate is not None:
            whole(self, calibrate=calibrate)
        if isinstance(self.budget, int) and self.budget < sinks + local:
            refuse(self, "budget", "is less than sinks and local", self.budget, f"at least {sinks + local}")
        self.history, self.block, self.sinks, self.local, self.calibrate = history, block, sinks, local, calibrate
        self.network = HistoryNet() if network is None else network

    def begin(self) -> History:
        return History()

    def prompt(self, own: History, held: Kept, q: Tensor, scale: float) -> History:
        found = [pool_blocks(a.flatten(1, 2), self.block) for a in rows(_asked(held, q, scale), last=self.history)]
        return own.with_rows(torch.cat(found, 2), self.history)

    def find(self, own: History, held: Kept, q: Tensor, scale: float) -> tuple[Tensor | None, History]:
        (_, G, S), step = held.positions.shape, own.step + 1
        chosen = None if self.limit(S) >= S else self.choose(self.predict(own, groups=G), S)
        if chosen is None or (self.calibrate is not None and step % self.calibrate == 0):
            (weights,) = rows(_asked(held, q, scale))
        else:
            hidden = held.positions.masked_fill(~chosen, -1)
            (weights,) = rows(_asked(held._replace(positions=hidden), q, scale))
        own = own.with_rows(pool_blocks(weights.flatten(1, 2), self.block), self.history)
        return chosen, replace(own, step=step)

    def reordered(self, own: History, index: Tensor) -> History:
        return own if own.rows is None else replace(own, rows=own.rows.index_select(0, index.to(own.rows.device)))

    def predict(self, own: History, *, groups: int) -> Float[Tensor, "B G C"]:
        """What the network expects of each block between sinks and local, the mean over heads that share keys."""
        x = own.rows
        if x is None:
            refuse(self, "own", "has no rows", None, "the history of a prompt or of steps")
        x = x[..., self.sinks // self.block : max(x.shape[3] - self.local // self.block, self.sinks // self.block)]
        if x.shape[3] < 3:
            return x.new_ones(x.shape[0], groups, x.shape[3])
        weight = next(self.network.parameters(), x)
        p: Tensor = self.network(x.to(weight.dtype))
        return p.unflatten(1, (groups, -1)).mean(2)

    def choose(self, p: Float[Tensor, "B G C"], S: int) -> Bool[Tensor, "B G S"]:
        """The tokens of the best blocks, the first and the last.

        Blocks are those of the history, before this step: where the newest token opens a block, one token between the
        last of them and `local` is never read, as in the authors' code.
        """
        limit = self.limit(S)
        local = min(self.local, limit)
        sinks = min(self.sinks, limit - local)
        most = min(max(limit - sinks - local, 0) // self.block, p.shape[2])
        best = p.argsort(dim=-1, descending=True, stable=True)[..., :most]
        blocks = torch.zeros_like(p, dtype=torch.bool).scatter_(2, best, True)
        middle = blocks.repeat_interleave(self.block, 2)[..., : max(S - self.sinks, 0)]
        keep = nn.functional.pad(middle, (self.sinks, S - self.sinks - middle.shape[2]))
        keep[..., :sinks] = True
        keep[..., S - local :] = True
        return keep


def _asked(held: Kept, q: Tensor, scale: float) -> Asked:
    """Queries of the last tokens held."""
    B, t, n = len(q), q.shape[2], held.k.shape[2]
    at = torch.arange(n - t, n, device=q.device).expand(B, t)
    return Asked(*held[:3], q, at, n, n, None, scale, None)
