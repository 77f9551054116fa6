"""Gates of feature maps, written out pixel by pixel: squeeze-excite and its effective form, ECA, CBAM, global context,
selective kernels, split and non-local attention, self-attention on maps.

Its author saw only the account of the papers' formulas, neither this library's code nor its tests. Loops over samples,
channels and pixels; plain convolutions by torch. A batch norm is a tuple (weight, bias, running_mean, running_var).
Pointwise weights may be (O, I) or (O, I, 1, 1).
"""

import math

import torch
import torch.nn.functional as F


def _matrix(weight):
    return weight.reshape(weight.shape[0], -1)


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def softmax(scores):
    """scores (n,) -> (n,)."""
    e = torch.exp(scores - scores.max().detach())
    return e / e.sum()


def gap(x):
    """(B,C,Y,X) -> (B,C), mean over the pixels."""
    B, C, Y, X = x.shape
    return torch.stack(
        [
            torch.stack([sum(x[b, c, y, z] for y in range(Y) for z in range(X)) / (Y * X) for c in range(C)])
            for b in range(B)
        ]
    )


def gmp(x):
    """(B,C,Y,X) -> (B,C), maximum over the pixels; amax, so ties share the gradient."""
    return torch.stack([torch.stack([x[b, c].amax() for c in range(x.shape[1])]) for b in range(x.shape[0])])


def scale_channels(x, g):
    """x (B,C,Y,X) times g (B,C)."""
    return torch.stack([torch.stack([x[b, c] * g[b, c] for c in range(x.shape[1])]) for b in range(x.shape[0])])


def batch_norm(x, bn, *, training=False, eps=1e-5):
    weight, bias, mean, var = bn
    out = []
    for c in range(x.shape[1]):
        m, s = (x[:, c].mean(), ((x[:, c] - x[:, c].mean()) ** 2).mean()) if training else (mean[c], var[c])
        out.append(weight[c] * (x[:, c] - m) / torch.sqrt(s + eps) + bias[c])
    return torch.stack(out, dim=1)


# 1 ------------------------------------------------------------------------------------------
def timm_width(v, divisor=8, round_limit=0.0):
    """timm's rounded reduced width: nearest multiple of divisor, never below it (SE: 8, CBAM: 1). v = C * ratio."""
    n = max(divisor, int(v + divisor / 2) // divisor * divisor)
    return n + divisor if n < round_limit * v else n


def squeeze_excite(x, w1, b1, w2, b2):
    """Equation 1: y = x * sigmoid(W2 relu(W1 gap(x) + b1) + b2). x (B,C,Y,X), w1 (R,C), b1 (R,), w2 (C,R), b2 (C,)."""
    g = [sigmoid(_matrix(w2) @ torch.relu(_matrix(w1) @ m + b1) + b2) for m in gap(x)]
    return scale_channels(x, torch.stack(g))


# 2 ------------------------------------------------------------------------------------------
def hard_sigmoid(z):
    # torch's own hardsigmoid has the float32 number 1/6 in its BACKWARD (relative error 3e-8, float64 too): the golden
    # gradients of `ese` differ from this exact form by that much; with F.hardsigmoid here they agree.
    return torch.clamp(z + 3, 0, 6) / 6


def effective_squeeze_excite(x, weight, bias):
    """Equation 2: y = x * hsig(W gap(x) + b), hsig(z) = clamp(z + 3, 0, 6)/6. weight (C,C), bias (C,)."""
    g = [hard_sigmoid(_matrix(weight) @ m + bias) for m in gap(x)]
    return scale_channels(x, torch.stack(g))


# 3 ------------------------------------------------------------------------------------------
def eca_kernel_size(C, g=2, b=1):
    """k = max(3, odd), t = int(|log2 C + b| / g), k = t if odd else t + 1."""
    t = int(abs(math.log2(C) + b) / g)
    return max(3, t if t % 2 else t + 1)


def efficient_channel_attention(x, kernel, *, circular=False):
    """Equation 3: y = x * sigmoid(conv1d_k(gap(x))) along the channels. kernel (k,) or (1,1,k), no bias;
    outside channels are 0, or wrap round when circular."""
    w = kernel.reshape(-1)
    k, C = len(w), x.shape[1]
    g = []
    for m in gap(x):
        z = []
        for c in range(C):
            total = x.new_zeros(())
            for i in range(k):
                j = c + i - k // 2
                if circular:
                    total = total + w[i] * m[j % C]
                elif 0 <= j < C:
                    total = total + w[i] * m[j]
            z.append(total)
        g.append(sigmoid(torch.stack(z)))
    return scale_channels(x, torch.stack(g))


# 4 ------------------------------------------------------------------------------------------
def cbam_channel(x, w1, w2):
    """x1 = x * sigmoid(MLP(gap x) + MLP(gmp x)), MLP = W2 relu(W1 .), shared, no bias. w1 (R,C), w2 (C,R)."""

    def mlp(m):
        return _matrix(w2) @ torch.relu(_matrix(w1) @ m)

    mean, top = gap(x), gmp(x)
    return scale_channels(x, torch.stack([sigmoid(mlp(mean[b]) + mlp(top[b])) for b in range(x.shape[0])]))


def cbam_spatial(x1, conv_weight, bn, *, training=False):
    """y = x1 * sigmoid(BN_1(conv_k([mean_c x1 ; max_c x1]))). conv_weight (1,2,k,k), no bias, padding k//2."""
    pooled = torch.stack([x1.mean(dim=1), x1.amax(dim=1)], dim=1)  # mean first
    s = batch_norm(F.conv2d(pooled, conv_weight, padding=conv_weight.shape[-1] // 2), bn, training=training)
    return x1 * sigmoid(s)


def cbam(x, w1, w2, conv_weight, bn, *, training=False):
    """Equation 4: channel, then spatial on the result."""
    return cbam_spatial(cbam_channel(x, w1, w2), conv_weight, bn, training=training)


# 5 ------------------------------------------------------------------------------------------
def global_context(x, attn_weight, attn_bias, w1, b1, ln_weight, ln_bias, w2, b2, *, form="scale", ln_eps=1e-6):
    """Equation 5. a = softmax over pixels of (w.x + b); c = sum_n a_n x_n; t = W2 relu(LN(W1 c + b1)) + b2.
    form "scale": y = x * sigmoid(t); "add": y = x + t. attn_weight (1,C), attn_bias (1,), w1 (R,C), w2 (C,R)."""
    B, C, Y, X = x.shape
    pixels = [(y, z) for y in range(Y) for z in range(X)]
    out = []
    for b in range(B):
        a = softmax(torch.stack([_matrix(attn_weight)[0] @ x[b, :, y, z] + attn_bias[0] for y, z in pixels]))
        c = sum(a[n] * x[b, :, y, z] for n, (y, z) in enumerate(pixels))
        h = _matrix(w1) @ c + b1
        m = h.mean()
        h = ln_weight * (h - m) / torch.sqrt(((h - m) ** 2).mean() + ln_eps) + ln_bias
        t = _matrix(w2) @ torch.relu(h) + b2
        out.append(torch.stack([x[b, k] * sigmoid(t[k]) if form == "scale" else x[b, k] + t[k] for k in range(C)]))
    return torch.stack(out)


# 6 ------------------------------------------------------------------------------------------
def selective_kernel_weights(paths, w1, bn, w2, *, training=False):
    """Equation 6. paths (B,P,C,Y,X), w1 (R,C) no bias, bn over R, w2 (P*C, R) no bias -> a (B,P,C), softmax over P."""
    B, P, C = paths.shape[:3]
    pooled = gap(sum(paths[:, p] for p in range(P)))
    z = torch.stack([_matrix(w1) @ m for m in pooled])
    z = torch.relu(batch_norm(z, bn, training=training))
    out = []
    for b in range(B):
        logits = (_matrix(w2) @ z[b]).reshape(P, C)  # path-major
        out.append(torch.stack([softmax(logits[:, c]) for c in range(C)], dim=1))
    return torch.stack(out)


def selective_kernel_mix(paths, w1, bn, w2, *, training=False):
    """y = sum_p a_p U_p: (B,P,C,Y,X) -> (B,C,Y,X)."""
    a = selective_kernel_weights(paths, w1, bn, w2, training=training)
    return sum(scale_channels(paths[:, p], a[:, p]) for p in range(paths.shape[1]))


def selective_kernel(x, conv_weights, conv_bns, w1, bn, w2, *, training=False):
    """The whole unit: path 0 conv 3x3, path 1 conv 3x3 dilated 2, ...; each conv, BN, ReLU; then the mix.

    conv_weights: list of (C, C/groups, 3, 3)."""
    # The account gives the two kernels only; BN and ReLU in each path as in timm's SelectiveKernel (ConvNormAct). timm
    # by default also SPLITS the input channels over the paths (its own change, not here).
    # conv_bns None or an entry None leaves BN and ReLU of that path out.
    paths = []
    for p, weight in enumerate(conv_weights):
        u = F.conv2d(x, weight, padding=p + 1, dilation=p + 1, groups=x.shape[1] // weight.shape[1])
        if conv_bns is not None and conv_bns[p] is not None:
            u = torch.relu(batch_norm(u, conv_bns[p], training=training))
        paths.append(u)
    return selective_kernel_mix(torch.stack(paths, dim=1), w1, bn, w2, training=training)


def split_attention(paths, w1, b1, bn, w2, b2, *, groups=1, training=False):
    """ResNeSt's form of 6: paths (B, radix, C, Y, X), w1 (R, C/groups), w2 (radix*C, R/groups), biases.

    groups > 1: grouped 1x1s, output channels of group g laid out [radix][C/groups]. radix 1: sigmoid."""
    # "the same" in the account; layout and biases read in timm's SplitAttn, no golden numbers: the map's channels are
    # radix-major, W2's output channels group-major, then radix. bn None: no norm (timm's default for this layer).
    B, radix, C = paths.shape[:3]
    cg, rg = C // groups, w1.shape[0] // groups
    pooled = gap(sum(paths[:, p] for p in range(radix)))
    z = torch.stack(
        [
            torch.cat([_matrix(w1)[g * rg : (g + 1) * rg] @ m[g * cg : (g + 1) * cg] for g in range(groups)]) + b1
            for m in pooled
        ]
    )
    z = torch.relu(z if bn is None else batch_norm(z, bn, training=training))
    out = []
    for b in range(B):
        n = radix * cg
        t = torch.cat([_matrix(w2)[g * n : (g + 1) * n] @ z[b, g * rg : (g + 1) * rg] for g in range(groups)]) + b2
        t = t.reshape(groups, radix, cg)
        y = 0
        for r in range(radix):
            a = torch.cat(
                [
                    torch.stack([sigmoid(t[g, 0, c]) if radix == 1 else softmax(t[g, :, c])[r] for c in range(cg)])
                    for g in range(groups)
                ]
            )
            y = y + torch.stack([a[c] * paths[b, r, c] for c in range(C)])
        out.append(y)
    return torch.stack(out)


# 7 ------------------------------------------------------------------------------------------
def non_local(
    x, t_weight, t_bias, p_weight, p_bias, g_weight, g_bias, z_weight, z_bias, bn, *, scale=None, training=False
):
    """Equation 7: y = x + BN(Wz sum_j softmax_j(t_i.p_j * scale) g_j). t, p, g (R,C) with biases, z (C,R) with bias.
    scale None: C^(-1/2) with C the FULL width (timm); the original has scale 1 (recalled)."""
    B, C, Y, X = x.shape
    scale = C**-0.5 if scale is None else scale
    pixels = [(y, z) for y in range(Y) for z in range(X)]

    def lin(w, b, v):
        return _matrix(w) @ v + b

    out = []
    for b in range(B):
        t = [lin(t_weight, t_bias, x[b, :, y, z]) for y, z in pixels]
        p = [lin(p_weight, p_bias, x[b, :, y, z]) for y, z in pixels]
        g = [lin(g_weight, g_bias, x[b, :, y, z]) for y, z in pixels]
        rows = []
        for i in range(len(pixels)):
            a = softmax(torch.stack([(t[i] * p[j]).sum() * scale for j in range(len(pixels))]))
            rows.append(lin(z_weight, z_bias, sum(a[j] * g[j] for j in range(len(pixels)))))
        out.append(torch.stack(rows, dim=1).reshape(C, Y, X))
    return x + batch_norm(torch.stack(out), bn, training=training)


# 8 ------------------------------------------------------------------------------------------
def map_self_attention(
    x,
    q_weight,
    k_weight,
    v_weight,
    gamma,
    num_heads=1,
    *,
    scale=1.0,
    q_bias=None,
    k_bias=None,
    v_bias=None,
    o_weight=None,
    o_bias=None,
):
    """Equation 8: query, key, value by 1x1 convolutions, softmax over pixels, y = x + gamma * o.
    q_weight, k_weight (H D, C), v_weight (C, C), heads are consecutive channels. num_heads 1 is SelfAtt, H is MHA."""
    # OPEN: inferred in the account: heads, reduction, gamma (start 0), scale (SAGAN: 1; usual MHA: D^(-1/2)), biases,
    # output projection and positions are not known; all are arguments except positions (none added).
    B, C, Y, X = x.shape
    pixels = [(y, z) for y in range(Y) for z in range(X)]
    N = len(pixels)

    def lin(w, b, v):
        return _matrix(w) @ v if b is None else _matrix(w) @ v + b

    out = []
    for b in range(B):
        q, k, v = (
            [lin(w, c, x[b, :, y, z]) for y, z in pixels]
            for w, c in ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias))
        )
        q, k, v = list(q), list(k), list(v)
        D, V = len(q[0]) // num_heads, len(v[0]) // num_heads
        cols = []
        for i in range(N):
            heads = []
            for h in range(num_heads):
                a = softmax(
                    torch.stack(
                        [scale * (q[i][h * D : (h + 1) * D] * k[j][h * D : (h + 1) * D]).sum() for j in range(N)]
                    )
                )
                heads.append(sum(a[j] * v[j][h * V : (h + 1) * V] for j in range(N)))
            o = torch.cat(heads)
            cols.append(o if o_weight is None else lin(o_weight, o_bias, o))
        out.append(torch.stack(cols, dim=1).reshape(C, Y, X))
    return x + gamma * torch.stack(out)
