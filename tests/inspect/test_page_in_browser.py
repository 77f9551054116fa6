"""The page in a real Chromium: what it shows, by pointer and by keyboard, and that it complains of nothing.

Every page is opened from disk; `opened` fails a test whose page logs, throws, asks or loads anything.
"""

import re
import time
from dataclasses import replace

import pytest
from playwright.sync_api import Page, expect
from tests.inspect import page_traces as made
from tests.inspect.browser import chromium, needs_chromium, opened, until

from regard.inspect.page.render import fragment, render

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def drawn(page: Page, view: str, *, timeout: int = 10_000) -> None:
    page.wait_for_selector(f"#view-{view}[data-drawn]:not([hidden])", timeout=timeout)


def inks(page: Page, canvas: str) -> int:
    """How many colours a canvas shows."""
    return page.locator(canvas).first.evaluate("""c => {
        const copy = document.createElement("canvas");
        [copy.width, copy.height] = [c.width, c.height];
        const brush = copy.getContext("2d", { willReadFrequently: true });
        brush.drawImage(c, 0, 0);
        return new Set(new Uint32Array(brush.getImageData(0, 0, c.width, c.height).data.buffer)).size;
    }""")


def cells(page: Page, matrix: int) -> list[float]:
    """Left and top of a matrix's first cell inside its canvas, and a cell's side."""
    return page.evaluate(
        "n => { const m = views.get('head').matrices[n]; return [m.margin.left, m.margin.top, m.cell]; }", matrix
    )


def brightness(page: Page) -> int:
    """Of the page's ground, 0 to 765."""
    return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))


def read(page: Page, where: str, words: str) -> list[float]:
    """The weights that stand after `words`, a pattern, in the text of an element."""
    expect(page.locator(where)).to_contain_text(re.compile(words + r"\d"))
    found = re.search(words + r"(.*)", page.locator(where).text_content())[1]
    return [float(x) / 100 for x in re.findall(r"(-?[\d.]+) %", found)]


def near(w: float) -> object:
    """`w` in 8 bits and as few digits as the page writes."""
    return pytest.approx(w, abs=0.004 + 0.005 * (w > 0.09))


def test_all_heads_are_drawn_and_a_click_opens_one(browser, tmp_path):
    trace = made.text(L=3, H=4)
    with opened(browser, render(trace), tmp_path) as page:
        drawn(page, "model")
        assert page.locator(".thumb").count() == 12
        assert inks(page, ".thumb canvas") > 5
        page.get_by_role("button", name="layer 2, head 3").click()
        drawn(page, "head")
        expect(page.locator("#said")).to_contain_text("layer 2, head 3 · layers.2 · self-attention")
        expect(page.get_by_role("tab", name="One head")).to_have_attribute("aria-selected", "true")
        assert inks(page, "#view-head .drawing") > 20


def test_a_query_under_the_pointer_reads_what_the_model_read(browser, tmp_path):
    trace = made.text()
    row = trace.layers[1].weights()[0, 2, 3]
    best = int(row.argmax())
    with opened(browser, render(trace), tmp_path) as page:
        page.get_by_role("button", name="layer 1, head 2").click()
        drawn(page, "head")
        everything = int(page.locator(".lines").get_attribute("data-lines"))
        page.locator(".queries .tok").nth(3).hover()
        said = read(page, "#said", rf"query 3 “sat” reads “{re.escape(made.WORDS[best])}” ")
        assert said == [near(w) for w in row.sort(descending=True).values[: len(said)].tolist()]
        assert 0 < int(page.locator(".lines").get_attribute("data-lines")) < everything
        page.locator(".queries .tok").nth(3).click()
        page.mouse.move(5, 5)
        expect(page.locator(".queries .tok.held")).to_have_text("sat")
        page.locator(".keys .tok").nth(4).hover()
        expect(page.locator("#said")).to_contain_text("key 4 “on”")


def test_the_matrix_reads_weights_and_holds_queries(browser, tmp_path):
    trace = made.text()
    with opened(browser, render(trace), tmp_path) as page:
        page.keyboard.press("2")
        drawn(page, "head")
        box = page.locator("#view-head .drawing").bounding_box()
        place = cells(page, 0)
        at = [box["x"] + place[0] + 4.5 * place[2], box["y"] + place[1] + 7.5 * place[2]]
        page.mouse.move(*at)
        w = float(trace.layers[0].weights()[0, 0, 7, 4])
        assert read(page, "#tip", r"query 7: and\s*key 4: on\s*") == [near(w)]
        page.mouse.click(*at)
        expect(page.locator(".queries .tok.held")).to_have_text("and")
        page.keyboard.press("Escape")
        expect(page.locator(".queries .tok.held")).to_have_count(0)


def test_several_heads_are_drawn_in_their_own_colours(browser, tmp_path):
    with opened(browser, render(made.text()), tmp_path) as page:
        page.keyboard.press("2")
        drawn(page, "head")
        alone = int(page.locator(".lines").get_attribute("data-lines"))
        page.locator(".chips button").nth(2).click()
        expect(page.locator(".chips button[aria-pressed=true]")).to_have_count(2)
        until(page, f"Number(document.querySelector('.lines').dataset.lines) > {alone}")
        colours = page.locator(".chips button[aria-pressed=true]").evaluate_all(
            "x => x.map(b => getComputedStyle(b).borderColor)"
        )
        assert colours[0] != colours[1]


def test_everything_is_reached_by_keys(browser, tmp_path):
    with opened(browser, render(made.text(L=3, H=4)), tmp_path) as page:
        drawn(page, "model")
        for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
            page.keyboard.press(key)
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "layer 1, head 1"
        page.keyboard.press("Enter")
        drawn(page, "head")
        expect(page.locator("#said")).to_contain_text("layer 1, head 1")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#said")).to_contain_text("layer 1, head 0")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#said")).to_contain_text("layer 1, head 0")
        page.keyboard.press("j")
        page.keyboard.press("j")
        expect(page.locator(".queries .tok.held")).to_have_text("the")
        page.keyboard.press("k")
        expect(page.locator(".queries .tok.held")).to_have_text("[CLS]")
        page.keyboard.press("b")
        expect(page.locator(".queries .tok").first).to_have_text("[SEP]")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "layer 1, head 0"
        page.keyboard.press("?")
        expect(page.locator("#help")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#help")).not_to_be_visible()
        page.locator("#tab-model").focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == "tab-head"
        page.keyboard.press("6")
        drawn(page, "table")


def test_focus_is_seen_and_everything_has_a_name(browser, tmp_path):
    with opened(browser, render(made.text(), other=made.text()), tmp_path) as page:
        for view in "123456":
            page.keyboard.press(view)
            page.wait_for_timeout(60)
            nameless = page.evaluate(
                "[...document.querySelectorAll('button, select, input, [role=img], [role=group]')]"
                ".filter(x => x.checkVisibility())"
                ".filter(x => !(x.getAttribute('aria-label') || x.textContent.trim() || x.labels?.[0]?.textContent))"
                ".map(x => x.outerHTML)"
            )
            assert nameless == []
        page.keyboard.press("1")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_neuron_view_multiplies_what_was_traced(browser, tmp_path):
    trace = made.text(H=4, G=2)
    one = trace.layers[0]
    with opened(browser, render(trace), tmp_path) as page:
        page.keyboard.press("3")
        drawn(page, "neuron")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#view-neuron[data-drawn='0 2 0']")
        page.locator("#view-neuron select").nth(0).select_option("5")
        page.wait_for_selector("#view-neuron[data-drawn='0 2 5']")
        box = page.locator("#view-neuron canvas").last.bounding_box()
        page.mouse.move(box["x"] + 145, box["y"] + 62 + 18 * 3 + 9)
        text = page.locator("#tip").text_content()
        q, k = float(one.q[0, 2, 5, 0]), float(one.k[0, 1, 3, 0])
        number, x, y, product, score = map(float, re.findall(r"(?:number|q|k|=|score) (-?\d+\.?\d*)", text))
        assert "key 3: sat" in text
        assert number == 0
        assert [x, y, product] == pytest.approx([q, k, q * k], abs=0.06)
        assert score == pytest.approx(float(one.logits()[0, 2, 5, 3]), abs=0.1)
        assert read(page, "#tip", "weight ") == [near(float(one.weights()[0, 2, 5, 3]))]


def test_queries_and_keys_stand_in_one_plane(browser, tmp_path):
    with opened(browser, render(made.text(L=1, H=1), planes=("pca", "tsne")), tmp_path) as page:
        page.keyboard.press("4")
        drawn(page, "plane")
        assert inks(page, "#view-plane canvas") > 3
        page.locator("#view-plane select").nth(0).select_option("tsne")
        page.locator("#view-plane select").nth(1).select_option("token")
        expect(page.locator("#view-plane .note").last).to_contain_text("the")
        x, y = page.evaluate("(() => { const b = document.querySelector('#view-plane canvas').getBoundingClientRect();"
                             "const [x, y] = views.get('plane').spot(20); return [b.x + x, b.y + y]; })()")  # fmt: skip
        page.mouse.move(x, y)
        expect(page.locator("#tip")).to_contain_text(re.compile(r"(query|key) \d+ of input \d: "))
        expect(page.locator("#tip")).to_contain_text("⟦")
        page.get_by_label("find a token").fill("cat")
        assert inks(page, "#view-plane canvas") > 3


def test_rollout_is_painted_on_the_words(browser, tmp_path):
    trace = made.text(L=3)
    through = trace.rollout()[-1][0]
    with opened(browser, render(trace), tmp_path) as page:
        page.keyboard.press("5")
        drawn(page, "text")
        page.locator(".word").nth(6).click()
        page.wait_for_selector("#view-text[data-drawn='0 row 6']")
        read = page.locator(".word").evaluate_all("x => x.map(w => Number(w.dataset.value))")
        assert read == pytest.approx(through[6].tolist(), abs=0.004)
        page.locator("#view-text select").nth(1).select_option("column")
        page.wait_for_selector("#view-text[data-drawn='0 column 6']")
        read = page.locator(".word").evaluate_all("x => x.map(w => Number(w.dataset.value))")
        assert read == pytest.approx(through[:, 6].tolist(), abs=0.004)


def test_the_table_sorts_and_opens_heads(browser, tmp_path):
    trace = made.text(L=3)
    by_entropy = sorted(trace.statistics(), key=lambda s: -s.entropy)
    with opened(browser, render(trace), tmp_path) as page:
        page.keyboard.press("6")
        drawn(page, "table")
        page.get_by_role("button", name="entropy").click()
        expect(page.locator("th[aria-sort=descending]")).to_contain_text("entropy")
        order = page.locator("tbody tr[data-head]").evaluate_all("x => x.map(r => r.dataset.head)")
        assert order == [f"{s.layer},{s.head}" for s in by_entropy]
        page.keyboard.press("Enter")  # the button keeps the focus: the other way round
        assert page.locator("tbody tr[data-head]").first.get_attribute("data-head") == order[-1]
        page.locator("tbody tr[data-head]").first.focus()
        page.keyboard.press("Enter")
        drawn(page, "head")
        layer, head = order[-1].split(",")
        expect(page.locator("#said")).to_contain_text(f"layer {layer}, head {head}")


@pytest.mark.parametrize("dark", [False, True])
def test_the_theme_follows_the_reader_and_the_button(browser, tmp_path, dark):
    with opened(browser, render(made.text()), tmp_path, dark=dark) as page:
        drawn(page, "model")
        assert (brightness(page) < 200) == dark
        before = page.locator(".thumb canvas").first.evaluate("c => c.toDataURL()")
        page.keyboard.press("t")
        assert (brightness(page) < 200) != dark
        until(page, "b => document.querySelector('.thumb canvas').toDataURL() !== b", before)


def test_hostile_tokens_stay_text(browser, tmp_path):
    counts = []
    for words in (("a",) * 12, made.HOSTILE):
        with opened(browser, render(made.text(words=words), title=words[0]), tmp_path) as page:
            for view in "123456":
                page.keyboard.press(view)
                page.wait_for_timeout(80)
            page.keyboard.press("2")
            drawn(page, "head")
            page.locator(".queries .tok").nth(1).hover()
            counts.append(page.evaluate("document.querySelectorAll('*').length"))
            assert page.evaluate("window.hacked") is None
            texts = page.locator(".queries .tok").all_text_contents()
            assert texts[:3] == list(words[:3])
            assert page.locator("h1").text_content() == words[0]
    assert counts[0] == counts[1]


def test_two_traces_stand_side_by_side(browser, tmp_path):
    before, after = made.text(), made.text(causal=True)
    with opened(browser, render(before, other=after, names=("full", "causal")), tmp_path) as page:
        drawn(page, "model")
        full = page.locator(".thumb canvas").first.evaluate("c => c.toDataURL()")
        page.locator("#shown").select_option("2")
        until(page, "b => document.querySelector('.thumb canvas').toDataURL() !== b", full)
        page.keyboard.press("2")
        drawn(page, "head")
        assert page.locator("#view-head .drawing").count() == 3
        page.locator(".queries .tok").nth(2).hover()
        assert page.locator(".queries .tok.held").count() == 2  # both panels light up together
        place = cells(page, 2)
        page.locator("#view-head .drawing").last.scroll_into_view_if_needed()
        box = page.locator("#view-head .drawing").last.bounding_box()
        page.mouse.move(box["x"] + place[0] + 9.5 * place[2], box["y"] + place[1] + 2.5 * place[2])
        was = float(before.layers[0].weights()[0, 0, 2, 9])
        assert read(page, "#tip", r"key 9: all\s*") == [near(was), 0]
        page.keyboard.press("6")
        page.locator("#shown").select_option("2")
        expect(page.locator("#view-table")).to_contain_text("causal less full")


def test_maps_lie_over_the_picture(browser, tmp_path):
    trace = made.picture()
    with opened(browser, render(trace), tmp_path) as page:
        page.get_by_role("tab", name="On the picture").click()
        drawn(page, "picture")
        assert page.locator(".heads button").count() == 3
        canvas = page.locator("#view-picture .drawing")
        class_token = canvas.evaluate("c => c.toDataURL()")
        box = canvas.bounding_box()
        page.mouse.click(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"])  # row 2, column 3
        page.wait_for_selector("#view-picture[data-drawn='0 0 7']")
        assert canvas.evaluate("c => c.toDataURL()") != class_token
        page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.1 * box["height"])
        w = float(trace.layers[0].weights()[0, 0, 7, 1])
        assert read(page, "#tip", r"row 1, column 1\s*") == [near(w)]
        expect(page.locator("#tip")).to_contain_text("of what row 2, column 3 reads")
        page.locator(".heads button").nth(2).click()
        page.wait_for_selector("#view-picture[data-drawn='0 2 7']")


def test_stacks_and_cross_attention_stand_apart(browser, tmp_path):
    with opened(browser, render(made.translation()), tmp_path) as page:
        drawn(page, "model")
        headings = ["encoder self-attention", "decoder self-attention", "decoder cross-attention"]
        assert page.locator(".stack h2").all_text_contents() == headings
        page.get_by_role("button", name="layer 1 decoder cross, head 0").click()
        drawn(page, "head")
        assert page.locator(".queries .tok").all_text_contents() == [f"written{n}" for n in range(5)]
        assert page.locator(".keys .tok").all_text_contents() == [f"read{n}" for n in range(7)]
        page.keyboard.press("5")
        drawn(page, "text")
        page.locator("#view-text select").nth(0).select_option(label="rollout of the decoder")
        expect(page.locator(".word").first).to_have_text("written0")


def test_without_tokens_or_vectors_the_page_says_so(browser, tmp_path):
    trace = made.text(words=made.WORDS * 4, L=2)
    with opened(browser, render(trace, limit=3_000), tmp_path) as page:
        drawn(page, "model")
        page.locator("footer summary").click()
        expect(page.locator("#notes")).to_contain_text("pooled into their largest")
        page.keyboard.press("3")
        expect(page.locator("#view-neuron")).to_contain_text("are not on the page")


def test_it_fits_a_thousand_pixels(browser, tmp_path):
    html = render(made.text(L=2, H=12), other=made.text(L=2, H=12))
    with opened(browser, html, tmp_path, width=1000, height=700) as page:
        for view in "123456":
            page.keyboard.press(view)
            page.wait_for_timeout(80)
            assert page.evaluate("document.documentElement.scrollWidth") <= 1000


def test_a_notebook_shows_it_in_a_frame(browser, tmp_path):
    host = f"<!DOCTYPE html><title>notebook</title>{fragment(made.text())}{fragment(made.text())}"
    with opened(browser, host, tmp_path) as page:
        frames = [page.frame_locator("iframe").nth(n) for n in range(2)]
        for frame in frames:
            frame.locator(".thumb").nth(4).click()
            expect(frame.locator("#said")).to_contain_text("layer 1, head 1")


def test_twelve_layers_of_twelve_heads_on_512_tokens_do_not_freeze_it(browser, tmp_path):
    words = tuple(f"w{n % 97}" for n in range(512))
    page_text = render(made.text(L=12, B=1, H=12, D=16, words=words, causal=True))
    assert len(page_text) < 60e6
    began = time.monotonic()
    with opened(browser, page_text, tmp_path) as page:
        drawn(page, "model", timeout=30_000)
        assert time.monotonic() - began < 25  # about 2 s on an idle machine
        page.evaluate("""() => {
            window.longest = 0;
            let last = performance.now();
            setInterval(() => {
                window.longest = Math.max(window.longest, performance.now() - last);
                last = performance.now();
            }, 10);
        }""")
        keys = {"2": "0 0", "ArrowRight": "0 1", "ArrowDown": "1 1", "3": "1 1 0", "4": "1 1", "5": "0 row null"}
        for step, done in keys.items():
            began = time.monotonic()
            page.keyboard.press(step)
            until(page, "d => document.querySelector('[role=tabpanel]:not([hidden])').dataset.drawn === d", done)
            assert time.monotonic() - began < 8
        page.keyboard.press("2")
        page.locator(".queries .tok").nth(20).hover()
        expect(page.locator("#said")).to_contain_text("query 20")
        assert page.evaluate("window.longest") < 4000  # ms that the page did not answer; about 150 when idle


def test_what_is_no_number_is_named_and_hides_no_other_head(browser, tmp_path):
    trace = made.text()
    q = trace.layers[0].q.clone()
    q[0, 1, 4] = float("nan")
    trace = replace(trace, layers=(replace(trace.layers[0], q=q), *trace.layers[1:]))
    with opened(browser, render(trace), tmp_path) as page:
        drawn(page, "model")
        expect(page.locator("#view-model")).to_contain_text("Weights that are no numbers: layer 0 head 1 (1 query).")
        page.get_by_role("button", name="layer 0, head 1").hover()
        expect(page.locator("#tip")).to_contain_text("entropy not a number")
        page.get_by_role("button", name="layer 0, head 1").click()
        drawn(page, "head")
        place, box = cells(page, 0), page.locator("#view-head .drawing").bounding_box()
        page.mouse.move(box["x"] + place[0] + 2.5 * place[2], box["y"] + place[1] + 4.5 * place[2])
        expect(page.locator("#tip")).to_contain_text("not a number")
        page.get_by_role("tab", name="Queries and keys").click()
        expect(page.locator("#view-plane")).to_contain_text("No place for 1 of the queries and keys")
        assert inks(page, "#view-plane canvas") > 5
        page.get_by_role("tab", name="On the text").click()
        expect(page.locator("#view-text")).to_contain_text(
            "leaves out 12 of the queries"
        )  # of the rollout, in which all read it
        page.get_by_role("tab", name="In numbers").click()
        expect(page.locator('#view-table tr[data-head="0,1"]')).to_contain_text("not a number")
        page.get_by_role("button", name="entropy").click()
        rows = page.locator("#view-table tbody tr")
        expect(rows.last).to_have_attribute("data-head", "0,1")
        assert rows.count() == 6
