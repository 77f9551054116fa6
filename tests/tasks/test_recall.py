"""The tasks of recall ask what they say, and the answers are there to be found."""

from pathlib import Path

import numpy as np
import pytest
import torch

from regard import tasks
from regard.models.mixer import parse
from regard.tasks import Size, TaskError
from regard.tasks._labelled import IGNORED
from regard.tasks.copying import ASK, BLANK, strings
from regard.tasks.mqar import recall
from regard.tasks.retrieval import chains

VECTORS = np.load(Path(__file__).parent.parent / "vectors" / "A145.npz")


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_recall_gives_the_numbers_of_the_authors_generator(case):
    def of(name):
        return VECTORS[f"{case}.{name}"]

    sizes = [int(of(f"arg.{name}")) for name in ("num_examples", "input_seq_len", "num_kv_pairs", "vocab_size")]
    inputs, labels = recall(*sizes, power=float(of("arg.power_a")), seed=int(of("arg.seed")))
    assert (inputs.numpy() == of("inputs_zero")).all()
    assert (labels.numpy() == of("labels")).all()


def test_recall_asks_every_key_once_for_its_value():
    inputs, labels = recall(50, 32, 5, 24, seed=3)
    for row, label in zip(inputs.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5
        asked = [n for n, y in enumerate(label) if y != IGNORED]
        assert sorted(row[n] for n in asked) == sorted(pairs)
        assert all(label[n] == pairs[row[n]] for n in asked)
        assert {row[n] for n in range(10, 32)} - set(pairs) <= {0}
        assert all(1 <= key < 12 <= value < 24 for key, value in pairs.items())


def test_recall_asks_near_the_pairs_first_unless_the_power_is_one():
    def mean_place(power):
        _, labels = recall(200, 64, 4, 32, power=power, seed=0)
        return (labels != IGNORED).nonzero()[:, 1].float().mean()

    assert mean_place(0.01) < mean_place(1.0) - 5
    assert mean_place(1.0) == pytest.approx(8 + 27, abs=1.5)


@pytest.mark.parametrize(("symbols", "scattered"), [(1, False), (4, False), (4, True), (6, True), (6, False)])
def test_copying_asks_for_the_symbols_in_their_order(symbols, scattered):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = strings(40, symbols, 6, 5 if symbols < 5 else 6, 9, generator, scattered=scattered)
    for row, label in zip(inputs.tolist(), labels.tolist(), strict=True):
        seen = [x for x in row[:6] if x != BLANK]
        assert len(seen) == symbols
        assert min(seen) > ASK
        assert set(row[6:]) == {ASK}
        assert label[6 : 6 + symbols] == seen
        assert set(label[:6] + label[6 + symbols :]) <= {IGNORED}
    places = (inputs[:, :6] != BLANK).float().mean(0)
    assert (places > 0).all() if scattered else (places == (torch.arange(6) < symbols)).all()


def test_chains_lead_from_every_name_to_its_end():
    inputs, labels, hops = chains(30, 3, 2, 12, torch.Generator().manual_seed(0))
    assert inputs.shape == (30, 18)
    for row, label, depth in zip(inputs.tolist(), labels.tolist(), hops.tolist(), strict=True):
        stands_for = {}
        for n in range(0, 12, 2):
            name, other = row[n : n + 2]
            assert name not in stands_for
            assert other in stands_for or other not in row[0:n:2], "a link stands behind those that it leads to"
            stands_for[name] = other
            assert (label[n], label[n + 1]) == (IGNORED, follow(stands_for, name)[0])
        assert sorted(row[12:]) == sorted(stands_for), "every name but the ends, once"
        assert [(label[n], depth[n]) for n in range(12, 18)] == [follow(stands_for, row[n]) for n in range(12, 18)]
        assert depth[:12] == [0] * 12


def follow(stands_for, name):
    hops = 0
    while name in stands_for:
        name, hops = stands_for[name], hops + 1
    return name, hops


def test_every_number_of_hops_is_asked_as_often():
    task = tasks.make("retrieval", {"hops": 3, "chains": 2, "vocab": 12})
    groups = {label: (labels != IGNORED).sum(1) for label, _, labels in task.questions(20, 0)}
    assert list(groups) == ["1", "2", "3"]
    assert all((count == 2).all() for count in groups.values())


@pytest.mark.parametrize("name", ["mqar", "copying", "selective_copying", "retrieval"])
def test_held_out_examples_are_none_of_the_first_batches(name):
    task = tasks.make(name)
    groups = [inputs for _, inputs, _ in task.questions(64, tasks.HELDOUT_SEED)]
    assert all(inputs.shape == (64, task.tokens) for inputs in groups)
    held = {tuple(row) for row in groups[-1].tolist()}  # of few symbols there are too few examples
    assert len(held) == 64
    for seed in (0, 1):
        for (inputs, _), _ in zip(task.batches(64, seed), range(4)):
            assert inputs.shape == (64, task.tokens)
            assert not held & {tuple(row) for row in inputs.tolist()}


@pytest.mark.parametrize("name", ["mqar", "copying"])
def test_each_batch_has_one_load_in_its_turn(name):
    task = tasks.make(name)
    loads = task.pairs if name == "mqar" else task.symbols
    for n, (_, labels) in zip(range(6), task.batches(4, 0)):
        assert ((labels != IGNORED).sum(1) == loads[n % 4]).all()


class Knows(torch.nn.Module):
    """Looks up the first value behind each key, if the key is at most `limit`."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, inputs):
        found = torch.zeros(*inputs.shape, 16)
        for b, row in enumerate(inputs.tolist()):
            first = {}
            for key, value in zip(row[0::2], row[1::2], strict=True):
                first.setdefault(key, value)
            for n, key in enumerate(row):
                found[b, n, first.get(key, 0) if key <= self.limit else 0] = 1
        return found


def test_accuracy_counts_labelled_positions_alone():
    task = tasks.make("mqar", {"length": 16, "pairs": (2, 4), "vocab": 16, "heldout": 200})
    cpu = torch.device("cpu")
    assert task.measure(Knows(7), 64, cpu) == ({"mean": 1.0, "2": 1.0, "4": 1.0}, [])
    assert task.measure(Knows(0), 64, cpu) == ({"mean": 0.0, "2": 0.0, "4": 0.0}, [])
    found, _ = task.measure(Knows(5), 64, cpu)
    assert found["mean"] == (found["2"] + found["4"]) / 2 == pytest.approx(5 / 7, abs=0.05)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "mqar",
            {"pairs": (1, 20)},
            r"task mqar: length has no room for 20 pairs \(got 64\); expected an even int >= 80",
        ),
        ("mqar", {"pairs": (1,), "length": 7}, "even"),
        ("mqar", {"pairs": (8,), "vocab": 16}, r"vocab is too small for 8 pairs \(got 16\); expected an int >= 18"),
        ("mqar", {"pairs": ()}, r"pairs has the wrong type \(got \(\)\); expected an int >= 1"),
        ("mqar", {"pairs": (0, 1)}, r"pairs is too small \(got 0\); expected an int >= 1"),
        ("mqar", {"vocab": 2.5}, r"vocab has the wrong type \(got 2.5\); expected an int >= 4"),
        ("retrieval", {"hops": 9, "chains": 4}, r"vocab is too small for all names \(got 32\); expected an int >= 41"),
        ("copying", {"symbols": "abc"}, r"task copying: symbols has the wrong type \(got 'abc'\)"),
        (
            "selective_copying",
            {"symbols": (40,)},
            r"length is too small for its symbols \(got 32\); expected an int >= 40",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, said):
    with pytest.raises(TaskError, match=said):
        tasks.make(name, {**({"length": 64} if name == "mqar" else {}), **options})


def trained(task, mechanism, steps, size, lr=1e-2):
    torch.manual_seed(0)
    model = task.model(parse(mechanism), size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _, batch in zip(range(steps), task.batches(32, 0)):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return task.measure(model.eval(), 64, torch.device("cpu"))[0]


@pytest.mark.slow
def test_attention_recalls_where_a_window_cannot():
    """Zoology's finding in small: what may look at every token recalls, what may not guesses."""
    task = tasks.make("mqar", {"length": 32, "pairs": (2, 6), "vocab": 32, "heldout": 128})
    full, near = (trained(task, name, 250, Size(32, 2, 1, 32)) for name in ("softmax", "window(window=3)"))
    assert full["6"] > 0.95
    assert near["6"] < 0.4
    assert near["2"] > near["6"]


@pytest.mark.slow
def test_two_hops_take_more_than_one_layer():
    """The retrieval paper's claim in small: shallow questions come first, and one layer never gets beyond them."""
    task = tasks.make("retrieval", {"hops": 2, "chains": 3, "vocab": 14, "heldout": 256})
    one, two = (trained(task, "softmax", 500, Size(32, depth, 2, 64)) for depth in (1, 2))
    assert one["1"] > 2 * one["2"]
    assert two["2"] > one["2"] + 0.2
