"""High-order attention and the loss between orders, in loops; their author saw only an account of the paper,
neither code nor test."""

import torch


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def inner_width(C):
    """I = C // 8 * 2 (not C // 4)."""
    return C // 8 * 2


def gate(x, projections, outputs, *, sigmoid_per_order=True):
    """Equations 1 to 3. x (B,C,Y,X); projections[r-1]: list of the r matrices P_{r,i} (I,C[,1,1]); outputs[r-1]:
    Q_r (C,I[,1,1]); the module's order R = len(outputs) -> g (B,C,Y,X) in (0,1).

    sigmoid_per_order False: sigmoid(sum_r Q_r relu(z_r))."""
    P = [[p.reshape(p.shape[0], -1) for p in row] for row in projections]
    Q = [q.reshape(q.shape[0], -1) for q in outputs]
    R = len(Q)
    B, _C, Y, X = x.shape
    out = []
    for b in range(B):
        rows = []
        for y in range(Y):
            row = []
            for k in range(X):
                v = x[b, :, y, k]
                scores = []
                for r in range(1, R + 1):
                    z = P[r - 1][0] @ v
                    for i in range(1, r):
                        z = z * (P[r - 1][i] @ v)  # product BEFORE the ReLU
                    scores.append(Q[r - 1] @ torch.relu(z))
                row.append(sum(sigmoid(s) for s in scores) / R if sigmoid_per_order else sigmoid(sum(scores)))
            rows.append(torch.stack(row, dim=-1))
        out.append(torch.stack(rows, dim=-2))
    return torch.stack(out)


def high_order_attention(x, projections, outputs, *, sigmoid_per_order=True):
    """Equation 4: y = g . x, no residual."""
    return gate(x, projections, outputs, sigmoid_per_order=sigmoid_per_order) * x


def mixed_high_order(x, modules, *, sigmoid_per_order=True):
    """modules: list over R = 1, 2, ... of (projections, outputs), parameters of their own. (B,C,Y,X) ->
    (R*B,C,Y,X), order-major: first all samples of order 1, then of order 2, ..."""
    return torch.cat([high_order_attention(x, p, q, sigmoid_per_order=sigmoid_per_order) for p, q in modules])


def parameter_count(C, R, inner=None):
    """I C (R(R+1)/2 + R)."""
    I = inner_width(C) if inner is None else inner
    return I * C * (R * (R + 1) // 2 + R)


def reverse_gradient(x):
    """Value x, gradient -1."""
    return 2 * x.detach() - x


def unit(v, eps=1e-12):
    return v / v.norm().clamp_min(eps)


def batch_norm(x, weight, bias, running_mean=None, running_var=None, *, training=True, eps=1e-5):
    """x (N, F). Training: statistics over all N rows, all orders together, biased variance."""
    out = []
    for c in range(x.shape[1]):
        m, s = (
            (x[:, c].mean(), ((x[:, c] - x[:, c].mean()) ** 2).mean())
            if training
            else (running_mean[c], running_var[c])
        )
        out.append(weight[c] * (x[:, c] - m) / torch.sqrt(s + eps) + bias[c])
    return torch.stack(out, dim=1)


def order_diversity(features, orders, first_weight, bn1, second_weight, second_bias, bn2, *, training=True, eps=1e-5):
    """Equation 6: L_div = 2/(R(R-1)) sum_{i<j} mean_b || n(e_{i,b}) - n(e_{j,b}) ||_2, e = E(n(f)).

    features (R*B, F) order-major; E: linear F -> H without bias (first_weight (H,F)), BN bn1, ReLU, linear H -> H
    with
    bias, BN bn2 (each BN: (weight, bias) or (weight, bias, running_mean, running_var)). The gradient that leaves
    the first
    linear layer towards the features is multiplied by -1, E's own weights get the ordinary one. Minimised as it
    is."""
    # The reversal stands between n(f) and the first linear layer, as the hook in the released code.
    n = [reverse_gradient(unit(f)) for f in features]
    e = torch.stack([first_weight @ v for v in n])
    e = torch.relu(batch_norm(e, *bn1, training=training, eps=eps))
    e = torch.stack([second_weight @ v + second_bias for v in e])
    e = batch_norm(e, *bn2, training=training, eps=eps)
    e = [unit(v) for v in e]
    B = len(e) // orders
    total = 0
    for i in range(orders):
        for j in range(i + 1, orders):
            total = total + sum((e[i * B + b] - e[j * B + b]).norm() for b in range(B)) / B
    return total * 2 / (orders * (orders - 1))
