"""SuperGAT one node, one head and one edge at a time, and its self-supervised loss one pair at a time."""

import math

import torch


def _pair(z_i, z_j, kind, a_dst, a_src):
    """e_ij, one head."""
    g = (z_i * z_j).sum()
    gat = (a_dst * z_i).sum() + (a_src * z_j).sum()
    return {"MX": gat * torch.sigmoid(g), "SD": g / math.sqrt(len(z_i)), "GO": gat, "DP": g}[kind]


def naive_supergat(x, edges, W, bias, kind, a_dst, a_src, H, mean=False, slope=0.2):
    """x (N, M), edges [(j, i)] with loops already there, W (H D, M), a (H, D) -> (N, H D), or (N, D) when mean.

    alpha_ij = softmax over j of LeakyReLU(e_ij);  y_i = sum_j alpha_ij z_j.
    """
    z = torch.stack([(W @ x[n]).reshape(H, -1) for n in range(len(x))])
    out = []
    for i in range(len(x)):
        into = [j for j, target in edges if target == i]
        heads = []
        for h in range(H):
            e = [_pair(z[i, h], z[j, h], kind, a_dst[h], a_src[h]) for j in into]
            e = [one if one >= 0 else slope * one for one in e]
            top = max((float(one.detach()) for one in e), default=0.0)
            p = [torch.exp(one - top) for one in e]
            y = torch.zeros(z.shape[-1], dtype=x.dtype)
            for one, j in zip(p, into):
                y = y + one / sum(p) * z[j, h]
            heads.append(y)
        out.append((sum(heads) / H if mean else torch.cat(heads)) + bias)
    return torch.stack(out)


def naive_edge_loss(x, positives, negatives, W, kind, a_dst, a_src, H):
    """Mean over positives and negatives of the binary cross-entropy of sigmoid(mean over heads of phi).

    phi: the raw dot product for MX and DP, divided by sqrt(D) for SD, the GAT logit for GO.
    """
    z = torch.stack([(W @ x[n]).reshape(H, -1) for n in range(len(x))])
    loss = 0.0
    for label, pairs in ((1, positives), (0, negatives)):
        for j, i in pairs:
            phi = [_pair(z[i, h], z[j, h], "DP" if kind == "MX" else kind, a_dst[h], a_src[h]) for h in range(H)]
            p = torch.sigmoid(sum(phi) / H)
            loss = loss - torch.log(p if label else 1 - p)
    return loss / (len(positives) + len(negatives))
