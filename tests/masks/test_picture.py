"""What the pictures show is what the mask says, and an SVG is safe to put on a page."""

import xml.etree.ElementTree as ET

import pytest
import torch

from regard import masks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg, T, S):
    """Read the mask back from the rectangles."""
    root = ET.fromstring(svg)
    field = next(r for r in root.iter(f"{SVG}rect") if r.get("class") == "off")
    left, top, width = (int(field.get(n)) for n in ("x", "y", "width"))
    size = width // S
    grid = torch.zeros(T, S, dtype=torch.bool)
    for r in root.iter(f"{SVG}rect"):
        if r.get("class") == "on":
            x, y, w = (int(r.get(n)) for n in ("x", "y", "width"))
            grid[(y - top) // size, (x - left) // size : (x - left + w) // size] = True
    return grid


@pytest.mark.parametrize(
    "mask", [masks.causal() & masks.window(3), masks.nothing(), masks.strided(3) | masks.prefix(2)]
)
@pytest.mark.parametrize(("T", "S"), [(9, 9), (5, 12), (12, 5), (1, 1), (48, 60)])
def test_short_masks_are_drawn_entry_by_entry(mask, T, S):
    want = mask.dense(T, S)[0, 0]
    torch.testing.assert_close(drawn(mask.svg(T, S), T, S), want)
    title, *rows = mask.picture(T, S).splitlines()
    assert title.startswith(repr(mask))
    step = 2 if 2 * S <= 90 else 1
    body = [row.split(" ", len(row) - len(row.lstrip()) + 1)[-1] for row in rows]
    assert [[c == "█" for c in row.ljust(step * S)[::step]] for row in body] == want.tolist()
    assert [int(row.split()[0]) for row in rows] == list(range(S - T, S))


@pytest.mark.parametrize("T", [100, 5000, 10**6])
def test_long_masks_are_pooled_and_fit(T):
    mask = (masks.causal() & masks.window(max(1, T // 10))) | masks.global_tokens(1)
    lines = mask.picture(T).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 49
    # The thin line of the global key is seen in every row, the far future is empty, the diagonal is full.
    rows = [line.split()[1] for line in lines[1:]]
    assert all(row[0] != "·" for row in rows)
    assert rows[24][-1] == "·"
    assert rows[24][rows[24].rindex("█") - 1] == "█"
    assert len(mask.svg(T)) < 200_000


def test_long_names_are_broken_to_fit():
    mask = masks.causal()
    for n in range(1, 12):
        mask = mask | masks.window(10 * n)
    assert max(map(len, mask.picture(6).splitlines())) <= 100


def test_pooled_shades_follow_density():
    rows = masks.per_head([masks.strided(2), masks.strided(5), masks.full()])
    shades = [set(rows.picture(96, 180, h=h).splitlines()[-1].split()[1]) for h in range(3)]
    assert shades == [{"▒"}, {"·", "░", "▒"}, {"█"}]


def test_batch_and_head_are_chosen_and_named():
    mask = masks.per_head([masks.nothing(), masks.full()]) & masks.padding(lengths=torch.tensor([4, 2]))
    assert "batch 1 of 2, head 0 of 2" in mask.picture(4, b=1)
    assert "█" not in mask.picture(4, h=0)
    assert mask.picture(4, b=0, h=1).count("██") == 16
    assert mask.picture(4, b=1, h=1).count("██") == 8


@pytest.mark.parametrize(("T", "S"), [(0, 0), (0, 4), (4, 0)])
def test_empty_pictures(T, S):
    assert f"T={T}" in masks.causal().picture(T, S)
    assert ET.fromstring(masks.causal().svg(T, S)).tag == f"{SVG}svg"


def test_svg_is_escaped_and_has_no_scripts():
    def rule(b, h, i, j):
        return i == j

    rule.__name__ = "</text><script>alert('1')</script>&"
    svg = masks.predicate(rule).svg(8)
    names = {element.tag.removeprefix(SVG) for element in ET.fromstring(svg).iter()}
    assert names == {"svg", "title", "style", "rect", "text", "path"}
    assert "<script" not in svg
    assert "prefers-color-scheme:dark" in svg
    assert "href" not in svg
