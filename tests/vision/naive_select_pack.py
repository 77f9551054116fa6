"""Oracle A043 (B105 is the same mechanism): Select and Pack Attention. Equations 1-8 (no golden numbers).

Its author has read neither the code nor its tests.
There are no golden numbers; images that are not split equal attention over their chosen tokens to 9e-15.
"""

import math

import torch


def linear(x, w, b=None):
    return torch.stack([(row * x).sum() for row in w]) + (0 if b is None else b)


def softmax(scores):
    top = max(float(s.detach()) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e)
    return [x / total for x in e]


def upsample(score, old, new):
    """Nearest (inferred). score (B,N_old) on the grid old = (Y,X) -> (B,N_new) on the grid new."""
    places = [(y * old[0] // new[0]) * old[1] + x * old[1] // new[1] for y in range(new[0]) for x in range(new[1])]
    return torch.stack([torch.stack([row[p] for p in places]) for row in score])


def score_map(r, wg, bg, previous=None):
    """Eq. 1. r (B,N,C), wg (C,), bg scalar, previous (B,N) already at this scale -> s (B,N)."""
    s = torch.stack([torch.stack([(x * wg).sum() + bg for x in row]) for row in r])
    return s if previous is None else torch.maximum(s, previous)


def choose(s, *, threshold=0.5, temperature=1.0, noise=None):
    """Eq. 3. s (B,N) -> choice (B,N) of 0 and 1. noise (B,N,2): Gumbel noise of training, straight-through.

    Two-way logits [s, 0]; without noise (evaluation): sigmoid(s) > threshold and no gradient.
    """
    rows = []
    for b in range(s.shape[0]):
        for i in range(s.shape[1]):
            if noise is None:
                soft = torch.sigmoid(s[b, i]).detach()
                rows.append((soft > threshold).to(s.dtype))
            else:
                soft = softmax([(s[b, i] + noise[b, i, 0]) / temperature, noise[b, i, 1] / temperature])[0]
                rows.append((soft > threshold).to(s.dtype) + soft - soft.detach())
    return torch.stack(rows).reshape(s.shape)


def raster(grid, shift=(0, 0)):
    """Eq. 7. Token numbers in the raster order of the map rolled by -shift (what was at `shift` comes first)."""
    height, width = grid
    return [((y + shift[0]) % height) * width + (x + shift[1]) % width for y in range(height) for x in range(width)]


def pack(x, chosen, length, *, order=None, align=False):
    """Eq. 4. x (B,N,C), chosen (B,N) bool -> packed (P,L,C), image (P,L), place (P,L); -1 and zeros where padded.

    align: an image that would be split but fits into one container starts a new one.
    """
    slots = []
    for b in range(x.shape[0]):
        mine = [(b, i) for i in (order or range(x.shape[1])) if bool(chosen[b, i])]
        room = -len(slots) % length
        if align and room < len(mine) <= length:
            slots += [(-1, -1)] * room
        slots += mine
    slots += [(-1, -1)] * (-len(slots) % length)
    count = len(slots) // length
    rows = [x[b, i] if b >= 0 else torch.zeros_like(x[0, 0]) for b, i in slots]
    packed = torch.stack(rows).reshape(count, length, -1) if rows else x.new_zeros(0, length, x.shape[2])
    slots = torch.tensor(slots, dtype=torch.long).reshape(count, length, 2)
    return packed, slots[..., 0], slots[..., 1]


def unpack(packed, image, place, batch, tokens):
    """Eq. 6. -> (B,N,C), 0 where nothing was packed."""
    slots = [(p, i) for p in range(packed.shape[0]) for i in range(packed.shape[1])]
    found = {(int(image[s]), int(place[s])): packed[s] for s in slots}
    rows = [found.get((b, i), packed.new_zeros(packed.shape[2])) for b in range(batch) for i in range(tokens)]
    return torch.stack(rows).reshape(batch, tokens, -1)


def packed_attention(packed, image, wq, wk, wv, wo, heads, biases=(None,) * 4):
    """Eq. 5. Attention inside a container between tokens of the same image; padded rows are 0. -> (P,L,C)."""
    rows = []
    for p in range(packed.shape[0]):
        q, k, v = ([linear(x, w, b) for x in packed[p]] for w, b in zip((wq, wk, wv), biases, strict=False))
        d = len(q[0]) // heads
        for i in range(packed.shape[1]):
            if image[p, i] < 0:
                rows.append(packed.new_zeros(len(wo)))
                continue
            seen, parts = [j for j in range(packed.shape[1]) if image[p, j] == image[p, i]], []
            for h in range(heads):
                cut = slice(h * d, (h + 1) * d)
                w = softmax([(q[i][cut] * k[j][cut]).sum() / math.sqrt(d) for j in seen])
                parts.append(sum(a * v[j][cut] for a, j in zip(w, seen, strict=True)))
            rows.append(linear(torch.cat(parts), wo, biases[3]))
    return torch.stack(rows).reshape(*packed.shape[:2], -1) if rows else packed


def select_pack(r, wg, bg, weights, *, heads, length, previous=None, noise=None, threshold=0.5, temperature=1.0,
                order=None, align=False, biases=(None,) * 4):  # fmt: skip
    """Eq. 1-6. r (B,N,C) -> branch (B,N,C) (0 at unchosen tokens; the residual is the caller's), s (B,N), choice."""
    s = score_map(r, wg, bg, previous)
    choice = choose(s, threshold=threshold, temperature=temperature, noise=noise)
    gated = choice[..., None] * torch.sigmoid(s)[..., None] * r  # eq. 2 and 3
    packed, image, place = pack(gated, choice.detach() > 0.5, length, order=order, align=align)
    out = packed_attention(packed, image, *weights, heads, biases)
    return unpack(out, image, place, *r.shape[:2]), s, choice


def select_loss(scores, labels):
    """Eq. 8. Lists of s (B,N) and y (B,N), one a block: sum of mean binary cross entropies of sigmoid(s)."""
    pairs = [(torch.sigmoid(s), y) for s, y in zip(scores, labels, strict=True)]
    return sum(-(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean() for p, y in pairs)
