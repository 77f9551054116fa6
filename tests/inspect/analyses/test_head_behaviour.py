"""Head statistics against loops; heads of known kinds are told apart."""

import math

import pytest
import torch
from sklearn.manifold import smacof
from tests.inspect.analyses.naive_head_behaviour import naive_distances, naive_entropy, naive_mass, naive_offset
from tests.inspect.analyses.test_rollout import maps
from torch import Tensor

from regard.inspect.analyses.head_behaviour import (
    attention_at_offset,
    attention_entropy,
    attention_mass,
    embed_heads,
    head_behaviour,
    head_distances,
)
from regard.laws.agreement import close

L, B, H, T = 2, 3, 2, 5
VALID = torch.tensor([[True] * 5, [True, True, True, False, False], [False, True, True, True, True]])


@pytest.fixture
def attention() -> list[Tensor]:
    """Padding gets no weight; queries of padding attend anyhow."""
    logits = torch.stack(maps(L, B, H, T, T)).log()
    return list(logits.masked_fill(~VALID[:, None, None], -torch.inf).softmax(-1))


def each(naive, given: list[Tensor], **options) -> Tensor:  # type: ignore[no-untyped-def]
    """(L, H): the mean over sequences of what loops say about one head and one sequence."""
    out = torch.zeros(L, H, dtype=torch.float64)
    for layer in range(L):
        for h in range(H):
            for b in range(B):
                own = {k: v[b].tolist() if isinstance(v, Tensor) else v for k, v in options.items()}
                out[layer, h] += naive(given[layer][b, h], **own) / B
    return out


def test_by_hand() -> None:
    one = torch.tensor([[[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]]]], dtype=torch.float64)
    close(attention_at_offset([one], 1), torch.tensor([[1 / 3]], dtype=torch.float64))
    close(attention_at_offset([one], -1), torch.tensor([[1.2 / 3]], dtype=torch.float64))
    close(attention_at_offset([one], 0), torch.tensor([[0.8 / 3]], dtype=torch.float64))
    middle = torch.tensor([[False, True, False]])
    close(attention_mass([one], middle), torch.tensor([[0.6]], dtype=torch.float64))
    close(attention_mass([one], middle, queries=~middle), torch.tensor([[0.75]], dtype=torch.float64))
    even = torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64)
    close(attention_entropy([even]), torch.tensor([[math.log(4)]], dtype=torch.float64))
    sharp = torch.eye(2, dtype=torch.float64)
    pair = torch.stack([sharp, sharp.flip(0)])[None]
    assert head_distances([pair])[0, 1].item() == pytest.approx(2 * math.log(2), rel=0.02)


def test_equals_the_loops(attention: list[Tensor]) -> None:
    keys = torch.rand(B, T) > 0.5
    queries = torch.ones(B, T, dtype=torch.bool)
    queries[:, 2] = False
    for given in (VALID, torch.ones_like(VALID)):
        got = attention_mass(attention, keys, queries=queries, valid=given)
        close(got, each(naive_mass, attention, keys=keys, queries=queries, valid=given))
        close(attention_entropy(attention, valid=given), each(naive_entropy, attention, valid=given))
        for offset in (-4, -1, 0, 1, 3):
            got = attention_at_offset(attention, offset, valid=given)
            close(got, each(naive_offset, attention, offset=offset, valid=given))
        documents = [torch.cat([layer[b] for layer in attention]) for b in range(B)]
        close(head_distances(attention, valid=given), naive_distances(documents, given.tolist()))


def test_large_tables_are_summed_in_parts(attention: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = head_distances(attention)
    monkeypatch.setattr("regard.inspect.analyses.head_behaviour.ELEMENTS", 100)
    close(head_distances(attention), whole)


def test_sequences_without_a_marked_query_are_left_out(attention: list[Tensor]) -> None:
    keys, queries = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    queries[1, 1] = True
    close(attention_mass(attention, keys, queries=queries), torch.ones(L, H, dtype=torch.float64))
    with pytest.raises(ValueError, match="attention_mass: queries marks no token"):
        attention_mass(attention, keys, queries=torch.zeros_like(queries))


def kinds() -> tuple[list[Tensor], Tensor, list[str]]:
    """Two layers of five heads of known kinds, on 40 tokens with delimiters at both ends."""
    n = 40
    ends = torch.zeros(2, n, dtype=torch.bool)
    ends[:, [0, -1]] = True
    made = {
        "next": torch.eye(n).roll(1, 1),
        "previous": torch.eye(n).roll(-1, 1),
        "broad": torch.ones(n, n),
        "delimiter": ends[0].float().expand(n, n),
        "": torch.eye(n),
    }
    torch.manual_seed(0)
    logits = torch.stack([(made[name] + 0.01).log() for name in made]).double()
    return [(logits + 0.3 * torch.randn(2, 5, n, n)).softmax(-1) for _ in range(2)], ends, list(made)


def test_heads_of_known_kinds_are_told_apart() -> None:
    """The claim, in small; and heads of one kind are nearer to each other than to any other."""
    attention, ends, names = kinds()
    found = head_behaviour(attention, delimiters=ends)
    assert found.names() == [names, names]
    assert found.itself[0].argmax() == 4
    distances = head_distances(attention)
    assert distances.fill_diagonal_(torch.inf).argmin(1).tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_embedding_recovers_points() -> None:
    points = torch.randn(7, 2, dtype=torch.float64)
    distances = torch.cdist(points, points)
    close(torch.cdist(*[embed_heads(distances)] * 2), distances)
    close(torch.cdist(*[embed_heads(distances, dims=1)] * 2).diagonal(), torch.zeros(7, dtype=torch.float64))


def test_embedding_is_no_worse_than_scikit_learns() -> None:
    attention, _, _ = kinds()
    distances = head_distances(attention)
    start = torch.randn(10, 2, dtype=torch.float64).numpy()
    found, _ = smacof(distances.numpy(), init=start, n_init=1, max_iter=300, normalized_stress=False)
    theirs = torch.from_numpy(found)

    def stress(points: Tensor) -> float:
        return float((torch.cdist(points, points) - distances).square().sum())

    assert stress(embed_heads(distances)) <= 1.02 * stress(theirs)


def test_what_is_wrong_is_named(attention: list[Tensor]) -> None:
    with pytest.raises(
        ValueError, match=r"attention_at_offset: offset is too large \(got 5\); expected an int from -4 to 4"
    ):
        attention_at_offset(attention, 5)
    with pytest.raises(TypeError, match=r"head_behaviour: valid .*dtype \(got torch.float32\); expected torch.bool"):
        head_behaviour(attention, valid=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"head_behaviour: delimiters .*\(got \(5,\)\); expected \(B = 3, T = 5\)"):
        head_behaviour(attention, delimiters=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attention_mass: keys .*\(got \(3, 4\)\); expected \(B = 3, T = 5\)"):
        attention_mass(attention, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"head_distances: attention\[1\] .*\(got \(3, 1, 5, 5\)\); expected \(B = 3, H = 2,"
    ):
        head_distances([attention[0], attention[1][:, :1]])
    with pytest.raises(ValueError, match=r"embed_heads: distances is not symmetric \(got entries 1 apart\)"):
        embed_heads(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    with pytest.raises(ValueError, match=r"embed_heads: dims is too large \(got 3\); expected an int from 1 to 2"):
        embed_heads(torch.zeros(2, 2), dims=3)
