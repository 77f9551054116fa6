"""Generalized neighborhood attention in loops: the rule along an axis, extra keys in one softmax, log-sum-exps,
the cost of tiles by brute force, the largest dilation, and receptive fields.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import itertools
import math

import torch

from naive import softmax


def sees(i, j, L, window, stride=1, dilation=1, causal=False):
    """One axis of length L: may query i see key j?"""
    g = i % dilation
    if j % dilation != g:
        return False
    p, u, n = i // dilation, j // dilation, -(-(L - g) // dilation)
    if causal:
        t = min(p // stride * stride + stride - 1, n - 1)
        return max(t - window + 1, 0) <= u <= p
    t = min(p // stride * stride + stride // 2, n - 1)
    start = min(max(t - window // 2, 0), n - window)
    return start <= u < start + window


def allowed(sizes, window, stride, dilation, causal):
    """(N, N) bool for row-major tokens; all arguments one number per axis."""
    at = list(itertools.product(*(range(L) for L in sizes)))
    return torch.tensor(
        [
            [
                all(sees(i[a], j[a], sizes[a], window[a], stride[a], dilation[a], causal[a]) for a in range(len(sizes)))
                for j in at
            ]
            for i in at
        ]
    )


def attention(q, k, v, mask, extra_keys=None, extra_values=None, scale=None):
    """q (B, H, N, D), k, v (B, G, N, .), head h reads key head h G // H; extra (B, G, E, .) seen by all queries, in the
    same softmax. Returns (B, H, N, V) and lse (B, H, N) over window and extra keys."""
    B, H, N, D = q.shape
    G = k.shape[1]
    scale = D**-0.5 if scale is None else scale
    out, lse = [], []
    for b in range(B):
        for h in range(H):
            g = h * G // H
            for i in range(N):
                seen = [j for j in range(N) if mask[i, j]]
                keys, values = [k[b, g, j] for j in seen], [v[b, g, j] for j in seen]
                if extra_keys is not None:
                    keys += list(extra_keys[b, g])
                    values += list(extra_values[b, g])
                z = [(q[b, h, i] * t).sum() * scale for t in keys]
                p = softmax(z)
                top = max(float(t.detach()) for t in z)
                out.append(sum(p[n] * t for n, t in enumerate(values)))
                lse.append(top + torch.log(sum(torch.exp(t - top) for t in z)))
    return torch.stack(out).view(B, H, N, -1), torch.stack(lse).view(B, H, N)


def axis_visits(L, window, stride, q_tile, k_tile, dynamic=False, dilation=1, causal=False):
    """Per dilation group, per query tile of one axis: list of (queries, visited key tiles as lists of keys).
    By looking at the mask."""
    groups = []
    for g in range(dilation):
        members = list(range(g, L, dilation))
        n, tiles = len(members), []
        for a in range(0, n, q_tile):
            queries = range(a, min(a + q_tile, n))
            keys = [
                u
                for u in range(n)
                if any(sees(members[i], members[u], L, window, stride, dilation, causal) for i in queries)
            ]
            lo, hi = min(keys), max(keys) + 1  # the box
            begin = lo if dynamic else lo // k_tile * k_tile
            visited = [[u for u in range(s, s + k_tile) if u < n] for s in range(begin, hi, k_tile)]
            tiles.append(([members[i] for i in queries], [[members[u] for u in t] for t in visited]))
        groups.append(tiles)
    return groups


def tile_cost(sizes, window, stride, q_tile, k_tile, dynamic=False, dilation=None, causal=None):
    """Dict: mean key tiles visited by a query tile, all key tiles, speed-up bound = all / mean,
    flop = prod(L) / prod(k), and perfect: bound = flop and every pair inside visited tiles is seen (no mask needed).
    Doubt with dilation ("groups become batch"): "all" is taken as the tiles of the whole map, ceil(L / T_k) per axis,
    as plain attention would visit, and the mean goes over the query tiles of all groups. Causal: the same flop."""
    r = len(sizes)
    dilation, causal = dilation or (1,) * r, causal or (False,) * r
    axes = [
        [
            t
            for grp in axis_visits(
                sizes[a], window[a], stride[a], q_tile[a], k_tile[a], dynamic, dilation[a], causal[a]
            )
            for t in grp
        ]
        for a in range(r)
    ]
    counts = [math.prod(len(t[1]) for t in combo) for combo in itertools.product(*axes)]
    mean, total = sum(counts) / len(counts), math.prod(-(-sizes[a] // k_tile[a]) for a in range(r))
    flop = math.prod(sizes) / math.prod(window)
    whole = all(
        sees(i, j, sizes[a], window[a], stride[a], dilation[a], causal[a])
        for a in range(r)
        for queries, tiles in axes[a]
        for i in queries
        for t in tiles
        for j in t
    )
    return {
        "visited": mean,
        "tiles": total,
        "speedup": total / mean,
        "flop": flop,
        "perfect": whole and abs(total / mean - flop) < 1e-9,
    }


def largest_dilation(side, window):
    return max(side // window, 1)


def receptive(L, window, dilations):
    """Keys reached by the middle query of an axis after layers of these dilations (non-zeros of the mask product)."""
    at = {L // 2}
    for d in reversed(dilations):
        at = {j for i in at for j in range(L) if sees(i, j, L, window, 1, d)}
    return len(at)
