"""Sinkhorn attention against loops and a port's numbers. The loops' author has read neither the code nor this test."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing.sinkhorn import Sinkhorn, sinkhorn_attention, sinkhorn_order
from routing import naive_sinkhorn

VECTORS = Path(__file__).parents[1] / "vectors" / "S-sinkhorn.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(T: int) -> list[Tensor]:
    return [normal(n, 2, 2, T, 3).requires_grad_() for n in range(3)]


def compared(T: int, noise: bool = False, **options: Any) -> None:
    given = inputs(T)
    gumbel = normal(4, 2, 2, T // 3, T // 3) if noise else None
    got = sinkhorn_attention(*given, block=3, gumbel=False if gumbel is None else gumbel, **options)
    told = {"tau" if name == "temperature" else name: value for name, value in options.items()}
    want, _ = naive_sinkhorn.sinkhorn_attention(*given, block=3, gumbel=gumbel, **told)
    close(got, want)
    g = normal(5, *got.shape)
    grads = [torch.autograd.grad((o * g).sum(), given) for o in (got, want)]
    for mine, theirs, name in zip(*grads, "qkv", strict=True):
        close(mine, theirs, f"gradient of {name}")


@pytest.mark.parametrize(
    ("T", "options"),
    [(12, {"iterations": 3, "temperature": 0.4, "noise": True}), (9, {"iterations": 0}), (9, {"hard": True}), (3, {})],
)
def test_is_the_definition(T: int, options: dict[str, Any]) -> None:
    compared(T, **options)


def test_a_wrong_reference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns the other way round."""
    soft = naive_sinkhorn.soft_sort
    monkeypatch.setattr(
        naive_sinkhorn, "soft_sort", lambda scores, *more: soft(list(zip(*scores, strict=True)), *more).mT
    )
    with pytest.raises(Exception, match="differ"):
        compared(9, iterations=1)


@pytest.mark.parametrize("case", ["a", "b"])
def test_gives_a_ports_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    given = [z[n].requires_grad_() for n in "qkv"]
    told: dict[str, Any] = {"hard": True} if case == "b" else {"iterations": 5, "gumbel": z["gumbel"]}
    out = sinkhorn_attention(*given, block=3, **told)
    close(out, z["out"])
    for found, name in zip(torch.autograd.grad((out * z["w"]).sum(), given), "qkv", strict=True):
        close(found, z[f"g{name}"], f"gradient of {name}")
    if case == "a":
        q, k = (t.detach().unflatten(2, (4, 3)).mean(3) for t in given[:2])
        R = sinkhorn_order(q @ k.mT / 2, iterations=5, gumbel=z["gumbel"])
        close(R, torch.stack([z[f"sort_{b}{h}"] for b in "01" for h in "01"]).view(2, 2, 4, 4))


def layer(**options: Any) -> Sinkhorn:
    torch.manual_seed(0)
    return regard.create("sinkhorn", dim=12, num_heads=2, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("hard", [True, False])
def test_rows_of_other_lengths_are_as_by_themselves(hard: bool) -> None:
    """Blocks of padding, a last block in part, and a row without tokens."""
    module, x = layer(block=4, hard=hard), normal(1, 4, 16, 12)
    keep = torch.arange(16) < torch.tensor([[16], [9], [3], [0]])
    out = module(x.masked_fill(~keep[..., None], torch.nan), mask=masks.padding(keep))
    for row, n in enumerate((16, 9, 3)):
        close(out[row, :n], module(x[row : row + 1, :n])[0], f"{n} tokens")
    assert not module(x, mask=masks.padding(keep))[3].any()


def test_rows_and_columns_sum_to_one() -> None:
    R = sinkhorn_order(normal(0, 1, 1, 6, 6).abs(), iterations=50)
    close(R.sum(3), torch.ones(1, 1, 6).double())
    close(R.sum(2), torch.ones(1, 1, 6).double())
    assert R.max() < 0.9
    order = torch.tensor([2, 0, 3, 1])
    P = sinkhorn_order(torch.eye(4).double()[order][None, None] + 0.1, iterations=50, temperature=0.05)
    assert P[0, 0].argmax(1).tolist() == order.tolist()
    assert P[0, 0].max(1).values.min() > 0.99


class Given(nn.Module):
    """Values that don't depend on tokens."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        return self.values


def test_a_query_reads_its_own_block_and_the_best_other() -> None:
    """By how outputs move with values: 8 of 32 tokens, and of other blocks the one with the largest mean score."""
    torch.manual_seed(0)
    module = regard.create("sinkhorn", dim=8, num_heads=1, dtype=torch.float64, block=4, hard=True).eval()
    x = normal(1, 1, 32, 8)
    q, k = (p(x)[0].unflatten(0, (8, 4)).mean(1) for p in (module.q_proj, module.k_proj))
    best = (q @ k.mT).argmax(1)
    module.v_proj = Given(normal(2, 1, 32, 8).requires_grad_())
    out = module(x)[0].square().sum(1)
    for t in (0, 5, 17, 30):
        (slope,) = torch.autograd.grad(out[t], module.v_proj.values, retain_graph=True)
        seen = slope[0].abs().sum(1) > 0
        assert set(seen.unflatten(0, (8, 4)).all(1).nonzero().flatten().tolist()) == {t // 4, int(best[t // 4])}
        assert seen.sum() <= 8


def test_one_block_is_plain_attention() -> None:
    """Its keys count twice, and a soft order of one block is itself."""
    q, k, v = inputs(5)
    close(sinkhorn_attention(q, k, v, block=64), regard.attention(q, k, v))
    close(
        sinkhorn_attention(q, k[:, :1], v[:, :1], block=2),
        sinkhorn_attention(q, *(z[:, :1].repeat(1, 2, 1, 1) for z in (k, v)), block=2),
    )


def test_noise_is_for_training() -> None:
    module, x = layer(block=4), normal(1, 2, 16, 12)
    quiet = module(x)
    assert torch.equal(module(x), quiet)
    assert not torch.equal(module.train()(x), module(x))
    calm = layer(block=4, noise=False).train()
    assert torch.equal(calm(x), quiet)
    assert module(x[:0]).shape == (0, 16, 12)
    assert module(x[:, :0]).shape == (2, 0, 12)


def test_options_are_checked() -> None:
    for wrong in ({"block": 0}, {"temperature": 0.0}, {"iterations": -1}):
        with pytest.raises(ValueError, match=f"Sinkhorn: {next(iter(wrong))}"):
            layer(**wrong)
    q, k, v = inputs(6)
    for more, said in (
        ({"k": k[:, :, :3], "v": v[:, :, :3]}, "k has other tokens"),
        ({"keep": torch.ones(2, 5, dtype=torch.bool)}, "keep"),
        ({"gumbel": normal(3, 2, 2, 4, 4)}, "gumbel"),
    ):
        with pytest.raises(ValueError, match=f"sinkhorn_attention: {said}"):
            sinkhorn_attention(**{"q": q, "k": k, "v": v, "block": 3, **more})
