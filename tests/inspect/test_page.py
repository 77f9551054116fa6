"""What the page holds: maps that come back as they were, text that stays text, reductions that are said."""

import base64
import gzip
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tests.inspect import page_traces as made

from regard.inspect.page import embedding, pack
from regard.inspect.page.render import fragment, render
from regard.inspect.trace import Trace


def facts(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', page)[1])


def chunk(page: str, name: str) -> bytes:
    return unpacked(re.search(rf'id="{name}">([^<]*)</script>', page)[1])


def unpacked(text: str) -> bytes:
    return gzip.decompress(base64.b64decode(text))


def weights(raw: bytes, T: int, S: int, top: int | None = None, *, signed: bool = False) -> torch.Tensor:
    """A map as the page's script reads it, written anew."""
    sizes = np.frombuffer(raw, "<f4", T)
    kind, full = (np.int8, 127) if signed else (np.uint8, 255)
    if top is None or top >= S:
        level = np.frombuffer(raw, kind, T * S, 4 * T).reshape(T, S).astype(float)
    else:
        level = np.zeros((T, S))
        places = np.frombuffer(raw, "<u2", T * top, 4 * T).reshape(T, top).astype(int)
        np.put_along_axis(level, places, np.frombuffer(raw, kind, T * top, 4 * T + 2 * T * top).reshape(T, top), 1)
    return torch.from_numpy(sizes[:, None] * np.sign(level) * (level / full) ** 2)


class Elements(HTMLParser):
    """Counts elements and keeps the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("rows", ["flat", "peaked", "tiny", "empty"])
def test_a_map_comes_back_within_its_stated_error(rows, signed):
    scale = {"flat": 0.1, "peaked": 12.0, "tiny": 0.1, "empty": 1.0}[rows]
    one = (torch.randn(9, 40) * scale).softmax(-1) * {"tiny": 1e-9, "empty": 0.0}.get(rows, 1.0)
    if signed:
        one = one * torch.randn(9, 40).sign()
    back = weights(unpacked(pack.packed(one, pack.Plan(1), signed=signed)), 9, 40, signed=signed)
    worst = (back - one).abs().amax(-1) / one.abs().amax(-1).clamp_min(1e-30)
    assert worst.max() <= (0.008 if signed else 0.004)
    if rows == "flat":
        assert (back / one).min() > 0.97  # small weights keep their digits


def test_the_largest_weights_of_each_query_are_kept():
    one = torch.randn(7, 50).mul(3).softmax(-1)
    back = weights(unpacked(pack.packed(one, pack.Plan(1, top=5), signed=False)), 7, 50, 5)
    assert ((back > 0).sum(-1) <= 5).all()
    kept = one.topk(5).indices
    torch.testing.assert_close(back.gather(1, kept).float(), one.gather(1, kept), rtol=0.01, atol=0.004)


def test_a_row_that_is_no_number_says_so():
    one = torch.rand(3, 4)
    one[1, 2] = torch.nan
    _, sizes = pack.levels(one, signed=False)
    assert sizes.isnan().tolist() == [False, True, False]


def test_pooling_keeps_the_weight_of_largest_size():
    one = torch.tensor([[0.1, -0.9, 0.2], [0.3, 0.4, -0.1], [0.0, 0.0, 0.5]])
    torch.testing.assert_close(pack.pooled(one, 2), torch.tensor([[-0.9, 0.2], [0.0, 0.5]]))


def test_vectors_come_back_within_half_a_step():
    x = torch.randn(6, 16) * torch.logspace(-6, 6, 6)[:, None]
    raw = unpacked(pack.vectors(x))
    scales = np.frombuffer(raw, "<f4", 6)
    back = torch.from_numpy(np.frombuffer(raw, np.int8, offset=24).reshape(6, 16) * scales[:, None])
    assert ((back - x).abs() <= 0.51 * torch.from_numpy(scales.copy())[:, None]).all()


def test_plans_give_up_as_little_as_the_limit_asks():
    shapes, sample = [(12, 512, 512)] * 12, torch.rand(12, 64, 64)
    plans = [pack.plan(shapes, batch=4, sample=sample, limit=n) for n in (10**9, 10**8, 10**7, 10**6)]
    assert plans[0] == pack.Plan(4)
    assert plans[1].rows == 4
    assert plans[1].top >= pack.FEWEST
    assert plans[2].rows < 4
    assert plans[3].pool > 1
    for plan, limit in zip(plans, (10**9, 10**8, 10**7, 10**6)):
        sides = [(H * -(-T // plan.pool), -(-S // plan.pool)) for H, T, S in shapes]
        entries = plan.rows * sum(queries * min(keys, plan.top or keys) for queries, keys in sides)
        assert entries * (4 if plan.top else 4 / 3) <= 1.1 * limit


def test_every_head_is_on_the_page_as_it_was_traced():
    trace = made.text(L=2, B=2, H=4, G=2, causal=True)
    page = render(trace)
    for number, one in enumerate(trace.layers):
        for head in range(4):
            for row in range(2):
                back = weights(chunk(page, f"a-{number}-{head}-{row}"), 12, 12)
                torch.testing.assert_close(back.float(), one.weights()[row, head], rtol=0, atol=0.004)
    said = facts(page)["traces"][0]
    assert said["tokens"]["text"][0] == list(made.WORDS)
    assert [len(r) for r in said["table"]] == [2 + len(said["columns"])] * 8
    stated = trace.statistics()[5]
    assert said["table"][5][2] == pytest.approx(stated.entropy, rel=1e-4)
    bits = np.frombuffer(chunk(page, said["layers"][1]["mask"]["chunks"][1]), np.uint8)
    mask = np.unpackbits(bits, bitorder="little")
    assert mask[: 12 * 12].reshape(12, 12).tolist() == np.tril(np.ones((12, 12), int)).tolist()


def test_rollout_is_painted_on_the_text():
    trace = made.text(L=3)
    back = weights(chunk(render(trace), "a-paint-0-1"), 12, 12)
    torch.testing.assert_close(back.float(), trace.rollout()[-1][1], rtol=0, atol=0.004)


def test_further_maps_are_painted_too():
    trace, relevance = made.text(), torch.rand(2, 12, 12)
    page = render(trace, maps={"relevance <b>": relevance})
    assert [p["name"] for p in facts(page)["traces"][0]["paint"]] == ["rollout", "relevance <b>"]
    back = weights(chunk(page, "a-paint-1-0"), 12, 12)
    torch.testing.assert_close(back.float(), relevance[0], rtol=0, atol=0.004)


def test_negative_weights_keep_their_sign():
    rule = lambda one, heads, rows: torch.tensor([[0.8, -0.2], [-0.5, 0.5]]).expand(1, len(heads), 2, 2)[:, :, rows]  # noqa: E731
    trace = Trace((made.layer(0, B=1, H=1, T=2, weight_rule=rule),))
    page = render(trace)
    back = weights(chunk(page, "a-0-0-0"), 2, 2, signed=True)
    torch.testing.assert_close(back.float(), torch.tensor([[0.8, -0.2], [-0.5, 0.5]]), rtol=0, atol=0.008)
    said = facts(page)["traces"][0]["layers"][0]
    assert said["signed"] == [True]
    assert not said["scored"]


def test_hostile_tokens_titles_and_names_stay_text():
    plain = made.text(words=("a",) * 12)
    hostile = replace(
        made.text(words=made.HOSTILE),
        model=made.HOSTILE[0],
        layers=tuple(replace(x, name=made.HOSTILE[2]) for x in plain.layers),
    )
    good, bad = (Elements(render(t, title=n)) for t, n in ((plain, "a"), (hostile, made.HOSTILE[1])))
    assert good.seen == bad.seen
    assert [name for name, _ in good.attributes] == [name for name, _ in bad.attributes]
    page = render(hostile, title=made.HOSTILE[2])
    assert "\u2028" not in page
    assert "\x1b" not in page
    shown = facts(page)["traces"][0]["tokens"]["text"][0]
    assert shown[0] == made.HOSTILE[0]
    assert "\u202e" not in shown[6]
    assert max(map(len, shown)) <= 120


def test_the_page_forbids_the_network_and_runs_only_its_own_scripts():
    page = render(made.text())
    nonce = re.search(r"script-src 'nonce-([^']+)'", page)[1]
    assert "default-src 'none'" in page
    scripts = re.findall(r"<script(?![^>]*type=)([^>]*)>", page)
    assert scripts
    assert set(scripts) == {f' nonce="{nonce}"'}
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", re.sub(r"(?s)<script.*?</script>", "", page))
    assert "://" not in re.sub(r"(?s)<script type=.*?</script>", "", page)


def test_what_was_left_out_is_said_in_the_facts():
    trace = made.text(L=2, B=4, H=2, words=made.WORDS * 4)
    full, some, few = (facts(render(trace, limit=n))["traces"][0] for n in (10**8, 60_000, 3_000))
    assert (full["rows"], full["top"], full["pool"], full["vectors"]) == (4, None, 1, 4)
    assert some["rows"] < 4 or some["top"] is not None
    assert few["pool"] > 1
    assert few["vectors"] == 0
    assert len(render(trace, limit=3_000)) < len(render(trace, limit=10**8)) / 1.3


def test_a_fragment_is_the_page_in_a_frame():
    inside = re.search(r'srcdoc="([^"]*)"', fragment(made.text()))[1]
    assert html.unescape(inside).startswith("<!DOCTYPE html>")
    assert "allow-same-origin" not in fragment(made.text())


def test_two_stacks_and_pictures_name_their_tokens():
    said = facts(render(made.translation()))["traces"][0]["layers"]
    named = {(x["side"], x["kind"]): (x["queries"], x["keys"]) for x in said}
    expected = {
        ("encoder", "self"): ("text", "text"),
        ("decoder", "self"): ("decoder", "decoder"),
        ("decoder", "cross"): ("decoder", "text"),
    }
    assert named == expected
    seen = facts(render(made.picture()))["traces"][0]
    assert seen["tokens"]["picture"][0][:3] == ["[CLS]", "row 1, column 1", "row 1, column 2"]
    assert seen["picture"] == {"size": [24, 32], "grid": [3, 4], "extra": 1, "lost": 0}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: render(Trace(())), "holds no layers"),
        (
            lambda: render(made.text(), other=made.text(H=2)),
            "other has layers of other shapes .*same inputs and layers",
        ),
        (lambda: render(made.text(), other=made.text(), names=("a", "a")), "names are the same .*two names"),
        (
            lambda: render(made.text(), planes=("lda",)),
            r"planes\[0\] is unknown \(got 'lda'\); expected one of 'pca', 'tsne'",
        ),
        (
            lambda: render(made.text(), maps={"x": torch.rand(2, 3, 3)}),
            r"maps\['x'\] fits no layer \(got \(2, 3, 3\)\); expected one of \[\(2, 12, 12\)",
        ),
        (lambda: render(made.text(), limit=0), r"limit is too small \(got 0\); expected an int >= 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_moved_and_scaled_queries_and_keys_attend_as_before():
    q, k = torch.randn(30, 6, dtype=torch.float64) * 5 + 2, torch.randn(20, 6, dtype=torch.float64) - 3
    x, y = embedding.joint(q, k)
    torch.testing.assert_close((x @ y.T).softmax(-1), (q @ k.T).softmax(-1))
    torch.testing.assert_close(x.mean(0), y.mean(0))
    widths = [(z - z.mean(0)).norm(dim=-1).median() for z in (x, y)]
    torch.testing.assert_close(*widths)


def test_pca_keeps_the_two_directions_of_largest_variance():
    points = torch.randn(40, 5, dtype=torch.float64) @ torch.diag(torch.tensor([0.1, 9.0, 1.0, 4.0, 0.5]).double())
    spread = torch.linalg.svdvals(points - points.mean(0))
    torch.testing.assert_close(embedding.pca(points).norm(dim=0), spread[:2])
    assert embedding.pca(points[:, :1]).shape == (40, 2)


def test_agreement_is_least_where_the_nearest_key_scores_most():
    scores = torch.rand(4, 9)
    assert embedding.agreement(scores, 3 - 2 * scores) == pytest.approx(-1)
    assert embedding.agreement(scores, scores) == pytest.approx(1)
    assert embedding.agreement(scores, torch.ones(4, 9)) == 0


def test_padding_is_no_point_of_the_plane():
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    mask[1, :, :, 7:] = False
    queries, keys = embedding.visible(made.layer(0, mask=mask))
    assert len(queries) == len(keys) == 12 + 7
    said = facts(render(made.text(L=1, mask=mask), planes=("pca", "tsne")))["traces"][0]["planes"]
    assert len(said["tsne"][0]["queries"]) == 19


@pytest.mark.parametrize("T", [1, 2])
def test_one_token_is_enough(T):
    assert facts(render(made.text(words=made.WORDS[:T])))["traces"][0]["layers"][0]["shape"] == [3, T, T]
