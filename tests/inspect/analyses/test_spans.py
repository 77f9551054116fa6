"""Attention between marked spans against loops."""

import pytest
import torch
from tests.inspect.analyses.naive_spans import naive_span
from tests.inspect.analyses.test_rollout import maps

from regard.inspect.analyses.spans import span_attention, spans_of
from regard.laws.agreement import close


def test_by_hand() -> None:
    one = torch.tensor([[[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.1, 0.9]]]], dtype=torch.float64)
    got = span_attention([one], [(0, 2), (2, 3)])[0, 0, 0]
    close(got, torch.tensor([[0.75, 0.25], [0.1, 0.9]], dtype=torch.float64))
    last = span_attention([one], [(0, 2)], queries=[(-1, None)], per_key=True)
    close(last.flatten(), torch.tensor([0.05], dtype=torch.float64))


def test_equals_the_loops() -> None:
    """Across two sequences: 6 queries, 7 keys; spans may overlap."""
    given, queries, keys = maps(2, 2, 3, 6, 7), [(0, 2), (4, 6), (1, 5)], [(0, 7), (3, 5)]
    got = span_attention(given, keys, queries=queries)
    assert got.shape == (2, 2, 3, 3, 2)
    for layer in range(2):
        for b in range(2):
            for h in range(3):
                want = [[naive_span(given[layer][b, h], p, r) for r in keys] for p in queries]
                close(got[layer, b, h], torch.tensor(want, dtype=torch.float64))
    per_key = span_attention(given, keys, queries=queries, per_key=True)
    close(per_key, got / torch.tensor([7.0, 2.0], dtype=torch.float64))


def test_tells_who_reads_the_instruction() -> None:
    """The claim, in small: head 2 of layer 1 reads the marked instruction, all others the rest."""
    logits = torch.randn(2, 1, 4, 10, 10)
    logits[..., 4:] += 2
    logits[1, :, 2, :, 1:4] += 6
    focus = span_attention(list(logits.softmax(-1)), [(1, 4)], queries=[(-1, None)])[:, 0, :, 0, 0]
    assert focus.flatten().argmax() == 6
    assert focus[1, 2] > 0.8
    assert focus.flatten().sort().values[-2] < 0.6


def test_spans_of_a_mask() -> None:
    mask = torch.tensor([1, 1, 0, 0, 1, 0, 1]).bool()
    assert spans_of(mask) == [(0, 2), (4, 5), (6, 7)]
    assert spans_of(torch.zeros(3, dtype=torch.bool)) == []


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ([], r"keys is empty \(got \[\]\); expected one span at least"),
        ([(2, 2)], r"keys has a span that is empty or out of range \(got \(2, 2\)\); expected .*of 5"),
        ([(0, 6)], r"keys has a span that is empty or out of range \(got \(0, 6\)\); expected .*of 5"),
        ([(-6, None)], r"keys has a span that is empty or out of range \(got \(-6, None\)\); expected .*of 5"),
    ],
)
def test_what_is_wrong_is_named(keys: list, says: str) -> None:
    with pytest.raises(ValueError, match=f"span_attention: {says}"):
        span_attention(maps(1, 1, 1, 5, 5), keys, queries=[(0, 1)])
    with pytest.raises(TypeError, match=r"spans_of: mask has the wrong dtype \(got torch.int64"):
        spans_of(torch.ones(3, dtype=torch.long))
