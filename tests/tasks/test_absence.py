"""Absence, small form and in words. The oracle's author saw only the paper's account, neither code nor test."""

import random
from itertools import pairwise

import pytest
import torch

from regard import tasks
from regard.models.mixer import parse
from regard.prompts import absence as words
from regard.prompts.asking import ask, make
from regard.tasks import HELDOUT_SEED, Size, TaskError
from regard.tasks._labelled import IGNORED
from regard.tasks.absence import AGAIN, COPY, MARK, PAD, f1, gaps

# --- the oracle


def naive_f1(predicted, labels):
    tp = sum(1 for a, y in zip(predicted, labels, strict=True) if a and y)
    fp = sum(1 for a, y in zip(predicted, labels, strict=True) if a and not y)
    fn = sum(1 for a, y in zip(predicted, labels, strict=True) if not a and y)
    if not any(labels):
        return 1 - fp / len(labels)
    return 2 * tp / (2 * tp + fp + fn) if 2 * tp + fp + fn else 0.0


def naive_example(original, keep, edit):
    edited = []
    for element, kept in zip(original, keep, strict=True):
        if kept or edit == "needle":
            edited.append(element)
        if not kept and edit != "missing":
            edited.append(MARK)
    ids = [*original, COPY, *edited, AGAIN]
    at = list(range(len(ids), len(ids) + len(original)))
    return ids + list(original), [0 if kept else 1 for kept in keep], at


def naive_score(original, omitted, answer, domain):
    tp = fp = fn = 0
    for i, e in enumerate(original):
        if domain == "numbers":
            hit = str(e) in [line.strip() for line in answer.split("\n")]
        elif not e.strip():
            continue
        else:
            hit = e.strip().lower() in answer.lower()
        tp += hit and i in omitted
        fp += hit and i not in omitted
        fn += not hit and i in omitted
    if not omitted:
        return 1 - fp / len(original)
    return 2 * tp / (2 * tp + fp + fn) if 2 * tp + fp + fn else 0.0


# --- the small form


@pytest.mark.parametrize("edit", ["missing", "placeholder", "needle"])
def test_examples_are_those_of_the_oracle(edit):
    task = tasks.make("absence", {"edit": edit, "elements": 7, "vocab": 20, "gone": (30,)})
    inputs, labels = next(task.batches(40, 0))
    assert inputs.shape == (40, task.tokens)
    for row, label in zip(inputs.tolist(), labels.tolist(), strict=True):
        original, gone = row[:7], [y for y in label if y != IGNORED]
        ids, expected, at = naive_example(original, [not y for y in gone], edit)
        assert row == ids + [PAD] * (task.tokens - len(ids))
        assert gone == expected
        assert [n for n, y in enumerate(label) if y != IGNORED] == at
        assert len(set(original)) == 7
        assert min(original) > MARK
        assert 0 < sum(gone) < 7


def test_gaps_have_their_share_and_are_neither_none_nor_all():
    drawn = gaps(4000, 20, 0.3, torch.Generator().manual_seed(0))
    assert drawn.double().mean().item() == pytest.approx(0.3, abs=0.01)
    few = gaps(500, 2, 0.1, torch.Generator().manual_seed(0))
    assert (few.sum(1) == 1).all()


def test_f1_is_the_oracles():
    draw = torch.Generator().manual_seed(0)
    predicted, gone = (torch.rand(200, 6, generator=draw) < share for share in (0.4, 0.2))
    expected = [naive_f1(a, y) for a, y in zip(predicted.tolist(), gone.tolist(), strict=True)]
    assert f1(predicted, gone).tolist() == pytest.approx(expected)
    assert not gone.any(1).all(), "documents without a gap are among them"


def test_naming_all_gives_what_the_task_says():
    task = tasks.make("absence", {"heldout": 300, "gone": (30,)})

    class All(torch.nn.Module):
        def forward(self, inputs):
            return torch.eye(2)[1].expand(*inputs.shape, 2)

    found, _ = task.measure(All(), 64, torch.device("cpu"))
    assert found["mean"] == pytest.approx(2 * 0.3 / 1.3, abs=0.03)
    assert f"F1 {2 * 0.3 / 1.3:.2f}" in task.describe()


def test_each_share_is_measured_and_the_model_has_two_answers():
    task = tasks.make("absence", {"heldout": 8})
    model = task.model(parse("softmax"), Size(16, 1, 2, 16))
    found, notes = task.measure(model, 4, torch.device("cpu"))
    assert list(found) == ["mean", "20%", "50%"]
    assert notes == []
    assert model(*task.example()).shape == (1, task.tokens, 2)


def test_held_out_documents_are_none_of_the_first_batches():
    task = tasks.make("absence")
    groups = [inputs for _, inputs, _ in task.questions(64, HELDOUT_SEED)]
    held = {tuple(row) for inputs in groups for row in inputs.tolist()}
    assert len(held) == 128
    for (inputs, _), _ in zip(task.batches(64, 0), range(4), strict=False):
        assert not held & {tuple(row) for row in inputs.tolist()}


def test_elements_may_repeat():
    task = tasks.make("absence", {"repeats": 1, "vocab": 8, "elements": 16})
    inputs, _ = next(task.batches(4, 0))
    assert all(len(set(row[:16])) < 16 for row in inputs.tolist())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"elements": 40}, r"task absence: vocab is too small for its elements \(got 32\); expected an int >= 44"),
        ({"edit": "gap"}, r"task absence: edit is unknown \(got 'gap'\)"),
        ({"gone": (100,)}, r"gone is too large \(got 100\)"),
        ({"repeats": 2}, r"repeats is too large"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(TaskError, match=said):
        tasks.make("absence", options)


@pytest.mark.slow
def test_what_is_missing_is_harder_than_what_was_put_in():
    """The paper's finding in small: at one budget needles and marked gaps are found, and what is missing is not."""
    found = {}
    for edit in ("missing", "placeholder", "needle"):
        options = {"edit": edit, "elements": 24, "vocab": 64, "gone": (10, 30), "heldout": 64}
        task = tasks.make("absence", options)
        torch.manual_seed(0)
        model = task.model(parse("softmax"), Size(48, 2, 4, 192))
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _, batch in zip(range(400), task.batches(32, 0), strict=False):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        found[edit] = task.measure(model.eval(), 64, torch.device("cpu"))[0]["mean"]
    assert found["missing"] < 0.4
    assert found["needle"] > found["missing"] + 0.3
    assert found["placeholder"] > found["missing"] + 0.5


# --- in words

NUMBERS, GONE = ["12", "312", "7", "50"], frozenset({1, 3})
LINES, LOST = ["One day", "", "a Fox", "one day", "ran"], frozenset({0, 4})


@pytest.mark.parametrize(
    "said", ["312\n50", "312", "", "12\n312\n7\n50", " 50 \n", "99\n312", "312 50", "ONE DAY\nran", "fox\na fox"]
)
def test_scores_are_the_oracles(said):
    assert words.f1(NUMBERS, GONE, said, "numbers") == pytest.approx(naive_score(NUMBERS, GONE, said, "numbers"))
    assert words.f1(NUMBERS, frozenset(), said, "numbers") == naive_score(NUMBERS, frozenset(), said, "numbers")
    assert words.f1(LINES, LOST, said, "lines") == pytest.approx(naive_score(LINES, LOST, said, "lines"))


def test_numbers_are_lines_and_no_parts_of_others():
    assert words.f1(["12", "312"], frozenset({1}), "312", "numbers") == 1.0


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_a_perfect_an_empty_and_a_whole_answer(order):
    kind = make(f"absence(order={order!r}, elements=40, share=0.2)")
    (question,) = kind.questions(4000, 1, len)
    original, gone = question.given
    share = len(gone) / 40
    assert kind.mark(question, "\n".join(question.answers)) == 1
    assert kind.mark(question, "") == 0
    assert kind.mark(question, "\n".join(original)) == pytest.approx(2 * share / (1 + share))
    steps = {int(b) - int(a) for a, b in pairwise(original)}
    assert (len(steps) == 1) == (order != "random")


def test_of_a_diff_only_changed_lines_that_come_once_can_go():
    diff = ["diff --git a b", "--- a", "+++ b", "@@ 1", " same", "+new", "-old", "+twice", "+twice"]
    may = words.removable(diff, "diff")
    assert [line for line, can in zip(diff, may, strict=True) if can] == ["+new", "-old"]
    gone = words.gaps(may, 0.5, random.Random(0))
    copy = words.edited(diff, gone, domain="diff")
    assert set(diff) - set(copy) == {diff[n] for n in gone} | {"+twice"}


@pytest.mark.parametrize("edit", ["missing", "placeholder", "needle"])
def test_the_copy_is_what_the_question_says(edit):
    kind = make(f"absence(domain='lines', edit={edit!r}, elements=12, share=0.3)")
    (question,) = kind.questions(4000, 1, len)
    original, gone = question.given
    before, _, after = question.prompt.partition("My copy")
    assert all(line in before for line in original)
    for n, line in enumerate(original):
        assert (line in after) == (n not in gone or edit == "needle")
    assert after.count(words.PLACEHOLDER) == (len(gone) if edit == "placeholder" else 0)
    assert all((needle in after) == (edit == "needle") for needle in question.answers)
    assert kind.mark(question, "\n".join(question.answers)) == 1
    assert kind.mark(question, "nothing") == 0


def test_who_compares_the_parts_answers_perfectly_and_prompts_fit():
    def reader(prompt):
        assert 300 < len(prompt) <= 600 - 64
        first, _, second = prompt.partition("\n\nMy copy")
        kept = second.split("\n")
        return "\n".join(line for line in first.split("\n")[1:] if line not in kept)

    assert ask(reader, "absence(share=0.3)", length=600, samples=6).mean == 1
    assert ask(lambda prompt: "", "absence", length=600, samples=6).mean == 0
