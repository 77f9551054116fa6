"""Log-sum-exps, extra keys and dilations of neighborhoods against loops whose author saw neither code nor test."""

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.kernels import neighborhood as kernel
from regard.laws.agreement import close
from regard.vision import alternating_dilations, neighborhood_attention, neighborhood_with_lse
from vision.naive_generalized import allowed, attention, largest_dilation, receptive
from vision.shared import gradients, leaves, normal, vectors

CASES = [
    # sizes, window, stride, dilation, causal
    ((9,), (4,), (2,), (2,), (False,)),
    ((8,), (3,), (3,), (1,), (True,)),
    ((4, 5), (3, 2), (1, 2), (1, 2), (False, True)),
    ((2, 3, 4), (2, 2, 3), (1, 2, 1), (1, 1, 1), (True, False, False)),
    ((3, 3), (3, 3), (1, 1), (1, 1), (False, False)),
]
NAMES = ("window", "stride", "dilation", "causal")


def drawn(sizes: tuple[int, ...], extra: int) -> list[Tensor]:
    """q, k, v and extra keys and values, of two heads that share one key head."""
    map_of = [normal(1, 1, 2, *sizes, 3), normal(2, 1, 1, *sizes, 3), normal(3, 1, 1, *sizes, 2)]
    return leaves(*map_of, normal(4, 1, 1, extra, 3), normal(5, 1, 1, extra, 2))


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_loops(case, extra: int, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "TILE", dict.fromkeys((1, 2, 3), 2))
    sizes, *rest = case
    options = dict(zip(NAMES, rest, strict=True))
    q, k, v, more_k, more_v = given = drawn(sizes, extra)
    want, sums = attention(*(z.flatten(2, -2) for z in (q, k, v)), allowed(sizes, *rest), more_k, more_v)
    more = {"extra_keys": more_k, "extra_values": more_v}
    got = neighborhood_with_lse(q, k, v, **options, **more)
    close(got.lse.flatten(2), sums)
    close(got.out.flatten(2, -2), want)
    fused = neighborhood_attention(q, k, v, **options, **more)
    close(fused.flatten(2, -2), want)
    wanted = given if extra else given[:3]

    def slopes(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """Of both outputs at once."""
        total = (out.flatten() @ normal(9, out.numel())) + (lse.flatten() @ normal(8, lse.numel()))
        return torch.autograd.grad(total, wanted, retain_graph=True)

    alone = torch.zeros_like(sums)
    for out, lse, right in (
        (got.out, got.lse, slopes(want, sums)),
        (got.out, alone, slopes(want, alone)),
        (fused, alone, slopes(want, alone)),
    ):
        for g, w in zip(slopes(out.flatten(2, -2), lse), right, strict=True):
            close(g, w)


def test_merged_with_attention_to_other_keys_it_is_the_one_softmax() -> None:
    q, k, v, more_k, more_v = given = drawn((5, 6), 4)
    one = neighborhood_attention(q, k, v, window=3, extra_keys=more_k, extra_values=more_v)
    near, lse = neighborhood_with_lse(q, k, v, window=3)
    scores = torch.einsum("bhyxd,bged->bhyxe", q, more_k) / 3**0.5
    far, sums = torch.einsum("bhyxe,bgev->bhyxv", scores.softmax(-1), more_v), scores.logsumexp(-1)
    merged = torch.sigmoid(lse - sums)[..., None] * near + torch.sigmoid(sums - lse)[..., None] * far
    close(merged, one)
    for g, w in zip(gradients(merged, given), gradients(one, given), strict=True):
        close(g, w)


def test_extra_keys_beside_a_bias_are_given_none() -> None:
    q, k, v, more_k, more_v = drawn((5, 6), 2)
    (bias,) = leaves(normal(6, 2, 5, 5))
    more = {"extra_keys": more_k, "extra_values": more_v}
    mask = torch.cat([masks.neighborhood((5, 6), 3).dense(30), torch.ones(1, 1, 30, 2, dtype=torch.bool)], -1)
    at = torch.arange(30)
    dy, dx = (one - one[:, None] for one in (at // 6, at % 6))
    table = torch.nn.functional.pad(bias[:, (dy + 2).clamp(0, 4), (dx + 2).clamp(0, 4)], (0, 2))
    keys, values = (torch.cat([z.flatten(2, -2), e], 2) for z, e in ((k, more_k), (v, more_v)))
    want = regard.attention(q.flatten(2, -2), keys, values, mask=mask, bias=table[None], kernel="eager")
    close(neighborhood_attention(q, k, v, window=3, bias=bias, **more).flatten(2, -2), want)
    close(neighborhood_with_lse(q, k, v, window=3, bias=bias, **more).out.flatten(2, -2), want)


@pytest.mark.parametrize("case", ["na1", "dina2", "gna2", "gna3", "block1"])
def test_gives_nattens_log_sum_exps(case: str) -> None:
    """natten 0.21.7 in fp32, hence the tolerance."""
    z = vectors("A055", case)
    q, k, v = (z[n].movedim(-2, 1) for n in "qkv")
    window, stride, dilation, causal = z["params"].int().tolist()
    options = {"window": window, "stride": stride, "dilation": dilation, "causal": [bool(c) for c in causal]}
    got = neighborhood_with_lse(q, k, v, **options, scale=float(z["scale"]))
    torch.testing.assert_close(got.lse, z["lse"].movedim(-1, 1).to(got.lse.dtype), rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(got.out, z["out"].movedim(-2, 1).to(got.out.dtype), rtol=1e-5, atol=5e-6)


def test_windows_of_the_whole_map_are_plain_attention(monkeypatch) -> None:
    monkeypatch.setattr(kernel, "run", None)
    q, k, v, more_k, more_v = drawn((3, 4), 2)
    flat = [z.flatten(2, -2) for z in (q, k, v)]
    close(neighborhood_attention(q, k, v, window=(3, 4)).flatten(2, -2), regard.attention(*flat))
    got = neighborhood_attention(q, k, v, window=(3, 4), extra_keys=more_k, extra_values=more_v)
    joined = [torch.cat(z, 2) for z in zip(flat[1:], (more_k, more_v), strict=True)]
    close(got.flatten(2, -2), regard.attention(flat[0], *joined))


@pytest.mark.parametrize("window", [3, 6])
def test_extra_keys_that_are_not_finite_reach_every_query_of_their_heads(window: int) -> None:
    q, k, v = (normal(n, 1, 2, 6, 4) for n in range(3))
    keys, values = normal(4, 1, 2, 3, 4), normal(5, 1, 2, 3, 4)
    keys[0, 1, 2, 0] = torch.nan
    for function in (neighborhood_attention, lambda *x, **more: neighborhood_with_lse(*x, **more).out):
        out = function(q, k, v, window=window, extra_keys=keys, extra_values=values)
        assert out[:, 0].isfinite().all()
        assert out[:, 1].isnan().all()


def test_dilations_of_dinats_stages() -> None:
    found = [alternating_dilations(n, side) for n, side in ((3, 56), (4, 28), (6, 14), (5, 7))]
    assert found == [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1] * 5]
    for side in (3, 7, 20, 50):
        assert max(alternating_dilations(2, side, 5)) == largest_dilation(side, 5)
    with pytest.raises(ValueError, match="alternating_dilations: side is too small"):
        alternating_dilations(2, 0)


@pytest.mark.parametrize("dilations", [(1, 1, 1), (1, 3, 9), (1, 4, 1)])
def test_the_field_that_is_seen_grows_with_the_dilations(dilations: tuple[int, ...]) -> None:
    seen = torch.eye(81)[40:41]
    for d in reversed(dilations):
        seen = seen @ masks.neighborhood((81,), 3, dilation=d).dense(81)[0, 0].float()
    reached = int((seen > 0).sum())
    assert reached == receptive(81, 3, dilations)
    places = (seen > 0).nonzero()[:, 1]
    assert places.max() - places.min() >= 2 * sum(dilations) - 2
    if dilations == (1, 3, 9):
        assert reached == 27


def test_bad_input() -> None:
    q = normal(0, 1, 2, 6, 4)
    for function in (neighborhood_attention, neighborhood_with_lse):
        for more in ({"extra_keys": q[:, :, :3]}, {"extra_keys": q[:, :, :3], "extra_values": q[:, :, :2]}):
            with pytest.raises(ValueError, match=r"extra_keys|extra_values"):
                function(q, q, q, window=3, **more)
        with pytest.raises(ValueError, match="window 7 with dilation 1 does not fit"):
            function(q, q, q, window=7)
