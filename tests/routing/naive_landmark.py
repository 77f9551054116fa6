"""Landmark attention in loops, by somebody who had an account of the paper and has read neither code nor test.

B batch, T positions (landmarks among them), M width, H heads, D = M / H; is_landmark (B, T). A landmark is the last
element of its block and carries its number.
"""

import torch


def softmax(scores):
    """List of scalars -> list of scalars that sum to 1 (empty list -> empty list)."""
    if not scores:
        return []
    top = max(s.detach().item() for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e[1:], e[0])
    return [x / total for x in e]


def dot(a, b):
    s = a[0] * b[0]
    for m in range(1, len(a)):
        s = s + a[m] * b[m]
    return s


def block_index(marks):
    """g_j = number of landmarks strictly before j."""
    g, count = [], 0
    for mark in marks:
        g.append(count)
        count += int(bool(mark))
    return g


def group_softmax_row(scores, marks):
    """One query, the last of the positions it is handed in chronological order: the weight of each.

    C = ordinary positions of the newest block; P = landmarks of the earlier blocks; p = softmax over both;
    r = softmax over the ordinary positions of an earlier block; w_j = p_j on C, p_landmark(b) r_j in block b, 0 on
    landmarks. An empty block loses its mass; a row with neither C nor P is all zero.
    """
    n, g = len(scores), block_index(marks)
    C = [j for j in range(n) if g[j] == g[-1] and not marks[j]]
    P = [j for j in range(n) if g[j] < g[-1] and marks[j]]
    p = dict(zip(C + P, softmax([scores[j] for j in C + P]), strict=True))
    w = [scores[0] * 0 for _ in range(n)]
    for j in C:
        w[j] = p[j]
    for mark in P:
        inside = [j for j in range(n) if g[j] == g[mark] and not marks[j]]
        for j, r in zip(inside, softmax([scores[j] for j in inside]), strict=True):
            w[j] = p[mark] * r
    return w


def project(x, W):
    """x (T, M), W (N, M) -> (T, N)."""
    return torch.stack([torch.stack([dot(W[o], x[t]) for o in range(W.shape[0])]) for t in range(x.shape[0])])


def landmark_attention(x, is_landmark, Wqkv, Wo, num_heads):
    """x (B, T, M), Wqkv (3M, M) rows q, k, v, Wo (M, M) -> out (B, T, M)."""
    B, T, M = x.shape
    D = M // num_heads
    outs = []
    for n in range(B):
        qkv, marks = project(x[n], Wqkv), [bool(m) for m in is_landmark[n]]
        merged = [[] for _ in range(T)]
        for h in range(num_heads):
            q, k, v = (qkv[:, part * M + h * D : part * M + (h + 1) * D] for part in range(3))
            for i in range(T):
                w = group_softmax_row([dot(q[i], k[j]) / D**0.5 for j in range(i + 1)], marks[: i + 1])
                o = v[0] * 0
                for j in range(i + 1):
                    o = o + w[j] * v[j]
                merged[i].append(o)
        outs.append(project(torch.stack([torch.cat(m) for m in merged]), Wo))
    return torch.stack(outs)


class Memory:
    """What inference keeps between chunks, for one layer and one batch row: finished blocks and the unfinished tail.

    blocks: list of (keys (H, f + 1, D), values (H, f + 1, D)), oldest first; tail: lists of (key (H, D), value (H, D),
    is_landmark) of at most f positions.
    """

    def __init__(self):
        self.blocks, self.tail = [], []


def choose_blocks(t, k, selection):
    """t[h][i][b], softmaxed landmark scores -> chosen[h][i], the k best blocks, ascending."""
    H, T, nb = len(t), len(t[0]), len(t[0][0])
    chosen = [[None] * T for _ in range(H)]
    for h in range(H):
        for i in range(T):
            if selection == "per_token_and_head":
                s = [t[h][i][b] for b in range(nb)]
            else:  # max_over_heads
                s = [max(t[hh][i][b] for hh in range(H)) for b in range(nb)]
            order = sorted(zip(s, range(nb), strict=True), key=lambda z: (-z[0], z[1]))
            chosen[h][i] = sorted(b for _, b in order[: min(k, nb)])
    return chosen


def retrieve_chunk(x, is_landmark, Wqkv, Wo, num_heads, f, top_k, memory, selection):
    """One chunk of random-access inference without rotation; changes `memory`, a list of B of them.

    For each head and query: the top_k finished blocks by softmax over blocks of q . k_landmark / sqrt(D); then the
    group softmax over [chosen blocks in chronological order; unfinished tail; the chunk up to the query].
    """
    B, T, M = x.shape
    H, D, L = num_heads, M // num_heads, f + 1
    outs = []
    for n in range(B):
        mem, marks, qkv = memory[n], [bool(m) for m in is_landmark[n]], project(x[n], Wqkv)
        q, k, v = (qkv[:, part * M : (part + 1) * M].reshape(T, H, D) for part in range(3))
        nb, chosen = len(mem.blocks), None
        if nb > 0 and top_k > 0:
            t = []
            for h in range(H):
                rows = []
                for i in range(T):
                    s = [dot(q[i, h], mem.blocks[b][0][h, f]) / D**0.5 for b in range(nb)]
                    rows.append([p.item() for p in softmax(s)])
                t.append(rows)
            chosen = choose_blocks(t, top_k, selection)
        merged = [[] for _ in range(T)]
        for h in range(H):
            for i in range(T):
                keys, values, flags = [], [], []
                for b in [] if chosen is None else chosen[h][i]:
                    for o in range(L):
                        keys.append(mem.blocks[b][0][h, o])
                        values.append(mem.blocks[b][1][h, o])
                        flags.append(o == f)
                for key, value, mark in mem.tail:
                    keys.append(key[h])
                    values.append(value[h])
                    flags.append(mark)
                for j in range(i + 1):
                    keys.append(k[j, h])
                    values.append(v[j, h])
                    flags.append(marks[j])
                w = group_softmax_row([dot(q[i, h], key) / D**0.5 for key in keys], flags)
                o = values[0] * 0
                for a, value in zip(w, values, strict=True):
                    o = o + a * value
                merged[i].append(o)
        outs.append(project(torch.stack([torch.cat(m) for m in merged]), Wo))
        items = mem.tail + [(k[j], v[j], marks[j]) for j in range(T)]
        full = len(items) // L * L
        for b in range(0, full, L):
            part = items[b : b + L]
            mem.blocks.append((torch.stack([p[0] for p in part], 1), torch.stack([p[1] for p in part], 1)))
        mem.tail = items[full:]
    return torch.stack(outs)
