"""StepNet and stiffness in loops; their author saw only an account of the paper, neither code nor test."""

import torch


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def gap(x):
    """(B, C, Y, X) (any number of map axes) -> (B, C)."""
    return torch.stack([torch.stack([x[b, c].mean() for c in range(x.shape[1])]) for b in range(x.shape[0])])


def stiffness_step(x, f, w1, b1, w2, b2, *, inputs="both"):
    """Equation 4 (and 2): step a in (0,1), (B, C). x state, f branch, each (B,C,Y,X).

    inputs "both": s = [GAP(x) ; GAP(f)], w1 (C/r, 2C); "branch": s = GAP(f), w1 (C/r, C), squeeze-excite on the
    branch;
    "both_sum": s = [GAP(x) ; GAP(x + f)]. b1 (C/r,), w2 (C, C/r), b2 (C,)."""
    px, pf = gap(x), gap(f)
    out = []
    for b in range(x.shape[0]):
        if inputs == "both":
            s = torch.cat([px[b], pf[b]])
        elif inputs == "both_sum":
            s = torch.cat([px[b], px[b] + pf[b]])
        else:
            s = pf[b]
        out.append(sigmoid(w2 @ torch.relu(w1 @ s + b1) + b2))
    return torch.stack(out)


def step_block(x, f, step):
    """x + step . f: the step multiplies f only, one number for each sample and channel. step (B, C)."""
    return torch.stack(
        [torch.stack([x[b, c] + step[b, c] * f[b, c] for c in range(x.shape[1])]) for b in range(x.shape[0])]
    )


def stiffness(states, *, h=None):
    """Equation 3. states: list of L + 1 tensors (B, ...), same shape -> (L, B).

    h None: NSI(t) = ||x_{t+1} - x_t|| / ||x_t||, features flattened, for each sample. h given (a number or one for
    each
    layer): SAI(t) = ||(x_{t+1} - x_t) / h|| / ||x_t||."""
    rows = []
    for t in range(len(states) - 1):
        a, b = states[t], states[t + 1]
        if a.shape != b.shape:
            rows.append(torch.full((a.shape[0],), float("nan"), dtype=a.dtype))
            continue
        step = 1.0 if h is None else (h[t] if hasattr(h, "__len__") else h)
        row = []
        for n in range(a.shape[0]):
            top = torch.sqrt((((b[n] - a[n]) / step) ** 2).sum())
            bottom = torch.sqrt((a[n] ** 2).sum())
            row.append(top / bottom)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def profile_distance(profile, reference, *, norm=2):
    """Equation 5 (R): distance between two NSI profiles over t (mean over samples first when (layers, B)).
    norm 2: Euclidean, 1: mean absolute difference."""
    p = profile if profile.dim() == 1 else profile.mean(dim=1)
    q = reference if reference.dim() == 1 else reference.mean(dim=1)
    if norm == 2:
        return torch.sqrt(sum((p[t] - q[t]) ** 2 for t in range(len(p))))
    return sum((p[t] - q[t]).abs() for t in range(len(p))) / len(p)
