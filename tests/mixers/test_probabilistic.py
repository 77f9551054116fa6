"""Probabilistic attention against loops (naive_probabilistic.py), whose author has read neither code nor test, and the
authors' numbers (B094)."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from laws.measured import largest
from mixers.naive_probabilistic import probabilistic_attention as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.probabilistic import probabilistic_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "B094.npz"
CASES: dict[str, dict[str, Any]] = {
    "dot": {},
    "em": {"key_steps": 1},
    "keys": {"log_prior": None, "key_steps": 2},
    "values": {"log_prior": None, "value_steps": 2},
    "values_noprior": {"log_prior": None, "value_steps": 1},
    "precision": {},
    "position": {},
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    of_all = [torch.autograd.grad((z * g).sum(), of, retain_graph=True, allow_unused=True) for z in (got, want)]
    for mine, other, z in zip(*of_all, of, strict=True):
        close(*(torch.zeros_like(z) if t is None else t for t in (mine, other)), "gradient")


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_gives_the_authors_numbers(case: str, rows: int | None) -> None:
    with np.load(VECTORS) as file:
        names = [n.removeprefix(case + "_") for n in file if n.startswith(case + "_")]
        z = {n: torch.from_numpy(file[f"{case}_{n}"]) for n in names}
    q, k, v = leaves = [z[n].clone().requires_grad_() for n in "qkv"]
    a, b = (z[n] if z[n].dim() else float(z[n]) for n in ("alpha", "beta"))
    given: dict[str, Any] = {"key_precision": a, "value_precision": b, "initial_values": z.get("v_init"), **CASES[case]}
    given |= {"key_prior": z.get("k_prior_precision"), "value_prior": z.get("v_prior_precision"), "rows": rows}
    given["positions"] = tuple(z.get(f"{n}_pos_emb") for n in "qkv")
    if "mask" in z:
        given["mask"] = z["mask"][None, None]
    if "pi" in z:
        given["log_prior"] = z["pi"].log()
    if "v_fixed" in z:
        given["known"] = z["v_fixed"][..., :-1], z["v_fixed"][..., -1]
    out = probabilistic_attention(q, k, v, **given)
    close(out.detach(), z["out"], "out")
    grads = torch.autograd.grad((out * z["w"]).sum(), leaves, allow_unused=True)
    for name, got in zip("qkv", grads, strict=True):
        if f"grad_{name}" in z:
            close(torch.zeros_like(z[name]) if got is None else got, z[f"grad_{name}"], f"gradient of {name}")


B, H, T, S, D, V = 2, 2, 4, 3, 3, 2
MAGNITUDE: dict[str, Any] = {"log_prior": "magnitude"}
UNIFORM: dict[str, Any] = {"log_prior": None}
STEPS = {"key_steps": 2, "value_steps": 2, "alpha": 0.8, "beta": 0.6}
WAYS: dict[str, dict[str, Any]] = {
    "plain": MAGNITUDE,
    "uniform": UNIFORM,
    "log pi": {"log_prior": (0.1 + drawn(1, B, 1, T, S)).log()},
    "each its own precision": {"alpha": 0.5 + drawn(1, B, H, S), "beta": drawn(2, B, H, S), "v0": 1, **UNIFORM},
    "each, magnitude": {"alpha": 0.5 + drawn(1, B, H, S), "beta": drawn(2, B, H, S), "v0": 1, "rq": 1, "rk": 1},
    "steps": {**STEPS, **UNIFORM},
    "steps, magnitude": {**STEPS, "v0": 1},
    "priors": {**STEPS, **UNIFORM, "key_prior": drawn(3, B, H, S, D), "value_prior": drawn(4, B, H, S, V), "v0": 1},
    "one prior": {**STEPS, "key_prior": 0.7, "value_prior": 1.3, "rk": 1},
    "positions": {"rq": 1, "rk": 1, "rv": 1, "beta": 0.3, "v0": 1, **UNIFORM},
    "positions, magnitude": {"rq": 1, "rk": 1, "rv": 1, "beta": 0.3, "v0": 1, "key_steps": 1},
    "positions of known values": {**STEPS, "rv": 1, "value_prior": 0.4},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_is_the_definition(way: str, masked: bool) -> None:
    o = {"alpha": None, "beta": 0.0, **WAYS[way]}
    placed = o.get("rv") is not None
    t = S if placed else T  # the known position parts are of as many tokens
    q, k, v = leaves = [normal(n, B, H, *size).requires_grad_() for n, size in enumerate(((t, D), (S, D), (S, V)))]
    shapes = {"rq": (t, S, D), "rk": (S, t, D), "rv": (t, S, V), "v0": (B, H, t, V)}
    o |= {name: 0.7 * normal(20 + n, *shape) for n, (name, shape) in enumerate(shapes.items()) if name in o}
    allowed = drawn(5, t, S) < 0.6 if masked else None
    if allowed is not None:
        allowed[1], allowed[0] = False, True  # a query that sees nothing; and no key without a query
    flag = (drawn(6, B, H, t) < 0.6).double()
    flag[:, :, 0] = 1
    known = normal(7, B, H, t, 2 * V if placed else V)
    known[..., :V] *= flag[..., None]
    want, _ = naive(q, k, v, **o, known=known, flag=flag, allowed=allowed)
    parts = (known[..., :V], flag, known[..., V:]) if placed else (known, flag.bool())
    given = {
        name: o[name] for name in ("log_prior", "key_steps", "key_prior", "value_steps", "value_prior") if name in o
    }
    for rows in (None, 2):
        got = probabilistic_attention(
            q,
            k,
            v,
            key_precision=o["alpha"],
            value_precision=o["beta"],
            initial_values=o.get("v0"),
            known=parts,
            mask=None if allowed is None else masks.dense(allowed[None, None]),
            positions=(o.get("rq"), o.get("rk"), o.get("rv")),
            rows=rows,
            **given,
        )
        close(got, want, "out")
        same_gradients(got, want, leaves)


def layer(**options: Any) -> nn.Module:
    made = regard.create("probabilistic", **{"dim": 12, "num_heads": 4, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.4 * normal(50 + n, *p.shape))
    return made


def heads(made: nn.Module, name: str, x: Tensor) -> Tensor:
    z = getattr(made, f"{name}_proj")(x).unflatten(-1, (-1, 3)).transpose(1, 2)
    return z.repeat_interleave(4 // z.shape[1], 1)


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steps": {"key_steps": 2, "key_precision": 0.8, "log_prior": "uniform", "num_kv_heads": 2, "bias": True},
    "prior": {"key_steps": 1, "key_prior": 0.5, "value_precision": 0.4},
    "own values": {"own_values": True, "value_precision": 0.4, "log_prior": "uniform"},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_is_the_definition_of_its_projections(kind: str, padded: bool) -> None:
    """Row by row: hidden tokens are as if they weren't there."""
    made, x = layer(**LAYERS[kind]), normal(1, 2, 5, 12).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool) if padded else torch.ones(2, 5).bool()
    flags = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 1, 0, 0]], dtype=torch.bool)
    known = normal(2, 2, 5, 12)
    got = made(x, mask=masks.padding(keep) if padded else None)
    options = {**LAYERS[kind], "value_precision": LAYERS[kind].get("value_precision", 0.7)}
    other = layer(**options)
    told = other.propagate(x, known.masked_fill(~flags[..., None], math.nan), flags, mask=keep if padded else None)
    for b in range(2):
        some = keep[b]
        for model, out, more in ((made, got, {}), (other, told, {"value_steps": 1, "value_prior": 1.0})):
            q, k, v, u = (heads(model, n, z[b : b + 1, some]) for n, z in zip("qkvv", (x, x, x, known), strict=True))
            f = flags[b : b + 1, None, some].expand(-1, 4, -1).double()
            o = {"alpha": model.options["key_precision"], "beta": model.options["value_precision"], **more}
            o |= {"log_prior": model.options["log_prior"], "key_prior": model.options["key_prior"]}
            o |= {"v0": v if model.own_values else None, "key_steps": model.key_steps}
            want, _ = naive(q, k, v, **o, known=u * f[..., None], flag=f)
            close(out[b, some], model.o_proj(want[0].transpose(0, 1).flatten(1)), "out")
            if not padded:
                same_gradients(out[b], model.o_proj(want[0].transpose(0, 1).flatten(1)), [x, *model.parameters()])


def test_it_attends_to_other_tokens() -> None:
    made = layer(key_steps=1, context_dim=7)
    x, context = normal(1, 1, 3, 12), normal(2, 1, 5, 7)
    want, _ = naive(heads(made, "q", x), heads(made, "k", context), heads(made, "v", context), key_steps=1)
    close(made(x, context), made.o_proj(want.transpose(1, 2).flatten(2)))


def test_defaults_are_dot_product_attention() -> None:
    q, k, v = normal(1, 2, 4, 5, 3), normal(2, 2, 2, 6, 3), normal(3, 2, 2, 6, 4)
    close(probabilistic_attention(q, k, v), regard.attention(q, k, v))
    made, x = layer(), normal(1, 2, 5, 12)
    plain = regard.create("softmax", dim=12, num_heads=4).double()
    plain.load_state_dict(made.state_dict())
    close(made(x), plain(x))


def test_key_steps_never_lower_the_likelihood() -> None:
    """sum_i log sum_j exp(-(a/2) |q_i - k_j|^2), of the keys that each step's weights make of the queries."""
    q, k = normal(1, 1, 1, 12, 2), 3 * normal(2, 1, 1, 4, 2)
    eye, found, keys = torch.eye(4, dtype=torch.float64)[None, None], [], k
    for n in range(8):
        found.append(float((-0.5 * torch.cdist(q, keys).square()).logsumexp(-1).sum()))
        w = probabilistic_attention(q, k, eye, key_precision=1.0, log_prior=None, key_steps=n)
        keys = w.mT @ q / w.sum(-2)[..., None]
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(found)), found
    assert found[1] > found[0] + 5, "the first step takes the keys to the queries"
    assert found[-1] > found[1] + 0.5, "later ones do better"


def test_a_known_value_reaches_its_cluster() -> None:
    """Of two clusters of 30 units one unit each has a known class; without a value step nobody has one."""
    centre = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64).repeat_interleave(30, 0)
    q = (centre + 0.5 * normal(1, 60, 2))[None, None]
    u, f = torch.zeros(1, 1, 60, 2, dtype=torch.float64), torch.zeros(1, 1, 60, dtype=torch.bool)
    u[0, 0, 0, 0] = u[0, 0, 30, 1] = 1
    f[0, 0, [0, 30]] = True
    given: dict[str, Any] = {"value_precision": 2.0, "value_prior": 1.0, "known": (u, f), "log_prior": None}
    before, after = (probabilistic_attention(q, q, 0 * u, value_steps=n, **given)[0, 0] for n in (0, 1))
    assert not before.any()
    assert torch.equal(after.argmax(-1), torch.arange(60) // 30)


def test_units_that_nothing_falls_to_stay() -> None:
    """A key that no query sees, a value that no known one reaches, and a row of the batch without known ones."""
    q, v = normal(1, 2, 1, 4, 3), normal(2, 2, 1, 4, 2)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2] = False
    mask[..., 0, 3] = mask[..., 1, 3] = False
    f = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]]], dtype=torch.bool)
    given: dict[str, Any] = {"value_precision": 1.0, "log_prior": None, "mask": mask}
    leaf = q.clone().requires_grad_()
    out = probabilistic_attention(leaf, leaf, v, value_steps=1, known=(0 * v, f), key_steps=1, **given)
    plain = probabilistic_attention(q, q, v, key_steps=1, **given)
    close(out[1], plain[1], "nothing is known there")
    weights = probabilistic_attention(q, q, torch.eye(4).double().expand(2, 1, 4, 4), key_steps=1, **given)
    close(out[0], (weights[0] @ (v[0] * torch.tensor([0.0, 0, 1, 1])[:, None])), "value 3 is out of their reach")
    assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()


def test_a_hidden_key_does_not_count_however_high_its_score() -> None:
    q, k, v = normal(1, 1, 1, 3, 2), normal(2, 1, 1, 4, 2), normal(3, 1, 1, 4, 2)
    k[..., 3, :] = 1e6
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask[..., 3] = False
    for steps in (0, 2):
        got = probabilistic_attention(q, k, v, mask=mask, key_steps=steps, log_prior=None)
        close(got, probabilistic_attention(q, k[:, :, :3], v[:, :, :3], key_steps=steps, log_prior=None))


def test_no_square_matrix() -> None:
    q = torch.randn(1, 1, 4096, 2)
    assert largest(lambda: probabilistic_attention(q, q, q, key_steps=1, rows=64)) <= 64 * 4096


def test_starts_as_plain_attention_does() -> None:
    torch.manual_seed(0)
    made = regard.create("probabilistic", dim=64, num_heads=4)
    for p in (made.q_proj, made.k_proj, made.v_proj, made.o_proj):
        assert p.bias is None
        assert p.weight.abs().max() <= 1 / 8
        assert 0.06 < float(p.weight.detach().std()) < 0.08
    assert (made.key_steps, made.own_values) == (0, False)
    assert made.options == {"key_precision": None, "key_prior": None, "value_precision": 0.0, "log_prior": "magnitude"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"key_steps": -1}, "key_steps"),
        ({"key_steps": 101}, "key_steps"),
        ({"key_steps": 1.0}, "key_steps"),
        ({"key_precision": 0.0}, "key_precision"),
        ({"key_prior": math.nan}, "key_prior"),
        ({"value_precision": -1.0}, "value_precision"),
        ({"log_prior": "even"}, "log_prior"),
        ({"own_values": 1}, "own_values"),
    ],
)
def test_refuses(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        layer(**wrong)


X = normal(1, 2, 3, 4, 2)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"key_steps": 101}, "key_steps is too large"),
        ({"value_steps": 10**9}, "value_steps is too large"),
        ({"key_precision": torch.ones(2, 3)}, "key_precision has the wrong shape"),
        ({"value_prior": -1.0}, "value_prior is out of range"),
        ({"log_prior": "even"}, "log_prior is unknown"),
        ({"log_prior": torch.zeros(2, 3, 4, 5)}, "log_prior has the wrong shape"),
        ({"known": X}, "known is no tuple"),
        ({"known": (X, X)}, "known.1. has the wrong shape"),
        ({"known": (X, X[..., 0]), "positions": (None, None, torch.zeros(4, 4, 2))}, "known is no tuple"),
        ({"positions": (None, None)}, "positions is no tuple"),
        ({"positions": (torch.zeros(4, 5, 2), None, None)}, "positions.0. has the wrong shape"),
        ({"initial_values": X[..., :1]}, "initial_values has the wrong shape"),
        ({"mask": torch.ones(4, 4)}, "mask has the wrong"),
        ({"tells": torch.ones(2, 4)}, "tells has the wrong dtype"),
        ({"rows": 0}, "rows is too small"),
    ],
)
def test_the_function_refuses(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        probabilistic_attention(X, X, X, **wrong)


def test_a_context_has_no_values_of_its_own() -> None:
    with pytest.raises(ValueError, match="context holds no values of x"):
        layer(own_values=True)(normal(1, 1, 3, 12), normal(2, 1, 3, 12))
    with pytest.raises(ValueError, match="known has the wrong shape"):
        layer().propagate(normal(1, 1, 3, 12), normal(2, 1, 3, 5), torch.ones(1, 3).bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_may_be_wrapped_and_have_hooks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = regard.create("probabilistic", dim=8, num_heads=2, key_steps=1, dtype=dtype)
    x = torch.randn(2, 5, 8, dtype=dtype)
    plain = layer(x)
    layer.q_proj = nn.Sequential(nn.Identity(), layer.q_proj)
    assert torch.equal(layer(x), plain)
    handle = layer.v_proj.register_forward_hook(lambda module, given, out: 0 * out)
    assert torch.equal(layer(x), torch.zeros_like(x))
    handle.remove()
    assert torch.equal(layer(x), plain)
