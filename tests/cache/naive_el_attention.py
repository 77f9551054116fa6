"""EL-attention's oracle: ordinary multi-head attention, formula by formula (it claims to equal that exactly)."""

import torch


def naive_el_attention(q, x, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, *, heads, keep=None, causal=False, beam=1):
    """q (B*beam,T,M), x (B,S,M) -> (B*beam,T,M).

    Weights (M,M) as (out, in), heads are row blocks of w_q, w_k, w_v and column blocks of w_o; biases (M).
    Rows of q are grouped by sentence: row r reads x[r // beam]. keep (B,S): True = a real token. causal: query t reads
    keys s <= t + S - T. out = b_o + sum_h W_o_h sum_s a_hs (W_v_h x_s + b_v_h),
    a_hs = softmax_s((W_q_h q + b_q_h) . (W_k_h x_s + b_k_h) / sqrt(D)). A query that reads nothing gets b_o alone.
    """
    rows, queries, width = q.shape
    keys, each = x.shape[1], width // heads
    out = []
    for r in range(rows):
        sentence = r // beam
        for t in range(queries):
            seen = [
                s
                for s in range(keys)
                if (keep is None or keep[sentence, s]) and (not causal or s <= t + keys - queries)
            ]
            total = b_o
            for h in range(heads if seen else 0):
                part = slice(h * each, (h + 1) * each)
                query = w_q[part] @ q[r, t] + b_q[part]
                logits = [torch.dot(query, w_k[part] @ x[sentence, s] + b_k[part]) / each**0.5 for s in seen]
                top = max(e.item() for e in logits)
                weights = [torch.exp(e - top) for e in logits]
                norm = sum(weights)
                mixed = sum(
                    w / norm * (w_v[part] @ x[sentence, s] + b_v[part]) for w, s in zip(weights, seen, strict=True)
                )
                total = total + w_o[:, part] @ mixed
            out.append(total)
    return torch.stack(out).reshape(rows, queries, width)
