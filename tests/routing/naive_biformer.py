"""Bi-level routing attention written out (BiFormer, arXiv 2303.08810), as in the authors' first implementation."""

import torch


def pooled(map_of, tall, wide, side, kind):
    """A region's map {(row, column): vector} as side x side cells of rows floor(a h / n) .. ceil((a + 1) h / n)."""
    cells = []
    for a in range(side):
        for c in range(side):
            rows = range(a * tall // side, -(-(a + 1) * tall // side))
            columns = range(c * wide // side, -(-(c + 1) * wide // side))
            held = torch.stack([map_of[r, i] for r in rows for i in columns])
            cells.append(held.mean(0) if kind == "mean" else held.amax(0))
    return cells


def naive_biformer(
    x, w_qkv, b_qkv, depthwise, b_depthwise, w_out, b_out, *, regions, topk, heads,
    soft=False, w_route=None, b_route=None, pool=None, pool_to=None,
):  # fmt: skip
    """x (B,C,Y,X) -> (B,C,Y,X).

    w_qkv (2Q+C, C), b_qkv (2Q+C): rows are q, k, v. depthwise (C,1,K,K) or None, b_depthwise (C).
    w_out (C,C), b_out (C), or None for no output map.
    regions = S a side, topk = regions read by each region.
    0. zeros at the bottom and right up to multiples of S, before the projection (padded tokens hold the biases).
    1. q, k, v of every token. 2.-3. Region means over all heads together, affinity by dot product, the topk largest
    (no gradient, one choice for all heads). 4. Softmax attention of each token over all tokens of its region's choice,
    scale Q^-1/2 (the full width). 5. plus a depthwise K x K cross-correlation of the v map, then the output map; crop.
    Variants. `soft`: keys and values of a chosen region are multiplied by its weight, a softmax over the chosen
    affinities (scaled, with a gradient). w_route (Q,Q), b_route (Q): both means go through this linear map first.
    `pool` "mean" or "max": a region's keys and values are pool_to x pool_to pooled ones; its means are those of all.
    """
    batch, channels, rows, columns = x.shape
    height, width = -(-rows // regions) * regions, -(-columns // regions) * regions
    tall, wide = height // regions, width // regions
    inner = (w_qkv.shape[0] - channels) // 2
    head_qk, head_v = inner // heads, channels // heads
    outputs = []
    for b in range(batch):
        q, k, v = {}, {}, {}
        for y in range(height):
            for z in range(width):
                token = x[b, :, y, z] if y < rows and z < columns else x.new_zeros(channels)
                projected = w_qkv @ token + b_qkv
                q[y, z], k[y, z], v[y, z] = projected[:inner], projected[inner : 2 * inner], projected[2 * inner :]
        members = {
            (j, i): [(j * tall + a, i * wide + c) for a in range(tall) for c in range(wide)]
            for j in range(regions)
            for i in range(regions)
        }
        mean_q = {r: sum(q[p] for p in places) / (tall * wide) for r, places in members.items()}
        mean_k = {r: sum(k[p] for p in places) / (tall * wide) for r, places in members.items()}
        if w_route is not None:
            mean_q, mean_k = ({r: w_route @ z + b_route for r, z in mean.items()} for mean in (mean_q, mean_k))
        keys, values = {}, {}
        for (j, i), places in members.items():
            for tokens, held in ((k, keys), (v, values)):
                own = {(y - j * tall, z - i * wide): tokens[y, z] for y, z in places}
                held[j, i] = list(own.values()) if pool is None else pooled(own, tall, wide, pool_to, pool)
        for y in range(rows):
            for z in range(columns):
                region = (y // tall, z // wide)
                affinity = {r: torch.dot(mean_q[region], mean_k[r]) * inner**-0.5 for r in members}
                chosen = sorted(members, key=lambda r: -float(affinity[r].detach()))[:topk]
                shares = torch.stack([affinity[r] for r in chosen]).softmax(0) if soft else [1.0] * topk
                seen = [(s * key, s * value) for r, s in zip(chosen, shares, strict=True)
                        for key, value in zip(keys[r], values[r], strict=True)]  # fmt: skip
                parts = []
                for m in range(heads):
                    here = slice(m * head_qk, (m + 1) * head_qk)
                    logits = [torch.dot(q[y, z][here], key[here]) * inner**-0.5 for key, _ in seen]
                    top = max(e.item() for e in logits)
                    weights = [torch.exp(e - top) for e in logits]
                    total = sum(weights)
                    mine = slice(m * head_v, (m + 1) * head_v)
                    parts.append(sum(w / total * value[mine] for w, (_, value) in zip(weights, seen, strict=True)))
                mixed = torch.cat(parts)
                if depthwise is not None:
                    side = depthwise.shape[-1]
                    local = b_depthwise
                    for a in range(side):
                        for c in range(side):
                            place = (y + a - side // 2, z + c - side // 2)
                            if place in v:
                                local = local + depthwise[:, 0, a, c] * v[place]
                    mixed = mixed + local
                outputs.append(mixed if w_out is None else w_out @ mixed + b_out)
    return torch.stack(outputs).reshape(batch, rows, columns, channels).permute(0, 3, 1, 2)
