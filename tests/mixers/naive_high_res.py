"""FlexAttention on images in loops, by somebody who had an account of it and saw neither code nor test.

B batch, T tokens, S2 = g2 x g2 detail tokens, M width, H query heads, G key heads, D width of a head;
image=(start, stop) the places of the small copy.
"""

import math

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


def project(x, W):
    """x (T,M), W (N,M) -> (T,N), y_t = W x_t (no bias)."""
    return torch.stack([torch.stack([dot(W[o], x[t]) for o in range(W.shape[0])]) for t in range(x.shape[0])])


def rotate(x, cos, sin):
    """x, cos, sin (D,): x cos + half(x) sin, half(x) = (-x_{D/2..}, x_{..D/2-1}). cos^2 + sin^2 need not be 1."""
    D = x.shape[0]
    half = [-x[a + D // 2] for a in range(D // 2)] + [x[a] for a in range(D // 2)]
    return torch.stack([x[a] * cos[a] + half[a] * sin[a] for a in range(D)])


def cubic(t, a=-0.75):
    """the bicubic kernel at distance t (a = -0.75, torch's)."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    if t < 2:
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return 0.0


def resize_table(table, g, g2):
    """cos or sin of the low image's places (g*g, D) -> (g2*g2, D) by bicubic interpolation of the entries themselves
    (pixel centres, i.e. align_corners False; borders repeated)."""
    D = table.shape[1]
    out = []
    for r in range(g2):
        y = (r + 0.5) * g / g2 - 0.5
        for c in range(g2):
            x = (c + 0.5) * g / g2 - 0.5
            v = table.new_zeros(D)
            for dy in range(-1, 3):
                for dx in range(-1, 3):
                    yy, xx = math.floor(y) + dy, math.floor(x) + dx
                    w = cubic(y - yy) * cubic(x - xx)
                    v = v + w * table[min(max(yy, 0), g - 1) * g + min(max(xx, 0), g - 1)]
            out.append(v)
    return torch.stack(out)


def select_detail(weights, grid, threshold=64, cells=9, detail_grid=None, size=None):
    """Which detail tokens the NEXT layer may see.

    weights (H,R,grid*grid): the plain branch's softmax weights of R looking rows on the image places;
    size (width, height)|None: of the original image (a padded square image has a margin; None: square)
    -> bool (R, detail_grid^2).
      w = sum over heads; margin places := 0; w <- (w - min)/(max - min); bit = 255 w > threshold;
      adaptive max pool to cells x cells; nearest resize to detail_grid x detail_grid.
    max = min: 0/0, nothing chosen. threshold: 64 is the code's default, 48..64 in the account.
    Nearest resize by exact integers, floor(i cells / g2); torch uses a float32 ratio (same where g2 is a
      multiple of cells).
    """
    H, R, _ = weights.shape
    g, g2 = grid, detail_grid
    out = []
    for r in range(R):
        w = [[sum(num(weights[h, r, y * g + x]) for h in range(H)) for x in range(g)] for y in range(g)]
        if size is not None:
            width, height = size
            margin = int((abs(width - height) // 2) / max(width, height) * g)
            for y in range(g):
                for x in range(g):
                    place = y if width > height else x
                    if margin and (place < margin or place >= g - margin):
                        w[y][x] = 0.0
        low, high = min(map(min, w)), max(map(max, w))
        bit = [[high > low and (w[y][x] - low) / (high - low) * 255 > threshold for x in range(g)] for y in range(g)]
        pooled = [[False] * cells for _ in range(cells)]
        for cy in range(cells):
            for cx in range(cells):
                for y in range(cy * g // cells, -(-(cy + 1) * g // cells)):
                    for x in range(cx * g // cells, -(-(cx + 1) * g // cells)):
                        pooled[cy][cx] = pooled[cy][cx] or bit[y][x]
        out.append([pooled[y * cells // g2][x * cells // g2] for y in range(g2) for x in range(g2)])
    return torch.tensor(out, dtype=torch.bool).reshape(R, g2 * g2)


def high_res_attention(
    x, detail, chosen, rows, W, num_heads, cos, sin, detail_cos, detail_sin, alpha=1.0, num_kv_heads=None
):
    """One layer: x (B,T,M), detail (B,S2,M), chosen (B,T,S2) bool|None, rows (B,T) bool (rows that may look),
    W dict of q_proj (M,M), k_proj, v_proj, k_proj_hd, v_proj_hd (G*D,M), o_proj (M,M); cos, sin (T,D) by position;
    detail_cos, detail_sin (S2,D) (resize_table); alpha: blend of training, min(1, warmup * fraction of training done);
    1 in inference (where only the last row looks).
    -> y (B,T,M), plain weights A (B,H,T,T) (own keys only, causal): what select_detail reads.
      o_i = A v;  o'_i = softmax over [own keys j <= i, chosen detail keys] [v; vd];  o <- (1 - alpha) o + alpha o'.
    """
    B, T, M = x.shape
    H = num_heads
    G = num_kv_heads or H
    D = M // H
    ys, As = [], []
    for n in range(B):
        q, k, v = project(x[n], W["q_proj"]), project(x[n], W["k_proj"]), project(x[n], W["v_proj"])
        kd = vd = None
        if chosen is not None:
            kd, vd = project(detail[n], W["k_proj_hd"]), project(detail[n], W["v_proj_hd"])

        def part(m, t, h):
            return m[t, h * D : (h + 1) * D]

        merged = [[] for _ in range(T)]
        heads = []
        for h in range(H):
            kh = h // (H // G)
            qs = [rotate(part(q, t, h), cos[t], sin[t]) for t in range(T)]
            ks = [rotate(part(k, t, kh), cos[t], sin[t]) for t in range(T)]
            A = []
            for i in range(T):
                own = [dot(qs[i], ks[j]) / D**0.5 for j in range(i + 1)]
                a = softmax(own)
                o = sum(a[j] * part(v, j, kh) for j in range(i + 1))
                A.append(torch.stack(a + [a[0] * 0] * (T - i - 1)))
                if chosen is not None and bool(rows[n, i]):
                    look = [s for s in range(detail.shape[1]) if bool(chosen[n, i, s])]
                    far = [dot(qs[i], rotate(part(kd, s, kh), detail_cos[s], detail_sin[s])) / D**0.5 for s in look]
                    b = softmax(own + far)
                    o2 = sum(b[j] * part(v, j, kh) for j in range(i + 1))
                    for w, s in zip(b[i + 1 :], look):
                        o2 = o2 + w * part(vd, s, kh)
                    o = (1 - alpha) * o + alpha * o2
                merged[i].append(o)
            heads.append(torch.stack(A))
        ys.append(project(torch.stack([torch.cat(m) for m in merged]), W["o_proj"]))
        As.append(torch.stack(heads))
    return torch.stack(ys), torch.stack(As)


def select_rows(A, rows, image, detail_grid, threshold=64, cells=9, sizes=None):
    """select_detail for every looking row: A (B,H,T,T), rows (B,T) bool, image (start, stop), sizes list of (width,
    height)|None -> chosen (B,T,S2) bool, all False on rows that do not look."""
    B, _H, T, _ = A.shape
    g = math.isqrt(image[1] - image[0])
    out = torch.zeros(B, T, detail_grid**2, dtype=torch.bool)
    for n in range(B):
        for t in range(T):
            if bool(rows[n, t]):
                out[n, t] = select_detail(
                    A[n, :, t : t + 1, image[0] : image[1]],
                    g,
                    threshold,
                    cells,
                    detail_grid,
                    None if sizes is None else sizes[n],
                )[0]
    return out


def host(
    x,
    detail,
    rows,
    layers,
    num_heads,
    image,
    detail_grid,
    cos,
    sin,
    first=0,
    threshold=64,
    cells=9,
    sizes=None,
    alpha=1.0,
    after=None,
):
    """Tiny host: x <- x + attention(x) per layer (after: list of callables applied to x after each layer, or None).
    Layers before `first` are plain; layer `first` is plain and selects; later ones use the previous layer's selection
    and select anew (the code: first = 8 of 32). layers: list of weight dicts. -> x, list of selections made.
    Norms, MLP of the host are the language model's; here only the residual and what `after` does."""
    g = math.isqrt(image[1] - image[0])
    dc = resize_table(cos[image[0] : image[1]], g, detail_grid)
    ds = resize_table(sin[image[0] : image[1]], g, detail_grid)
    chosen, made = None, []
    for l, W in enumerate(layers):
        y, A = high_res_attention(x, detail, chosen, rows, W, num_heads, cos, sin, dc, ds, alpha)
        x = x + y
        if after is not None:
            x = after[l](x)
        if l >= first:
            chosen = select_rows(A, rows, image, detail_grid, threshold, cells, sizes)
            made.append(chosen)
    return x, made
