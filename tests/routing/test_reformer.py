"""Reformer against loops and a released code's numbers. The loops' author has read neither the code nor this test."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing._lsh import columns, halves, hashed
from regard.routing.reformer import Reformer, lsh_attention
from routing import naive_reformer
from routing.naive_reformer import hash_head, reformer

VECTORS = Path(__file__).parents[1] / "vectors" / "S-reformer.npz"
H, D = 2, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.mT).unflatten(-1, (H, -1)).transpose(1, 2)


def ours(x: Tensor, wqk: Tensor, wv: Tensor, rotations: Tensor, **options: Any) -> Tensor:
    return lsh_attention(heads(x, wqk), heads(x, wv), rotations, **options).transpose(1, 2).flatten(2)


def compared(options: dict[str, Any], T: int, keep: Tensor | None = None, rounds: int = 2) -> None:
    """Values and gradients, at real tokens."""
    buckets: Any = options["buckets"]
    given = [normal(n, *shape).requires_grad_() for n, shape in enumerate(((2, T, 5), (H * D, 5), (H * D, 5)))]
    rotations = normal(4, H, D, rounds, columns(buckets, T, 4))
    got = ours(*given, rotations, keep=keep, **options)
    if "same_bucket_only" in options:
        options = {**options, "same_bucket": options["same_bucket_only"]}
        del options["same_bucket_only"]
    want = reformer(*given, rotations, heads=H, keep=keep, **options)
    real = torch.ones(2, T, 1) if keep is None else keep[..., None]
    close(got * real, want * real)
    g = normal(5, *got.shape) * real
    grads = [torch.autograd.grad((o * g).sum(), given) for o in (got, want)]
    for mine, theirs, name in zip(*grads, ("x", "query_key", "value"), strict=True):
        close(mine, theirs, f"gradient of {name}")


PAPERS = {"same_bucket_only": True, "exclude_duplicates": True}


@pytest.mark.parametrize(
    ("options", "T", "padded"),
    [
        ({"buckets": 4, "causal": True}, 12, 0),
        ({"buckets": 4, "causal": True, **PAPERS}, 12, 3),
        ({"buckets": (2, 4), "after": 1, **PAPERS}, 12, 0),
        ({"buckets": 2, "before": 0, "exclude_duplicates": True}, 8, 2),
        ({"buckets": 2, "same_bucket_only": True}, 12, 1),
        ({"buckets": 2, "causal": True, **PAPERS}, 3, 1),
    ],
)
def test_is_the_definition(options: dict[str, Any], T: int, padded: int) -> None:
    keep = torch.arange(T) < torch.tensor([[T], [T - padded]]) if padded else None
    compared({**options, "chunk": 4}, T, keep)


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(case)}


CASES: dict[str, dict[str, Any]] = {"a": {"buckets": 4}, "b": {"buckets": 4, "causal": True}, "c": {"buckets": (2, 4)}}


@pytest.mark.parametrize("case", CASES)
def test_gives_a_released_codes_numbers(case: str) -> None:
    z, told = vectors(case), CASES[case]
    keep = z["keep"].bool() if "keep" in z else None
    x, wqk = z["x"].requires_grad_(), z["query_key.weight"].requires_grad_()
    real = torch.ones(1, x.shape[1], dtype=torch.bool) if keep is None else keep
    found = hashed(heads(x, wqk), z["rotations"], halves(told["buckets"], real.sum(1), 4), real)
    each = 4 if keep is None else 9  # padding has a bucket of its own
    assert torch.equal(found + each * torch.arange(found.shape[2])[:, None], z["buckets"])
    out = ours(x, wqk, z["value.weight"], z["rotations"], chunk=4, keep=keep, **told)
    close(out, z["out"])
    grads = torch.autograd.grad((out * z["w"]).sum(), (x, wqk))
    close(grads[0], z["gx"], "gradient of x")
    close(grads[1], z["gquery_key"], "gradient of query_key")


def test_a_wrong_reference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys as they are, without their norm."""
    monkeypatch.setattr(naive_reformer, "make_key", lambda z: z)
    with pytest.raises(Exception, match="differ"):
        compared({"buckets": 4, "chunk": 4}, 8)


def layer(**options: Any) -> Reformer:
    torch.manual_seed(0)
    return regard.create("reformer", dim=12, num_heads=2, dtype=torch.float64, draws="kept", **options).eval()


def naive(module: Reformer, x: Tensor, buckets: Any, **options: Any) -> Tensor:
    assert module.rotations is not None
    need = columns(buckets, None, 4)
    made = {"heads": 2, "chunk": 4, "buckets": buckets, **options}
    weights = (module.q_proj.weight, module.v_proj.weight, module.rotations[..., :need])
    return reformer(x, *weights, **made) @ module.o_proj.weight.mT


@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_and_its_default_buckets(causal: bool) -> None:
    """16 tokens in chunks of 4: 8 buckets. 36: 16, which are two factors, 4 and 4."""
    module = layer(chunk=4, rounds=2, causal=causal)
    for T, buckets in ((16, 8), (36, (4, 4))):
        x = normal(1, 1, T, 12)
        close(module(x), naive(module, x, buckets, causal=causal))
    assert [
        tuple(int(z) for z in h) for h in zip(*halves(None, torch.tensor([4095, 4096, 8192]), 64), strict=True)
    ] == [
        (32, 0),
        (64, 0),
        (8, 8),
    ]


@pytest.mark.parametrize("options", [{}, PAPERS, {"after": 1, "causal": True}])
def test_rows_of_other_lengths_are_as_by_themselves(options: dict[str, Any]) -> None:
    """Whole chunks of padding, a row that fits into one chunk, and one without tokens."""
    module, x = layer(chunk=4, rounds=2, **options), normal(1, 4, 32, 12)
    keep = torch.arange(32) < torch.tensor([[32], [13], [3], [0]])
    out = module(x.masked_fill(~keep[..., None], torch.nan), mask=masks.padding(keep))
    for row, n in enumerate((32, 13, 3)):
        close(out[row, :n], module(x[row : row + 1, :n])[0], f"{n} tokens")
    assert not module(x, mask=masks.padding(keep))[3].any()


def test_more_rounds_come_nearer_to_all_keys() -> None:
    x, errors = normal(0, 1, 128, 12), []
    for rounds in (1, 4, 16):
        module = layer(chunk=8, buckets=8, rounds=rounds, exclude_duplicates=True)
        z, v = (heads(x, p.weight) for p in (module.q_proj, module.v_proj))
        k = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() / z.shape[3] ** 0.5
        full = regard.attention(z, k, v, scale=1.0, mask=~torch.eye(128, dtype=torch.bool)[None, None])
        full = module.o_proj(full.transpose(1, 2).flatten(2))
        errors.append(float((module(x) - full).norm() / full.norm()))
    assert errors[0] > 1.3 * errors[1] > 1.69 * errors[2], errors
    close(layer(chunk=128)(x), full, "one chunk holds all")


def test_equal_tokens_share_buckets() -> None:
    """Of 128 tokens each sees at most 16 in a head, and an earlier copy mostly, wherever that stands."""
    module = layer(chunk=8, buckets=32)
    x = normal(0, 64, 12).repeat(2, 1)
    slopes = torch.autograd.functional.jacobian(lambda x: module(x[None])[0].square().sum(-1), x)
    seen = slopes.abs().amax(2) > 0
    assert seen.sum(1).max() <= 32, "two heads"
    assert seen[torch.arange(64) + 64, torch.arange(64)].sum() >= 57
    z = heads(x[None], module.q_proj.weight)
    found = hashed(z, normal(1, 2, 6, 3, 16), halves(32, torch.tensor([128]), 8), torch.ones(1, 128, dtype=torch.bool))
    assert torch.equal(found[..., :64], found[..., 64:])


def test_a_token_sees_itself_only_where_it_sees_nothing_else() -> None:
    module, x = layer(causal=True, chunk=4), normal(1, 1, 9, 12)
    close(module(x)[:, 0], module.o_proj(module.v_proj(x[:, 0])))


def test_fresh_and_kept_rotations() -> None:
    module, x = layer(chunk=4), normal(1, 1, 32, 12)
    first = module(x)
    assert torch.equal(module(x), first)
    module.redraw()
    assert not torch.equal(module(x), first)
    fresh = regard.create("reformer", dim=12, num_heads=2, dtype=torch.float64, chunk=4).eval()
    assert fresh.rotations is None
    assert not torch.equal(fresh(x), fresh(x))
    assert fresh(x.narrow(0, 0, 0)).shape == (0, 32, 12)
    assert fresh(x[:, :0]).shape == (1, 0, 12)


def test_what_a_hash_of_one_head_is() -> None:
    """Ids of two factors, by the loops."""
    z, rotations = normal(0, 1, 1, 9, 3), normal(1, 1, 3, 2, 5)
    found = hashed(z, rotations, halves((4, 6), torch.tensor([9]), 4), torch.ones(1, 9, dtype=torch.bool))
    assert found[0, 0].tolist() == hash_head(z[0, 0], rotations[0], (4, 6))


@pytest.mark.parametrize("buckets", [3, (2, 3), 0])
def test_buckets_must_be_even(buckets: Any) -> None:
    with pytest.raises(ValueError, match="Reformer: buckets"):
        Reformer(12, 2, buckets=buckets)


def test_tensors_must_fit() -> None:
    z, rotations = normal(0, 1, 2, 8, 4), normal(1, 2, 4, 1, 2)
    for more, said in (
        ({"keep": torch.ones(1, 7, dtype=torch.bool)}, "keep"),
        ({"rotations": rotations[:1]}, "rotations"),
    ):
        with pytest.raises(ValueError, match=f"lsh_attention: {said}"):
            lsh_attention(z, z, **{"rotations": rotations, "chunk": 4, "buckets": 4, **more})
