"""Adaptive attention with a visual sentinel written out with loops, in the paper's form and in the released code's."""

import torch
from torch import Tensor


def _linear(W: Tensor, x: Tensor, b: Tensor | None = None) -> Tensor:
    """W x + b, one row of W (out, in) at a time."""
    rows = [torch.dot(W[r], x) for r in range(W.shape[0])]
    return torch.stack(rows if b is None else [y + b[r] for r, y in enumerate(rows)])


def _softmax(scores: list[Tensor | None]) -> list[Tensor]:
    given = [s for s in scores if s is not None]
    largest = max(float(s) for s in given)
    zero = torch.zeros_like(given[0])
    total = sum(((s - largest).exp() for s in given), zero)
    return [zero if s is None else (s - largest).exp() / total for s in scores]


def naive_visual_sentinel(x: Tensor, h_before: Tensor, m: Tensor, Wx: Tensor, Wh: Tensor) -> Tensor:
    """x (B, E) the LSTM's input, h_before (B, M) hidden state before it, m (B, M) cell after it, Wx (M, E), Wh (M, M)
    -> s = sigmoid(Wx x + Wh h_before) * tanh(m), (B, M)."""
    return torch.stack(
        [torch.sigmoid(_linear(Wx, x[b]) + _linear(Wh, h_before[b])) * torch.tanh(m[b]) for b in range(x.shape[0])]
    )


def naive_sentinel(
    V: Tensor,
    h: Tensor,
    s: Tensor,
    Wv: Tensor,
    Wg: Tensor,
    Ws: Tensor,
    wh: Tensor,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The paper's form. V (B, K, M) regions, h (B, M), s (B, M) sentinel, Wv, Wg, Ws (A, M), wh (A), keep (B, K)
    -> mixed context (B, M) and weights (B, K + 1) with the sentinel LAST (its weight is beta).

    z_i = wh . tanh(Wv v_i + Wg h); zs = wh . tanh(Ws s + Wg h); weights = softmax([z; zs]);
    context = beta s + (1 - beta) c, c = sum_i softmax(z)_i v_i.
    """
    contexts, weights = [], []
    for b in range(V.shape[0]):
        query = _linear(Wg, h[b])
        z: list[Tensor | None] = []
        for i in range(V.shape[1]):
            seen = keep is None or bool(keep[b, i])
            z.append(torch.dot(wh, torch.tanh(_linear(Wv, V[b, i]) + query)) if seen else None)
        zs = torch.dot(wh, torch.tanh(_linear(Ws, s[b]) + query))
        joint = _softmax([*z, zs])
        beta = joint[-1]
        context = beta * s[b]
        if any(one is not None for one in z):
            for i, a in enumerate(_softmax(z)):
                if z[i] is not None:
                    context = context + (1 - beta) * a * V[b, i]
        contexts.append(context)
        weights.append(torch.stack(joint))
    return torch.stack(contexts), torch.stack(weights)


def naive_sentinel_code(
    x: Tensor,
    image: Tensor,
    h0: Tensor,
    c0: Tensor,
    V: Tensor,
    Ve: Tensor,
    p: dict[str, Tensor],
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The released code's step. x, image (global feature), h0, c0 (B, M), V, Ve (B, K, M), mask (B, K); p holds
    <layer>_weight and <layer>_bias for w2h, v2h, h2h_0, r_w2h, r_v2h, r_h2h, fr_linear_0, fr_embed, ho_linear_0,
    ho_embed, alpha_net, att2h -> {"h", "c", "sentinel", "alphahat" (B, K + 1, sentinel FIRST), "out"}.

    LSTM gates in the order i, f, o, u. s = sig(L_rw2h x + L_rv2h image + L_rh2h h0) * tanh(c); s2 = relu(L_fr s);
    hl = tanh(L_ho h); z = wa . tanh([L_fre s2; Ve] + L_hoe hl) + ba; out = tanh(L_a2h(sum alphahat [s2; V] + hl)).
    """

    def layer(name: str, given: Tensor) -> Tensor:
        return _linear(p[f"{name}_weight"], given, p[f"{name}_bias"])

    found: dict[str, list[Tensor]] = {n: [] for n in ("h", "c", "sentinel", "alphahat", "out")}
    for b in range(x.shape[0]):
        M = h0.shape[1]
        gates = layer("w2h", x[b]) + layer("v2h", image[b]) + layer("h2h_0", h0[b])
        i, f, o = (torch.sigmoid(gates[n * M : (n + 1) * M]) for n in range(3))
        c = f * c0[b] + i * torch.tanh(gates[3 * M :])
        h = o * torch.tanh(c)
        gate = torch.sigmoid(layer("r_w2h", x[b]) + layer("r_v2h", image[b]) + layer("r_h2h", h0[b]))
        s = gate * torch.tanh(c)
        s2, hl = torch.relu(layer("fr_linear_0", s)), torch.tanh(layer("ho_linear_0", h))
        query = layer("ho_embed", hl)
        z: list[Tensor | None] = [layer("alpha_net", torch.tanh(layer("fr_embed", s2) + query))[0]]
        for k in range(V.shape[1]):
            seen = mask is None or bool(mask[b, k])
            z.append(layer("alpha_net", torch.tanh(Ve[b, k] + query))[0] if seen else None)
        weights = _softmax(z)
        mixed = weights[0] * s2
        for k in range(V.shape[1]):
            if z[k + 1] is not None:
                mixed = mixed + weights[k + 1] * V[b, k]
        out = torch.tanh(layer("att2h", mixed + hl))
        for name, value in zip(found, (h, c, s, torch.stack(weights), out), strict=True):
            found[name].append(value)
    return {name: torch.stack(values) for name, values in found.items()}
