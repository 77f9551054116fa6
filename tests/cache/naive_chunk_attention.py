"""ChunkAttention's oracle: each sequence by itself, softmax over all of its cached tokens."""

import torch


def naive_chunk_attention(q, keys, values):
    """q (N,H,D); keys, values: N lists' worth of tensors (S_r,H,D) -> (N,H,D).

    out_rh = sum_s softmax_s(q_rh . k_rhs / sqrt(D)) v_rhs over all S_r tokens of row r (its newest token is already
    among them, so no mask). A row with no tokens gives 0.
    """
    rows, heads, width = q.shape
    out = []
    for r in range(rows):
        for h in range(heads):
            logits = [torch.dot(q[r, h], keys[r][s, h]) / width**0.5 for s in range(len(keys[r]))]
            if not logits:
                out.append(torch.zeros(values[r].shape[-1], dtype=q.dtype))
                continue
            top = max(e.item() for e in logits)
            weights = [torch.exp(e - top) for e in logits]
            total = sum(weights)
            out.append(sum(w / total * values[r][s, h] for s, w in enumerate(weights)))
    return torch.stack(out).reshape(rows, heads, -1)


def naive_stored_tokens(prompts, chunk):
    """Token ids of N prompts, added in this order -> number of tokens that the prefix tree stores.

    A node holds up to `chunk` tokens. A prompt walks from the root into the first child that has children itself (a
    leaf is never shared) and whose tokens equal the prompt's next ones; the rest becomes a chain of new nodes, with
    an empty one at the end when the last is full.
    """
    root = {"tokens": (), "children": []}
    for prompt in prompts:
        node, place = root, 0
        while True:
            for child in node["children"]:
                size = len(child["tokens"])
                if child["children"] and child["tokens"] == tuple(prompt[place : place + size]):
                    node, place = child, place + size
                    break
            else:
                break
        rest = [tuple(prompt[a : a + chunk]) for a in range(place, len(prompt), chunk)]
        if not rest or len(rest[-1]) == chunk:
            rest.append(())
        for tokens in rest:
            new = {"tokens": tokens, "children": []}
            node["children"].append(new)
            node = new

    def count(node):
        return len(node["tokens"]) + sum(count(child) for child in node["children"])

    return count(root)
