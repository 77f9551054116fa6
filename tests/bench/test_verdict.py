"""What is said of a ranking: the paired test, the lead that must last, and the words."""

import math
import random

import pytest
from scipy import stats

from regard.bench.record import Cell, Result
from regard.bench.report.groups import grouped
from regard.bench.report.verdict import HORIZON, difference, end_and_pace, holm, paired_t, student, verdict
from regard.bench.report.wording import sentences
from regard.tasks import ACCURACY

STEPS = range(10, 1001, 10)


def flat(level):
    return lambda step: level


def rows(losses, curves, **fields):
    """A group of mechanisms by name: held-out numbers by seed, and a training curve."""
    return grouped(
        [
            Result(
                Cell("text", name, seed),
                "done",
                heldout={"1x": value, "accuracy": value},
                curve=[(step, curves[name](step)) for step in STEPS],
                **fields,
            )
            for name, values in losses.items()
            for seed, value in enumerate(values)
        ]
    )[0]


@pytest.mark.parametrize("freedom", range(1, 12))
@pytest.mark.parametrize("t", [0.0, 0.3, -2.0, 9.0])
def test_students_tail_is_scipys(freedom, t):
    assert student(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_paired_test_is_scipys(count):
    draw = random.Random(count)
    one, two = ([draw.gauss(mean, 1) for _ in range(count)] for mean in (0, 0.7))
    assert paired_t([a - b for a, b in zip(one, two)]) == pytest.approx(stats.ttest_rel(one, two).pvalue)


def test_the_paired_test_knows_its_edges():
    assert paired_t([0.3]) is None
    assert paired_t([]) is None
    assert paired_t([0.5, 0.5]) == 0
    assert paired_t([0.0, 0.0]) == 1


def test_holm_corrects_for_how_many_there_are():
    assert holm([0.03, None, 0.01, 0.02]) == pytest.approx([0.04, None, 0.03, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_line_is_fitted_to_the_second_half():
    curve = [(step, 3 - 0.2 * math.log(step) if step > 500 else 99.0) for step in STEPS]
    end, pace = end_and_pace(curve)
    assert end == pytest.approx(3 - 0.2 * math.log(1000))
    assert pace == pytest.approx(-0.2)
    assert all(map(math.isnan, end_and_pace(curve[:8])))


def test_differences_are_taken_seed_by_seed_where_all_have_a_point():
    pairs = [([(1, 1.0), (2, 2.0)], [(1, 3.0), (2, 3.0)]), ([(2, 0.0)], [(2, 3.0), (3, 9.0)])]
    assert difference(pairs) == [(2, 2.0)]
    assert difference([]) == []


LOSSES = {"best": [1.0, 1.1, 1.2], "other": [1.3, 1.41, 1.5]}


def said(group):
    return " ".join(sentences(group))


def test_a_lead_that_seeds_carry_and_that_lasts_tells_apart():
    group = rows(LOSSES, {"best": flat(1.0), "other": flat(1.3)})
    ((_, pair),) = verdict(group).pairs
    assert pair.p == pytest.approx(stats.ttest_rel(*LOSSES.values()).pvalue)
    assert (pair.apart, pair.lasts, pair.gap, pair.falls) == (True, math.inf, pytest.approx(0.3), 0)
    assert said(group).startswith("Of 2 mechanisms on text, best is best on held-out data: 1.100 ± 0.100 bits per byte")
    assert "It is told apart from other (0.303)." in said(group)


def test_noise_over_seeds_does_not():
    group = rows({**LOSSES, "other": [1.3, 0.9, 1.5]}, {"best": flat(1.0), "other": flat(1.3)})
    assert not verdict(group).pairs[0][1].carried
    p = stats.ttest_rel([1.0, 1.1, 1.2], [1.3, 0.9, 1.5]).pvalue
    assert f"not told apart from other (0.133, p = {p:.2g})" in said(group)


def test_more_mechanisms_ask_for_more():
    """One comparison at p = 0.03 is carried; the same among four is not."""
    losses = {"best": [1.0, 1.1, 1.2], "other": [1.3, 1.5, 1.4]}
    curves = {name: flat(1.0 + n) for n, name in enumerate(("best", "other", "a", "b", "c"))}
    alone = verdict(rows(losses, curves)).pairs[0][1]
    assert 0.0125 < alone.p < 0.05
    more = {name: [value + n for value in (1.6, 1.2, 2.0)] for n, name in enumerate("abc")}
    assert not verdict(rows(losses | more, curves)).pairs[0][1].carried


@pytest.mark.parametrize(("times", "apart"), [(2, False), (HORIZON - 1, False), (HORIZON + 1, True)])
def test_a_lead_that_shrinks_must_last(times, apart):
    gone = times * STEPS[-1]
    group = rows(LOSSES, {"best": flat(1.0), "other": lambda step: 1.0 + 0.5 * math.log(gone / step)})
    ((_, pair),) = verdict(group).pairs
    assert pair.lasts == pytest.approx(times)
    assert pair.apart == (apart and pair.gap > pair.falls)
    if times == 2:
        assert "ahead of other (0.303; at its pace gone at 2.0 times the steps)" in said(group)


def test_where_steps_decide_more_it_is_early_training():
    falling = {
        "best": lambda step: 3 - 0.5 * math.log(step / 10),
        "other": lambda step: 3.1 - 0.5 * math.log(step / 10),
    }
    group = rows(LOSSES, falling)
    found = verdict(group)
    assert found.early
    assert found.falls == pytest.approx(0.5 * math.log(2))
    assert not found.pairs[0][1].apart
    assert said(group).startswith("Still improving: this ranks early training. Of 2 mechanisms on text, best is ahead")
    assert "still falls by 0.347 bits per byte with each doubling of the steps" in said(group)
    assert "its lead in it over other is 0.100" in said(group)
    assert "perhaps only then, it is ahead of other (0.303; less than a doubling of the steps brings)" in said(group)


def test_equals_at_the_end_of_training_are_not_called_early():
    slow = {name: (lambda step: 1 - 0.001 * math.log(step)) for name in LOSSES}
    assert not verdict(rows(LOSSES, slow)).early


def test_curves_of_few_points_tell_nothing_of_other_steps():
    group = rows(LOSSES, {"best": flat(1.0), "other": flat(1.3)})
    for row in group.rows:
        row.done = [Result(r.cell, "done", heldout=r.heldout, curve=r.curve[:4]) for r in row.done]
    assert not verdict(group).pairs[0][1].apart
    assert "too few steps to see whether it lasts" in said(group)


def test_more_is_better_for_accuracy():
    its = {"best": [0.9, 0.92, 0.91], "other": [0.5, 0.53, 0.51]}
    group = rows(its, {"best": flat(0.1), "other": flat(0.9)}, metric=ACCURACY)
    assert verdict(group).best.label == "best"
    assert "It is told apart from other (39.7 points)." in said(group)


def test_one_mechanism_or_none_has_nothing_to_be_held_against():
    group = rows({"best": [1.0]}, {"best": flat(1.0)})
    assert verdict(group) is None
    assert said(group) == "best reaches 1.000 bits per byte on held-out data on text (one seed)."
