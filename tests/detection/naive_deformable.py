"""Multi-scale deformable attention (Deformable DETR, RT-DETRv2's options) one sample at a time."""

import math

import torch


def linear(vector, weight, bias):
    """weight @ vector + bias, entry by entry of the output."""
    return torch.stack([(weight[o] * vector).sum() + bias[o] for o in range(weight.shape[0])])


def pixel(image, row, column):
    """image (Y, X, D); 0 outside."""
    Y, X, D = image.shape
    if 0 <= row < Y and 0 <= column < X:
        return image[row, column]
    return torch.zeros(D, dtype=image.dtype)


def naive_deformable(
    x, mem, ref, shapes, points, Woff, boff, Wa, ba, Wv, bv, Wo, bo, heads, discrete=False, offset_scale=0.5, keep=None
):
    """x (B, T, M), mem (B, S, M), ref (B, T, L or 1, 2 or 4), shapes [(Y, X)], points [K_l], weights (out, in).

    keep (B, S): False hides a row of mem. Offsets' and weights' outputs are in the order head, level, point, (x, y).
        value = Wv mem + bv, 0 where hidden
        weight = softmax over levels and points of (Wa x + ba)
        points: loc = ref + off / (X, Y);  boxes: loc = centre + off / K_l * (w, h) * offset_scale
        bilinear: u = loc_x X - 1/2, w = loc_y Y - 1/2;  discrete: trunc(loc X + 1/2), clamped
    """
    B, T, M = x.shape
    D, P = M // heads, sum(points)
    out = []
    for b in range(B):
        value = []
        for s in range(mem.shape[1]):
            hidden = keep is not None and not keep[b, s]
            value.append(torch.zeros(M, dtype=x.dtype) if hidden else linear(mem[b, s], Wv, bv))
        maps, start = [], 0
        for Y, X in shapes:
            maps.append(torch.stack(value[start : start + Y * X]).reshape(Y, X, M))
            start += Y * X
        for t in range(T):
            offsets = linear(x[b, t], Woff, boff).reshape(heads, P, 2)
            logits = linear(x[b, t], Wa, ba).reshape(heads, P)
            merged = []
            for h in range(heads):
                e = [torch.exp(logits[h, p] - logits[h].detach().max()) for p in range(P)]
                total = sum(e)
                acc, p = torch.zeros(D, dtype=x.dtype), 0
                for level, (Y, X) in enumerate(shapes):
                    image = maps[level][:, :, h * D : (h + 1) * D]
                    r = ref[b, t, level if ref.shape[2] > 1 else 0]
                    for _ in range(points[level]):
                        if len(r) == 2:
                            lx = r[0] + offsets[h, p, 0] / X
                            ly = r[1] + offsets[h, p, 1] / Y
                        else:
                            lx = r[0] + offsets[h, p, 0] / points[level] * r[2] * offset_scale
                            ly = r[1] + offsets[h, p, 1] / points[level] * r[3] * offset_scale
                        if discrete:
                            column = min(max(math.trunc(float(lx.detach()) * X + 0.5), 0), X - 1)
                            row = min(max(math.trunc(float(ly.detach()) * Y + 0.5), 0), Y - 1)
                            sample = image[row, column]
                        else:
                            u, w = lx * X - 0.5, ly * Y - 0.5
                            i, j = math.floor(float(u.detach())), math.floor(float(w.detach()))
                            sample = torch.zeros(D, dtype=x.dtype)
                            for column in (i, i + 1):
                                for row in (j, j + 1):
                                    near_x = 1 - (u - column) if column == i else 1 - (column - u)
                                    near_y = 1 - (w - row) if row == j else 1 - (row - w)
                                    sample = sample + near_x * near_y * pixel(image, row, column)
                        acc = acc + e[p] / total * sample
                        p += 1
                merged.append(acc)
            out.append(linear(torch.cat(merged), Wo, bo))
    return torch.stack(out).reshape(B, T, M)
