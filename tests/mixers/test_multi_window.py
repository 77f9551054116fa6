"""Multi-window attention against loops, whose author has read neither code nor test, and the authors' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_multi_window as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.multi_window import MultiWindowAttention, WindowTables, spread_windows

VECTORS = Path(__file__).parents[1] / "vectors" / "A196.npz"
WINDOWS = (2, 3, 5, 0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(dim: int = 12, windows: tuple[int, ...] = WINDOWS, **options) -> MultiWindowAttention:
    layer = regard.create("multi_window", dim=dim, num_heads=len(windows), windows=windows, **options).double().eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 + n, *p.shape))
    return layer


def tables(layer: MultiWindowAttention) -> list[Tensor | None]:
    return [layer.position.tables[str(h)] if w else None for h, w in enumerate(layer.windows)]


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("shift", [False, True])
def test_is_the_definition(shift: bool, relative: bool) -> None:
    layer, x = built(shift=shift, relative=relative, bias=True), normal(1, 1, 30 if shift else 10, 12).requires_grad_()
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    wqkv, bqkv = (torch.cat([getattr(p, name) for p in projections]) for name in ("weight", "bias"))
    given = (wqkv, bqkv, layer.o_proj.weight, layer.o_proj.bias, WINDOWS, tables(layer) if relative else None)
    got, (want, _) = layer(x), naive.multi_window(x, *given, shift, None)  # rolled, all windows must divide the length
    close(got, want, "out")
    of = [x, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), of) for y in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize(("case", "shift"), [("a", False), ("b", True)])
def test_gives_the_authors_numbers(case: str, shift: bool) -> None:
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}
    windows = tuple(z["windows"].tolist())
    layer, x = built(z["x"].shape[2], windows, shift=shift, bias=True), z["x"].requires_grad_()
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    with torch.no_grad():
        for p, w, b in zip(projections, z["Wqkv"].chunk(3), z["bqkv"].chunk(3), strict=True):
            p.weight.copy_(w)
            p.bias.copy_(b)
        layer.o_proj.weight.copy_(z["Wo"])
        layer.o_proj.bias.copy_(z["bo"])
        for h, table in layer.position.tables.items():
            table.copy_(z[f"table{h}"])
    out = layer(x)
    assert (out - z["out"]).abs().max() < 1e-10
    (out * z["w"]).sum().backward()
    assert (x.grad - z["grad_x"]).abs().max() < 1e-10
    assert (torch.cat([p.weight.grad for p in projections]) - z["grad_Wqkv"]).abs().max() < 1e-10
    for h, table in layer.position.tables.items():
        assert (table.grad - z[f"grad_table{h}"]).abs().max() < 1e-10


def test_a_head_hears_its_own_window_alone() -> None:
    """And heads look the farther, the larger their windows are."""
    layer, x = built(windows=(2, 4, 8, 0), relative=False), normal(1, 1, 16, 12)
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(12))
    other = x.clone()
    other[:, 5] += 1
    changed = (layer(other) - layer(x)).unflatten(-1, (4, 3)).abs().amax((0, -1)) > 1e-9
    for h, (first, end) in enumerate(((4, 6), (4, 8), (0, 8), (0, 16))):
        assert changed[first:end, h].all()
        assert int(changed[:, h].sum()) == end - first
    q, k = (f(x).unflatten(-1, (4, 3)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj))
    weights = (q @ k.mT / 3**0.5).masked_fill(~layer.receptive_field().dense(16), -1e9).softmax(-1)
    far = (torch.arange(16)[:, None] - torch.arange(16)).abs()
    distances = (weights * far).sum(-1).mean((0, 2)).tolist()
    assert distances == sorted(distances)


def test_the_sign_of_a_table_is_query_minus_key() -> None:
    layer = built(windows=(3,) * 4)
    with torch.no_grad():
        for p in (layer.q_proj.weight, layer.position.tables["0"]):
            p.zero_()
        layer.position.tables["0"][4] = 50.0  # two back
    q, v = (
        layer.q_proj(normal(1, 1, 3, 12)).unflatten(-1, (4, 3)).transpose(1, 2),
        torch.eye(3).double().expand(1, 4, 3, 3),
    )
    seen = regard.attention(q, q, v, mask=layer.mask, position=layer.position)[0, 0]
    assert seen[2].tolist() == pytest.approx([1, 0, 0])
    assert seen[0].tolist() == pytest.approx([1 / 3] * 3)


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = regard.create("multi_window", dim=64, num_heads=8, windows=(400,) * 6 + (0, 0), bias=True)
    assert layer.position.tables.keys() == {*"012345"}
    for proj, bound in ((layer.q_proj, 6 / 256), (layer.v_proj, 6 / 256), (layer.o_proj, 6 / 128)):
        assert 0.95 * bound**0.5 < float(proj.weight.detach().abs().max()) <= bound**0.5
        assert not proj.bias.any()
    for table in layer.position.tables.values():
        assert len(table) == 799
        assert float(table.detach().std()) == pytest.approx((0.02 / 799) ** 0.5, rel=0.1)
    assert layer.position.start_neutral()
    assert not any(table.any() for table in layer.position.tables.values())


def test_windows_that_nobody_names() -> None:
    assert spread_windows(8) == (2, 4, 8, 16, 32, 64, 0, 0)
    assert spread_windows(4) == (2, 8, 32, 0)
    assert spread_windows(1) == (0,)
    assert regard.create("multi_window", dim=8, num_heads=2, windows=4).windows == (4, 4)


def test_runs_on_blocks_with_its_tables() -> None:
    torch.manual_seed(0)
    windows = (16, 64, 100, 0)
    q, k, v = torch.randn(3, 1, 4, 640, 16)
    given = {"mask": masks.multi_window(windows), "position": WindowTables(windows)}
    assert regard.plan(q, k, v, **given).kernel in ("native", "block_sparse")
    want = regard.attention(q.double(), k.double(), v.double(), **given, kernel="eager")
    for name in ("auto", "block_sparse"):
        torch.testing.assert_close(regard.attention(q, k, v, **given, kernel=name).double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"windows": (2, 3)}, "windows are not one for each head"),
        ({"windows": (2, 3, 4, -1)}, "windows is too small"),
        ({"windows": "2345"}, "windows are not one for each head"),
        ({"windows": ()}, "windows are not one for each head"),
        ({"shift": 1}, "shift"),
        ({"relative": None}, "relative"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        regard.create("multi_window", dim=12, num_heads=4, **wrong)
