"""The report says what the results say, in one self-contained page that hostile text cannot change."""

import builtins
import json
import math
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("plotly")

from regard.bench import report
from regard.bench.record import Cell, Result
from regard.bench.report import cards, curves, pareto
from regard.bench.report.text import clean, quantity
from regard.cards import Card, Paper
from regard.tasks import ACCURACY, Metric

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</script><script>alert(1)</script>",
    '<a href="javascript:alert(1)">x</a>',
    "</title></style></textarea>-->",
    "{{7*7}} %{x} $\\sum$",
    "&lt;b&gt;&amp;",
    "a\u2028b\u2029c",
    "\u202egnp.exe",
    "\x00\x1b[31m",
    "\ud800",
]
SETTINGS = {
    "steps": 100,
    "batch": 4,
    "length": 32,
    "dim": 64,
    "depth": 2,
    "data": "book.txt",
    "device": "cpu",
}


def result(name="alibi", seed=0, loss=1.5, **changes):
    heldout = {"1x": loss, "2x": loss + 0.1, "4x": loss + 0.4}
    values = {
        "status": "done",
        "curve": [(s, loss + 5 * math.exp(-s / 5)) for s in range(1, 101)],
        "heldout": heldout,
        "parameters": 1_234_567,
        "flops_per_token": 2.5e6,
        "mlp_dim": 256,
        "train_tokens_per_second": 51_700.0,
        "generate_tokens_per_second": 940.0,
        "peak_memory_bytes": 310_000_000,
        "state_bytes": 65_536,
        "seconds": 12.0,
        "environment": {"device": "a test machine", "torch": "2.13.0", "regard": "0.1.0"},
    } | changes
    settings = values.pop("settings", SETTINGS)
    task = values.pop("task", "text")
    return Result(Cell(task, name, seed, settings), **values)


def failed(name, seed=0, reason="ValueError: dim: is odd (got 3)", **changes):
    return Result(Cell("text", name, seed, SETTINGS), "failed", reason=reason, **changes)


class Page(HTMLParser):
    """What a reader of the page gets: its tags, links, text outside scripts, and the rows of its tables."""

    VOID = {"meta", "link", "br", "path", "img"}

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.rows, self.data, self.classes = [], "", []
        self.feed(source)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ("script", "style"):
            if self.open[-1][1].get("id") == "plots":
                self.data = data
            return
        self.words.append(data)
        inside = [tag for tag, _ in self.open]
        if "td" in inside or "th" in inside:
            self.rows[-1][-1] += data + " "

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words).replace("\u00a0", " "))

    @property
    def table(self):
        """Mechanism -> its cells, from the first table."""
        last = next(i for i, row in enumerate(self.rows) if row and row[0].strip() == "Mechanism" and i > 0)
        head = [cell.split()[0] for cell in self.rows[0]]
        return {row[0].split()[0]: dict(zip(head, map(str.strip, row))) for row in self.rows[1:last]}

    @property
    def plots(self):
        return {plot["id"]: plot for plot in json.loads(self.data)}


@pytest.fixture
def render(tmp_path, monkeypatch):
    """Writes and reads a page, without the 5 MB of plotly's own code (one test keeps it)."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly */")

    def run(results, **options):
        path = report.write(results, tmp_path / "report.html", **options)
        return Page(path.read_text("utf-8"))

    return run


def numbers(text):
    return [float(n) for n in re.findall(r"\d+\.\d+", text)]


def test_the_table_shows_means_and_sample_deviations(render):
    losses = {"alibi": [1.51, 1.52, 1.56], "gated": [1.41, 1.43, 1.42], "kerple": [1.71, 1.79, 1.81]}
    page = render([result(n, s, v) for n, vs in losses.items() for s, v in enumerate(vs)])
    for name, values in losses.items():
        mean = sum(values) / 3
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
        for length, extra in (("1x", 0), ("2x", 0.1), ("4x", 0.4)):
            assert numbers(page.table[name][length]) == [round(mean + extra, 3), round(deviation, 3)]
    assert list(page.table) == ["gated", "alibi", "kerple"]
    starred = {name for name, cells in page.table.items() if cells["1x"].startswith("★")}
    assert starred == {"gated"}
    assert "gated is best on held-out data: 1.420 ± 0.010 bits per byte (3 seeds)" in page.text
    assert "It is told apart from alibi (0.110) and kerple (0.350)." in page.text


def test_units_are_readable(render):
    cells = render([result()]).table["alibi"]
    assert cells["Train"] == "51.7 k tok/s"
    assert cells["Generate"] == "940 tok/s"
    assert cells["Peak"] == "310 MB"
    assert cells["State"] == "65.5 KB"
    assert cells["Parameters"] == "1.23 M"
    assert cells["MLP"] == "256"
    assert cells["FLOP"] == "2.50 M"


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.5, "tok/s", "0.50 tok/s"),
        (999.4, "tok/s", "999 tok/s"),
        (999.6, "tok/s", "1.00 k tok/s"),
        (512, "B", "512 B"),
        (1000, "B", "1.00 KB"),
        (9_995, "B", "10.0 KB"),
        (99_960, "B", "100 KB"),
        (3e12, "B", "3.00 TB"),
        (9_999, "", "9999"),
        (12_345, "", "12.3 k"),
    ],
)
def test_quantities_keep_three_digits(value, unit, shown):
    assert quantity(value, unit) == shown


def test_stars_mark_only_what_the_table_can_tell_apart(render):
    changes = ({"state_bytes": 1000}, {"state_bytes": 1001}, {"state_bytes": 5000})
    page = render([result(f"m{i}", 0, 1 + i, flops_per_token=1e6 + i, **c) for i, c in enumerate(changes)])
    assert [page.table[f"m{i}"]["State"] for i in range(3)] == ["★ 1.00 KB", "★ 1.00 KB", "5.00 KB"]
    assert {page.table[f"m{i}"]["FLOP"] for i in range(3)} == {"1.00 M"}


def test_what_the_test_does_not_tell_apart_is_said_and_marked(render):
    flat = [(step, 1.0) for step in range(1, 101)]
    later = [(step, 1.4) for step in range(1, 101)]
    results = [result("alibi", s, v, curve=flat) for s, v in enumerate((1.50, 1.54, 1.52))]
    results += [result("gated", s, v, curve=later) for s, v in enumerate((1.51, 1.52, 1.54))]
    results += [result("kerple", s, v, curve=later) for s, v in enumerate((1.90, 1.93, 1.92))]
    page = render(results)
    assert re.search(r"It is not told apart from gated \(0\.003, p = 0\.\d+\)", page.text)
    assert page.table["gated"]["1x"].startswith("≈")
    assert "It is told apart from kerple (0.397)." in page.text
    assert not page.table["kerple"]["1x"].startswith("≈")


def test_a_speed_within_the_spread_of_the_best_is_marked(render):
    speeds = {"alibi": (100.0, 3.0), "gated": (98.0, 1.0), "kerple": (90.0, 1.0)}
    page = render(
        [
            result(name, 0, 1.5 + n, train_tokens_per_second=speed, train_spread=spread, turns="now")
            for n, (name, (speed, spread)) in enumerate(speeds.items())
        ]
    )
    assert [page.table[name]["Train"][:1] for name in speeds] == ["★", "≈", "9"]
    assert "± 3" in page.table["alibi"]["Train"]


def test_speeds_that_were_not_measured_in_turns_with_each_other_are_warned_of(render):
    both = [result("alibi", 0, 1.5, turns="now"), result("gated", 0, 1.6, turns="then")]
    assert "Not all speeds were measured in turns" in render(both).text
    assert "Not all speeds were measured in turns" not in render([replace(one, turns="now") for one in both]).text


def test_one_seed_says_that_nothing_is_known_of_chance(render):
    page = render([result("alibi", 0, 1.5), result("gated", 0, 1.6)])
    assert "Nothing is known of chance for gated: fewer than two seeds in common." in page.text
    assert "±" not in page.table["alibi"]["1x"]


def test_seeds_of_different_settings_are_never_averaged(render):
    page = render([result(seed=s, loss=v, settings=SETTINGS | {"dim": d}) for s, v, d in ((0, 1.0, 64), (1, 2.0, 128))])
    assert "1.500" not in page.text
    assert page.text.count("alibi reaches") == 2
    for number, dim in (("1.000", 64), ("2.000", 128)):
        assert f"alibi reaches {number} bits per byte on held-out data on text, dim={dim} (one seed)" in page.text
        assert f"Results: text, dim={dim}" in page.text
    assert "Not all runs share" not in page.text


def test_rows_of_other_code_say_so_in_one_group(render):
    page = render(
        [result(seed=s, loss=v, settings=SETTINGS | {"code": c}) for s, v, c in ((0, 1.0, "a"), (1, 2.0, "b"))]
    )
    assert "1.500" not in page.text
    labels = [row[0] for row in page.rows if "code=" in "".join(row[:1])]
    assert [label.strip() for label in labels] == ["alibi · code=a", "alibi · code=b"]
    assert "Not all runs share the same code" in page.text


def test_every_text_has_a_table_and_a_headline_of_its_own(render):
    """What was learnt from one text is never held against what was learnt from another."""
    found = []
    for n, (data, fingerprint) in enumerate((("a.txt", "1"), ("b.txt", "2"), ("b.txt", "3"))):
        its = SETTINGS | {"data": data, "fingerprint": fingerprint, "bytes": n}
        found += [result(name, 0, loss + n, settings=its) for name, loss in (("alibi", 1.0), ("gated", 1.5))]
    first = render(found[:4])
    assert first.text.count("Of 2 mechanisms on text, data=") == 2
    assert "best on held-out data: 1.000" in first.text
    assert "best on held-out data: 2.000" in first.text
    assert "Results: text, data=b.txt" in first.text
    assert render(found[:2]).text.count("Of 2 mechanisms on text, ") == 1
    same = render(found[2:])
    assert "Results: text, fingerprint=2" in same.text.replace(", bytes=1", "")


def test_what_was_read_and_what_was_held_out_is_told(render):
    read = ["read: 2 files (a.txt, b.txt), 100 bytes", "held out: the last 10 bytes (10.0%), from byte 3 of b.txt on"]
    page = render([replace(result("alibi", 0, 1.5), data=read), replace(result("gated", 0, 1.6), data=read)])
    for line in read:
        assert page.text.count(line) == 1


def test_a_failure_shows_its_traceback_folded_up(render):
    said = "Traceback:\n  File <b>own.py</b>, line 7\nRuntimeError: x"
    page = render([result("alibi", 0, 1.5), replace(failed("own"), traceback=said)])
    assert page.tags.count("details") == 1
    assert "File <b>own.py</b>, line 7" in page.text


def test_a_cell_that_ran_again_counts_once(render):
    page = render([failed("alibi"), result("alibi", 0, 1.25)])
    assert page.table["alibi"]["1x"] == "1.250"


def test_tasks_stay_apart(render):
    page = render([result("alibi", 0, 1.5), result("alibi", 0, 0.5, task="recall")])
    assert "Results: text" in page.text
    assert "Results: recall" in page.text
    assert "1.000" not in page.text
    assert {"curves-0", "curves-1"} <= set(page.plots)


def test_failures_are_listed_with_their_reason(render):
    page = render([result("gated"), failed("alibi", 0), failed("alibi", 1), failed("cope", 0, "out of memory")])
    assert "Failed: 3 runs" in page.text
    assert "alibi (seeds 0, 1): ValueError: dim: is odd (got 3)" in page.text
    assert "cope (seed 0): out of memory" in page.text
    assert next(iter(page.table)) == "gated"
    assert page.table["cope"]["1x"] == "—"


def test_all_failed_still_gives_a_page_without_plots(render):
    page = render([failed("alibi"), failed("gated")])
    assert "none finished" in page.text
    assert page.data == ""
    assert "script" not in page.tags


def test_diverged_runs_are_named_and_never_best(render):
    nan = {"1x": math.nan, "2x": math.inf}
    page = render([result("alibi", 0, heldout=nan, curve=[(1, 3.0), (2, math.nan)]), result("gated", 0, 1.7)])
    assert page.table["alibi"]["1x"] == "diverged"
    assert page.table["gated"]["1x"].startswith("★") or "★" not in page.table["alibi"]["1x"]
    assert "NaN" not in page.data
    assert "gated" in page.text.split("bits per byte")[0]


@pytest.mark.parametrize("heldout", [{"1x": 1.5}, {"1x": 1.5, "4x": 1.9}, {}], ids=["1x", "no 2x", "none"])
def test_lengths_may_be_missing(render, heldout):
    page = render([result("alibi", 0, heldout=heldout), result("gated", 0, 1.7)])
    assert page.table["alibi"]["4x"].removeprefix("★ ") == (f"{heldout['4x']:.3f}" if "4x" in heldout else "—")


def test_unmeasured_costs_are_dashes_and_leave_the_plots(render):
    nothing = {
        "train_tokens_per_second": 0.0,
        "generate_tokens_per_second": 0.0,
        "peak_memory_bytes": 0,
        "state_bytes": 0,
    }
    page = render([result(**nothing, curve=[])])
    assert {page.table["alibi"][c] for c in ("Train", "Generate", "Peak", "State")} == {"—"}
    assert set(page.plots) == {"lengths-0"}


def test_curves_are_means_over_seeds_at_common_steps(render):
    first, second = [(1, 4.0), (2, 3.0), (3, 2.0)], [(1, 5.0), (3, 2.5)]
    page = render([result(seed=0, curve=first), result(seed=1, curve=second)])
    series = page.plots["curves-0"]["series"]
    strong = [s for s in series if not s.get("faint")]
    assert [(s["x"], s["y"]) for s in strong] == [([1, 3], [4.5, 2.25])]
    assert [s["x"] for s in series if s.get("faint")] == [[1, 2, 3], [1, 3]]


def test_long_curves_are_averaged_not_sampled():
    curve = [(s, float(s % 2)) for s in range(1200)]
    smooth = curves._smoothed(curve)
    assert len(smooth) == 60
    assert {v for _, v in smooth} == {0.5}
    assert statistics.fmean(s for s, _ in smooth) == pytest.approx(599.5, abs=1)


def test_the_front_is_what_nothing_dominates():
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 2.5), (3.0, 3.0), (2.5, 2.0)]
    brute = [i for i, (x, y) in enumerate(points) if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points)]
    assert sorted(pareto._front(points)) == brute
    assert pareto._front(points) == [1, 2, 0]


def test_pareto_plots_hold_the_means(render):
    speeds = {"alibi": (1.5, 20_000.0), "gated": (1.4, 10_000.0), "cope": (1.6, 5_000.0)}
    page = render([result(n, 0, loss, train_tokens_per_second=speed) for n, (loss, speed) in speeds.items()])
    plot = page.plots["time-0"]
    assert {s["label"]: (s["x"], s["y"]) for s in plot["series"]} == {
        name: ([pytest.approx(1e6 / speed)], [pytest.approx(loss)]) for name, (loss, speed) in speeds.items()
    }
    assert {s["label"] for s in plot["series"] if s["front"]} == {"alibi", "gated"}
    assert "nothing is both faster and better than gated, alibi" in page.text.replace("alibi and gated", "gated, alibi")


@pytest.mark.parametrize("count", [1, 30])
def test_looks_differ_and_points_stay_inside_their_axes(render, count):
    page = render([result(f"m{i}", s, 1 + i / 10 + s / 100) for i in range(count) for s in range(2)])
    assert len(page.table) == count
    strong = [s for s in page.plots["curves-0"]["series"] if not s["faint"]]
    assert len({(s["colour"], s["dash"], s["marker"]) for s in strong}) == count
    for name in ("time-0", "memory-0", "lengths-0"):
        plot = page.plots[name]
        for axis in "xy":
            low, high = plot[axis]["range"]
            scale = math.log10 if plot[axis]["type"] == "log" else float
            assert all(low < scale(v) < high for s in plot["series"] for v in s[axis])


# --- Other tasks

RECALL = Metric("accuracy", "accuracy", better=1, main="mean", along="pairs", loss="bits", percent=True)


def recalled(name, seed, first, last, **changes):
    heldout = {"mean": (first + last) / 2, "4": first, "16": last}
    changes = {"task": "mqar", "metric": RECALL, "generate_tokens_per_second": 0.0} | changes
    return result(name, seed, heldout=heldout, **changes)


def test_where_more_is_better_the_most_comes_first(render):
    ends = {"softmax": (1.0, 0.99), "performer": (0.9, 0.3), "window": (0.5, 0.2)}
    states = {"softmax": 8000, "performer": 1000, "window": 0}
    page = render(
        [
            recalled(n, s, a, b - s / 100, state_bytes=states[n])
            for n, (a, b) in reversed(ends.items())
            for s in range(2)
        ]
    )
    assert list(page.table) == ["softmax", "performer", "window"]
    assert "Of 3 mechanisms on mqar, softmax is best on held-out data: 99.2 ± 0.4% accuracy (2 seeds)" in page.text
    assert "performer (39.5 points" in page.text
    assert [n for n, cells in page.table.items() if cells["accuracy"].startswith("★")] == ["softmax"]
    assert numbers(page.table["performer"]["16"]) == [29.5, 0.7]
    assert "Generate" not in page.table["softmax"], "nothing generates"


def test_accuracy_is_drawn_against_the_number_of_pairs(render):
    page = render(
        [recalled("softmax", s, 1.0, 0.98) for s in range(2)] + [recalled("linear", 0, 0.9, 0.3, state_bytes=512)]
    )
    plot = page.plots["lengths-0"]
    assert plot["x"]["ticktext"] == ["4", "16"]
    assert plot["x"]["title"] == "pairs"
    assert plot["y"]["type"] == "linear"
    assert {s["name"]: s["y"] for s in plot["series"]} == {"softmax": [1.0, 0.98], "linear": [0.9, 0.3]}
    assert all("spread" in s for s in plot["series"])
    assert "Accuracy by pairs" in page.text
    assert (
        "From 4 to 16 it falls least for softmax (\u22122.0 points) and most for linear (\u221260.0 points)"
        in page.text
    )
    assert "State kept of a sequence: softmax 65.5 KB and linear 512 B." in page.text
    state = page.plots["state-0"]
    assert {s["name"]: s["x"] for s in state["series"]} == {"softmax": [65.536], "linear": [0.512]}
    assert "upper left is better" in page.text
    assert state["front"]["y"][0] == state["y"]["range"][0], "the front begins where nothing is good"


def test_a_task_with_one_number_has_no_plot_of_many(render):
    page = render([result("softmax", 0, heldout={"accuracy": 0.9}, task="digits", metric=ACCURACY)])
    assert "lengths-0" not in page.plots
    assert "measured at" not in page.text
    assert page.table["softmax"]["accuracy"] == "90.0%"


def test_rows_of_old_are_bits_per_byte(render):
    page = render([result("alibi", 0, 1.5), recalled("alibi", 0, 0.9, 0.5)])
    assert "1.500 bits per byte" in page.text
    assert "70.0% accuracy" in page.text


# --- Cards


def card(name, **changes):
    paper = Paper("A Title & More", "Ada, Byron", 2022, "2108.12409", "eq. 1")
    return Card(name, "A = q k^T < 1", (paper,), f"the gist of {name}", **changes)


def test_cards_are_shown_and_linked_and_parts_told_once(render, monkeypatch):
    known = {name: card(name, differs=("No dropout.",)) for name in ("gated", "rotary")}
    monkeypatch.setattr(cards, "_find_card", known.get)
    page = render([result("gated", 0, 1.5), result("gated+rotary", 0, 1.6), result("unknown", 0, 1.7)])
    assert page.text.count("the gist of rotary") == 1
    assert "A = q k^T < 1" in page.text
    assert "No dropout." in page.text
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert all(link[1:] in ids for link in links if link.startswith("#"))
    assert {link for link in links if not link.startswith("#")} == {"https://arxiv.org/abs/2108.12409"}
    assert sum(link.startswith("#") for link in links) == 3  # two rows of the table, and the shared part


def test_options_in_a_name_still_find_the_card(render, monkeypatch):
    monkeypatch.setattr(cards, "_find_card", {name: card(name) for name in ("gated", "rotary")}.get)
    page = render([result("gated+rotary(base=100)", 0, 1.5), result("rotary(base=5)", 0, 1.6)])
    assert page.text.count("the gist of gated") == 1
    assert page.text.count("A = q k^T < 1") == 2  # the second mention of rotary is a link


def test_the_catalogue_is_asked():
    assert cards._find_card("alibi").name == "alibi"
    assert cards._find_card("no such mechanism") is None


def test_notes_say_what_was_not_measured(render):
    assert "alibi: no 4x: too long" in render([result(notes=["no 4x: too long"])]).text


def test_without_cards_the_section_is_left_out(render, monkeypatch):
    monkeypatch.setattr(cards, "_find_card", lambda name: None)
    assert "The mechanisms" not in render([result()]).text


# --- The page as a file


def test_the_page_is_self_contained_and_accessible(render):
    page = render([result("alibi", 0, 1.5), result("gated", 0, 1.6)])
    assert not [a for a in page.attributes if a[1] in ("src", "srcset", "action", "style") or a[1].startswith("on")]
    assert not [a for a in page.attributes if a[1] == "href" and a[2].startswith("//")]
    links = [a for a in page.attributes if (a[2] or "").startswith("http")]
    assert all(tag == "a" and value.startswith("https://arxiv.org/abs/") for tag, _, value in links)
    assert page.tags.count("h1") == page.tags.count("main") == 1
    assert ("html", "lang", "en") in page.attributes
    assert any(a[:2] == ("meta", "content") and "width=device-width" in a[2] for a in page.attributes)
    labels = [a for a in page.attributes if a[0] == "div" and a[1] == "aria-label" and a[2]]
    assert len(labels) == len(page.plots) + 2  # and the two tables
    assert {value for _, name, value in page.attributes if name == "scope"} == {"col", "row"}


def test_only_scripts_with_the_fresh_nonce_may_run(render):
    pages = [render([result()]) for _ in range(2)]
    nonces = [{v for tag, name, v in page.attributes if (tag, name) == ("script", "nonce")} for page in pages]
    assert all(len(n) == 1 for n in nonces)
    assert nonces[0] != nonces[1]
    policy = next(a[2] for a in pages[0].attributes if a[:2] == ("meta", "content") and "default-src" in a[2])
    assert policy == (
        f"default-src 'none'; script-src 'nonce-{nonces[0].pop()}'; style-src 'unsafe-inline'; img-src data:"
    )


def page_about(render, text):
    results = [result(text, s, 1.5, checkpoint=text, settings=SETTINGS | {text: text, "data": text}) for s in range(2)]
    results += [
        result(f"{text}+{text}", 0, 1.6, environment={text: text}),
        failed(text + text, 0, reason=text),
    ]
    results += [result(text, 0, 0.5, task=text, heldout={"1x": 1.0, text: 2.0})]
    return render(results, title=text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_and_no_attribute(render, monkeypatch, text):
    def of(word):
        paper = Paper(word, word, 2022, word, word)
        monkeypatch.setattr(
            cards,
            "_find_card",
            lambda name: Card(name, word, (paper, paper), word, differs=(word,), claim=word),
        )
        return page_about(render, word)

    # Brackets and plus signs mean something in a mechanism's name, so the harmless twin keeps them.
    plain, hostile = of(re.sub("[^()+]", "a", text)), of(text)
    assert hostile.tags == plain.tags
    assert [a[:2] for a in hostile.attributes] == [a[:2] for a in plain.attributes]
    assert not re.search("[\x00\x1b\u2028\u202e<>&]", hostile.data)
    shown = [
        series[key]
        for plot in hostile.plots.values()
        for series in plot["series"]
        for key in ("name", "label")
        if key in series
    ]
    assert not re.search("[\x00\x1b\u2028\u202e]", "".join([*hostile.words, *shown]))
    assert clean(text)[:20] in "".join(hostile.words)


def test_endless_text_is_shortened(render):
    page = render([result("m" * 1_000_000), failed("alibi", reason="r" * 1_000_000)])
    assert len(page.text) < 20_000


def test_the_page_carries_plotly_once(tmp_path):
    source = report.write([result()], tmp_path / "report.html").read_text("utf-8")
    assert len(re.findall(r"plotly\.js v\d", source)) == 1
    assert len(source) < 8_000_000


def test_write_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert report.write([result()], path) == path
    before = path.read_bytes()

    def broken(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(report.os, "replace", broken)
    with pytest.raises(OSError, match="disk is full"):
        report.write([result("gated")], path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_without_plotly_the_message_says_what_to_install(tmp_path, monkeypatch):
    original = builtins.__import__

    def blocked(name, *rest):
        if name.split(".")[0] == "plotly":
            raise ModuleNotFoundError(f"No module named {name!r}", name="plotly")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ModuleNotFoundError) as error:
        report.write([result()], tmp_path / "report.html")
    assert str(error.value) == 'report.html needs plotly: pip install "regard[report]"'
    assert not list(tmp_path.iterdir())


def test_no_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="results: is empty"):
        report.write([], tmp_path / "report.html")
