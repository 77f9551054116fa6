"""coarse-to-fine attention of an image-to-markup decoder. Equations 1-5 (no golden numbers).

Its author has read neither the code nor its tests.
There are no golden numbers; against the same formulas in matrix form: 2.8e-16.
"""

import torch


def linear(x, w, b=None):
    return torch.stack([(row * x).sum() for row in w]) + (0 if b is None else b)


def softmax(scores):
    top = max(float(s.detach()) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def sparsemax(scores):
    """Eq. 4. max(s - tau, 0) with tau such that the sum is 1: the largest k with 1 + k s_(k) > s_(1) + .. + s_(k)."""
    order = sorted(scores, key=lambda s: -float(s.detach()))
    support = [k for k in range(1, len(order) + 1) if float(1 + k * order[k - 1] - sum(order[:k])) > 0]
    tau = (sum(order[: support[-1]]) - 1) / support[-1]
    return [torch.clamp(s - tau, min=0) for s in scores]


def additive(h, v, p):
    """Eq. 2. beta^T tanh(W1 h + W2 v), p = (beta, W1, W2)."""
    return (p[0] * torch.tanh(linear(h, p[1]) + linear(v, p[2]))).sum()


def general(h, v, p):
    """The score of the released code: (Wa h) . v, p = Wa."""
    return (linear(h, p) * v).sum()


def region_map(grid, coarse_grid):
    """Coarse cell of every fine cell, both in raster order; grids are (Y, X)."""
    (height, width), (rows, cols) = grid, coarse_grid
    return [(y // (height // rows)) * cols + x // (width // cols) for y in range(height) for x in range(width)]


def masked(normalise, scores, real):
    """Normalise over the real entries only (minus infinity elsewhere). -> list with 0 at the others."""
    w = iter(normalise([s for s, r in zip(scores, real, strict=True) if r]) if any(real) else [])
    return [next(w) if r else torch.zeros_like(s) for s, r in zip(scores, real, strict=True)]


def coarse_to_fine(h, coarse, fine, region, coarse_p, fine_p, *, kind="hierarchical", keep=None, cell=None,
                   score=additive):  # fmt: skip
    """h (B,D), coarse (B,Lc,D), fine (B,N,D), region: coarse cell of each fine cell (N,), keep (B,N) true = real.

    kind standard (eq. 2), hierarchical (3), sparse (4) or hard (5); cell (B,): the sampled cell of training, None:
    the most probable one. -> context (B,D), weights (B,N), lookups (B,), log p(cell) (B,) (0 where not hard).
    lookups: coarse cells and fine cells scored, padding left out.
    """
    batch, count = fine.shape[:2]
    region = [int(r) for r in region]
    contexts, weights, lookups, logs = [], [], [], []
    for b in range(batch):
        real = [keep is None or bool(keep[b, z]) for z in range(count)]
        scores = [score(h[b], fine[b, z], fine_p) for z in range(count)]
        log = h.new_zeros(())
        if kind == "standard":
            p, used = masked(softmax, scores, real), sum(real)
        else:
            cells = range(coarse.shape[1])
            alive = [any(real[z] and region[z] == c for z in range(count)) for c in cells]
            upper = [score(h[b], coarse[b, c], coarse_p) for c in cells]
            top = masked(sparsemax if kind == "sparse" else softmax, upper, alive)
            if kind == "hard":  # eq. 5: one region; its coarse score gets no gradient through the context
                best = max(cells, key=lambda c, top=top: float(top[c].detach())) if cell is None else int(cell[b])
                log = torch.log(top[best])
                top = [torch.ones_like(a) if c == best else torch.zeros_like(a) for c, a in enumerate(top)]
            p, used = [h.new_zeros(())] * count, sum(alive)
            for c in cells:  # eq. 3: p(z) = p(z') p(z | z'), the fine softmax inside one region
                inside = [real[z] and region[z] == c for z in range(count)]
                if float(top[c].detach()) > 0:
                    fine_w = masked(softmax, scores, inside)
                    p = [top[c] * fine_w[z] if inside[z] else p[z] for z in range(count)]
                    used += sum(inside)
        contexts.append(sum(w * fine[b, z] for z, w in enumerate(p)))
        weights.append(torch.stack(p))
        lookups.append(used)
        logs.append(log)
    return torch.stack(contexts), torch.stack(weights), torch.tensor(lookups), torch.stack(logs)


def hard_loss(log_target, log_cell, baseline):
    """Eq. 5. Reward = log p(y_t | ..), (B,). -> loss whose gradient is that of the sampled fine part plus REINFORCE."""
    reward = [(r - base).detach() * c for r, base, c in zip(log_target, baseline, log_cell, strict=True)]
    return -sum(r + w for r, w in zip(log_target, reward, strict=True)) / len(reward)


def lstm_cell(x, h, c, p):
    """p = (Wx, Wh, b), rows in the order input, forget, cell, output."""
    i, f, g, o = (linear(x, p[0]) + linear(h, p[1], p[2])).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def row_encoder(grid, start, p):
    """Eq. 1. grid (Y,X,C), start (Y,2,D): trainable first h and c of every row -> (Y,X,D), one direction."""
    rows = []
    for y in range(grid.shape[0]):
        h, c = start[y]
        for x in range(grid.shape[1]):
            h, c = lstm_cell(grid[y, x], h, c, p)
            rows.append(h)
    return torch.stack(rows).reshape(*grid.shape[:2], -1)


def read_out(h, context, wc, wout):
    """Eq. 1. o = tanh(Wc [h; c]), p(y) = softmax(Wout o); the next input of the decoder LSTM is [emb(y); o]."""
    o = torch.tanh(linear(torch.cat([h, context]), wc))
    return o, torch.stack(softmax(list(linear(o, wout))))
