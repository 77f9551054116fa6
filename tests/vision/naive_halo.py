"""HaloNet's blocked local attention (arXiv 2103.12731), written out query by query and key by key."""

import torch
from torch import Tensor


def naive_halo(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_table: Tensor | None,
    width_table: Tensor | None,
    block: int,
    halo: int,
    stride: int = 1,
    scale_positions: bool = False,
    mask_padding: bool = False,
    strided_offsets: str = "timm",
) -> Tensor:
    """q (B, H, Y/s, X/s, D), k (B, H, Y, X, D), v (B, H, Y, X, V) -> (B, H, Y/s, X/s, V).

    Queries of block (I, J) see the keys at rows I b - h .. I b + b + h - 1 and the same columns; W = b + 2 h. The logit
    is D^-1/2 q.k + q.R_y[u - i + W - 1] + q.R_x[w - j + W - 1], with u, w the key's place in the window and i, j the
    query's place in its block; R_y, R_x are (2 W - 1, D), one pair for all heads; None leaves them out.
    scale_positions: D^-1/2 multiplies the position terms too. Keys outside the map have k = v = 0 and take part in the
    softmax, or not at all with mask_padding. With stride 2 the query's place i counts strided queries
    (strided_offsets="timm") or pixels ("pixels").
    """
    B, H, Y, X, D = k.shape
    out = q.new_zeros(B, H, q.shape[2], q.shape[3], v.shape[-1])
    W = block + 2 * halo
    zero_k, zero_v = k.new_zeros(D), v.new_zeros(v.shape[-1])
    for b in range(B):
        for h in range(H):
            for y in range(q.shape[2]):
                for x in range(q.shape[3]):
                    top, left = y * stride // block * block, x * stride // block * block
                    i, j = y * stride - top, x * stride - left
                    if strided_offsets == "timm":
                        i, j = i // stride, j // stride
                    query = q[b, h, y, x]
                    logits, values = [], []
                    for u in range(W):
                        for w in range(W):
                            yy, xx = top - halo + u, left - halo + w
                            inside = 0 <= yy < Y and 0 <= xx < X
                            if mask_padding and not inside:
                                continue
                            key = k[b, h, yy, xx] if inside else zero_k
                            place = query.new_zeros(())
                            if height_table is not None:
                                place = place + torch.einsum("d,d->", query, height_table[u - i + W - 1])
                            if width_table is not None:
                                place = place + torch.einsum("d,d->", query, width_table[w - j + W - 1])
                            dot = torch.einsum("d,d->", query, key)
                            logits.append(dot * D**-0.5 + place * (D**-0.5 if scale_positions else 1.0))
                            values.append(v[b, h, yy, xx] if inside else zero_v)
                    largest = max(z.item() for z in logits)
                    e = [torch.exp(z - largest) for z in logits]
                    out[b, h, y, x] = sum(one / sum(e) * value for one, value in zip(e, values, strict=True))
    return out
