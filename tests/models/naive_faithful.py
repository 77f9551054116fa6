"""iFAM: two transformers, the parts that the first finds, the mask that the second has, and losses, in loops.

Its author saw only an account of the equations, neither code nor tests of the library.
"""

import math

import torch
import torch.nn.functional as F


def layer_norm(x, weight, bias, eps):
    """Over the last axis."""
    M = x.shape[-1]
    mean = x.sum(-1, keepdim=True) / M
    var = ((x - mean) ** 2).sum(-1, keepdim=True) / M
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


# --- ViT with a key mask
def masked_attention(x, w_qkv, b_qkv, w_out, b_out, num_heads, *, keep=None, weight=None, log_bias=None):
    """x (B,L,M), prefix tokens included; w_qkv (3M,M): q, k, v. All rows are computed; only keys are hidden.

    keep (B,L) bool: keys with False get -inf. log_bias (B,L): added to the scores of a key. weight (B,L): A_ij = m_j
    e^s / sum m_j e^s
    (for m in {0,1} the hard mask, and a gradient for m)."""
    B, L, M = x.shape
    D = M // num_heads
    qkv = F.linear(x, w_qkv, b_qkv)
    q, k, v = qkv[..., :M], qkv[..., M : 2 * M], qkv[..., 2 * M :]
    out = []
    for b in range(B):
        keys = [j for j in range(L) if keep is None or bool(keep[b, j])]
        rows = []
        for i in range(L):
            heads = []
            for h in range(num_heads):
                c = slice(h * D, (h + 1) * D)
                s = torch.stack([(q[b, i, c] * k[b, j, c]).sum() / math.sqrt(D) for j in keys])
                if log_bias is not None:
                    s = s + torch.stack([log_bias[b, j] for j in keys])
                e = torch.exp(s - s.max().detach())
                if weight is not None:
                    e = e * torch.stack([weight[b, j] for j in keys])
                a = e / e.sum()
                heads.append(sum(a[n] * v[b, j, c] for n, j in enumerate(keys)))
            rows.append(torch.cat(heads))
        out.append(torch.stack(rows))
    return F.linear(torch.stack(out), w_out, b_out)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def vit_block(x, p, num_heads, **mask):
    """p: dict norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2 (.weight, .bias) and ls1.gamma, ls2.gamma (layer
    scale; may lack)."""

    def g(n):
        return p.get(n, 1.0)

    h = layer_norm(x, p["norm1.weight"], p["norm1.bias"], 1e-6)
    h = masked_attention(
        h, p["attn.qkv.weight"], p["attn.qkv.bias"], p["attn.proj.weight"], p["attn.proj.bias"], num_heads, **mask
    )
    x = x + h * g("ls1.gamma")
    h = layer_norm(x, p["norm2.weight"], p["norm2.bias"], 1e-6)
    h = F.linear(gelu(F.linear(h, p["mlp.fc1.weight"], p["mlp.fc1.bias"])), p["mlp.fc2.weight"], p["mlp.fc2.bias"])
    return x + h * g("ls2.gamma")


def embed(image, p):
    """Patches (conv p stride p), [class, registers, patches] row-major, plus positions for all of them -> (tokens,
    number of prefix
    tokens, Y, X). Positions are added before anything is cut."""
    w = p["patch_embed.proj.weight"]
    z = F.conv2d(image, w, p["patch_embed.proj.bias"], stride=w.shape[-1])
    B, M, Y, X = z.shape
    prefix = torch.cat([p["cls_token"], p["reg_token"]], 1)
    x = torch.cat([prefix.expand(B, -1, -1), z.reshape(B, M, Y * X).transpose(1, 2)], 1)
    return x + p["pos_embed"], prefix.shape[1], Y, X


def block_params(p, n):
    return {k[len(f"blocks.{n}.") :]: v for k, v in p.items() if k.startswith(f"blocks.{n}.")}


def depth(p):
    return 1 + max(int(k.split(".")[1]) for k in p if k.startswith("blocks."))


def vit(image, p, num_heads, *, patch_mask=None, form="hard", cut=False, prefix_bias=1e-10, eps_log=1e-10):
    """The whole ViT with its final norm (1e-6). patch_mask (B,N) or None -> (tokens (B,L,M), prefix count, Y, X).

    form "hard": keys with mask 0 hidden, no gradient to the mask (the released code). "soft": log(mask + 1e-10) added
    (eq. 7), prefix
    log(1 + 1e-10) as in the code (the account says 0: 1e-10 apart). "weight": each key weighted by its mask (gradient
    kept).
    OPEN: "weight" is the account's "multiply attention by the straight-through m (our choice)": here multiplied
    BEFORE the row is
    normalised, so that rows still sum to 1; multiplying after would change the hard forward.
    cut=True (form "hard", one mask for the batch): hidden patches are removed before the blocks; same result for the
    class token."""
    x, n, Y, X = embed(image, p)
    B, _L = x.shape[:2]
    kw = {}
    if patch_mask is not None:
        one = torch.ones(B, n, dtype=x.dtype)
        full = torch.cat([one, patch_mask.to(x.dtype)], 1)
        if form == "hard":
            keep = full.detach() != 0
            if cut:
                assert bool((keep == keep[:1]).all())
                x = x[:, keep[0]]
            else:
                kw = {"keep": keep}
        elif form == "soft":
            kw = {"log_bias": torch.cat([one * prefix_bias, torch.log(patch_mask + eps_log)], 1)}
        else:
            assert form == "weight"
            kw = {"weight": full}
    for i in range(depth(p)):
        x = vit_block(x, block_params(p, i), num_heads, **kw)
    return layer_norm(x, p["norm.weight"], p["norm.bias"], 1e-6), n, Y, X


def stage2(image, patch_mask, p, num_heads, **options):
    """Eq. 6-7. Class token -> norm (in vit) -> LayerNorm (1e-5) -> bias-free linear. -> (B,classes)."""
    x, *_ = vit(image, p, num_heads, patch_mask=patch_mask, **options)
    return F.linear(layer_norm(x[:, 0], p["fc_norm.weight"], p["fc_norm.bias"], 1e-5), p["head.weight"])


# --- stage 1: parts
def part_logits(z, prototypes):
    """Eq. 2. z (B,M,Y,X), prototypes (K+1,M) -> l_k = -||z - p_k||^2 (B,K+1,Y,X)."""
    B, _M, Y, X = z.shape
    out = torch.empty(B, prototypes.shape[0], Y, X, dtype=z.dtype)
    for b in range(B):
        for k in range(prototypes.shape[0]):
            for y in range(Y):
                for i in range(X):
                    out[b, k, y, i] = -((z[b, :, y, i] - prototypes[k]) ** 2).sum()
    return out


def thresholded_logits(z, prototypes, thresholds):
    """Optional at test: dot products instead of distances; a part below its threshold gets -inf, the background
    stays. thresholds (K,)."""
    B, _M, Y, X = z.shape
    K = prototypes.shape[0] - 1
    out = torch.empty(B, K + 1, Y, X, dtype=z.dtype)
    for b in range(B):
        for k in range(K + 1):
            for y in range(Y):
                for i in range(X):
                    d = (z[b, :, y, i] * prototypes[k]).sum()
                    out[b, k, y, i] = d if k == K or d >= thresholds[k] else -math.inf
    return out


def part_maps(l, *, tau=1.0, gumbel=None):
    """softmax over k of (l [+ noise]) / tau."""
    return torch.softmax((l if gumbel is None else l + gumbel) / tau, 1)


def part_features(z, maps, weight, bias, eps=1e-5):
    """Eq. 3. v_k = mean over ALL places of map_k z, then LayerNorm over the whole (M,K+1) matrix; weight, bias
    (M,K+1) -> (B,M,K+1)."""
    B, M, Y, X = z.shape
    K1 = maps.shape[1]
    out = []
    for b in range(B):
        v = torch.empty(M, K1, dtype=z.dtype)
        for m in range(M):
            for k in range(K1):
                v[m, k] = sum(maps[b, k, y, i] * z[b, m, y, i] for y in range(Y) for i in range(X)) / (Y * X)
        mean = v.sum() / (M * K1)
        var = ((v - mean) ** 2).sum() / (M * K1)
        out.append((v - mean) / torch.sqrt(var + eps) * weight + bias)
    return torch.stack(out)


def part_scores(features, w_class, *, keep=None, rate=0.3):
    """Stage-1 scores (B,classes,K) of the K foreground parts, one bias-free linear (classes,M) for all; their mean
    over K is trained.

    keep (B,K) bool: dropout of whole parts in training, kept ones times 1 / (1 - rate); None = eval."""
    _B, _M, K1 = features.shape
    cols = []
    for k in range(K1 - 1):
        v = features[:, :, k]
        if keep is not None:
            v = v * keep[:, k : k + 1].to(v.dtype) / (1 - rate)
        cols.append(F.linear(v, w_class))
    return torch.stack(cols, -1)


def foreground(l, *, tau=1.0, gumbel=None, keep=None):
    """Eq. 4-5. l (B,K+1,Y,X); gumbel the noise of that shape or None (noise=False); keep (B,K) bool or None:
    training's dropout of
    foreground maps (kept maps unchanged).
    -> soft (B,2,Y,X) = (fg = max over k < K of g_k, bg = g_K), hard (B,2,Y,X): the one-hot of the larger (ties:
    foreground) with
    - stop(s) + s, s = the SUM over foreground parts, added to BOTH channels (as in the code). The mask is hard[:,
    0]."""
    g = part_maps(l, tau=tau, gumbel=gumbel)
    K = g.shape[1] - 1
    fg = [g[:, k] if keep is None else g[:, k] * keep[:, k, None, None].to(g.dtype) for k in range(K)]
    best = torch.stack(fg).max(0).values
    soft = torch.stack([best, g[:, K]], 1)
    one = (best >= g[:, K]).to(g.dtype)
    s = sum(fg)
    hard = torch.stack([one - s.detach() + s, 1 - one - s.detach() + s], 1)
    return soft, hard


def without_parts(maps, drop_parts):
    """Eq. 9. maps (B,K+1,Y,X) of softmax (part_maps, not the noisy g) -> mask (B,Y,X) of 0 / 1.

    Places whose arg max is a removed part become background; elsewhere foreground if the best REMAINING part >=
    background."""
    B, K1, Y, X = maps.shape
    K = K1 - 1
    rest = [k for k in range(K) if k not in drop_parts]
    mask = torch.zeros(B, Y, X, dtype=maps.dtype)
    for b in range(B):
        for y in range(Y):
            for i in range(X):
                m = maps[b, :, y, i].detach()
                if int(m.argmax()) in drop_parts or not rest:
                    continue
                mask[b, y, i] = float(max(float(m[k]) for k in rest) >= float(m[K]))
    return mask


def stage1(
    image, p, num_heads, *, tau=1.0, map_gumbel=None, mask_gumbel=None, thresholds=None, keep_parts=None, keep_maps=None
):
    """Eq. 1-5 -> dict tokens z (B,M,Y,X), logits, part_maps, features, scores, soft, hard."""
    x, n, Y, X = vit(image, p, num_heads)
    B, _L, M = x.shape
    z = x[:, n:].transpose(1, 2).reshape(B, M, Y, X)
    proto = p["fc_landmarks.weight"].reshape(-1, M)
    l = part_logits(z, proto) if thresholds is None else thresholded_logits(z, proto, thresholds)
    maps = part_maps(l, tau=tau, gumbel=map_gumbel)
    v = part_features(z, maps, p["modulation.weight"], p["modulation.bias"])
    soft, hard = foreground(l, tau=tau, gumbel=mask_gumbel, keep=keep_maps)
    return {
        "tokens": z,
        "logits": l,
        "part_maps": maps,
        "features": v,
        "scores": part_scores(v, p["fc_class_landmarks.weight"], keep=keep_parts),
        "soft": soft,
        "hard": hard,
    }


def faithful_vit(
    image, p1, p2, num_heads, *, mask="hard", drop_parts=(), gradient="none", tau=1.0, mask_gumbel=None, map_gumbel=None
):
    """The two stages -> (logits (B,classes), part_maps (B,K+1,N), mask (B,N), part_logits).

    mask "hard": hard[:, 0]; "soft": soft[:, 0]. gradient "none": the released code's stage 2 (bool mask); "weight":
    gradient kept.
    OPEN: part_logits: the account doesn't say whether these are l, the dot products z . p_k (the code's last output)
    or the stage-1
    scores; the scores (B,classes,K) are returned. drop_parts only with mask="hard" here."""
    s = stage1(image, p1, num_heads, tau=tau, mask_gumbel=mask_gumbel, map_gumbel=map_gumbel)
    m = s["hard"][:, 0] if mask == "hard" else s["soft"][:, 0]
    if drop_parts:
        assert mask == "hard"
        m = without_parts(s["part_maps"], drop_parts)
    m = m.flatten(1)
    form = "soft" if mask == "soft" else ("hard" if gradient == "none" else "weight")
    return stage2(image, m, p2, num_heads, form=form), s["part_maps"].flatten(2), m, s["scores"]


# --- losses (eq. 8)
def mean3(maps):
    """3x3 means, stride 1, no padding: (B,K,Y,X) -> (B,K,Y-2,X-2)."""
    Y, X = maps.shape[2:]
    rows = [
        [sum(maps[:, :, y + a, i + e] for a in range(3) for e in range(3)) / 9 for i in range(X - 2)]
        for y in range(Y - 2)
    ]
    return torch.stack([torch.stack(r, -1) for r in rows], -2)


def presence(maps):
    """1 - mean over the given maps k of the max over batch and place of mean3. The code gives the foreground maps
    only, maps[:, :-1]
    (the account doesn't say so)."""
    m = mean3(maps)
    return 1 - sum(m[:, k].max() for k in range(m.shape[1])) / m.shape[1]


def background_presence(maps):
    """Mean over samples of -log(max over places of mean3(map_K) rho), rho = squared distance from the centre, scaled
    to max 1."""
    m = mean3(maps[:, -1:])[:, 0]
    B, Y, X = m.shape
    r = [[(2 * y / (Y - 1) - 1) ** 2 + (2 * i / (X - 1) - 1) ** 2 for i in range(X)] for y in range(Y)]
    top = max(max(row) for row in r)
    loss = 0
    for b in range(B):
        best = torch.stack([m[b, y, i] * (r[y][i] / top) for y in range(Y) for i in range(X)]).max()
        loss = loss - torch.log(best)
    return loss / B


def total_variation(maps):
    """Sum of |differences| of neighbours (rows and columns, all maps) / (B Y X)."""
    B, _K, Y, X = maps.shape
    s = sum((maps[:, :, y + 1] - maps[:, :, y]).abs().sum() for y in range(Y - 1))
    s = s + sum((maps[..., i + 1] - maps[..., i]).abs().sum() for i in range(X - 1))
    return s / (B * Y * X)


def pixel_entropy(maps):
    """Mean over samples and places of -sum_k p log p."""
    B, K, Y, X = maps.shape
    return -sum((maps[:, k] * torch.log(maps[:, k])).sum() for k in range(K)) / (B * Y * X)


def orthogonality(features, *, transposed=False):
    """Mean over samples and all pairs (i,j) of K+1 of (cos(v_i, v_j) - delta_ij)^2; features (B,M,K+1), after the
    LayerNorm.

    OPEN: the trainer (distributed_trainer_two_stage_pdisco.py) permutes the features to (B,K+1,M) before this
    function, so
    what is trained there makes the M CHANNELS orthogonal over the parts: transposed=True. The account's formula is
    transposed=False."""
    if transposed:
        features = features.transpose(1, 2)
    B, _M, K1 = features.shape
    s = 0
    for b in range(B):
        u = [features[b, :, k] / features[b, :, k].norm().clamp(min=1e-12) for k in range(K1)]
        for i in range(K1):
            for j in range(K1):
                s = s + ((u[i] * u[j]).sum() - float(i == j)) ** 2
    return s / (B * K1 * K1)


def equivariance(maps, back):
    """(The back-transformation itself isn't part of this.) 1 - mean over samples and foreground parts of cos(map_k,
    back-transformed map_k); maps, back (B,K+1,Y,X)."""
    B, K1 = maps.shape[:2]
    s = 0
    for b in range(B):
        for k in range(K1 - 1):
            a, c = maps[b, k].flatten(), back[b, k].flatten()
            s = s + (a * c).sum() / (a.norm().clamp(min=1e-8) * c.norm().clamp(min=1e-8))
    return 1 - s / (B * (K1 - 1))
