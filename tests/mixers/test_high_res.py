"""A closer look at images, against loops whose author saw only the paper's account, neither code nor test."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from mixers import naive_high_res as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.detail_attention import high_res_attention
from regard.mixers.detail_selection import resize_table, select_detail
from regard.mixers.high_res import HighResAttention
from regard.mixers.high_res_stack import HighResStack

VECTORS = Path(__file__).parents[1] / "vectors/B158.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(seed: int, *shape: int, share: float = 0.5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    made = regard.create(
        "high_res_attention", **{"dim": 12, "num_heads": 2, "image": (1, 5), "causal": True, **options}
    ).double()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.add_(0.3 * normal(n, *p.shape))
    return made


def maps(module: Any) -> dict[str, Tensor]:
    own = {f"{n}_proj": getattr(module, f"{n}_proj").weight for n in "qkvo"}
    return own | {f"{n}_proj_hd": getattr(module.detail, f"{n}_proj").weight for n in "kv"}


def tables(module: Any, T: int, g2: int) -> tuple[Tensor, ...]:
    D = module.head_dim
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    own = [torch.cat([z, z], 1) for z in (angle.cos(), angle.sin())]
    start, stop = module.image
    return (*own, *(naive.resize_table(z[start:stop], math.isqrt(stop - start), g2) for z in own))


def same_gradients(got: Tensor, want: Tensor, leaves: list[Tensor], what: str = "gradient") -> None:
    direction = normal(99, *got.shape)
    both = ((o * direction).sum() for o in (got, want))
    for mine, other in zip(*(torch.autograd.grad(s, leaves, allow_unused=True) for s in both), strict=True):
        zero = torch.zeros(())
        close(zero if mine is None else mine, zero if other is None else other, what)


@pytest.mark.parametrize("case", ["a", "b"])
def test_the_authors_numbers(case: str) -> None:
    file = np.load(VECTORS)
    given = {n[2:]: torch.from_numpy(file[n]) for n in file.files if n.startswith(f"{case}_")}
    (start, stop), (first, last) = given["image"].tolist(), given["rows"].tolist()
    heads = 12 // given["cos"].shape[1]
    options = {"alpha": float(given["alpha"]), "threshold": float(given["threshold"])}
    module: Any = HighResAttention(12, heads, image=(start, stop), **options).double()
    with torch.no_grad():
        for name, p in maps(module).items():
            p.copy_(given[f"P_{name}.weight"])
    x, detail = given["x"].requires_grad_(), given["hd"].requires_grad_()
    rows = torch.zeros(1, x.shape[1], dtype=torch.bool)
    rows[0, first:last] = True
    chosen = torch.zeros(1, x.shape[1], detail.shape[1], dtype=torch.bool)
    chosen[0, first:last] = given["prev"]
    y = module(x, detail, chosen)
    close(y, given["y"], "y")
    (y * given["w"]).sum().backward()
    for got, name in ((x.grad, "gx"), (detail.grad, "ghd"), (module.detail.k_proj.weight.grad, "gk_hd")):
        close(got, given[name], name)
    grid = math.isqrt(detail.shape[1])
    made = module.select(x, grid, rows, sizes=[tuple(given["size"].tolist())])
    assert torch.equal(made[0, first:last], given["next"])
    assert not made[~rows].any()
    for name in ("cos", "sin"):
        close(resize_table(given[name][start:stop], grid), given[f"hd_{name}"], name)


@pytest.mark.parametrize("options", [{}, {"num_heads": 3, "head_dim": 4, "alpha": 0.3}, {"num_kv_heads": 1}])
def test_is_the_definition(options: dict[str, Any]) -> None:
    module, T = layer(**options), 8
    x, detail = normal(1, 2, T, 12).requires_grad_(), normal(2, 2, 9, 12).requires_grad_()
    rows, chosen = some(3, 2, T), some(4, 2, T, 9)
    chosen &= rows[..., None]
    alpha, groups, W = module.alpha, module.num_kv_heads, maps(module)
    want, A = naive.high_res_attention(
        x, detail, chosen, rows, W, module.num_heads, *tables(module, T, 3), alpha=alpha, num_kv_heads=groups
    )
    got = module(x, detail, chosen)
    close(got, want)
    same_gradients(got, want, [x, detail, *module.parameters()])
    rows[:, :5] = False
    assert torch.equal(module.select(x, 3, rows), naive.select_rows(A, rows, module.image, 3))
    assert torch.equal(module.select(x, 3, rows, sizes=[(8, 4), (5, 9)]),
                       naive.select_rows(A, rows, module.image, 3, sizes=[(8, 4), (5, 9)]))  # fmt: skip


def test_a_closed_eye_is_plain_attention_and_an_open_one_sees_all() -> None:
    q, k, v, far_k, far_v = normal(1, 2, 4, 6, 4), *normal(2, 4, 2, 2, 6, 4)
    plain = regard.attention(q, k, v, mask=masks.causal())
    close(high_res_attention(q, k, v, far_k, far_v, torch.zeros(2, 6, 6, dtype=torch.bool)), plain)
    everything = torch.cat([torch.ones(6, 6).tril() > 0, torch.ones(6, 6) > 0], 1)[None, None]
    both = regard.attention(q, torch.cat([k, far_k], 2), torch.cat([v, far_v], 2), mask=everything)
    opened = torch.ones(2, 6, 6, dtype=torch.bool)
    close(high_res_attention(q, k, v, far_k, far_v, opened), both)
    close(high_res_attention(q, k, v, far_k, far_v, opened, alpha=0.25), 0.75 * plain + 0.25 * both)


@pytest.mark.parametrize(("g", "g2", "cells"), [(4, 6, 9), (3, 9, 9), (12, 24, 9), (10, 20, 9), (5, 7, 4)])
@pytest.mark.parametrize("size", [None, (20, 8), (8, 20), (7, 7)])
def test_selects_as_the_loops_do(g: int, g2: int, cells: int, size: tuple[int, int] | None) -> None:
    weights = normal(g, 2, 3, g * g).exp()
    options: dict[str, Any] = {"threshold": 96, "cells": cells}
    got = select_detail(weights.sum(0)[None], g2, **options, sizes=None if size is None else [size])
    want = naive.select_detail(weights, g, 96, cells, g2, size)
    assert torch.equal(got[0], want)
    assert 0 < got.sum() < got.numel()


def test_where_all_weights_are_alike_nothing_is_chosen() -> None:
    assert not select_detail(torch.full((1, 2, 9), 0.1), 9).any()


def test_the_stack_is_the_loops() -> None:
    layers = [layer(threshold=20.0) for _ in range(3)]
    for n, one in enumerate(layers):
        with torch.no_grad():
            one.q_proj.weight.add_(normal(60 + n, 12, 12))
    x, detail, rows = normal(1, 1, 8, 12), normal(2, 1, 9, 12), torch.arange(8)[None] >= 5
    want, made = naive.host(
        x, detail, rows, [maps(one) for one in layers], 2, (1, 5), 3, *tables(layers[0], 8, 3)[:2], 1, 20
    )
    got = HighResStack(layers, first=1)(x, detail)
    close(got.out, want)
    assert len(made) == len(got.chosen) == 2
    assert all(torch.equal(a, b) for a, b in zip(got.chosen, made, strict=True))
    assert made[0].any()
    plain = x
    for one in layers:
        plain = plain + one(plain)
    assert (got.out - plain)[:, 5:].abs().max() > 1e-3
    norms, after = ([nn.LayerNorm(12).double() for _ in layers] for _ in range(2))
    normed = HighResStack(layers[:1], norms=norms[:1], after=after[:1])(x, detail).out
    close(normed, after[0](x + layers[0](norms[0](x))))


def test_the_selection_reads_the_bright_cell() -> None:
    """A question behind 3 x 3 cells, one of them bright; which of 4 classes it is stands in its detail alone."""
    first, second = (layer(dim=16, num_heads=1, image=(0, 9), base=1e9, threshold=128.0) for _ in range(2))
    with torch.no_grad():
        for p in (*first.parameters(), *second.parameters()):
            p.zero_()
        first.q_proj.weight[7, 0] = first.k_proj.weight[7, 1] = 8.0  # questions look at what is bright; 7 hardly turns
        second.detail.v_proj.weight.copy_(torch.eye(16))
        second.o_proj.weight.copy_(torch.eye(16))
    bright, classes, at = torch.arange(36) % 9, torch.arange(36) % 4, torch.arange(36)
    x = torch.zeros(36, 10, 16, dtype=torch.float64)
    x[:, 9, 0], x[at, bright, 1] = 1, 1
    shown = torch.randint(4, (36, 9, 9), generator=torch.Generator().manual_seed(0))  # cell, place in it
    shown[at, bright] = classes[:, None]
    detail = nn.functional.one_hot(shown, 16).double().unflatten(1, (3, 3)).unflatten(3, (3, 3))
    detail = detail.transpose(2, 3).flatten(3, 4).flatten(1, 3).reshape(36, 81, 16)

    def right(chosen: Tensor) -> float:
        return float((second(x, detail, chosen)[:, 9, :4].argmax(-1) == classes).double().mean())

    chosen = first.select(x, 9)
    assert (chosen[:, 9].sum(1) == 9).all()
    assert right(chosen) == 1
    assert right(chosen.roll(3, 2)) < 0.6
    assert right(torch.ones_like(chosen)) < 0.9


def test_a_stream_reads_as_all_at_once() -> None:
    module, x, detail = layer(threshold=20.0), normal(1, 2, 9, 12), normal(2, 2, 9, 12)
    chosen, keep = some(3, 2, 9, 9), torch.arange(9) > torch.tensor([[-1], [1]])
    want, made = module(x, detail, chosen, mask=keep), module.select(x, 3, mask=keep)
    state, outs, picked = module.init_state(2, 9, dtype=torch.float64), [], []
    for piece, pick, real in zip(
        x.split([6, 1, 2], 1), chosen.split([6, 1, 2], 1), keep.split([6, 1, 2], 1), strict=True
    ):
        picked.append(module.select(piece, 3, mask=real, state=state))
        out, state = module.step(piece, state, detail, pick, mask=real)
        outs.append(out)
    close(torch.cat(outs, 1)[keep], want[keep])
    assert torch.equal(torch.cat(picked, 1)[keep], made[keep])
    assert made.any()


def test_a_stream_under_autocast_reads_the_same_detail() -> None:
    module, x, detail, chosen = layer(), normal(1, 2, 9, 12), normal(2, 2, 9, 12), some(3, 2, 9, 9)
    want, module, x, detail = module(x, detail, chosen), module.float(), x.float(), detail.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state, outs = module.init_state(2, 9), []
        for piece, pick in zip(x.split([6, 1, 2], 1), chosen.split([6, 1, 2], 1), strict=True):
            out, state = module.step(piece, state, detail, pick)
            outs.append(out)
        whole = module(x, detail, chosen)
    size = want.abs().max()
    assert (torch.cat(outs, 1) - want).abs().max() < 0.02 * size
    assert (whole - want).abs().max() < 0.02 * size
    assert (module(x) - want).abs().max() > 0.2 * size


def test_nan_stays_where_it_is_read() -> None:
    module, x, detail = layer(), normal(1, 1, 6, 12), normal(2, 1, 9, 12)
    chosen = some(3, 1, 6, 9)
    spoilt = detail.clone()
    spoilt[:, 4] = math.nan
    got, hit = module(x, spoilt, chosen), chosen[..., 4]
    assert 0 < hit.sum() < hit.numel()
    assert got[hit].isnan().all()
    close(got[~hit], module(x, detail, chosen)[~hit])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": (1, 6)}, "image has places that make no square"),
        ({"image": (-1, 3)}, "image begins before"),
        ({"alpha": 1.5}, "alpha is out of range"),
        ({"head_dim": 3}, "head_dim is odd"),
    ],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer(**options)


def test_refuses_what_does_not_fit() -> None:
    module, x, detail = layer(), normal(1, 2, 6, 12), normal(2, 2, 9, 12)
    with pytest.raises(ValueError, match="chosen goes with a context"):
        module(x, None, some(1, 2, 6, 9))
    with pytest.raises(ValueError, match="context has places that make no square"):
        module(x, detail[:, :7])
    with pytest.raises(ValueError, match="does not hold the small copy"):
        module.select(x[:, :3], 3)
    with pytest.raises(TypeError, match="chosen has the wrong dtype"):
        module(x, detail, torch.ones(2, 6, 9))
    with pytest.raises(ValueError, match="sizes are not of these images"):
        module.select(x, 3, sizes=[(1, 1)])
    with pytest.raises(ValueError, match="norms are not one for each layer"):
        HighResStack([module], norms=[])
