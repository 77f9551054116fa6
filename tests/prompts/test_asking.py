"""Questions in words say what they ask, fit their length, and a model is asked greedily in padded batches."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import regard
from regard.prompts._text import hidden, letters, most, words
from regard.prompts.asking import Prompts, Question, Row, Scores, ask, make, names, score

HOME = Path(__file__).resolve().parents[2] / "models" / "small"
FORMS = [
    "needle",
    "needle(keys=3, values=2)",
    "needle(queries=2, haystack='needles')",
    "needle(form='lines')",
    "needle(form='lines', values=2)",
    "variables(chains=2, hops=2)",
    "common_words(asked=3)",
    "frequent_words",
    "frequent_words(form='lines')",
    "absence",
    "absence(domain='diff', share=0.3)",
]


def count(text):
    return len(text.split()) + text.count("\n")


@pytest.mark.parametrize("task", FORMS)
def test_the_seed_alone_decides_the_questions_and_they_fit(task):
    kind = make(task)
    for length in (500, 900):
        first, again, other = (kind.questions(length, 4, len, seed) for seed in (0, 0, 1))
        assert first == again
        assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True))
        for question in first:
            assert 0.7 * (length - kind.room) < len(question.prompt) <= length - kind.room
            assert kind.mark(question, "\n".join(question.answers)) == 1
            assert kind.mark(question, "...") == 0


def test_every_kind_has_a_name_and_a_gist():
    assert names() == ["absence", "common_words", "frequent_words", "needle", "variables"]
    assert all(0 < len(make(name).gist) < 90 for name in names())


def test_needles_stand_at_their_depth_and_only_the_asked_keys_count():
    kind = make("needle(keys=3, values=2)")
    questions = kind.questions(1500, 5, len)
    for n, question in enumerate(questions):
        told = re.findall(r"The secret number of (\w+) is (\d{4})\.", question.prompt)
        key = question.prompt.split()[-2]
        assert sorted(value for name, value in told if name == key) == sorted(question.answers)
        assert len(told) == 6
        text = question.prompt.split("\n")[1]
        where = text.index(f"is {question.answers[0]}.") / len(text)
        assert where == pytest.approx((n + 0.5) / 5, abs=0.1)


def test_lines_give_every_key_one_value():
    (question,) = make("needle(form='lines')").questions(300, 1, len)
    *lines, last = question.prompt.split("\n")
    pairs = [line.split("=") for line in lines]
    assert len({key for key, _ in pairs}) == len(pairs) > 40
    assert dict(pairs)[last.rstrip("=")] == question.answers[0]
    assert make("needle(form='lines')").mark(question, f"??{question.answers[0]}") == 0, "only what is said at once"


def test_variables_lead_to_the_value():
    for question in make("variables(chains=3, hops=3)").questions(1500, 4, len):
        value = re.search(r"value (\d{5}), at once", question.prompt)[1]
        known = {}
        for name, given in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", question.prompt):
            known[name] = known.get(given, given)
        assert len(known) == 12
        assert {name for name, given in known.items() if given == value} == set(question.answers)


def test_common_and_frequent_words_are_the_commonest():
    (question,) = make("common_words(asked=3, often=5, seldom=2)").questions(1500, 1, len)
    often = Counter(re.findall(r"\d+\. (\w+)", question.prompt))
    assert {often[word] for word in question.answers} == {5}
    assert {number for word, number in often.items() if word not in question.answers} == {2}
    (question,) = make("frequent_words(power=1.5)").questions(3000, 1, len)
    coded = question.prompt.split("\n")[0].partition("dots. ")[2].split()
    assert tuple(word for word, _ in Counter(coded).most_common(4)) == ("...", *question.answers)
    (question,) = make("frequent_words(form='lines')").questions(300, 1, len)
    values = Counter(line[3:] for line in question.prompt.split("\n")[:-1])
    assert values.most_common(1)[0][0] == question.answers[0]


def test_a_mark_is_the_share_of_answers_that_were_said():
    kind = make("needle(values=2)")
    assert kind.mark(Question("", ("Ab", "Cd")), "so ab it is") == 0.5


def test_scores_by_length_and_depth():
    rows = [Row(8, 0.05, 1.0, "", ()), Row(8, 0.95, 0.0, "", ()), Row(16, 1.0, 1.0, "", ()), Row(16, None, 0.0, "", ())]
    scores = Scores("needle", tuple(rows))
    assert scores.mean == 0.5
    assert scores.by_length() == {8: 0.5, 16: 0.5}
    assert scores.by_depth() == {"0-20%": 1.0, "80-100%": 0.5}
    assert str(scores) == "needle 0.50; by length 8: 0.50, 16: 0.50; by depth 0-20%: 1.00, 80-100%: 0.50"


def test_any_function_can_be_asked():
    def reader(prompt):
        key = prompt.split()[-2]
        return re.search(rf"number of {key} is (\d+)", prompt)[1]

    scores = ask(reader, "needle(keys=4)", length=(400, 800), samples=5)
    assert scores.by_length() == {400: 1.0, 800: 1.0}
    assert sum(scores.by_depth().values()) == len(scores.by_depth())


def test_as_much_text_as_fits_and_no_more():
    assert most("x", lambda n: "a" * n, 57, len) == 57
    with pytest.raises(ValueError, match=r"needle: length has no room for the question \(got 8\); expected \d+ tokens"):
        make("needle").questions(20, 1, len)


def test_needles_in_hay():
    text, stand = hidden(["a", "b", "c", "d"], ["X", "Y"], [0.5, 1.0])
    assert text == ["a", "b", "X", "c", "d", "Y"]
    assert stand == [0.4, 1.0]


def test_words_differ():
    import random

    assert len(set(words(300, random.Random(0), 2))) == 300


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match=r"prompts: .* is unknown|prompts is unknown"):
        make("needel")
    with pytest.raises(ValueError, match=r"'needle' has no such option \(got 'key'\); .*did you mean 'keys'\?"):
        make("needle(key=3)")
    with pytest.raises(ValueError, match="queries are too many for lines"):
        make("needle(form='lines', queries=2)")
    with pytest.raises(ValueError, match="at most 3600 for lines"):
        make("needle(form='lines')").questions(5000, 1, len)


# --- a transformers model


@pytest.fixture(scope="module")
def small():
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(HOME, use_safetensors=True).eval()
    return model, transformers.AutoTokenizer.from_pretrained(HOME)


def test_the_small_model_finds_needles_in_lines(small):
    scores = score(*small, "needle(form='lines')", length=(64, 240), samples=20)
    assert all(mark > 0.8 for mark in scores.by_length().values()), scores
    assert list(scores.by_depth()) == ["0-20%", "20-40%", "40-60%", "60-80%", "80-100%"]


def test_the_small_model_names_the_commonest_value(small):
    assert score(*small, "frequent_words(form='lines')", length=200, samples=20).mean > 0.8, "a third is chance"


def test_a_window_loses_what_stands_far_back_and_the_model_is_itself_again(small):
    model, tokenizer = small

    def found():
        return score(model, tokenizer, "needle(form='lines')", length=200, samples=10)

    whole = found()
    with regard.swap(model, regard.masks.window(48)):
        near = found()
    assert near.by_depth(2)["0-50%"] < 0.3 < 0.8 < whole.by_depth(2)["0-50%"]
    assert found() == whole


def test_batches_are_padded_on_the_left_and_change_nothing(small):
    """Prompts of several lengths: each alone says what it says in a batch."""

    class Growing(Prompts):
        name, gist, room = "growing", "lines of several lengths", 2

        def question(self, length, depth, tokens, draw):
            n = int(depth * length)
            lines = [f"{letters(2, draw)}={letters(2, draw)}" for _ in range(n + 1)]
            return Question("\n".join([*lines, f"{lines[0][:3]}"]), (lines[0][3:],), depth)

    alone, together = (score(*small, Growing(), length=12, samples=6, batch=batch) for batch in (1, 6))
    assert alone == together
    assert alone.mean > 0.8


def test_a_cache_is_made_for_each_batch_and_options_reach_generate(small):
    from transformers import DynamicCache

    model, tokenizer = small
    made = []

    def cache():
        made.append(DynamicCache(config=model.config))
        return made[-1]

    scores = score(model, tokenizer, "needle(form='lines')", length=64, samples=6, batch=4, cache=cache)
    assert len(made) == 2
    assert made[0].get_seq_length() > 50
    assert scores == score(model, tokenizer, "needle(form='lines')", length=64, samples=6)
    short = score(model, tokenizer, "needle(form='lines')", length=64, samples=2, max_new_tokens=1)
    assert all(len(row.said) == 1 for row in short.rows)


def test_a_model_that_cannot_generate_is_refused(small):
    with pytest.raises(ValueError, match=r"score: model cannot generate \(got Linear\)"):
        score(torch.nn.Linear(2, 2), small[1], "needle", length=400)
