"""AttentionPredictor in plain loops, keys repeated to all heads.

Its author saw only the paper's account, neither code nor test. Shapes: B batch, H query heads, S keys, D head width.
"""

import torch


def num(x):
    """the bare number in a scalar tensor."""
    return x.detach().item() if torch.is_tensor(x) else float(x)


def softmax(scores):
    """list of scalars -> list of scalars that sum to 1."""
    top = max(num(s) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e[1:], e[0])
    return [x / total for x in e]


def dot(a, b):
    s = a[0] * b[0]
    for m in range(1, len(a)):
        s = s + a[m] * b[m]
    return s


def pool(a, b):
    """P(a)_c = max over the tokens of block c, the last block padded with zeros. a: list of S scalars -> list of
    ceil(S/b) scalars."""
    S = len(a)
    out = []
    for c in range(0, S, b):
        block = [a[j] if j < S else a[0] * 0 for j in range(c, c + b)]
        best = block[0]
        for x in block[1:]:
            if num(x) > num(best):
                best = x
        out.append(best)
    return out


def prompt_history(q, k, history, block):
    """q, k (B,H,S,D) of the prompt -> X (B,H,min(history,S),ceil(S/block)): P of the causal softmax rows of the last
    `history` prompt queries.
    # OPEN: a prompt shorter than `history` gives fewer rows (as in the code, which slices)."""
    B, H, S, D = q.shape
    out = []
    for n in range(B):
        for h in range(H):
            for i in range(max(0, S - history), S):
                a = softmax([dot(q[n, h, i], k[n, h, j]) / D**0.5 for j in range(i + 1)])
                out.append(torch.stack(pool(a + [a[0] * 0] * (S - i - 1), block)))
    return torch.stack(out).reshape(B, H, -1, out[0].shape[0])


def conv3x3_relu(x, w, bias):
    """x: list over channels of (R,C) nested lists of scalars; w (O,I,3,3), bias (O,); zero pad 1, then ReLU."""
    R, C = len(x[0]), len(x[0][0])
    out = []
    for o in range(w.shape[0]):
        plane = []
        for r in range(R):
            row = []
            for c in range(C):
                s = bias[o]
                for i in range(len(x)):
                    for dr in range(3):
                        for dc in range(3):
                            rr, cc = r + dr - 1, c + dc - 1
                            if 0 <= rr < R and 0 <= cc < C:
                                s = s + w[o, i, dr, dc] * x[i][rr][cc]
                row.append(torch.relu(s))
            plane.append(row)
        out.append(plane)
    return out


def conv3x3_relu_rows(x, w, bias):
    """The same numbers as conv3x3_relu, with the sums over the input channels done on rows (much fewer tensor
    operations). x (I,R,C) -> (O,R,C)."""
    _I, R, C = x.shape
    out = []
    for r in range(R):
        cols = []
        for c in range(C):
            s = bias
            for dr in range(3):
                for dc in range(3):
                    rr, cc = r + dr - 1, c + dc - 1
                    if 0 <= rr < R and 0 <= cc < C:
                        s = s + (w[:, :, dr, dc] * x[:, rr, cc]).sum(1)
            cols.append(torch.relu(s))
        out.append(torch.stack(cols, 1))
    return torch.stack(out, 1)


def predictor(X, net):
    """X (R,C): history of one head (rows = time) -> p, list of C scalars.
    net: c1w (16,1,3,3), c1b (16,), c2w (32,16,3,3), c2b (32,), c3w (1,32,1), c3b (1,).
    conv3x3 ReLU, conv3x3 ReLU, MEAN OVER THE ROWS, 1x1 convolution; no softmax. 4,833 numbers in all."""
    y = conv3x3_relu_rows(X[None], net["c1w"], net["c1b"])
    y = conv3x3_relu_rows(y, net["c2w"], net["c2b"])
    R, C = X.shape
    p = []
    for c in range(C):
        s = net["c3b"][0]
        for o in range(y.shape[0]):
            s = s + net["c3w"][0, o, 0] * (sum(y[o, r, c] for r in range(R)) / R)
        p.append(s)
    return p


class AttentionHistoryPredictor:
    """init_state / select / update, then exact attention over the kept keys (attend).
    # OPEN: how the predictor is trained is not in the code; mse() is the recalled target.
    """

    def __init__(self, net, history=64, block=16, sink=64, local=64, budget=1024, calibrate=5):
        self.net, self.history, self.block, self.sink = net, history, block, sink
        self.local, self.budget, self.calibrate = local, budget, calibrate

    def init_state(self, q, k):
        """prompt q, k (B,H,S0,D) -> state."""
        return {"X": prompt_history(q, k, self.history, self.block), "step": 0}

    def predict(self, state):
        """p (B,H,hi-lo): lo = sink // b, hi = blocks IN THE HISTORY - local // b; 1 everywhere when hi - lo < 3."""
        X = state["X"]
        B, H = X.shape[:2]
        lo, hi = self.sink // self.block, X.shape[3] - self.local // self.block
        out = []
        for n in range(B):
            for h in range(H):
                if hi - lo < 3:
                    out.append(X.new_ones(max(hi - lo, 0)))
                else:
                    out.append(torch.stack(predictor(X[n, h, :, lo:hi], self.net)))
        return torch.stack(out).reshape(B, H, -1)

    def select(self, state, S, p=None):
        """S keys now (new one included) -> keep (B,H,S) bool: the best (budget - sink - local)//b blocks by p, the
        first `sink` tokens, the last `local` tokens. Block c of p covers tokens sink + c b ...
        # OPEN: ties (p = 1 everywhere) go to the first blocks here. local = 0 would keep everything in the code
        #   (slice -0); here it keeps none."""
        p = self.predict(state) if p is None else p
        B, H, C = p.shape
        keep = torch.zeros(B, H, S, dtype=torch.bool)
        kb = min((self.budget - self.sink - self.local) // self.block, C)
        for n in range(B):
            for h in range(H):
                best = sorted(range(C), key=lambda c: (-num(p[n, h, c]), c))[: max(kb, 0)]
                for j in range(S):
                    if j < self.sink or j >= S - self.local:
                        keep[n, h, j] = True
                for c in best:
                    for j in range(self.sink + c * self.block, self.sink + (c + 1) * self.block):
                        if j < S:
                            keep[n, h, j] = True
        return keep

    def attend(self, q, k, v, keep):
        """q (B,H,1,D), k, v (B,H,S,D), keep (B,H,S) -> y (B,H,1,V), full weights, sparse weights (both (B,H,S)).
        A dropped key has score w - 10000 in the code: weight exactly 0 unless all are dropped; here it is left out."""
        B, H, S, D = k.shape
        ys, full, sparse = [], [], []
        for n in range(B):
            for h in range(H):
                w = [dot(q[n, h, 0], k[n, h, j]) / D**0.5 for j in range(S)]
                kept = [j for j in range(S) if bool(keep[n, h, j])]
                p = softmax([w[j] for j in kept])
                row = [w[0] * 0] * S
                for j, x in zip(kept, p):
                    row[j] = x
                ys.append(sum(x * v[n, h, j] for x, j in zip(p, kept)))
                full.append(torch.stack(softmax(w)))
                sparse.append(torch.stack(row))

        def shape(a, *s):
            return torch.stack(a).reshape(B, H, *s)

        return shape(ys, 1, -1), shape(full, S), shape(sparse, S)

    def update(self, state, weights):
        """weights (B,H,S): one new row P(weights), the oldest row dropped; old rows get a zero column when S opens a
        block. -> new state."""
        X = state["X"]
        B, H, N, C = X.shape
        out = []
        for n in range(B):
            for h in range(H):
                new = pool(list(weights[n, h]), self.block)
                rows = [torch.cat([X[n, h, r], X.new_zeros(len(new) - C)]) for r in range(1, N)] + [torch.stack(new)]
                out.append(torch.stack(rows))
        return {"X": torch.stack(out).reshape(B, H, N, -1), "step": state["step"]}

    def step(self, state, q, k, v):
        """One decode step, key of the new token already in k, v (B,H,S,D). -> y, keep, p, new state.
        The row fed back is the full softmax when step % calibrate == 0 (steps from 1), else the sparse one
        (calibrate None: never full)."""
        count = state["step"] + 1
        p = self.predict(state)
        keep = self.select(state, k.shape[2], p)
        y, full, sparse = self.attend(q, k, v, keep)
        dense = self.calibrate is not None and count % self.calibrate == 0
        state = self.update(state, full if dense else sparse)
        state["step"] = count
        return y, keep, p, state


def union_of_group(keep, num_kv_heads):
    """keep (B,H,S) -> (B,G,S): what a cache that stores per key head must hold."""
    B, H, S = keep.shape
    out = torch.zeros(B, num_kv_heads, S, dtype=torch.bool)
    for n in range(B):
        for h in range(H):
            for j in range(S):
                if bool(keep[n, h, j]):
                    out[n, h // (H // num_kv_heads), j] = True
    return out


def mse(p, target):
    """recalled target: mean over blocks of (p_c - P(a_next)_c)^2. p, target lists of scalars. # OPEN: not seen."""
    return sum((a - t) ** 2 for a, t in zip(p, target)) / len(p)
