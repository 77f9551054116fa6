"""A004 DAS, deformable attention gate (Salajegheh, Asadi, Saryazdi, Mudur; arXiv 2311.12091), naive oracle.

The authors' code and the paper's body could not be read; equations are the account's (R recalled, the rest as marked).
Loops over samples and pixels; plain convolutions by torch.nn.functional.
"""

import math

import torch
import torch.nn.functional as F


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def gelu(z):
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def instance_norm(x, eps=1e-5):
    """Per sample and channel over Y X, biased variance, no affine, no running statistics."""
    out = []
    for b in range(x.shape[0]):
        rows = []
        for c in range(x.shape[1]):
            m = x[b, c].mean()
            rows.append((x[b, c] - m) / torch.sqrt(((x[b, c] - m) ** 2).mean() + eps))
        out.append(torch.stack(rows))
    return torch.stack(out)


def bilinear_sample(plane, y, x):
    """plane (C, Y, X), y, x scalars (tensors) in pixels -> (C,). Zero outside: each of the four neighbours that lies
    outside counts as 0. At whole-number positions the derivative in y, x is the one of the cell above (floor), as in
    torch's grid_sample."""
    C, Y, X = plane.shape
    y0, x0 = int(torch.floor(y.detach())), int(torch.floor(x.detach()))
    fy, fx = y - y0, x - x0
    value = plane.new_zeros(C)
    for dy, wy in ((0, 1 - fy), (1, fy)):
        for dx, wx in ((0, 1 - fx), (1, fx)):
            if 0 <= y0 + dy < Y and 0 <= x0 + dx < X:
                value = value + wy * wx * plane[:, y0 + dy, x0 + dx]
    return value


def deformable_conv(x, offsets, weight, bias=None):
    """Equation 3: V(p) = sum_k W_k Z(p + p_k + delta_k(p)) + w. x (B,c,Y,X); offsets (B,2K,Y,X), (dy, dx) of each tap
    after one another, taps row-major; weight (O,c,k,k), K = k k; one offset group, no modulation -> (B,O,Y,X)."""
    B, _c, Y, X = x.shape
    k = weight.shape[-1]
    out = []
    for b in range(B):
        rows = []
        for i in range(Y):
            row = []
            for j in range(X):
                total = x.new_zeros(weight.shape[0])
                for t in range(k * k):
                    ti, tj = t // k, t % k
                    y = i + ti - k // 2 + offsets[b, 2 * t, i, j]
                    z = j + tj - k // 2 + offsets[b, 2 * t + 1, i, j]
                    total = total + weight[:, :, ti, tj] @ bilinear_sample(x[b], y, z)
                row.append(total if bias is None else total + bias)
            rows.append(torch.stack(row, dim=-1))
        out.append(torch.stack(rows, dim=-2))
    return torch.stack(out)


def layer_norm(v, weight, bias, *, axes="channels", eps=1e-5):
    """axes "channels": over channels at each pixel, weight, bias (C,); "all": over (C,Y,X) of a sample, weight, bias
    (C,) (GroupNorm with one group) or (C,Y,X)."""
    # OPEN: which axes the paper normalises is not known; third parties differ. Default: channels.
    w, o = ((p[:, None, None] if p.dim() == 1 else p) for p in (weight, bias))
    out = []
    for b in range(v.shape[0]):
        if axes == "all":
            m = v[b].mean()
            n = (v[b] - m) / torch.sqrt(((v[b] - m) ** 2).mean() + eps)
        else:
            rows = []
            for y in range(v.shape[2]):
                row = []
                for x in range(v.shape[3]):
                    p = v[b, :, y, x]
                    m = p.mean()
                    row.append((p - m) / torch.sqrt(((p - m) ** 2).mean() + eps))
                rows.append(torch.stack(row, dim=-1))
            n = torch.stack(rows, dim=-2)
        out.append(w * n + o)
    return torch.stack(out)


def reduced(x, depth_weight, point_weight, *, depth_bias=None, point_bias=None, act=gelu, eps=1e-5):
    """Equation 1: Z = gelu(InstanceNorm(P (D * X))). depth_weight (C,1,k,k), point_weight (c,C,1,1), c = max(1,
    int(ratio
    C)) -> (B,c,Y,X)."""
    # OPEN: gelu and ratio 0.2 are recalled (third parties: ReLU or nothing, c = C); kernel of D and biases unknown.
    # A bias of P has no effect (the instance norm removes it), one of D only at the border through P.
    h = F.conv2d(x, depth_weight, depth_bias, padding=depth_weight.shape[-1] // 2, groups=x.shape[1])
    h = F.conv2d(h, point_weight, point_bias)
    return act(instance_norm(h, eps))


def offsets(z, offset_weight, offset_bias):
    """Equation 2: delta = O * Z + o, from Z. offset_weight (2K, c, 3, 3), offset_bias (2K,) -> (B,2K,Y,X)."""
    return F.conv2d(z, offset_weight, offset_bias, padding=offset_weight.shape[-1] // 2)


def gate(
    x,
    depth_weight,
    point_weight,
    offset_weight,
    offset_bias,
    deform_weight,
    deform_bias,
    ln_weight,
    ln_bias,
    *,
    depth_bias=None,
    point_bias=None,
    act=gelu,
    axes="channels",
):
    """Equations 1 to 4: A = sigmoid(LayerNorm(V)), (B,C,Y,X) in (0,1). deform_weight (C,c,3,3), deform_bias (C,)."""
    z = reduced(x, depth_weight, point_weight, depth_bias=depth_bias, point_bias=point_bias, act=act)
    v = deformable_conv(z, offsets(z, offset_weight, offset_bias), deform_weight, deform_bias)
    return sigmoid(layer_norm(v, ln_weight, ln_bias, axes=axes))


def deformable_gate(x, *weights, **options):
    """Equation 5: Y = A . X, the gate multiplies the module's INPUT. Arguments as in `gate`."""
    # OPEN: one third party has (1 + A) . Z instead.
    return gate(x, *weights, **options) * x


def parameter_count(C, ratio=0.2, K=9):
    """9C + Cc + 9c*18 + 18 + 9cC + 3C: D and P without bias, offset conv with bias, deformable conv with bias, LN."""
    c = max(1, int(ratio * C))
    return K * C + C * c + K * c * 2 * K + 2 * K + K * c * C + 3 * C
