"""Attention whose rank is free of its heads, against loops (naive_nearest.py) and the authors' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from cross import naive_nearest as naive
from regard import masks
from regard.cross import nearest as points
from regard.cross.free_rank import FreeRankAttention, low_rank_attention
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[1] / "vectors" / "B008.npz"
NAMES = ("queries", "keys", "Q", "K", "VO")
M, H = 5, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int = M, heads: int = H, **options) -> FreeRankAttention:
    made = FreeRankAttention(dim, heads, **options).double().eval()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.8 * normal(100 + n, *p.shape))
    return made


def maps(layer: FreeRankAttention) -> list[Tensor]:
    """Q, K, VO by heads."""
    H, M = layer.num_heads, layer.dim
    return [
        layer.q_proj.weight.view(H, -1, M), layer.k_proj.weight.view(H, -1, M), layer.o_proj.weight.T.view(H, M, M)
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["low", "full"])
def test_gives_the_authors_numbers(case: str) -> None:
    """H r = 8 > M = 5, and one head of full rank."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}
    given = [z[name].requires_grad_() for name in NAMES]
    out = low_rank_attention(*given)
    assert (out - z["out"]).abs().max() < 1e-10
    for name, got in zip(NAMES, torch.autograd.grad((out * z["w"]).sum(), given), strict=True):
        if name == "K":  # not in the file; what queries and keys share in every row of Q and K
            want = (z["Q"] * z["grad_Q"]).sum(-1)
            assert ((z["K"] * got).sum(-1) - want).abs().max() < 1e-10
            continue
        assert (got - z[f"grad_{name}"]).abs().max() < 1e-10, name
    assert (low_rank_attention(*given, hard=True) - z["hard_out"]).abs().max() < 1e-10


@pytest.mark.parametrize("case", ["low", "full"])
def test_the_layer_gives_the_authors_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}
    heads, rank, dim = z["Q"].shape
    for hard, want in ((False, "out"), (True, "hard_out")):
        layer = FreeRankAttention(dim, heads, rank=rank, hard=hard).double()
        with torch.no_grad():
            for p, theirs in zip((layer.q_proj, layer.k_proj), (z["Q"], z["K"]), strict=True):
                p.weight.copy_(theirs.flatten(0, 1))
            layer.o_proj.weight.copy_(z["VO"].flatten(0, 1).T)
        assert (layer(z["queries"], z["keys"]) - z[want]).abs().max() < 1e-10


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_is_the_definition(rank: int, padded: bool, causal: bool, hard: bool) -> None:
    layer, x = filled(rank=rank, causal=causal, hard=hard), normal(1, 2, 4, M).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    allowed = keep[:, None].expand(-1, 4, -1) if padded else torch.ones(2, 4, 4, dtype=torch.bool)
    allowed = allowed & torch.ones(4, 4, dtype=torch.bool).tril() if causal else allowed
    got = layer(x, **({"mask": masks.padding(keep)} if padded else {}))
    want = naive.low_rank_attention(x, x, *maps(layer), hard=hard, allowed=allowed)
    close(got, want, "out")
    of, g = [x, layer.o_proj.weight] if hard else [x, *layer.parameters()], normal(9, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("hard", [False, True])
def test_attends_to_other_tokens(hard: bool) -> None:
    layer, x, context = filled(rank=2, hard=hard), normal(1, 2, 3, M), normal(2, 2, 4, M)
    keep = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    allowed = keep[:, None].expand(-1, 3, -1)
    got = layer(x, context, mask=masks.padding(keep))
    close(got, naive.low_rank_attention(x, context, *maps(layer), hard=hard, allowed=allowed), "out")
    assert not layer(x, context[:, :0]).any(), "no key at all"


@pytest.mark.parametrize("hard", [False, True])
def test_the_function_takes_masks(hard: bool) -> None:
    x, given = normal(1, 2, 5, M), [normal(n, 3, r, M) for n, r in ((2, 2), (3, 2), (4, M))]
    got = low_rank_attention(x, x, *given, hard=hard, mask=masks.causal() & masks.window(2))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    close(got, naive.low_rank_attention(x, x, *given, hard=hard, allowed=allowed), "out")


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("sizes", [(1,) * 6, (3, 0, 2, 1)])
def test_steps_equal_the_full_pass(sizes: tuple[int, ...], hard: bool) -> None:
    layer, x = filled(causal=True, rank=2, hard=hard), normal(1, 2, 6, M)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, :2] = keep[1, 4] = False
    want, state, outs, at = layer(x, mask=masks.padding(keep)), layer.init_state(2, 6), [], 0
    state = type(state)(*(z.double() if z.is_floating_point() else z for z in state))
    for t in sizes:
        out, state = layer.step(x[:, at : at + t], state, mask=keep[:, at : at + t])
        outs, at = [*outs, out], at + t
    close(torch.cat(outs, 1)[keep], want[keep], "steps")


@torch.no_grad()
def test_one_full_head_finds_the_nearest_of_any_number() -> None:
    """A hard head whose three maps are the identity, of points of which it never saw as many; not so a narrow one."""
    generator = torch.Generator().manual_seed(0)
    for S in (2, 16, 300):
        keys, queries = points.draw(8, S, 6, generator=generator), points.sphere(8, 5, 6, generator=generator)
        errors = []
        for rank in (6, 1):
            layer = regard.create("free_rank", dim=6, num_heads=1, rank=rank, hard=True)
            for p in layer.parameters():
                p.copy_(torch.eye(6)[: p.shape[0]])
            errors.append(points.squared_error(layer(queries, keys), points.nearest(queries, keys)).item())
        assert errors[0] < 1e-10
        assert errors[1] > 0.2


def test_hard_heads_do_not_learn_where_to_look() -> None:
    layer = filled(rank=2, hard=True)
    layer(normal(1, 2, 4, M)).sum().backward()
    assert layer.q_proj.weight.grad is None
    assert layer.k_proj.weight.grad is None
    assert layer.o_proj.weight.grad is not None


def test_starting_values() -> None:
    """Those of queries and keys don't shrink with the number of heads; those of VO do."""
    layer = regard.create("free_rank", dim=32, num_heads=16, rank=8)
    for p, bound in (
        (layer.q_proj, (6 / 40) ** 0.5),
        (layer.k_proj, (6 / 40) ** 0.5),
        (layer.o_proj, (6 / 544) ** 0.5),
    ):
        assert p.bias is None
        assert 0.98 * bound < p.weight.detach().abs().max().item() <= bound
        assert p.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert regard.create("free_rank", dim=12, num_heads=2).rank == 12


@pytest.mark.parametrize(
    ("wrong", "told"), [({"rank": 0}, "rank is too small"), ({"hard": 1}, "hard"), ({"heads": 0}, "num_heads")]
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        filled(**wrong)


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="K has the wrong shape"):
        low_rank_attention(
            normal(0, 1, 2, 3), normal(0, 1, 2, 3), normal(0, 2, 1, 3), normal(0, 2, 2, 3), normal(0, 2, 3, 3)
        )
