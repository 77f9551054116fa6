"""A013 SAGAN self-attention block (Zhang, Goodfellow, Metaxas, Odena; ICML 2019), naive oracle.

Two forms: `sagan_pooled` is the released code (max-pooled keys and values, output projection),
`sagan_full` the printed formula. Weights are 1x1 convolutions without bias and may be given as
(out, in), (out, in, 1) or (out, in, 1, 1). Everything in torch float64, loops over batch, pixels
and channels; differentiable.
"""

import torch
import torch.nn.functional as F


def _matrix(weight):
    return weight.reshape(weight.shape[0], -1)


def _pointwise(weight, x):
    """W x at every pixel: weight (out, in), x (B, in, N) -> (B, out, N)."""
    W = _matrix(weight)
    rows = []
    for b in range(x.shape[0]):
        rows.append(torch.stack([W @ x[b, :, n] for n in range(x.shape[2])], dim=1))
    return torch.stack(rows)


def max_pool_2x2(x):
    """(B, C, Y, X) -> (B, C, Y//2, X//2): maximum of each 2x2 cell, stride 2, odd edge dropped."""
    _B, _C, Y, X = x.shape
    out = []
    for i in range(Y // 2):
        row = []
        for j in range(X // 2):
            cell = torch.stack([x[:, :, 2 * i + dy, 2 * j + dx] for dy in (0, 1) for dx in (0, 1)])
            row.append(cell.max(dim=0).values)  # a tie sends its gradient to one of the equal entries
        out.append(torch.stack(row, dim=-1))
    return torch.stack(out, dim=-2)


def softmax_attention(q, k, v):
    """One head, scale 1. q (D, T), k (D, S), v (V, S) -> o (V, T), A (T, S)."""
    T, S = q.shape[1], k.shape[1]
    o, A = [], []
    for t in range(T):
        score = torch.stack([(q[:, t] * k[:, s]).sum() for s in range(S)])  # no 1/sqrt(D)
        e = torch.exp(score - score.max().detach())
        a = e / e.sum()
        A.append(a)
        o.append(sum(a[s] * v[:, s] for s in range(S)))
    return torch.stack(o, dim=1), torch.stack(A)


def sagan_pooled(x, q_weight, k_weight, v_weight, o_weight, gamma, *, return_weights=False):
    """Equations 1 to 3. x (B, C, Y, X); q_weight, k_weight (C/8, C); v_weight (C/2, C);
    o_weight (C, C/2); gamma scalar -> (B, C, Y, X)   [A (B, YX, (Y//2)(X//2))]."""
    B, C, Y, X = x.shape
    flat = x.reshape(B, C, Y * X)
    q = _pointwise(q_weight, flat)  # (B, C/8, N)
    k = max_pool_2x2(_pointwise(k_weight, flat).reshape(B, -1, Y, X))  # pool AFTER projection
    v = max_pool_2x2(_pointwise(v_weight, flat).reshape(B, -1, Y, X))
    k, v = k.flatten(2), v.flatten(2)
    o, A = zip(*[softmax_attention(q[b], k[b], v[b]) for b in range(B)])
    o = _pointwise(o_weight, torch.stack(o)).reshape(B, C, Y, X)
    y = x + gamma * o
    return (y, torch.stack(A)) if return_weights else y


def sagan_full(x, q_weight, k_weight, v_weight, gamma, o_weight=None, *, return_weights=False):
    """Equation 4. x (B, C, *axes), any number of map axes; q_weight, k_weight (C/8, C); v_weight
    (C, C); gamma scalar -> (B, C, *axes).   s_ij = f(x_i).g(x_j), beta_{j,i} = softmax over i.

    The softmax runs over the index of f: f is the KEY (k_weight), g the QUERY (q_weight), h = v_weight.
    o_weight (C, C'): the later printed version v(sum beta h) with h: C -> C' = C/8.
    """
    # OPEN: o_weight (later version of the text) is recalled in the account; default None = first version.
    shape = x.shape
    B, C = shape[:2]
    flat = x.reshape(B, C, -1)
    N = flat.shape[2]
    f, g, h = _pointwise(k_weight, flat), _pointwise(q_weight, flat), _pointwise(v_weight, flat)
    outs, betas = [], []
    for b in range(B):
        o, beta = [], []
        for j in range(N):
            s = torch.stack([(f[b, :, i] * g[b, :, j]).sum() for i in range(N)])
            e = torch.exp(s - s.max().detach())
            beta_j = e / e.sum()
            beta.append(beta_j)
            o.append(sum(beta_j[i] * h[b, :, i] for i in range(N)))
        outs.append(torch.stack(o, dim=1))
        betas.append(torch.stack(beta))
    o = torch.stack(outs)
    if o_weight is not None:
        o = _pointwise(o_weight, o)
    y = gamma * o.reshape(shape) + x
    return (y, torch.stack(betas)) if return_weights else y


# ----------------------------------------------------------------- spectral normalisation


def _unit(vector, eps=1e-12):
    return vector / vector.norm().clamp_min(eps)


def spectral_weight(weight, u, *, eps=1e-12):
    """Equation 5, as in BigGAN-PyTorch: one power step from the stored u, also in eval (where the
    new u is then not stored). weight (out, in, ...), u (out,) -> weight / sigma, u' (out,), sigma."""
    W, u = _matrix(weight), u.reshape(-1)
    with torch.no_grad():
        v = _unit(u @ W, eps)
        u_new = _unit(W @ v, eps)
    sigma = u_new @ (W @ v)  # carries gradient through W only
    return weight / sigma, u_new, sigma


def spectral_weight_torch(weight, u, v, *, training, eps=1e-12):
    """torch.nn.utils.parametrizations.spectral_norm: one step only while training, u first then v;
    in eval the stored u (out,) and v (in,) are used as they are."""
    # The account's Build asks for torch's parametrization, its golden case `sn` for BigGAN's; they agree
    # once u, v have converged.
    W, u, v = _matrix(weight), u.reshape(-1), v.reshape(-1)
    if training:
        with torch.no_grad():
            u = _unit(W @ v, eps)
            v = _unit(W.T @ u, eps)
    sigma = u @ (W @ v)
    return weight / sigma, u, v, sigma


# ----------------------------------------------------------------- host: losses and blocks


def hinge_discriminator(real, fake):
    """real, fake: discriminator outputs (B,) or (B,1) -> mean relu(1 - D(real)) + mean relu(1 + D(fake))."""
    real, fake = real.reshape(-1), fake.reshape(-1)
    return sum(F.relu(1 - r) for r in real) / len(real) + sum(F.relu(1 + f) for f in fake) / len(fake)


def hinge_generator(fake):
    """-mean D(fake)."""
    fake = fake.reshape(-1)
    return -sum(fake) / len(fake)


def conditional_batch_norm(x, labels, gain, bias, *, eps=1e-5):
    """x (B,C,Y,X), labels (B,) int, gain/bias (classes, C); batch statistics, biased variance (training; the official
    code has moving averages, decay 0.999, in eval)."""
    out = []
    for c in range(x.shape[1]):
        m = x[:, c].mean()
        s = ((x[:, c] - m) ** 2).mean()
        n = (x[:, c] - m) / torch.sqrt(s + eps)
        out.append(torch.stack([gain[labels[b], c] * n[b] + bias[labels[b], c] for b in range(x.shape[0])]))
    return torch.stack(out, dim=1)


def upsample_nearest_2(x):
    _B, _C, Y, X = x.shape
    return torch.stack([torch.stack([x[:, :, y // 2, z // 2] for z in range(2 * X)], -1) for y in range(2 * Y)], -2)


def average_pool_2x2(x):
    _B, _C, Y, X = x.shape
    return torch.stack(
        [
            torch.stack(
                [sum(x[:, :, 2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)) / 4 for j in range(X // 2)], -1
            )
            for i in range(Y // 2)
        ],
        -2,
    )


def generator_block(x, labels, gain0, bias0, conv1, gain1, bias1, conv2, skip, *, b1=None, b2=None, b3=None):
    """x (B,I,Y,X) -> (B,O,2Y,2X). relu(cbn), nearest x2, 3x3, relu(cbn), 3x3; skip: nearest x2, 1x1; sum.
    The 3x3 / 1x1 weights are given already spectrally normalised where that is wanted."""
    # Read in generator.py @ ad9612e6: `block` has SN convs (an older plain one stands beside it as block_no_sn).
    h = F.relu(conditional_batch_norm(x, labels, gain0, bias0))
    h = F.conv2d(upsample_nearest_2(h), conv1, b1, padding=1)
    h = F.relu(conditional_batch_norm(h, labels, gain1, bias1))
    h = F.conv2d(h, conv2, b2, padding=1)
    return F.conv2d(upsample_nearest_2(x), skip, b3) + h


def discriminator_first_block(x, conv1, conv2, skip, *, b1=None, b2=None, b3=None):
    """x (B,I,Y,X) -> (B,O,Y/2,X/2). 3x3, relu, 3x3, average pool; skip: average pool, THEN 1x1."""
    h = F.conv2d(F.relu(F.conv2d(x, conv1, b1, padding=1)), conv2, b2, padding=1)
    return average_pool_2x2(h) + F.conv2d(average_pool_2x2(x), skip, b3)


def discriminator_block(x, conv1, conv2, skip=None, *, downsample=True, b1=None, b2=None, b3=None):
    """x (B,I,Y,X) -> (B,O,Y/2,X/2). relu, 3x3, relu, 3x3, pool; skip: 1x1, THEN pool. No downsampling
    and skip None (I = O): plain residual sum."""
    h = F.conv2d(F.relu(x), conv1, b1, padding=1)
    h = F.conv2d(F.relu(h), conv2, b2, padding=1)
    s = x if skip is None else F.conv2d(x, skip, b3)
    if downsample:
        h, s = average_pool_2x2(h), average_pool_2x2(s)
    return s + h


def projection_head(h, labels, linear_weight, linear_bias, embedding):
    """h (B,C,Y,X), linear_weight (1,C), linear_bias (1,), embedding (classes,C) -> (B,1)."""
    out = []
    for b in range(h.shape[0]):
        pooled = F.relu(h[b]).sum(dim=(1, 2))  # SUM over pixels
        out.append(linear_weight @ pooled + linear_bias + (pooled * embedding[labels[b]]).sum())
    return torch.stack(out)
