"""NaN and infinity: shown and named wherever they are, dropped nowhere, and no obstacle for the other heads."""

import math
from dataclasses import replace

import pytest
import torch
from tests.inspect import page_traces as made
from tests.inspect.test_page import chunk, facts, weights
from torch import nn

import regard
from regard.inspect import analyses
from regard.inspect.analyses.head_behaviour import head_behaviour
from regard.inspect.analyses.massive_activations import massive_activations
from regard.inspect.effective import effective_weights
from regard.inspect.explain import summary
from regard.inspect.page import embedding, labels, pack
from regard.inspect.page.render import render
from regard.inspect.trace import Trace, trace

NAN, INF = math.nan, math.inf
LAYERS = ("softmax", "alibi", "entmax", "cope", "mta", "shaw", "linear", "efficient", "performer")
"""Plain softmax, stages before, at and behind it, and weights that are measured."""


def built(name: str, *, causal: bool) -> nn.Module:
    torch.manual_seed(0)
    options = regard.card(name).example
    return regard.create(name, dim=24, num_heads=6, causal=causal, dtype=torch.float64, **options).eval()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize(
    ("name", "causal"),
    [(n, word == "causal") for n in LAYERS for word in ("bidirectional", "causal") if word in regard.card(n).supports],
)
def test_weights_are_no_numbers_where_outputs_are(name: str, causal: bool, bad: float) -> None:
    module = built(name, causal=causal)
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    clean = trace(module, x).weights(0)
    x[0, 3, 5] = bad
    traced = trace(module, x)
    lost = traced.output.isnan().any(-1)
    assert lost[0].tolist() == [not causal or i >= 3 for i in range(8)]
    assert not lost[1].any()
    found = traced.weights(0)
    assert torch.equal(found.isnan().any(-1), lost[:, None].expand(-1, 6, -1))
    kept = ~lost[:, None].expand(-1, 6, -1)
    torch.testing.assert_close(found[kept], clean[kept])
    assert torch.equal(found.nan_to_num(2.0), traced.weights(0, rows=slice(None)).nan_to_num(2.0))
    measured = effective_weights(module, x)
    assert torch.equal(measured.isnan().any(-1), lost[:, None].expand(-1, 6, -1))


def test_what_padding_hides_stays_hidden() -> None:
    module, x = built("softmax", causal=False), torch.randn(2, 6, 24, dtype=torch.float64)
    mask = regard.masks.padding(torch.tensor([[True] * 6, [True] * 4 + [False] * 2]))
    clean = effective_weights(module, x, mask=mask)
    x[1, 5] = NAN
    seen = effective_weights(module, x, mask=mask)
    assert seen[1, :, 5].isnan().all(), "the row itself"
    torch.testing.assert_close(seen[:, :, :5], clean[:, :, :5])


def spoiled(bad: float = NAN) -> Trace:
    """A trace of 2 layers and 3 heads, of which the first layer's second has one query that is no number."""
    torch.manual_seed(0)
    one = made.text()
    q = one.layers[0].q.clone()
    q[0, 1, 4] = bad
    return replace(one, layers=(replace(one.layers[0], q=q), *one.layers[1:]))


VALUES = [(NAN, True), (INF, True), (-INF, True), (1e20, False), (3e38, True)]
"""What a query holds, and whether its weights are no numbers: products with the greatest numbers overflow."""


@pytest.mark.parametrize(("bad", "lost"), VALUES)
def test_statistics_and_their_summary_name_the_head(bad: float, lost: bool) -> None:
    torch.manual_seed(0)
    good, found = made.text().statistics(), spoiled(bad).statistics()
    assert [n for n, row in enumerate(found) if not math.isfinite(row.entropy)] == [1] * lost
    assert [row for n, row in enumerate(found) if n != 1] == [row for n, row in enumerate(good) if n != 1]
    lines = [line for line in summary("M", spoiled(bad)) if "no numbers" in line]
    assert lines == ["weights that are no numbers (NaN or infinity): layer 0 head 1"] * lost
    assert not any("nan" in line for line in summary("M", spoiled(bad)))


@pytest.mark.parametrize(("bad", "lost"), VALUES)
def test_a_page_shows_the_other_heads_as_they_are(bad: float, lost: bool) -> None:
    torch.manual_seed(0)
    good, page = render(made.text()), render(spoiled(bad))
    before, after = facts(good)["traces"][0], facts(page)["traces"][0]
    assert [layer["lost"] for layer in after["layers"]] == [[0, int(lost), 0], [0, 0, 0]]
    for n, row in enumerate(before["table"]):
        assert (after["table"][n] == row) == (n != 1)
    if lost:
        assert after["table"][1][2] == "NaN"
    for layer, head, row in [(l, h, r) for l in range(2) for h in range(3) for r in range(2)]:
        name = f"a-{layer}-{head}-{row}"
        if (layer, head, row) != (0, 1, 0):
            assert chunk(page, name) == chunk(good, name)
    shown = weights(chunk(page, "a-0-1-0"), 12, 12)
    assert shown[4].isnan().any() == lost
    assert shown[[n for n in range(12) if n != 4]].isfinite().all()


def test_points_that_are_no_numbers_have_no_place() -> None:
    layer = spoiled().layers[0]
    places = embedding.visible(layer)
    points, near = embedding.flat(layer, 1, *places, plane="pca")
    nowhere = (points == embedding.NOWHERE).all(-1)
    assert nowhere.tolist() == [n == 4 for n in range(len(points))]
    assert math.isfinite(near)
    assert points[~nowhere].max() == embedding.NOWHERE - 1
    torch.manual_seed(0)
    others = made.text().layers[0]
    assert torch.equal(*(embedding.flat(one, 0, *places, plane="pca")[0] for one in (layer, others)))
    all_bad = replace(layer, q=torch.full_like(layer.q, INF), k=torch.full_like(layer.k, NAN))
    assert (embedding.flat(all_bad, 0, *places, plane="pca")[0] == embedding.NOWHERE).all()


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_the_plane_is_the_same_at_any_size(size: float) -> None:
    layer = made.text().layers[0]
    places = embedding.visible(layer)
    points, near = embedding.flat(layer, 0, *places, plane="pca")
    big, also = embedding.flat(replace(layer, q=layer.q * size, k=layer.k * size), 0, *places, plane="pca")
    assert (points - big).abs().max() <= 2
    assert near == pytest.approx(also, abs=1e-5)


def test_small_pictures_mark_what_is_no_number() -> None:
    maps = torch.rand(1, 8, 8)
    maps[0, 2, 3], maps[0, 7, 0] = NAN, INF
    for side in (8, 4):
        small = pack.thumbnails(maps, side)[0] == 255
        each = 8 // side
        assert small.nonzero().tolist() == [[2 // each, 3 // each], [7 // each, 0]]
    assert pack.thumbnails(torch.ones(1, 2, 2), 2).unique().tolist() == [254]


def test_pictures_show_pixels_that_are_no_numbers() -> None:
    image = torch.rand(3, 6, 5)
    clean = labels.picture(image)
    image[1, 2, 3], image[0, 4, 0] = NAN, INF
    drawn = labels.picture(image)
    lost = (drawn == torch.tensor(labels.LOST)).all(-1)
    assert lost.nonzero().tolist() == [[2, 3], [4, 0]]
    assert (drawn[~lost].int() - clean[~lost].int()).abs().max() <= 255 // 8, "the range is that of what is left"
    assert (labels.picture(torch.full((3, 4, 4), NAN)) == torch.tensor(labels.LOST)).all()
    seen = made.picture()
    seen.images[1, :, 3, 4] = NAN
    assert facts(render(seen))["traces"][0]["picture"]["lost"] == 1


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)], ids=["no tokens", "no batch"])
def test_a_page_of_nothing_is_refused(shape: tuple[int, int]) -> None:
    traced = trace(regard.create("softmax", dim=16, num_heads=2), torch.randn(*shape, 16))
    with pytest.raises(ValueError, match=r"render: trace.layers: Attention has nothing to show \(got \("):
        render(traced)


def test_analyses_keep_what_is_no_number() -> None:
    maps = spoiled().maps()
    for one in head_behaviour(maps)[:5]:
        broken = ~one.isfinite()
        assert broken.nonzero().tolist() in ([[0, 1]], []), "one head of six"
    assert head_behaviour(maps).names()[0][1] == "no number"
    assert analyses.attention_rollout(maps)[:, 0, 4].isnan().all()
    with pytest.raises(ValueError, match=r"attention\[0\] has weights that are negative, NaN or infinite \(got nan\)"):
        analyses.attention_flow(maps)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_activations_that_are_no_numbers_are_massive(bad: float) -> None:
    hidden = [torch.randn(2, 5, 8) for _ in range(3)]
    hidden[2][0, 1, 2] = 1e5
    before = massive_activations(hidden)
    assert len(before.layer) == 1
    hidden[1][0, 3, 4] = bad
    found = massive_activations(hidden)
    at = list(
        zip(found.layer.tolist(), found.sequence.tolist(), found.token.tolist(), found.width.tolist(), strict=True)
    )
    assert at == [(1, 0, 3, 4), (2, 0, 1, 2)]
    assert not found.value[0].isfinite()
    assert found.value[1] == before.value[0]
