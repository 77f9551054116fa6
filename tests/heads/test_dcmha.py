"""Dynamic composition of heads (DCMHA): loops over every pair of tokens and heads, and the authors' numbers (A144)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.heads import ComposeHeads
from regard.stages import Rows

VECTORS = Path(__file__).parents[1] / "vectors" / "A144.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def filled(seed: int, dim: int, num_heads: int, **options) -> ComposeHeads:
    """A part whose parameters are large enough to matter (it starts near the identity)."""
    part = ComposeHeads(dim, num_heads, **options).double()
    with torch.no_grad():
        for n, parameter in enumerate(part.parameters()):
            parameter.copy_(0.7 * normal(100 * seed + n, *parameter.shape))
    return part


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def token_weights(
    x: Tensor, dw1: Tensor, qkw: Tensor, dd: Tensor
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """One token, one side: w1 and w2 (rank, H), w1 normalised over heads, and the gates (H)."""
    M, K = dw1.shape
    hidden = [gelu(sum(float(x[m] * dw1[m, k]) for m in range(M))) for k in range(K)]
    both = [
        [sum(hidden[k] * float(qkw[k, r, h]) for k in range(K)) for h in range(qkw.shape[2])]
        for r in range(qkw.shape[1])
    ]
    rank = len(both) // 2
    w1, w2 = both[:rank], both[rank:]
    w1 = [[v / math.sqrt(sum(u * u for u in row) / len(row) + 1e-6) for v in row] for row in w1]
    gates = [math.tanh(sum(float(x[m] * dd[m, h]) for m in range(M))) for h in range(dd.shape[1])]
    return w1, w2, gates


def oracle(part: ComposeHeads, z: Tensor, x: Tensor, context: Tensor) -> Tensor:
    """z (B, H, t, s) composed by the weights of query tokens x and key tokens context, group by group of heads."""
    p = {name: value.detach() for name, value in part.named_parameters()}
    G, hidden, heads = part.groups, len(p["qkw"][0]), z.shape[1] // part.groups
    composed = []
    for g in range(G):
        mine = slice(g * heads, (g + 1) * heads)
        own = {
            "dw1": p["dw1"][..., g * hidden : (g + 1) * hidden],
            "qkw": p["qkw"][..., mine],
            "dd": p["dd"][..., mine],
        }
        composed.append(one_group(own, z[:, mine], x, context, part.sides))
    return torch.cat(composed, 1)


def one_group(p: dict[str, Tensor], z: Tensor, x: Tensor, context: Tensor, who: str) -> Tensor:
    B, H, t, s = z.shape
    names = ["queries", "keys"] if who == "both" else [who]
    out = torch.zeros_like(z)
    for b in range(B):
        sides = {
            name: [
                token_weights(row, p["dw1"][:, c], p["qkw"][c], p["dd"][:, c])
                for row in (x if name == "queries" else context)[b]
            ]
            for c, name in enumerate(names)
        }
        for i in range(t):
            for j in range(s):
                vector = [float(z[b, m, i, j]) for m in range(H)]
                for h in range(H):
                    value = vector[h]
                    for name, made in sides.items():
                        w1, w2, gates = made[i if name == "queries" else j]
                        for low, high in zip(w1, w2, strict=True):
                            value += high[h] * sum(a * v for a, v in zip(low, vector, strict=True))
                        value += vector[h] * gates[h]
                    out[b, h, i, j] = value
    return out


def rows(z: Tensor, x: Tensor, context: Tensor, allowed: Tensor | None = None) -> Rows:
    B, H, t, s = z.shape
    q, k = torch.zeros(B, H, t, 2, dtype=z.dtype), torch.zeros(B, H, s, 2, dtype=z.dtype)
    return Rows(q, k, z, torch.arange(s - t, s), torch.arange(s), allowed, x, context)


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_formula(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    B, H, t, s, M = (int(torch.randint(1, n, (), generator=g)) for n in (3, 6, 4, 5, 6))
    part = filled(seed, M, H, **({"rank": 1 + seed % 3} if seed % 4 else {}))
    z, x, context = normal(seed, B, H, t, s), normal(seed + 1, B, t, M), normal(seed + 2, B, s, M)
    close(part(z, rows(z, x, context)).detach(), oracle(part, z, x, context))


@pytest.mark.parametrize("sides", ["both", "queries", "keys"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_sides_and_groups_equal_the_formula(sides: str, groups: int) -> None:
    part = filled(groups, 5, 6, rank=1, sides=sides, groups=groups)
    z, x, context = normal(1, 2, 6, 3, 4), normal(2, 2, 3, 5), normal(3, 2, 4, 5)
    close(part(z, rows(z, x, context)).detach(), oracle(part, z, x, context))


def numbers(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        found = {name.removeprefix(f"{case}:"): file[name] for name in file if name.startswith(f"{case}:")}
    return {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}


ROWS = {"both": [0, 1], "queries": [0], "keys": [1]}
"""Which of a Compose's two sides is held, by `sides`; the authors stack pre-query, pre-key, post-query, post-key."""


def compose_weights(dw1: Tensor, qkw: Tensor, dd: Tensor, number: int, sides: str) -> dict[str, Tensor]:
    """The authors' dw1 (M, G, 4, K), qkw (G, 4, K, 2I, h), dd (M, G, 4 h) as ours of the first or second Compose."""
    mine = [2 * number + side for side in ROWS[sides]]
    return {
        "dw1": dw1[:, :, mine].transpose(1, 2).flatten(2),
        "qkw": qkw[:, mine].permute(1, 2, 3, 0, 4).flatten(3),
        "dd": dd.unflatten(2, (4, -1))[:, :, mine].transpose(1, 2).flatten(2),
    }


@pytest.mark.parametrize(
    ("case", "sides"), [("both", "both"), ("queries", "queries"), ("keys", "keys"), ("grouped", "both")]
)
def test_authors_compositions(case: str, sides: str) -> None:
    """Their JAX code, which has all of them: both Composes of the same tokens."""
    n = numbers(case)
    H, (M, groups, _, hidden) = n["z"].shape[1], n["P_dw1"].shape
    x, z = n["x"].requires_grad_(), n["z"].requires_grad_()
    parts = [ComposeHeads(M, H, hidden=hidden, sides=sides, groups=groups).double() for _ in range(2)]
    outs = []
    for number, part in enumerate(parts):
        part.load_state_dict(compose_weights(*(n[f"P_{name}"] for name in ("dw1", "qkw", "dd")), number, sides))
        outs.append(part(z, rows(z, x, x)))
    close(torch.stack(outs).detach(), n["out"])
    leaves = [x, z, *(p for part in parts for p in part.parameters())]
    grads = torch.autograd.grad((torch.stack(outs) * n["w"]).sum(), leaves)
    wanted = [compose_weights(*(n[f"G_{name}"] for name in ("dw1", "qkw", "dd")), number, sides) for number in range(2)]
    for got, want in zip(grads, [n["gx"], n["gz"], *(g for own in wanted for g in own.values())], strict=True):
        close(got, want)


@pytest.mark.parametrize(("case", "sides"), [("layer", "both"), ("layer_queries", "queries")])
def test_authors_layer(case: str, sides: str) -> None:
    """Their PyTorch layer, causal; query-wise as they decode, token by token."""
    n = numbers(case)
    M, hidden = n["x"].shape[-1], n["P_dyn_w_proj.dw1"].shape[3]
    H = n["P_dyn_w_proj.qkw"].shape[-1]
    layer = regard.create("dcmha", dim=M, num_heads=H, causal=True, sides=sides, hidden=hidden).double()

    def ours(letter: str) -> dict[str, Tensor]:
        q, k, v = n[f"{letter}_wqkv.weight"].chunk(3)
        found = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": n[f"{letter}_wo.weight"]}
        for number, slot in enumerate(("score_mix", "weight_mix")):
            own = compose_weights(*(n[f"{letter}_dyn_w_proj.{name}"] for name in ("dw1", "qkw", "dd")), number, sides)
            found |= {f"{slot}.{name}": value for name, value in own.items()}
        return found

    layer.load_state_dict(ours("P"))
    x = n["x"].requires_grad_()
    y = layer(x)
    close(y.detach(), n["out"])
    own = dict(layer.named_parameters())
    grads = torch.autograd.grad((y * n["w"]).sum(), [x, *own.values()])
    close(grads[0], n["gx"])
    for name, grad in zip(own, grads[1:], strict=True):
        close(grad, ours("G")[name])


def test_one_side_reads_no_token_of_the_other() -> None:
    z, x, other = normal(0, 1, 4, 3, 3), normal(1, 1, 3, 8), normal(2, 1, 3, 8)
    for sides, kept, changed in (("queries", (x, x), (x, other)), ("keys", (x, x), (other, x))):
        part = filled(6, 8, 4, sides=sides)
        assert torch.equal(part(z, rows(z, *kept)), part(z, rows(z, *changed)))


def test_groups_exchange_nothing() -> None:
    part, z, x = filled(6, 8, 4, groups=2), normal(0, 1, 4, 3, 3), normal(1, 1, 3, 8)
    changed = z.clone()
    changed[:, 3] += 1
    before, after = (part(one, rows(one, x, x)) for one in (z, changed))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2], after[:, 2])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"num_heads is no multiple of groups = 4 \(got 6\)"):
        ComposeHeads(8, 6, groups=4)
    with pytest.raises(
        ValueError, match=r"sides is unknown \(got 'query'\); expected one of 'both', 'queries', 'keys'"
    ):
        ComposeHeads(8, 6, sides="query")


def test_shapes_are_those_of_the_paper() -> None:
    part = ComposeHeads(10, 6, rank=2)
    assert {name: tuple(p.shape) for name, p in part.named_parameters()} == {
        "dw1": (10, 2, 24),
        "qkw": (2, 24, 4, 6),
        "dd": (10, 2, 6),
    }
    assert "tokens" in part.needs


def test_is_the_identity_without_qkw_and_dd_and_starts_near_it() -> None:
    z, x = normal(0, 2, 4, 3, 3), normal(1, 2, 3, 8)
    part = ComposeHeads(8, 4).double()
    assert (part(z, rows(z, x, x)) - z).abs().max() < 0.5 * z.abs().max()
    with torch.no_grad():
        part.qkw.zero_()
        part.dd.zero_()
    close(part(z, rows(z, x, x)).detach(), z, 1e-14)


def test_initial_spread_is_that_of_the_authors_code() -> None:
    torch.manual_seed(0)
    M, H = 96, 8
    part, K = ComposeHeads(M, H), 4 * H
    wanted = {
        "dw1": math.sqrt(2 / (M + K)),
        "qkw": 0.02 / (math.sqrt(K) * (H + 2)),
        "dd": 0.05 * math.sqrt(2 / (H + M)),
    }
    for name, std in wanted.items():
        values = getattr(part, name).detach()
        assert abs(float(values.std()) / std - 1) < 4 / math.sqrt(2 * values.numel())


def test_weights_of_masked_keys_stay_exactly_zero() -> None:
    part = filled(3, 8, 4)
    x = normal(1, 2, 5, 8)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    weights = normal(0, 2, 4, 5, 5).masked_fill(~allowed, -math.inf).softmax(-1)
    mixed = part(weights, rows(weights, x, x, allowed[None, None]))
    assert not mixed.masked_select(~allowed).any()
    assert (mixed < 0).any()  # no longer a distribution


def test_a_future_token_does_not_change_the_past() -> None:
    pre, post = filled(4, 8, 4), filled(5, 8, 4)
    z, v = normal(0, 1, 4, 5, 5), normal(2, 1, 4, 5, 3)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()

    def attend(x: Tensor) -> Tensor:
        r = rows(z, x, x, allowed[None, None])
        weights = pre(z, r).masked_fill(~allowed, -math.inf).softmax(-1)
        return post(weights, r) @ v

    x = normal(1, 1, 5, 8)
    changed = x.clone()
    changed[:, 3] *= -100
    before, after = attend(x), attend(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])


def test_query_and_key_sides_differ() -> None:
    part = filled(6, 8, 4)
    z, x, other = normal(0, 1, 4, 3, 3), normal(1, 1, 3, 8), normal(2, 1, 3, 8)
    both = part(z, rows(z, x, other))
    swapped = part(z.transpose(2, 3), rows(z, other, x)).transpose(2, 3)
    assert (both - swapped).abs().max() > 0.1


def test_gradcheck() -> None:
    part = filled(7, 3, 2, rank=1)
    z, x = normal(0, 1, 2, 2, 2).requires_grad_(), normal(1, 1, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, x: part(z, rows(z, x, x)), (z, x))


def layer_inputs(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every query head, from the layer's projections."""
    D, R = layer.head_dim, layer.num_heads // layer.num_kv_heads
    q, k, v = (
        (x @ getattr(layer, n + "_proj").weight.T).unflatten(-1, (-1, D)).transpose(1, 2).detach() for n in "qkv"
    )
    return q, k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)


def randomised(layer: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.7 * normal(50 + n, *parameter.shape))
    return layer.double()


@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_composes_before_and_after_the_softmax(causal: bool) -> None:
    layer = randomised(regard.create("dcmha", dim=12, num_heads=4, num_kv_heads=2, causal=causal))
    x = normal(1, 2, 4, 12)
    q, k, v = layer_inputs(layer, x)
    allowed = torch.ones(4, 4, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    s = oracle(layer.score_mix, q @ k.transpose(-1, -2) / math.sqrt(3), x, x)
    a = oracle(layer.weight_mix, s.masked_fill(~allowed, -math.inf).softmax(-1), x, x)
    close(layer(x).detach(), (a @ v).transpose(1, 2).flatten(2) @ layer.o_proj.weight.detach().T)
    assert layer.score_mix is not layer.weight_mix
