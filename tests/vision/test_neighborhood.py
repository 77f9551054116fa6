"""Neighborhood attention against loops over queries and keys, dense masked attention, and natten's numbers (A055)."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import regard
from regard import masks
from regard.kernels import neighborhood as kernel
from regard.kernels.problem import Problem
from regard.laws.agreement import close, same
from regard.vision import NeighborhoodAttention, neighborhood_attention
from vision.naive_neighborhood import naive_neighborhood
from vision.shared import filled, gradients, leaves, normal, vectors

CASES = [
    # sizes, window, stride, dilation, causal
    ((7,), (3,), (1,), (1,), (False,)),
    ((9,), (4,), (3,), (2,), (False,)),
    ((11,), (5,), (2,), (2,), (True,)),
    ((10,), (4,), (4,), (1,), (False,)),
    ((6,), (1,), (1,), (3,), (True,)),
    ((4, 5), (3, 3), (1, 1), (1, 1), (False, False)),
    ((5, 6), (2, 3), (2, 1), (2, 1), (True, False)),
    ((3, 3), (3, 3), (1, 1), (1, 1), (False, False)),
    ((4, 4), (2, 2), (2, 2), (1, 1), (False, False)),
    ((2, 3, 4), (2, 2, 3), (1, 2, 1), (1, 1, 1), (True, False, False)),
    ((4, 2, 2), (2, 1, 2), (1, 1, 1), (2, 2, 1), (False, False, True)),
]


@pytest.fixture(params=[None, 2, 3], ids=["tiles as they are", "tiles of 2", "tiles of 3"])
def tiles(request, monkeypatch):
    """Tiles so small that a few tokens straddle many of them."""
    if request.param:
        monkeypatch.setattr(kernel, "TILE", dict.fromkeys((1, 2, 3), request.param))
        monkeypatch.setattr(kernel, "ENTRIES", 1)


def named(sizes, window, stride, dilation, causal) -> dict:
    return {"window": window, "stride": stride, "dilation": dilation, "causal": causal}


def last(z: Tensor) -> Tensor:
    """Heads last, as natten has them."""
    return z.movedim(1, -2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_loops(case, tiles) -> None:
    sizes, *options = case
    q, k, v = leaves(normal(1, 1, 2, *sizes, 3), normal(2, 1, 1, *sizes, 3), normal(3, 1, 1, *sizes, 2))
    got = neighborhood_attention(q, k, v, **named(*case))
    want = naive_neighborhood(last(q), last(k), last(v), *options).movedim(-2, 1)
    close(got, want)
    for g, w in zip(gradients(got, [q, k, v]), gradients(want, [q, k, v]), strict=True):
        close(g, w)


@pytest.mark.parametrize(
    ("sizes", "window", "dilation"),
    [((8,), (3,), (2,)), ((4, 5), (3, 3), (1, 1)), ((6, 3), (3, 1), (2, 3)), ((2, 3, 3), (1, 3, 3), (2, 1, 1))],
)
def test_bias_equals_the_loops(sizes, window, dilation, tiles) -> None:
    q, k, v, bias = leaves(*(normal(n, 2, 2, *sizes, 2) for n in range(3)), normal(4, 2, *(2 * w - 1 for w in window)))
    got = neighborhood_attention(q, k, v, window=window, dilation=dilation, bias=bias, scale=0.3)
    axes = len(sizes)
    want = naive_neighborhood(
        last(q), last(k), last(v), window, (1,) * axes, dilation, (False,) * axes, scale=0.3, bias=bias
    ).movedim(-2, 1)
    close(got, want)
    for g, w in zip(gradients(got, [q, k, v, bias]), gradients(want, [q, k, v, bias]), strict=True):
        close(g, w)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((40,), {"window": 7}),
        ((100,), {"window": 33, "causal": True}),
        ((97,), {"window": 5, "dilation": 4, "stride": 2}),
        ((17, 19), {"window": 7}),
        ((20, 16), {"window": (5, 4), "dilation": (3, 2), "stride": (2, 4)}),
        ((9, 10, 11), {"window": (2, 3, 5), "causal": (True, False, False)}),
        ((12, 12, 4), {"window": (3, 4, 4), "dilation": (2, 1, 1), "stride": (1, 4, 3)}),
    ],
)
def test_is_attention_under_the_mask(sizes, options) -> None:
    """Where there are many tiles of the usual size."""
    q, k, v = leaves(normal(1, 2, 4, *sizes, 5), normal(2, 2, 2, *sizes, 5), normal(3, 2, 2, *sizes, 3))
    got = neighborhood_attention(q, k, v, **options)
    flat = (z.flatten(2, -2) for z in (q, k, v))
    window = options["window"]
    mask = masks.neighborhood(sizes, window, **{n: z for n, z in options.items() if n != "window"})
    want = regard.attention(*flat, mask=mask, kernel="eager").view_as(got)
    close(got, want)
    for g, w in zip(gradients(got, [q, k, v]), gradients(want, [q, k, v]), strict=True):
        close(g, w)


@pytest.mark.parametrize("case", ["na1", "dina2", "gna2", "gna3", "block1"])
def test_gives_nattens_numbers(case: str) -> None:
    """natten 0.21.7 in fp32, hence the tolerance."""
    z = vectors("A055", case)
    q, k, v = (z[n].movedim(-2, 1) for n in "qkv")
    window, stride, dilation, causal = z["params"].int().tolist()
    got = neighborhood_attention(
        q,
        k,
        v,
        window=window,
        stride=stride,
        dilation=dilation,
        causal=[bool(c) for c in causal],
        scale=float(z["scale"]),
    )
    torch.testing.assert_close(got, z["out"].movedim(-2, 1).to(got.dtype), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("case", ["rpb1", "rpb2"])
def test_gives_the_numbers_of_nattens_layer_with_bias(case: str) -> None:
    """natten 0.14.6 in float64, gradients too."""
    z = vectors("A055", case)
    H, window, dilation = z["HkD"].tolist()
    M = z["x"].shape[-1]
    layer = NeighborhoodAttention(M, H, window=window, dilation=dilation, relative=True).double()
    state = {"table": z["rpb"], "o_proj.weight": z["Wo"], "o_proj.bias": z["bo"]}
    for n, w, b in zip("qkv", z["Wqkv"].chunk(3), z["bqkv"].chunk(3), strict=True):
        state |= {f"{n}_proj.weight": w, f"{n}_proj.bias": b}
    layer.load_state_dict(state)
    (x,) = leaves(z["x"])
    out = layer(x.movedim(-1, 1)).movedim(1, -1)
    close(out, z["out"])
    for got, want in zip(
        torch.autograd.grad((out * z["w"]).sum(), (x, layer.table)), (z["gx"], z["grpb"]), strict=True
    ):
        close(got, want)


def test_layer_is_the_function_of_its_projections() -> None:
    for axes, sizes in ((1, (9,)), (2, (5, 6)), (3, (3, 4, 5))):
        layer = filled(NeighborhoodAttention(8, 4, num_kv_heads=2, axes=axes, window=3, causal=(True,) * axes))
        x = normal(5, 2, 8, *sizes)
        tokens = x.flatten(2).mT
        q, k, v = (
            nn.functional.linear(tokens, f.weight, f.bias).unflatten(-1, (n, 2)).transpose(1, 2)
            for f, n in ((layer.q_proj, 4), (layer.k_proj, 2), (layer.v_proj, 2))
        )
        heads = regard.attention(q, k, v, mask=layer.mask(sizes), kernel="eager")
        want = layer.o_proj(heads.transpose(1, 2).flatten(2)).mT.unflatten(2, sizes)
        close(layer(x), want)


def test_card_options_reach_the_layer() -> None:
    settings = {"window": (2, 3), "dilation": 2, "stride": (2, 1), "causal_axes": (True, False)}
    layer = regard.create("neighborhood", dim=8, num_heads=4, num_kv_heads=2, **settings)
    assert layer.mask((6, 6)) == masks.neighborhood((6, 6), (2, 3), dilation=2, stride=(2, 1), causal=(True, False))
    assert regard.create("neighborhood", dim=8, num_heads=4, axes=3, causal=True).mask((9, 8, 7)).is_causal
    assert layer.num_kv_heads == 2
    with pytest.raises(ValueError, match=r"causal_axes is given beside causal \(got \(True, False\)\)"):
        regard.create("neighborhood", dim=8, num_heads=4, causal=True, causal_axes=(True, False))


def test_sees_its_window_and_nothing_else() -> None:
    layer = filled(NeighborhoodAttention(4, 2, window=3, dilation=2))
    (x,) = leaves(normal(6, 1, 4, 7, 6))
    for y, w in ((0, 0), (3, 2), (6, 5)):
        seen = torch.autograd.grad(layer(x)[0, :, y, w].sum(), x)[0].ne(0).any(1)[0]
        same(seen.flatten(), layer.mask((7, 6)).dense(42)[0, 0, y * 6 + w])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_who_sees_it_and_no_one_else(bad: float) -> None:
    layer = filled(NeighborhoodAttention(4, 2, window=3, relative=True))
    x = normal(7, 2, 4, 9, 8)
    clean = layer(x)
    x[1, 2, 4, 0] = bad
    out = layer(x).isfinite().all(1)
    want = ~layer.mask((9, 8)).dense(72)[0, 0, :, 4 * 8].view(9, 8)
    same(out[0], torch.ones_like(want))
    same(out[1], want)
    close(layer(x)[1][:, want], clean[1][:, want])


def test_equivariant_to_moving_away_from_borders() -> None:
    layer = filled(NeighborhoodAttention(4, 2, window=3, relative=True))
    x = normal(8, 1, 4, 12, 12)
    moved = layer(x.roll((1, 2), (2, 3)))
    close(moved[..., 3:-3, 3:-3], layer(x).roll((1, 2), (2, 3))[..., 3:-3, 3:-3])


def test_keys_looked_at_grow_with_tokens_and_fall_to_the_window_where_windows_are_blocks() -> None:
    def looked_at(size: int, **options: int) -> float:
        """Scores formed for each query."""
        mask = masks.neighborhood((size, size), 8, **options)
        assert kernel.scored(mask) == kernel.cut(mask, torch.device("cpu")).seen.numel()
        return kernel.scored(mask) / size**2

    assert looked_at(64) == looked_at(128)
    assert looked_at(64) < 4 * 64
    assert looked_at(64, stride=8) == 64

    class Count(TorchDispatchMode):
        written = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.written += sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    layer, counts = NeighborhoodAttention(8, 2, window=8), []
    for size in (32, 64):
        with Count() as count:
            layer(torch.randn(1, 8, size, size))
        counts.append(count.written)
    assert counts[1] < 4.5 * counts[0]  # for four times the tokens


def test_kernel_says_what_it_can_not_do() -> None:
    q = normal(0, 1, 1, 12, 2)

    def reasons(mask, **other) -> str:
        return "; ".join(kernel.why_not(Problem(q, q, q, 1.0, mask, **other)))

    assert reasons(masks.neighborhood((3, 4), 3)) == ""
    assert "no mask" in reasons(None)
    assert "not a neighborhood" in reasons(masks.causal())
    assert "6 tokens" in reasons(masks.neighborhood((2, 3), 2))
    assert "no bias" in reasons(masks.neighborhood((3, 4), 3), bias=torch.zeros(1, 1, 12, 12))


def test_bad_input() -> None:
    q = normal(0, 1, 2, 6, 6, 4)
    with pytest.raises(ValueError, match="does not fit"):
        neighborhood_attention(q, q, q, window=7)
    with pytest.raises(ValueError, match=r"k has the wrong shape \(got \(1, 2, 5, 6, 4\)\); expected \(.*X = 6"):
        neighborhood_attention(q, q[:, :, :5], q, window=3)
    with pytest.raises(
        ValueError, match=r"q has the wrong shape \(got \(6, 6, 4\)\); expected \(B, H, X, \*sizes, D\)"
    ):
        neighborhood_attention(q[0, 0], q[0, 0], q[0, 0], window=3)
    with pytest.raises(ValueError, match=r"k has the wrong shape .* expected .* D = 4\)"):
        neighborhood_attention(q, q[..., :3], q, window=3)
    with pytest.raises(ValueError, match=r"bias has the wrong shape \(got \(2, 5, 4\)\); expected \(H = 2, 5, 5\)"):
        neighborhood_attention(q, q, q, window=3, bias=normal(0, 2, 5, 4))
    for options in ({"window": 2}, {"window": 3, "stride": 2}, {"window": 3, "causal": True}):
        with pytest.raises(ValueError, match=r"bias does not go with this window .* expected odd windows, stride 1"):
            neighborhood_attention(q, q, q, bias=normal(0, 2, 5, 5), **options)
        with pytest.raises(ValueError, match=r"bias does not go with this window .* expected odd windows, stride 1"):
            NeighborhoodAttention(8, 2, relative=True, **options)
    with pytest.raises(ValueError, match=r"axes is unknown \(got 4\); expected one of 1, 2, 3"):
        NeighborhoodAttention(8, 2, axes=4)
    with pytest.raises(ValueError, match="stride"):
        NeighborhoodAttention(8, 2, window=3, stride=4)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, M = 8, Y, X\)"):
        NeighborhoodAttention(8, 2)(normal(0, 2, 8, 9))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_small_maps_are_padded_on_the_right_and_below(axes: int) -> None:
    """What is added is attended to: its keys and values are the biases."""
    layer = filled(regard.create("neighborhood", dim=8, num_heads=4, axes=axes, window=3, dilation=2, small_maps="pad"))
    x = normal(7, 1, 8, *(4, 8, 5)[:axes])
    wide = nn.functional.pad(x, [n for short in (2, 0, 1)[:axes][::-1] for n in (0, short)])
    close(layer(x), layer(wide)[(..., *(slice(0, n) for n in x.shape[2:]))])
    with pytest.raises(ValueError, match="does not fit an axis of 4"):
        regard.create("neighborhood", dim=8, num_heads=4, axes=axes, window=3, dilation=2)(x.float())


def test_no_batch_at_all() -> None:
    q, v = normal(0, 0, 2, 6, 6, 4), normal(0, 0, 2, 6, 6, 3)
    assert neighborhood_attention(q, q, v, window=3).shape == v.shape
    assert neighborhood_attention(q, q, v, window=3, bias=normal(0, 2, 5, 5)).shape == v.shape
