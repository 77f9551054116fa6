"""Dual attention against loops, whose author saw the formulas only (naive_dual_attention.py), and their numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_dual_attention as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers._relational import relational_attention
from regard.mixers._symbols import PositionalSymbols, RelativeSymbols, SymbolicAttention
from regard.mixers.dual_attention import DualAttention

VECTORS = Path(__file__).parents[1] / "vectors" / "dual_attention.npz"
M, H = 12, 4
SMALL = {"num_symbols": 5, "symbol_heads": 2, "max_length": 8, "max_distance": 2}
OPTIONS: list[dict] = [
    {},
    {"num_relational_heads": 3, "num_relations": 9, "relation_activation": "tanh", "out_bias": True},
    {"num_relations": 3, "relation_activation": "gelu", "num_kv_heads": 1, "relational_kv_heads": 1, "kv_bias": True},
    {"symbols": "positional", "symmetric": True, "relation_activation": "relu", "causal": True},
    {"symbols": "relative", "relation_activation": "sigmoid", "relational_kv_heads": 1, "kv_bias": True},
    {"symbols": "relative", "relation_activation": "silu", "causal": True, "num_relational_heads": 4},
    {"share": True, "causal": True},
    {"num_relational_heads": 0, "out_bias": True},
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(dim: int = M, heads: int = H, seed: int = 0, **options) -> DualAttention:
    made = regard.create("dual_attention", dim=dim, num_heads=heads, **{**SMALL, **options}).double().eval()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.7 * normal(100 * seed + n, *p.shape))
    return made


def oracle(
    made: DualAttention,
    x: Tensor,
    allowed: Tensor | None = None,
    context: Tensor | None = None,
    rotate=None,
) -> Tensor:
    """The loops with a layer's own parameters."""
    sensory = relational = None
    source, relative, symbols = x if context is None else context, False, None
    if (half := made.sensory) is not None:
        sensory = {f"W{n}": getattr(half, f"{n}_proj").weight for n in "qkvo"}
        sensory |= {f"b{n}": getattr(half, f"{n}_proj").bias for n in "kvo"}
        sensory |= {"num_heads": half.num_heads, "num_kv_heads": half.num_kv_heads}
    if (half := made.relational) is not None:
        pairs = half.position
        relational = {f"W{n}": getattr(half, f"{n}_proj").weight for n in "qko"}
        relational |= {"Ws": half.v_proj.weight, "Wr": pairs.mix, "P": pairs.receiver_proj.weight}
        relational |= {"bk": half.k_proj.bias, "bs": half.v_proj.bias, "bo": half.o_proj.bias}
        relational["Q"] = None if pairs.sender_proj is None else pairs.sender_proj.weight
        relational |= {"num_heads": half.num_heads, "num_relations": made.num_relations}
        relational |= {"num_kv_heads": half.num_kv_heads, "activation": pairs.activation}
        B, S = source.shape[:2]
        if relative := pairs.pairs is not None:
            symbols = naive.relative_symbols(pairs.pairs.table, S)
        elif isinstance(half.symbols, SymbolicAttention):
            own = half.symbols
            symbols = naive.symbolic_attention(
                source, own.weight, own.bias, own.templates, own.library, num_heads=own.num_heads
            )
        else:
            symbols = naive.positional_symbols(half.symbols.table, B, S)
    given = {"relative": relative, "allowed": allowed, "rotate": rotate, "context": context}
    return naive.dual_attention(x, symbols, sensory=sensory, relational=relational, **given)


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_definition(options: dict) -> None:
    made = layer(**options)
    x = normal(1, 2, 5, M).requires_grad_()
    allowed = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[0, 1] = False
    seen = allowed.tril() if made.causal else allowed
    want, got = oracle(made, x, seen), made(x, mask=allowed[:, None])
    close(got, want, "out")
    same_gradients(got, want, [x, *made.parameters()])


def test_turns_scores_and_no_relations() -> None:
    def rotate(z: Tensor, position: int) -> Tensor:
        out = []
        for a in range(len(z) // 2):
            turn = position * 50.0 ** (-2 * a / len(z))
            cos, sin = math.cos(turn), math.sin(turn)
            out += [z[2 * a] * cos - z[2 * a + 1] * sin, z[2 * a] * sin + z[2 * a + 1] * cos]
        return torch.stack(out)

    made, x = layer(16, base=50.0, causal=True), normal(1, 2, 5, 16)
    close(made(x), oracle(made, x, torch.ones(5, 5).bool().tril(), rotate=rotate), "out")


def test_attends_to_other_tokens() -> None:
    made = layer()
    x, context = normal(1, 2, 3, M).requires_grad_(), normal(2, 2, 5, M).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    want = oracle(made, x, keep[:, None].expand(-1, 3, -1), context)
    got = made(x, context, mask=masks.padding(keep))
    close(got, want, "out")
    same_gradients(got, want, [x, context, *made.parameters()])


NAMES = {
    "layer.self_attention.w": "sensory.{}_proj",
    "layer.relational_attention.wr": "relational.position.mix",
    "layer.relational_attention.wq_rel": "relational.position.receiver_proj",
    "layer.relational_attention.wk_rel": "relational.position.sender_proj",
    "layer.relational_attention.w": "relational.{}_proj",
    "symbols.template_features": "relational.symbols.templates",
    "symbols.symbol_library.weight": "relational.symbols.table",
    "symbols.symbol_library": "relational.symbols.library",
    "symbols.q_proj.": "relational.symbols.",
    "symbols.rel_pos_enc.rel_pos_embeddings": "relational.position.pairs.table",
}


def ours(name: str) -> str:
    """What a parameter of theirs is called here."""
    theirs = next(known for known in NAMES if name.startswith(known))
    rest = name.removeprefix(theirs)
    if "{}" not in NAMES[theirs]:
        return NAMES[theirs] + rest
    return NAMES[theirs].format(rest[0]) + rest[1:].removeprefix("_attn")


@pytest.mark.parametrize(
    ("case", "heads", "options"),
    [
        ("a_", 4, {"num_relational_heads": 2}),
        (
            "b_",
            6,
            {
                "num_relational_heads": 4,
                "symbols": "positional",
                "num_relations": 2,
                "relation_activation": "gelu",
                "num_kv_heads": 1,
                "relational_kv_heads": 2,
                "kv_bias": True,
                "out_bias": True,
                "causal": True,
            },
        ),
        (
            "c_",
            4,
            {"symbols": "relative", "symmetric": True, "relation_activation": "sigmoid", "relational_kv_heads": 1},
        ),
        ("d_", 6, {"relation_activation": "silu", "share": True, "causal": True}),
    ],
)
def test_gives_the_authors_numbers(case: str, heads: int, options: dict) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    made = layer(12, heads, **options)
    named = dict(made.named_parameters())
    theirs = {ours(k[2:]): k[2:] for k in z if k.startswith("p_")}
    assert theirs.keys() == named.keys()
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(z["p_" + theirs[name]])
    x = z["x"].requires_grad_()
    out = made(x, mask=z["mask"][None, None] if "mask" in z else None)
    assert (out - z["out"]).abs().max() < 1e-10
    (out * z["w"]).sum().backward()
    assert (x.grad - z["grad_x"]).abs().max() < 1e-10
    for name, p in named.items():
        assert (p.grad - z["g_" + theirs[name]]).abs().max() < 1e-10, name


@pytest.mark.parametrize("options", [{}, {"symbols": "positional", "base": 100.0}, {"symbols": "relative"}], ids=str)
def test_steps_equal_the_full_pass(options: dict) -> None:
    made, x = layer(16, causal=True, **options), normal(1, 2, 7, 16)
    want, state, outs = made(x), made.init_state(2, 7), []
    for part in x.split((1, 3, 1, 2), 1):
        out, state = made.step(part, state)
        outs.append(out)
    close(torch.cat(outs, 1), want, "steps")


@torch.no_grad()
def test_sees_relations_and_not_features() -> None:
    """All maps of features the identity: tokens that are turned alike relate alike, and that is all that comes out."""
    made = layer(6, 1, num_relational_heads=1, symbols="positional")
    half = made.relational
    for proj in (half.q_proj, half.k_proj, half.position.receiver_proj, half.position.sender_proj):
        proj.weight.copy_(torch.eye(6))
    x, turn = normal(5, 2, 8, 6), torch.linalg.qr(normal(6, 6, 6)).Q
    close(made(x @ turn), made(x), "turned tokens")
    moved = x.clone()
    moved[:, 3] *= 2
    assert (made(moved) - made(x)).abs().amax(-1).min() > 1e-3, "how tokens relate counts"
    half.position.mix.zero_()
    weights = (x @ x.mT / 6**0.5).softmax(-1)
    close(made(x), half.o_proj(weights @ half.v_proj(half.symbols.table)), "attention over symbols")


def test_the_function_is_what_layers_do() -> None:
    made, x = layer(num_relational_heads=4, relational_kv_heads=2), normal(1, 2, 5, M)
    half, pairs = made.relational, made.relational.position
    given = (half.q_proj(x), half.k_proj(x), half.v_proj(half.symbols(x, torch.arange(5))))
    q, k, s = (z.unflatten(-1, (-1, 3)).transpose(1, 2) for z in given)
    p, r = (proj(x).unflatten(-1, (4, -1)).transpose(1, 2) for proj in (pairs.receiver_proj, pairs.sender_proj))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    out = relational_attention(q, k, s, p, r, pairs.mix, mask=allowed[None, None])
    close(half.o_proj(out.transpose(1, 2).flatten(2)), made(x, mask=allowed[None, None]), "function")


def test_layers_share_symbols() -> None:
    found = SymbolicAttention(M, 2, 5)
    one, two = (DualAttention(M, H, retriever=found) for _ in range(2))
    assert one.relational.symbols is two.relational.symbols is found
    one, two = layer(seed=1), layer(seed=2)
    regard.share(one, two)
    assert one.relational.symbols.library is two.relational.symbols.library
    assert one.relational.v_proj.weight is not two.relational.v_proj.weight


def test_one_matrix_stays_one() -> None:
    made = layer(symmetric=True)
    assert made.relational.position.sender_proj is None
    tied = layer(share=True)
    assert tied.relational.q_proj is tied.sensory.q_proj
    assert "relational.q_proj.weight" not in dict(tied.named_parameters())


@torch.no_grad()
def test_starting_values() -> None:
    torch.manual_seed(0)
    made = regard.create("dual_attention", dim=64, num_heads=8)
    half = made.relational
    assert (half.num_heads, made.num_relations, half.symbols.library.shape) == (4, 4, (512, 64))
    for p in (half.symbols.library, half.symbols.templates, PositionalSymbols(64).table):
        assert abs(float(p.std()) - 1) < 0.02
    bound = (8 * 4) ** -0.5  # of kaiming_uniform_(a=sqrt(5)), whose fan of (H, D, R) is D R
    assert 0.9 * bound < float(half.position.mix.abs().max()) <= bound
    glorot = (6 / (33 + 64)) ** 0.5
    assert 0.9 * glorot < float(RelativeSymbols(64).table.abs().max()) <= glorot
    for proj in (half.q_proj, half.k_proj, half.v_proj, half.o_proj, made.sensory.q_proj, half.position.receiver_proj):
        assert proj.bias is None
        assert 0.9 * proj.in_features**-0.5 < float(proj.weight.abs().max()) <= proj.in_features**-0.5


def test_a_dropped_output_is_zero() -> None:
    made = layer(dropout=1.0).train()
    assert not made(normal(1, 2, 5, M)).any()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num_relational_heads": 5}, "num_relational_heads"),
        ({"num_relations": 5}, "num_relations"),
        ({"relation_activation": "softmax"}, "relation_activation"),
        ({"symbols": "none"}, "symbols"),
        ({"symbol_heads": 5}, "num_heads"),
        ({"share": True, "num_relational_heads": 1}, "share"),
        ({"share": True, "num_kv_heads": 1}, "share"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        layer(**wrong)


def test_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="no symbol"):
        layer(symbols="positional")(normal(0, 1, 9, M))
    with pytest.raises(ValueError, match="retriever"):
        DualAttention(M, H, retriever=PositionalSymbols(7))
    with pytest.raises(TypeError, match="state"):
        layer(causal=True).step(normal(0, 1, 1, M), None)


@torch.no_grad()
def test_a_mask_may_tell_heads_apart() -> None:
    made, x = layer(num_relational_heads=1), normal(1, 2, 5, M)
    allowed = torch.rand(2, H, 5, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    halves = (made.sensory(x, mask=allowed[:, :3]), made.relational(x, mask=allowed[:, 3:]))
    close(made(x, mask=allowed), torch.cat(halves, -1), "each half with its own")


def test_what_overflows_behind_the_mask_stays_there() -> None:
    made = layer(num_relational_heads=4).float()
    x = normal(1, 1, 4, M).float()
    x[0, 2] = 1e25  # with itself its relations are inf
    keep = torch.tensor([[True, True, False, True]])
    x.requires_grad_()
    out = made(x, mask=masks.padding(keep))[:, keep[0]]
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert torch.isfinite(x.grad[:, keep[0]]).all()
