"""The problems of `problems` in plain sums, written without the pipeline.

Masks by their definitions, every stage by its formula over whole matrices, gradients by autograd.
"""

import math
from itertools import product

import torch
from torch import Tensor

from kernels.problems import Built, Description, Tree, table, total

Parameters = dict[str, Tensor]


def run(built: Built, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Output and gradients, everything computed in that dtype."""
    d = built.given
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in built.wanted.items()}
    bias = leaves.get("bias", None if built.bias is None else built.bias.to(dtype))
    parameters = {
        slot: {name.split(" ")[1]: t for name, t in leaves.items() if name.startswith(f"{slot} ")} for slot in d.stages
    }
    out = attention(d, leaves["q"], leaves["k"], leaves["v"], bias, parameters)
    grads = torch.autograd.grad(out, list(leaves.values()), built.grad.to(dtype), allow_unused=True)
    found = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True))
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def attention(
    d: Description, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, parameters: dict[str, Parameters]
) -> Tensor:
    """Outputs (B, H, T, V)."""
    if 0 in (d.B, d.T, d.S):
        return q.new_zeros(d.B, d.H, d.T, d.V) + 0 * (q.sum() + k.sum() + v.sum())
    i, j = places(d)
    position, by = parameters.get("position", {}), d.position
    if by.startswith("rotary"):
        q, k = turned(d, q, i), turned(d, k, j)
    # Query head h reads key head h // (H // G).
    group = [h // (d.H // d.G) for h in range(d.H)]
    k, v = torch.stack([k[:, g] for g in group], 1), torch.stack([v[:, g] for g in group], 1)
    scale = 1 / math.sqrt(d.D) if d.scale is None else d.scale
    dots = scale * torch.einsum("bhtd,bhsd->bhts", q, k)
    allowed = torch.ones(d.B, d.H, d.T, d.S, dtype=torch.bool)
    if d.mask is not None:
        allowed = allowed & seen(d, d.mask)
    if bias is not None:
        allowed = allowed & (bias != -math.inf)
        bias = bias.masked_fill(bias == -math.inf, 0)
    z = score(d, dots, q, k, scale, parameters.get("score", {}))
    z = z + position_bias(d, dots, q, k, allowed, position)
    z = z if bias is None else z + bias
    z = mix(d, d.score_mix, z, allowed, parameters.get("score_mix", {}))
    weights = normalised(d, z, allowed, parameters.get("normalizer", {}))
    weights = mix(d, d.weight_mix, weights, allowed, parameters.get("weight_mix", {}), on_weights=True)
    out = torch.einsum("bhts,bhsv->bhtv", weights, v)
    if by.startswith("shaw"):
        offsets = (j - i[:, None]).clamp(-3, 3) + 3
        tables = position["value_table"].expand(d.H, 7, d.V)
        out = out + torch.einsum("bhts,htsv->bhtv", weights, tables[:, offsets])
    if by == "added":
        out = out + torch.einsum("bhts,s,h->bht", weights, j.to(weights.dtype), position["c"])[..., None]
    return out


def places(d: Description) -> tuple[Tensor, Tensor]:
    """Where queries and keys stand: the last query where the last key stands."""
    return torch.arange(total(d) - d.T, total(d)), torch.arange(d.first_key, total(d))


# --- masks --------------------------------------------------------------------------------------------------------


def seen(d: Description, tree: Tree) -> Tensor:
    """(B, H, T, S) bool, by the definition of each mask."""
    i, j = places(d)
    b, h = torch.arange(d.B)[:, None, None, None], torch.arange(d.H)[:, None, None]
    return _seen(d, tree, b, h, i[:, None], j).expand(d.B, d.H, d.T, d.S)


def _seen(d: Description, tree: Tree, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    kind, given, S = tree[0], tree[1:], total(d)
    here = (b, h, i, j)
    always = (b + h + i + j) == (b + h + i + j)
    match kind:
        case "full":
            return always
        case "nothing":
            return ~always
        case "and" | "or":
            found = torch.stack([(_seen(d, part, *here) & always).expand(always.shape) for part in given])
            return found.all(0) if kind == "and" else found.any(0)
        case "not":
            return ~_seen(d, given[0], *here)
        case "per_head":
            each = [(_seen(d, given[n % len(given)], *here) & always).expand(d.B, d.H, d.T, d.S) for n in range(d.H)]
            return torch.stack([each[n][:, n] for n in range(d.H)], 1)
        case "causal":
            return j <= i
        case "window":
            return (i - j < given[0]) & (j - i < given[-1])
        case "dilated":
            return ((i - j).abs() < given[0] * given[1]) & ((i - j) % given[1] == 0)
        case "strided":
            return (i - j) % given[0] == 0
        case "blocks":
            return i // given[0] == j // given[0]
        case "global_tokens":
            return (i < given[0]) | (j < given[0])
        case "prefix":
            return j < given[0]
        case "lengths" | "prefix_lengths":
            return j < table(d, tree)[b]
        case "padding":
            return table(d, tree)[b, j]
        case "documents" | "packed":
            ids = table(d, tree)
            if kind == "packed":
                ids = torch.tensor([[int((ids[1:] <= n).sum()) for n in range(S)]], dtype=torch.long)
            ids = ids.expand(d.B, S)
            return (i >= 0) & (ids[b, i.clamp(min=0)] == ids[b, j])
        case "dense":
            return table(d, tree).expand(d.B, d.H, d.T, S)[b, h, i - (S - d.T), j]
        case "chosen":
            tiles = table(d, tree)
            tiles = tiles.expand(d.B, d.H, *tiles.shape[2:])
            return tiles[b, h, (i - (S - d.T)) // given[2], j // given[3]]
        case "predicate":
            return (i + 2 * j + b * given[1]) % given[0] != h * given[2] % given[0]
    assert kind == "neighborhood", kind
    return neighbours(*given)


def neighbours(
    sizes: tuple[int, ...],
    windows: tuple[int, ...],
    dilations: tuple[int, ...],
    strides: tuple[int, ...],
    causal: tuple[bool, ...],
) -> Tensor:
    """(N, N) bool: along every axis, which places see which, one at a time."""
    axes = []
    for L, k, d, s, c in zip(sizes, windows, dilations, strides, causal, strict=True):
        axis = torch.zeros(L, L, dtype=torch.bool)
        for x, y in product(range(L), range(L)):
            if x % d != y % d:
                continue
            n, p, u = len(range(x % d, L, d)), x // d, y // d
            if c:
                leader = min(p // s * s + s - 1, n - 1)
                axis[x, y] = max(leader - k + 1, 0) <= u <= p
            else:
                leader = min(p // s * s + s // 2, n - 1)
                first = min(max(leader - k // 2, 0), n - k)
                axis[x, y] = first <= u < first + k
        axes.append(axis)
    found = axes[0]
    for axis in axes[1:]:
        found = torch.einsum("ab,cd->acbd", found.int(), axis.int()).reshape(len(found) * len(axis), -1).bool()
    return found


# --- stages -------------------------------------------------------------------------------------------------------


def turned(d: Description, z: Tensor, place: Tensor) -> Tensor:
    """Rotary positions, one pair of channels at a time."""
    half, base, m = d.D // 2, 50.0 if d.position == "rotary_interleaved" else 10000.0, 1.0
    w = [base ** (-2 * a / d.D) for a in range(half)]
    if d.position == "rotary_linear":
        w = [x / 2 for x in w]
    if d.position == "rotary_ntk":
        base = base * 2 ** (d.D / (d.D - 2))
        w = [base ** (-2 * a / d.D) for a in range(half)]
    if d.position == "rotary_yarn":
        # Pairs that turn more than twice in the 8 tokens of training stay, those under half a turn are stretched by 2.
        low, high = (d.D * math.log(8 / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (2.0, 0.5))
        low, high = max(math.floor(low), 0), min(math.ceil(high), d.D - 1)
        ramp = [min(max((a - low) / (high - low if high > low else 0.001), 0), 1) for a in range(half)]
        w = [x * (1 - r) + x / 2 * r for x, r in zip(w, ramp, strict=True)]
        m = 0.1 * math.log(2) + 1
    channels: list[Tensor] = [z[..., 0]] * d.D
    for a in range(half):
        x, y = (2 * a, 2 * a + 1) if d.position == "rotary_interleaved" else (a, a + half)
        angle = place.double() * w[a]
        cos, sin = (m * angle.cos()).to(z.dtype), (m * angle.sin()).to(z.dtype)
        channels[x], channels[y] = z[..., x] * cos - z[..., y] * sin, z[..., x] * sin + z[..., y] * cos
    return torch.stack(channels, -1)


def score(d: Description, dots: Tensor, q: Tensor, k: Tensor, scale: float, own: Parameters) -> Tensor:
    match d.score:
        case "bilinear":
            return scale * torch.einsum("bhtd,de,bhse->bhts", q, own["weight"], k)
        case "gated":
            return dots * own["g"].sigmoid()[:, None, None]
    return dots


def position_bias(
    d: Description, dots: Tensor, q: Tensor, k: Tensor, allowed: Tensor, own: Parameters
) -> Tensor | float:
    i, j = places(d)
    away = (i[:, None] - j).abs().to(q.dtype)
    match d.position:
        case "alibi":
            power = 2 ** math.floor(math.log2(d.H))
            slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
            slopes += [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * (d.H - power), 2)]
            return -torch.tensor(slopes, dtype=torch.float64).to(q.dtype)[:, None, None] * away
        case "kerple":
            return -own["r1"][:, None, None] * (1 + own["r2"][:, None, None] * away).log()
        case "kerple_power":
            # Clipped to 2, with the gradient of what is not.
            r2 = own["r2"] - (own["r2"].detach() - 2).clamp(min=0)
            far = away.clamp(min=1)
            return -own["r1"][:, None, None] * torch.where(away > 0, far ** r2[:, None, None], 0)
        case "cope":
            gates = torch.where(allowed, dots.sigmoid(), 0)
            p = torch.stack([gates[..., s:].sum(-1) for s in range(d.S)], -1).clamp(max=3)
            by_place = torch.einsum("bhtd,nd->bhtn", q, own["table"])
            low, high = p.detach().floor().long(), p.detach().ceil().long()
            part = p - low
            return by_place.gather(-1, low) * (1 - part) + by_place.gather(-1, high) * part
        case "shaw" | "shaw_per_head":
            offsets = (j - i[:, None]).clamp(-3, 3) + 3
            tables = own["key_table"].expand(d.H, 7, d.D)
            return torch.einsum("bhtd,htsd->bhts", q, tables[:, offsets]) / math.sqrt(d.D)
        case "slanted":
            by_query, by_key = torch.einsum("bhtd,d->bht", q, own["u"]), torch.einsum("bhsd,d->bhs", k, own["w"])
            return -(by_query[..., None] + by_key[:, :, None]) * away / (1 + away)
        case "tabled":
            return own["a"][i % 7][:, None] + own["b"][j % 5]
        case "echo":
            return own["c"] * dots.tanh()
    return 0.0


def mix(d: Description, name: str, z: Tensor, allowed: Tensor, own: Parameters, *, on_weights: bool = False) -> Tensor:
    match name:
        case "capped":
            return 1.5 * (z / 1.5).tanh()
        case "temperature":
            return z / own["temperature"][:, places(d)[0].clamp(0, 4), None]
        case "head_mix":
            return heads_mixed(z, own["weight"], allowed)
        case "conv" | "key_conv":
            return convolved(z, own["kernel"], allowed, on_weights)
        case "conv_then_heads":
            z = convolved(z, own["mixes.0.kernel"], allowed, on_weights)
            return heads_mixed(z, own["mixes.1.weight"], allowed)
    return z


def heads_mixed(z: Tensor, weight: Tensor, allowed: Tensor) -> Tensor:
    """Of each group of heads; pairs that no head may see count 0."""
    z = torch.where(allowed.any(1, keepdim=True), z, 0)
    group = weight.shape[-1]
    parts = [torch.einsum("gh,bhts->bgts", weight[n], z[:, n * group : (n + 1) * group]) for n in range(len(weight))]
    return torch.cat(parts, 1)


def convolved(z: Tensor, kernel: Tensor, allowed: Tensor, on_weights: bool) -> Tensor:
    """sum_ac kernel[h, a, c] z[h, t + a - (rows - 1), s + c - keys // 2], where what is not allowed counts 0."""
    z = torch.where(allowed, z, 0)
    _, rows, keys = kernel.shape
    (T, S), total = z.shape[2:], torch.zeros_like(z)
    for a, c in product(range(rows), range(keys)):
        up, right = a - (rows - 1), c - keys // 2
        moved = torch.zeros_like(z)
        t, s = range(max(0, -up), T), range(max(0, -right), min(S, S - right))
        if len(t) and len(s):
            piece = z[:, :, t.start + up : t.stop + up, s.start + right : s.stop + right]
            moved = torch.nn.functional.pad(piece, (s.start, S - s.stop, t.start, T - t.stop))
        total = total + kernel[:, a, c, None, None] * moved
    return torch.where(allowed, total, 0) if on_weights else total


def normalised(d: Description, z: Tensor, allowed: Tensor, own: Parameters) -> Tensor:
    """Weights; a row that sees nothing has none."""
    alive = allowed.any(-1, keepdim=True)
    # Rows that see nothing are normalised as if they saw all, and thrown away.
    allowed = allowed | ~alive
    z = torch.where(alive, z, 0)
    match d.normalizer:
        case "entmax15" | "entmax12" | "sparsemax":
            alpha = {"entmax15": 1.5, "entmax12": 1.2, "sparsemax": 2.0}[d.normalizer]
            weights = entmax(z, torch.tensor(alpha, dtype=z.dtype), allowed)
        case "adaptive_entmax":
            weights = entmax(z, (1 + own["pre_alpha"].sigmoid()).clamp(1.01, 2)[:, None, None], allowed)
        case "topk":
            sorted_z = torch.where(allowed, z.detach(), -math.inf).sort(-1, descending=True).values
            weights = exponentials(z, allowed & (z >= sorted_z[..., min(3, d.S) - 1 : min(3, d.S)]))
            weights = weights / weights.sum(-1, keepdim=True)
        case "cog":
            weights = exponentials(z.abs(), allowed)
            weights = z.sign() * weights / weights.sum(-1, keepdim=True)
        case "sinks":
            sink = own["sinks"][:, None, None]
            top = torch.maximum(torch.where(allowed, z.detach(), -math.inf).amax(-1, keepdim=True), sink.detach())
            weights = torch.where(allowed, (torch.where(allowed, z, 0) - top).exp(), 0)
            weights = weights / (weights.sum(-1, keepdim=True) + (sink - top).exp())
        case _:
            weights = exponentials(z, allowed)
            weights = weights / weights.sum(-1, keepdim=True)
    return torch.where(alive, weights, 0)


def exponentials(z: Tensor, allowed: Tensor) -> Tensor:
    """exp(z - max z) where allowed, else 0."""
    top = torch.where(allowed, z.detach(), -math.inf).amax(-1, keepdim=True)
    return torch.where(allowed, (torch.where(allowed, z, top) - top).exp(), 0)


def entmax(z: Tensor, alpha: Tensor, allowed: Tensor) -> Tensor:
    """max((alpha - 1) z - tau, 0)^(1 / (alpha - 1)), tau by halving; its gradient by one Newton step, which moves it no
    more."""
    x = torch.where(allowed, (alpha - 1) * z, -math.inf)
    top = x.detach().amax(-1, keepdim=True)
    x = torch.where(allowed, (alpha - 1) * z - top, -2.0)  # tau lies between -1 and 0: what is below counts nothing

    def weights(tau: Tensor) -> Tensor:
        return (x - tau).clamp(min=0) ** (1 / (alpha - 1))

    with torch.no_grad():
        low, high = torch.full_like(top, -1.0), torch.zeros_like(top)
        for _ in range(60):
            middle = (low + high) / 2
            more = weights(middle).sum(-1, keepdim=True) >= 1
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        rest = (x - low).clamp(min=0)
        slope = torch.where(rest > 0, rest ** (1 / (alpha - 1) - 1), 0).sum(-1, keepdim=True) / (alpha - 1)
    tau = low + (weights(low).sum(-1, keepdim=True) - 1) / slope
    return weights(tau)
