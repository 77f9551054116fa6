"""RetrievalAttention in plain loops: partial attentions and their merge, flat and IVF search, the graph of keys.

Its author saw only the paper's account, neither code nor test. Shapes: B batch, H query heads, S keys, D head width.
"""

import itertools
import math

import torch


def num(x):
    """the bare number in a scalar tensor."""
    return x.detach().item() if torch.is_tensor(x) else float(x)


def dot(a, b):
    s = a[0] * b[0]
    for m in range(1, len(a)):
        s = s + a[m] * b[m]
    return s


def inner(a, b):
    """inner product as a bare number (for searching)."""
    return sum(x * y for x, y in zip(a.detach().tolist(), b.detach().tolist()))


def split(S, sink=128, local=512):
    """positions 0..S-1 -> (W, R): W = first sink + last local (each position once), R = the rest."""
    W = [i for i in range(S) if i < sink or i >= S - local]
    return W, [i for i in range(S) if i not in W]


def partial_attention(q, k, v, ids):
    """q (D,), k (S,D), v (S,V), ids list -> o (V,), l scalar.
    z_i = q.k_i / sqrt(D), z1 = max z, o = sum e^(z_i - z1) v_i / sum e^(z_i - z1), l = z1 + log sum e^(z_i - z1).
    Empty ids: o = 0, l = -inf."""
    if not ids:
        return v.new_zeros(v.shape[1]), v.new_tensor(-math.inf)
    z = [dot(q, k[i]) / math.sqrt(q.shape[0]) for i in ids]
    z1 = max(num(a) for a in z)
    e = [torch.exp(a - z1) for a in z]
    total = sum(e[1:], e[0])
    o = sum(w * v[i] for w, i in zip(e, ids)) / total
    return o, z1 + torch.log(total)


def merge(o1, l1, o2, l2):
    """out = g1 o1 + g2 o2, g = e^(l_part - l), l = log(e^l1 + e^l2). -> out, l. Exact for disjoint parts."""
    top = max(num(l1), num(l2))
    if top == -math.inf:
        return o1 * 0, l1
    a, b = torch.exp(l1 - top), torch.exp(l2 - top)
    return a / (a + b) * o1 + b / (a + b) * o2, top + torch.log(a + b)


def flat_search(q, k, ids, top_k):
    """top_k of ids by inner product q.k_i (no scale needed), best first, ties to the smaller position.
    -> chosen ids, number scanned."""
    s = {i: inner(q, k[i]) for i in ids}
    return sorted(ids, key=lambda i: (-s[i], i))[:top_k], len(ids)


def ivf_lists(k, ids, centroids, metric="inner"):
    """inverted lists: each key goes to its best centroid. metric "inner" | "euclid". centroids (C,D) -> list of lists.
    # OPEN: how the centroids are made (k-means, of which metric) is the peer's business; they are an argument."""
    lists = [[] for _ in range(centroids.shape[0])]
    for i in ids:
        lists[nearest(k[i], centroids, metric, 1)[0]].append(i)
    return lists


def nearest(x, centroids, metric, n):
    def cost(c):
        y = centroids[c]
        return -inner(x, y) if metric == "inner" else inner(x - y, x - y)

    return sorted(range(centroids.shape[0]), key=lambda c: (cost(c), c))[:n]


def ivf_search(q, k, lists, centroids, top_k, probes, metric="inner"):
    """top_k by inner product among the keys of the `probes` best lists. -> chosen ids, number scanned (keys)."""
    pool = [i for c in nearest(q, centroids, metric, probes) for i in lists[c]]
    return flat_search(q, k, pool, top_k)


class QueryGraph:
    """Item 4, one QUERY head: keys linked through the prompt queries of that head, queries deleted.

    queries (Q,D) all prompt queries (against ALL keys of ids, causality ignored, as the paper), k (S,D), ids = R.
    The paper: keys that are among one query's exact nearest (m of them) become neighbours of each other. The library
    sketch of the account ("mine"), link="sketch": the best one is linked to all others, consecutive ones in a chain;
    link="all": every pair. Links go both ways.
    degree: cap, keeping the neighbours with the best inner products to the key itself (None: no cap).
    rest: keys no query ever chose get a plain link to the `rest` keys with largest inner product (0: none).
    entries: number of entry points, the keys of highest degree (ties to the smaller position).
    # OPEN: everything but "nearest keys, projected, queries deleted" is a design: m, link, degree, rest, entries.
    # OPEN: "best inner products" of the cap taken as key-to-key inner products; cap applied per key, so it can leave
    #   one-way links; links of `rest` are added after the cap.
    """

    def __init__(self, queries, k, ids, m=16, link="sketch", degree=None, rest=1, entries=1):
        self.ids = list(ids)
        self.near = {i: set() for i in self.ids}
        chosen = set()
        for q in queries:
            best, _ = flat_search(q, k, self.ids, m)
            chosen.update(best)
            if link == "all":
                pairs = [(a, b) for a in best for b in best if a < b]
            else:
                pairs = [(best[0], b) for b in best[1:]] + list(itertools.pairwise(best))
            for a, b in pairs:
                self.near[a].add(b)
                self.near[b].add(a)
        if degree is not None:
            for i in self.ids:
                self.near[i] = set(sorted(self.near[i], key=lambda j: (-inner(k[i], k[j]), j))[:degree])
        for i in self.ids:
            if i not in chosen and rest:
                self.link(i, k, rest, [j for j in self.ids if j != i])
        self.entry = sorted(self.ids, key=lambda i: (-len(self.near[i]), i))[:entries]

    def link(self, i, k, n, among):
        for j in flat_search(k[i], k, among, n)[0]:
            self.near[i].add(j)
            self.near[j].add(i)

    def insert(self, i, k, n=1):
        """a key that left the local window. # OPEN: not said how; here a key-to-key link to its n best keys."""
        self.near[i] = set()
        self.link(i, k, n, list(self.ids))
        self.ids.append(i)
        if not self.entry:
            self.entry = [i]

    def search(self, q, k, top_k, pool=None):
        """Item 5: greedy best-first walk by inner product from the entries with a pool of `pool` (default top_k) best
        seen; stops when every key in the pool has been expanded. -> chosen ids best first, number scanned.
        # OPEN: pool rule is the usual one; RoarGraph's details are not in the paper."""
        size = max(pool or top_k, top_k)
        seen = {i: inner(q, k[i]) for i in self.entry}
        done = set()
        while True:
            best = sorted(seen, key=lambda i: (-seen[i], i))[:size]
            todo = [i for i in best if i not in done]
            if not todo:
                return best[:top_k], len(seen)
            done.add(todo[0])
            for j in self.near[todo[0]]:
                if j not in seen:
                    seen[j] = inner(q, k[j])


def retrieval_attention(q, k, v, W, chosen):
    """out = attention of q over W and the chosen keys, by two partial outputs and the merge (items 1-3).
    q (D,), k (S,D), v (S,V); W, chosen: disjoint lists of positions -> (V,)."""
    o1, l1 = partial_attention(q, k, v, W)
    o2, l2 = partial_attention(q, k, v, chosen)
    return merge(o1, l1, o2, l2)[0]


def attention_over(q, k, v, ids):
    """plain softmax attention over ids: what retrieval_attention must equal for ids = W u chosen."""
    z = [dot(q, k[i]) / math.sqrt(q.shape[0]) for i in ids]
    top = max(num(a) for a in z)
    e = [torch.exp(a - top) for a in z]
    total = sum(e[1:], e[0])
    return sum(w * v[i] for w, i in zip(e, ids)) / total


def prompt_attention(q, k, v):
    """prompt phase: full causal attention. q (B,H,T,D), k, v (B,G,T,D) -> (B,H,T,V)."""
    B, H, T, _ = q.shape
    G = k.shape[1]
    return torch.stack(
        [
            attention_over(q[b, h, t], k[b, h // (H // G)], v[b, h // (H // G)], list(range(t + 1)))
            for b in range(B)
            for h in range(H)
            for t in range(T)
        ]
    ).reshape(B, H, T, -1)


class RetrievalCache:
    """The cache: build() on the prompt, then step() per token.

    index "flat" | "query_graph" | "ivf" (keywords of the index in `options`; ivf needs centroids (H,C,D) and probes).
    One index per batch row and QUERY head; keys and values are stored once per key head.
    """

    def __init__(self, index="query_graph", top_k=100, sink=128, local=512, pool=None, insert_links=1, **options):
        self.kind, self.top_k, self.sink, self.local = index, top_k, sink, local
        self.pool, self.insert_links, self.options = pool, insert_links, options

    def build(self, q_prompt, k, v):
        """q_prompt (B,H,T,D), k, v (B,G,T,D): positions already in the vectors (rotary applied by the caller)."""
        self.k, self.v = k, v
        B, H, T, _ = q_prompt.shape
        self.H, self.G = H, k.shape[1]
        self.R = split(T, self.sink, self.local)[1]
        self.index = [[self.make(q_prompt[b, h], k[b, h // (H // self.G)], h) for h in range(H)] for b in range(B)]
        return self

    def make(self, queries, k, h):
        if self.kind == "query_graph":
            return QueryGraph(queries, k, self.R, **self.options)
        if self.kind == "ivf":
            return ivf_lists(k, self.R, self.options["centroids"][h], self.options.get("metric", "inner"))
        return None

    def step(self, q, k_new, v_new):
        """q (B,H,1,D), k_new, v_new (B,G,1,D) -> out (B,H,1,V), scanned (B,H), recall (B,H) against flat search.
        The new key is in the local window of its own query; a key that leaves the window is inserted first.
        # OPEN: order inferred (Algorithm 1 moves old tokens to the index; before or after the search not said). With
        #   sink + local keys or fewer nothing is indexed."""
        self.k, self.v = torch.cat([self.k, k_new], 2), torch.cat([self.v, v_new], 2)
        B, S = self.k.shape[0], self.k.shape[2]
        W, R = split(S, self.sink, self.local)
        left = [i for i in R if i not in self.R]
        self.R = R
        out, scanned, recall = [], torch.zeros(B, self.H), torch.zeros(B, self.H)
        for b in range(B):
            for h in range(self.H):
                g = h // (self.H // self.G)
                k, v, x = self.k[b, g], self.v[b, g], self.index[b][h]
                exact, _ = flat_search(q[b, h, 0], k, R, self.top_k)
                if self.kind == "query_graph":
                    for i in left:
                        x.insert(i, k, self.insert_links)
                    found, n = x.search(q[b, h, 0], k, self.top_k, self.pool)
                elif self.kind == "ivf":
                    c, metric = self.options["centroids"][h], self.options.get("metric", "inner")
                    for i in left:
                        x[nearest(k[i], c, metric, 1)[0]].append(i)
                    found, n = ivf_search(q[b, h, 0], k, x, c, self.top_k, self.options["probes"], metric)
                else:
                    found, n = exact, len(R)
                out.append(retrieval_attention(q[b, h, 0], k, v, W, found))
                scanned[b, h] = n
                recall[b, h] = len(set(found) & set(exact)) / len(exact) if exact else 1.0
        return torch.stack(out).reshape(B, self.H, 1, -1), scanned, recall
