"""Key-driven grouped-query attention against loops (naive_kdgqa.py) and the authors' numbers (A051.npz)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_kdgqa as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.kdgqa import KeyDrivenAttention, allocate, key_norms, key_shares, pooled_heads, read_by

VECTORS = Path(__file__).parents[1] / "vectors" / "A051.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int, heads: int, groups: int, seed: int = 0, **options) -> KeyDrivenAttention:
    layer = KeyDrivenAttention(dim, heads, num_kv_heads=groups, **options).double().eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.5 * normal(100 * seed + n, *p.shape))
        for g, rows in enumerate(layer.k_proj.weight.unflatten(0, (groups, -1))):
            rows.mul_(1 + 0.4 * g)  # so that key heads differ
    return layer


def given(layer: torch.nn.Module) -> tuple[list[Tensor], dict]:
    own = dict(layer.named_parameters())
    sizes = {"num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    return [own[f"{n}_proj.weight"] for n in "qkvo"], {**sizes, **{f"b{n}": own.get(f"{n}_proj.bias") for n in "qkvo"}}


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


def numbers(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}


def state(n: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {f"{name}_proj.weight": n[f"W{name}"] for name in "qkvo"}
    return weights | {f"{name}_proj.bias": n[f"b{name}"] for name in "qkvo"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (8, 4), (6, 6), (4, 1), (6, 2)])
def test_is_the_definition(heads: int, groups: int, bias: bool) -> None:
    layer = filled(10, heads, groups, head_dim=3, bias=bias)
    x = normal(1, 2, 4, 10).requires_grad_()
    weights, rest = given(layer)
    keep = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    for kept in (None, keep):
        allowed = None if kept is None else kept[:, None].expand(-1, 4, -1)
        want, counts = naive.kdgqa(x, *weights, allowed=allowed, keep=kept, **rest)
        got = layer(x, mask=None if kept is None else masks.padding(kept))
        assert layer.allocation(layer.split(x, x)[1], kept).tolist() == counts
        close(got, want, "out")
        same_gradients(got, want, [x, *layer.parameters()])


def test_each_sequence_decides_for_itself_where_asked() -> None:
    layer = filled(10, 6, 3, head_dim=3, counted="sequence")
    x = normal(1, 5, 4, 10) * torch.tensor([1.0, 5, 0.2, 3, 1])[:, None, None]
    weights, rest = given(layer)
    alone = [naive.kdgqa(row[None], *weights, **rest) for row in x]
    close(layer(x), torch.cat([out for out, _ in alone]))
    assert layer.allocation(layer.split(x, x)[1]).tolist() == [counts for _, counts in alone]
    assert len({tuple(counts) for _, counts in alone}) > 1


def test_a_context_decides_for_its_readers() -> None:
    layer = filled(10, 6, 3, head_dim=3, bias=True)
    x, context = normal(1, 2, 3, 10), normal(2, 2, 5, 10)
    q, k, v = layer.split(x, context)
    counts = naive.kdgqa_allocation(naive.key_norms(k.transpose(1, 2)), 6)
    which = naive.head_map(counts)
    weights = (q @ k[:, which].mT / math.sqrt(3)).softmax(-1)
    close(layer(x, context), layer.merge(weights @ v[:, which]))


@pytest.mark.parametrize("seed", range(60))
def test_numbers_of_query_heads_are_the_definitions(seed: int) -> None:
    """Many are rounded to too many or too few, one or several."""
    draw = torch.Generator().manual_seed(seed)
    G = int(torch.randint(1, 9, (), generator=draw))
    H = G * int(torch.randint(1, 4, (), generator=draw))
    norms = torch.rand(G, generator=draw, dtype=torch.float64).pow(3)
    got = allocate(key_shares(norms), H).tolist()
    assert got == naive.kdgqa_allocation(list(norms), H)
    assert sum(got) == H
    assert read_by(torch.tensor(got), H).tolist() == naive.head_map(got)


@pytest.mark.parametrize(
    ("shares", "heads", "want"),
    [
        ([0.0, 0.0, 0.0, 0.0], 6, [2, 2, 1, 1]),
        ([1.0, 1.0, 1.0, 1.0], 6, [1, 1, 2, 2]),  # 1.5 goes to the even 2: two too many, the first give first
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3, [0, 0, 0, 1, 1, 1][::-1]),  # 0.5 goes to 0: three too few
        ([1.0, 0.0, 1.0], 3, [1, 0, 2]),
    ],
)
def test_rounding_is_made_up_for_one_by_one(shares: list[float], heads: int, want: list[int]) -> None:
    assert allocate(torch.tensor(shares), heads).tolist() == want


def test_equal_keys_share_query_heads_evenly() -> None:
    k = normal(1, 2, 1, 5, 3).expand(-1, 3, -1, -1)
    assert allocate(key_shares(key_norms(k).sum(0)), 6).tolist() == [2, 2, 2]


@pytest.mark.parametrize("case", ["kd1", "kd2"])
def test_gives_the_authors_numbers(case: str) -> None:
    n = numbers(case)
    (M, D), G = (n["Wo"].shape[0], 2), len(n["Wk"]) // 2
    layer = regard.create("kdgqa", dim=M, num_heads=M // D, num_kv_heads=G, causal=False, bias=True).double()
    layer.load_state_dict(state(n))
    x = n["x"].requires_grad_()
    out = layer(x)
    close(out, n["out"])
    assert torch.equal(layer.allocation(layer.split(x, x)[1]), n["allocation"])
    close(torch.autograd.grad((out * n["w"]).sum(), x)[0], n["grad_x"], "gradient")


def test_a_head_with_longer_keys_is_read_by_more() -> None:
    """Its values alone are not 0: features of query heads that read it are what is left."""
    layer = filled(16, 8, 4, counted="batch")
    x, shares = normal(1, 2, 6, 16), []
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(16))
        layer.v_proj.weight[2:].zero_()
        for _ in range(2):
            read = layer(x).unflatten(-1, (8, 2)).ne(0).any(-1).any(1).any(0)
            counts = layer.allocation(layer.split(x, x)[1])
            assert counts.sum() == 8
            assert read.sum() == counts[0]
            shares.append(int(counts[0]))
            layer.k_proj.weight[:2] *= 10
    assert shares[0] <= 2 < shares[1]


def test_later_tokens_and_other_rows_decide_too() -> None:
    """What has no causal form: whatever stands in a batch moves the answers to all of it, by a jump."""
    layer = filled(10, 6, 3, head_dim=3)
    x = normal(1, 2, 6, 10)
    later, other = x.clone(), x.clone()
    wanted = torch.tensor([60.0] * 3 + [0] * 6, dtype=x.dtype)[:, None]  # of the first key head alone
    pull = torch.linalg.lstsq(layer.k_proj.weight.detach(), wanted).solution[:, 0]
    later[0, -1] += pull
    other[1] += pull
    before = layer.allocation(layer.split(x, x)[1])
    for changed in (later, other):
        keys = layer.split(changed, changed)[1]
        assert not torch.equal(layer.allocation(keys), before)
    alone = filled(10, 6, 3, head_dim=3, counted="sequence")
    assert (layer(other)[0] - layer(x)[0]).abs().max() > 1e-3
    close(alone(other)[0], alone(x)[0])
    for name in ("kdgqa", "kdgqa_sequence", "dgqa", "pgqa"):
        with pytest.raises(ValueError, match="does not support causal"):
            regard.create(name, dim=24, num_heads=6, causal=True)


def test_takes_over_a_multi_head_layer() -> None:
    for shape in ((24, 7), (24,)):
        weight = normal(1, *shape)
        close(pooled_heads(weight, 6, 2), naive.pool_heads(weight, 6, 2))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="counted is unknown"):
        KeyDrivenAttention(8, 4, counted="row")
    with pytest.raises(ValueError, match="dropout is out of range"):
        KeyDrivenAttention(8, 4, dropout=2.0)
    with pytest.raises(ValueError, match="num_heads"):
        KeyDrivenAttention(8, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match="no 'packed' on its card"):
        KeyDrivenAttention(8, 4)(normal(1, 1, 4, 8).float(), mask=masks.packed(torch.tensor([0, 2, 4])))
