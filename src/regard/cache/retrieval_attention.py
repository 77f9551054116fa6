"""RetrievalAttention: a step reads the best keys, found by an index that knows a prompt's queries.

Queries lie elsewhere than keys do, so an index of keys alone leads them astray. Here keys are neighbours that one query
of the prompt found next to each other, and a walk from neighbour to neighbour finds what such queries look for. The
walk is in Python: it shows what share of the keys is scanned, and is not quick.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cache.key_index import Index, IndexKind, make_index, top_keys
from regard.cache.reading import Parts, Reading
from regard.cards import Card, Cost, Paper
from regard.checks import choice, refuse, whole
from regard.kernels.two_phase import Partial, merge
from regard.kinds import Kept

CARD = Card(
    "retrieval_attention",
    equation="""W: the first `sinks` and the last `local` keys;   R: the others, in an index for each query head
Omega = the top-k of R by q . k, as found;   out = softmax over W and Omega, by their partial softmaxes merged
graph: the `links` best keys of each query of the prompt become neighbours, the best one of all, the others in a chain
walk: from the key of most neighbours, always on from the best one seen; done when the `pool` best are looked around""",
    papers=(
        Paper(
            "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",
            "Liu et al.",
            2024,
            "2409.10516",
            "sections 2.4 to 4.4, appendices A to F",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("2*B*H*budget*D + B*H*T*T*D", "2*S*G*D + H*S*links"),
    claim="Queries from elsewhere than the keys miss half as many of their top keys as by lists, at no larger share "
    "scanned: tests/cache/test_retrieval_attention.py::test_queries_from_elsewhere_find_their_keys.",
    differs=(
        "Heads that share keys fill one budget, taking turns with their best; in the paper each reads its own.",
        "How queries' keys are linked, the cap on neighbours, the walk, and one link for keys no query chose are ours; "
        "the paper points to RoarGraph.",
        "A key that leaves the local window is linked to the key nearest to it; the paper doesn't say how.",
        "All is held and searched on one device, where the paper keeps R and its index on the CPU.",
    ),
    example={"budget": 6, "sinks": 1, "local": 1, "links": 3, "pool": 2},
    tries={
        "budget": 4,
        "index": "flat",
        "sinks": 2,
        "local": 2,
        "links": 2,
        "degree": {"degree": 1, "budget": 4, "pool": 1},
        "pool": {"pool": 1, "budget": 3},
        "lists": {"index": "ivf", "lists": 3, "probes": 1},
        "probes": {"index": "ivf", "lists": 4, "probes": 2},
    },
    defaults={
        "index": "paper, section 3.2",
        "sinks": "paper",
        "local": "paper",
        "budget": "paper, 100 keys besides sinks and local",
        "links": "ours, as in a trial of 4,096 keys",
        "degree": "ours, four times the links",
        "pool": "ours",
        "lists": "ours",
        "probes": "ours, an eighth of the lists",
    },
)


class Found(NamedTuple):
    """What a search was like."""

    recall: Float[Tensor, "B H"]
    """The share of the true top keys that it found; 1 where nothing is to be found."""
    scanned: Float[Tensor, "B H"]
    """The share of the indexed keys whose scores it computed."""


@dataclass(frozen=True, eq=False)
class Indexed:
    """An index for each row and query head, of the keys from `first` to `last`."""

    indices: tuple[tuple[Index, ...], ...] = ()
    last: int = 0


def merge_two_parts(
    scores: Float[Tensor, "*b S"], v: Float[Tensor, "*b S V"], static: Bool[Tensor, "*b S"], found: Bool[Tensor, "*b S"]
) -> Float[Tensor, "*b V"]:
    """The output over two disjoint sets of keys, each by itself, merged by their sums of exponentials.

    Exactly softmax over both; sets may be empty, and of two such the output is 0.
    """
    parts = []
    for mask in (static, found):
        z = scores.masked_fill(~mask, -torch.inf)
        m = z.amax(-1, keepdim=True)
        e = (z - m.masked_fill(m == -torch.inf, 0.0)).exp()
        parts.append(Partial(m, e.sum(-1, keepdim=True), (e[..., None, :] @ v)[..., 0, :]))
    whole_ = merge(*parts)
    return whole_.o / whole_.z.masked_fill(whole_.z == 0, 1.0)


@CARD.module
class RetrievalAttention(Reading):
    """Reads what an index of the keys finds for the query, and the first and last keys.

    Args:
        index: "query_graph", or as peers "ivf" (lists around centres of keys, by inner product) and "flat" (all keys).
        sinks: the first keys, always read.
        local: the last keys, always read.
        links: m, how many keys each query of the prompt links.
        degree: neighbours that a key has at most, but for those that came later.
        pool: how many of the best keys seen the walk looks around; at least as many as are asked for.
        lists, probes: of "ivf": how many lists there are, and how many are scanned.
        budget: as of `regard.cache.Reading`: so many keys, sinks and local among them.
    """

    def __init__(
        self,
        *,
        index: IndexKind = "query_graph",
        sinks: int = 128,
        local: int = 512,
        links: int = 16,
        degree: int = 64,
        pool: int = 128,
        lists: int = 64,
        probes: int = 8,
        budget: int | float = 740,
    ) -> None:
        super().__init__(budget=budget)
        choice(self, ("query_graph", "ivf", "flat"), index=index)
        whole(self, 0, sinks=sinks)
        whole(self, local=local, links=links, degree=degree, pool=pool, lists=lists, probes=probes)
        if isinstance(self.budget, int) and self.budget < sinks + local:
            refuse(self, "budget", "is less than sinks and local", self.budget, f"at least {sinks + local}")
        self.index, self.sinks, self.local, self.pool = index, sinks, local, pool
        self.links, self.degree, self.lists, self.probes = links, degree, lists, probes

    def begin(self) -> Indexed:
        return Indexed()

    def prompt(self, own: Indexed, held: Kept, q: Tensor, scale: float) -> Indexed:
        if own.last > self.sinks:
            return self._grown(own, held, q.shape[1])
        return self._built(held, q)

    def find(self, own: Indexed, held: Kept, q: Tensor, scale: float) -> tuple[Tensor | None, Indexed]:
        (B, G, S), H = held.positions.shape, q.shape[1]
        own = self._grown(own, held, H) if own.indices else self._built(held, q[:, :, :0])
        limit = self.limit(S)
        if limit >= S:
            return None, own
        local = min(self.local, limit)
        sinks = min(self.sinks, limit - local)
        chosen = torch.zeros(B, G, S, dtype=torch.bool, device=q.device)
        chosen[..., :sinks] = True
        chosen[..., S - local :] = True
        many, R = limit - sinks - local, H // G
        for b in range(B):
            for g in range(G):
                k = held.k[b, g]
                found = [own.indices[b][h].search(q[b, h, 0], k, many)[0] for h in range(g * R, g * R + R)]
                chosen[b, g, _in_turn(found, many)] = True
        return chosen, own

    def reordered(self, own: Indexed, index: Tensor) -> Indexed:
        return replace(own, indices=tuple(own.indices[b] for b in index.tolist())) if own.indices else own

    def measure(self, state: Parts, q: Float[Tensor, "B H D"], *, top_k: int | None = None) -> Found:
        """How well the indices find these queries' top keys, by default as many as a step asks for."""
        recall, scanned = [], []
        rows = [(part, b) for part in state.parts for b in range(len(part.own.indices))]
        for z, (part, b) in zip(q, rows, strict=True):
            keys, many = part.store.read().k[b], top_k
            if many is None:
                many = max(self.limit(part.length) - self.sinks - self.local, 0)
            for h, index in enumerate(part.own.indices[b]):
                k = keys[h // (len(z) // len(keys))]
                ids, looked = index.search(z[h], k, many)
                true = top_keys(z[h], k, range(self.sinks, part.own.last), many)
                recall.append(len(set(ids) & set(true)) / len(true) if true else 1.0)
                scanned.append(looked / max(1, part.own.last - self.sinks))
        return Found(*(torch.tensor(found).view(q.shape[:2]) for found in (recall, scanned)))

    def _built(self, held: Kept, q: Float[Tensor, "B H t D"]) -> Indexed:
        """Indices of all keys between sinks and the local window."""
        S, R = held.k.shape[2], q.shape[1] // held.k.shape[1]
        last = max(S - self.local, self.sinks)
        options = {"links": self.links, "degree": self.degree, "pool": self.pool}
        if self.index != "query_graph":
            options = {"lists": self.lists, "probes": self.probes} if self.index == "ivf" else {}
        return Indexed(
            tuple(
                tuple(
                    make_index(self.index, q[b, h], held.k[b, h // R], self.sinks, last, **options)
                    for h in range(q.shape[1])
                )
                for b in range(len(q))
            ),
            last,
        )

    def _grown(self, own: Indexed, held: Kept, heads: int) -> Indexed:
        """With the keys that have left the local window since."""
        last, R = max(held.k.shape[2] - self.local, self.sinks), heads // held.k.shape[1]
        if last <= own.last:
            return own
        indices = tuple(
            tuple(index.insert(held.k[b, h // R], own.last, last) for h, index in enumerate(row))
            for b, row in enumerate(own.indices)
        )
        return Indexed(indices, last)


def _in_turn(found: list[list[int]], many: int) -> list[int]:
    """The first `many` different keys, each list giving its best that is left in its turn."""
    chosen: dict[int, None] = {}
    for rank in range(max(map(len, found), default=0)):
        for ids in found:
            if rank < len(ids) and len(chosen) < many:
                chosen.setdefault(ids[rank])
    return list(chosen)
