"""The attention probes against loops, and on sentences whose heads are known."""

import pytest
import torch
import torch.nn.functional as F
from tests.inspect.analyses.naive_attention_probe import naive_head_accuracy, naive_loss, naive_probe
from tests.inspect.analyses.test_rollout import maps
from torch import Tensor

from regard.inspect.analyses.attention_probe import (
    NO_WORD,
    AttentionProbe,
    ProbeBatch,
    fit_probe,
    head_accuracy,
    probe_accuracy,
)
from regard.laws.agreement import close

L, H, T, E = 2, 3, 6, 4
LENGTHS = [6, 4]


def valid() -> Tensor:
    return torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def labels() -> Tensor:
    """Words stand at 1 .. n - 2."""
    out = torch.full((2, T), NO_WORD)
    out[0, 1:5] = torch.tensor([1 + 2, 0, 1 + 4, 1 + 1])
    out[1, 1:3] = torch.tensor([0, 1 + 1])
    return out


def probe(**options: int) -> AttentionProbe:
    torch.manual_seed(0)
    made = AttentionProbe(L, H, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p))
    return made


@pytest.mark.parametrize("words", [False, True])
def test_equals_the_loops(words: bool) -> None:
    attention = maps(L, 2, H, T, T)
    vectors = torch.randn(2, T, E, dtype=torch.float64) if words else None
    made = probe(word_dim=E) if words else probe()
    got = made(attention, words=vectors, valid=valid())
    tables, wanted = [], []
    for b, n in enumerate(LENGTHS):
        if vectors is None:
            weight = made.weight
        else:
            own = vectors[b, 1 : n - 1]
            joined = torch.cat([own[:, None].expand(-1, n - 2, -1), own[None].expand(n - 2, -1, -1)], -1)
            joined = torch.cat([torch.zeros(n - 2, 1, 2 * E, dtype=torch.float64), joined], 1)
            weight = made.words(joined)
        every = torch.cat([layer[b] for layer in attention])
        table = naive_probe(every.detach(), weight.detach(), *made.root.tolist(), n)
        close(got[b, 1 : n - 1, [0, *range(2, n)]].detach(), table)
        assert got[b, :, [1, *range(n, T + 1)]].isneginf().all(), "neither delimiters nor padding are candidates"
        tables.append(table)
        wanted.append([int(x) for x in labels()[b] if x != NO_WORD])
        wanted[-1] = [x - 1 if x else 0 for x in wanted[-1]]  # words are counted from 1 there
    loss = F.cross_entropy(got.flatten(0, 1), labels().flatten(), ignore_index=NO_WORD, reduction="sum")
    assert loss.item() == pytest.approx(naive_loss(tables, wanted), rel=1e-10)


@pytest.mark.parametrize("direction", ["dependent", "head"])
def test_single_heads_equal_the_loops(direction: str) -> None:
    attention = maps(L, 2, H, T, T, seed=3)
    batch = ProbeBatch(attention, labels(), valid=valid())
    got = head_accuracy(batch, direction=direction)  # type: ignore[arg-type]
    for layer in range(L):
        for h in range(H):
            hits = 0.0
            for b, n in enumerate(LENGTHS):
                want = [x - 1 if x else -1 for x in labels()[b, 1 : n - 1].tolist()]
                hits += (n - 2) * naive_head_accuracy(attention[layer][b, h], want, n, direction == "head")
            assert got[layer, h].item() == pytest.approx(hits / 6)
    assert got.unique().numel() > 1


def sentences(count: int, seed: int, *, kinds: bool = False) -> ProbeBatch:
    """Head (0, 1) attends to the word's syntactic head, head (1, 2) the other way round; the rest is noise.

    With kinds: words of kind 0 are right in head (0, 1) and random in (1, 0), words of kind 1 the reverse.
    """
    g = torch.Generator().manual_seed(seed)
    n = 8
    parent = torch.randint(1, n - 1, (count, n), generator=g)
    parent = torch.where(parent == torch.arange(n), parent % (n - 2) + 1, parent)
    kind = torch.randint(2, (count, n), generator=g)
    wrong = torch.randint(1, n - 1, (count, n), generator=g)
    logits = torch.randn(2, count, 3, n, n, generator=g)
    to_parent = 4 * F.one_hot(parent, n)
    if kinds:
        to_wrong = 4 * F.one_hot(wrong, n)
        logits[0, :, 1] += torch.where(kind[..., None] == 0, to_parent, to_wrong)
        logits[1, :, 0] += torch.where(kind[..., None] == 1, to_parent, to_wrong)
    else:
        logits[0, :, 1] += to_parent
    truth = 1 + parent
    truth[:, [0, -1]] = NO_WORD
    return ProbeBatch(list(logits.softmax(-1)), truth, words=F.one_hot(kind, 2).float() if kinds else None)


def test_finds_the_head_that_knows() -> None:
    """The claim, in small: one head knows the syntax, and the probe learns to listen to it."""
    train, test = sentences(64, 0), sentences(64, 1)
    made = AttentionProbe(2, 3)
    before = probe_accuracy(made, test)
    losses = fit_probe(made, [train], epochs=60, lr=0.1)
    assert losses[-1] < losses[0] / 3
    assert probe_accuracy(made, test) > 0.95 > 0.6 > before
    assert made.weight.argmax() == 1
    alone = head_accuracy(test)
    assert alone.flatten().argmax() == 1
    assert alone[0, 1] > 0.95
    turned = [layer.mT for layer in test.attention]
    assert head_accuracy(test._replace(attention=turned), direction="head")[0, 1] == alone[0, 1]


def test_words_tell_which_head_to_trust() -> None:
    train, test = sentences(128, 0, kinds=True), sentences(64, 1, kinds=True)
    plain, with_words = AttentionProbe(2, 3), AttentionProbe(2, 3, word_dim=2)
    bare = [batch._replace(words=None) for batch in (train, test)]
    fit_probe(plain, [bare[0]], epochs=60, lr=0.1)
    fit_probe(with_words, [train], epochs=60, lr=0.1)
    assert probe_accuracy(with_words, test) > 0.95
    assert probe_accuracy(plain, bare[1]) < 0.85


def test_the_root_is_read_from_the_delimiters() -> None:
    """Words that attend to [CLS] have the root as their head."""
    g = torch.Generator().manual_seed(0)
    root = torch.rand(64, 6, generator=g) < 0.5
    logits = torch.randn(1, 64, 2, 6, 6, generator=g)
    target = torch.where(root, 0, torch.randint(1, 5, (64, 6), generator=g))
    logits[0, :, 0] += 5 * F.one_hot(target, 6)
    truth = torch.where(root, 0, 1 + target)
    truth[:, [0, -1]] = NO_WORD
    batch = ProbeBatch(list(logits.softmax(-1)), truth)
    made = AttentionProbe(1, 2)
    fit_probe(made, [batch], epochs=80, lr=0.1)
    assert probe_accuracy(made, batch) > 0.9


def test_what_is_wrong_is_named() -> None:
    attention = maps(L, 2, H, T, T)
    with pytest.raises(ValueError, match=r"AttentionProbe: num_layers is too small \(got 0\); expected an int >= 1"):
        AttentionProbe(0, 3)
    with pytest.raises(
        ValueError, match=r"AttentionProbe: attention has another number of heads .*\(got 3\); expected 6"
    ):
        probe()(attention[:1])
    with pytest.raises(TypeError, match=r"AttentionProbe: words .*got NoneType\); .*\(B = 2, T = 6, E = 4\)"):
        probe(word_dim=E)(attention)
    with pytest.raises(
        ValueError, match=r"AttentionProbe: words .*got \(2, 6, 3\)\); expected \(B = 2, T = 6, E = 4\)"
    ):
        probe(word_dim=E)(attention, words=torch.ones(2, T, E - 1))
    with pytest.raises(ValueError, match=r"AttentionProbe: words are not taken .*\(got \(2, 6, 4\)\); expected none"):
        probe()(attention, words=torch.ones(2, T, E))
    with pytest.raises(
        ValueError, match=r"valid leaves a sentence no word \(got 0 between its ends\); expected one word at least"
    ):
        probe()(attention, valid=torch.arange(T).expand(2, T) < 2)
    with pytest.raises(ValueError, match=r"fit_probe: epochs is too small \(got 0\)"):
        fit_probe(probe(), [], epochs=0)
    with pytest.raises(ValueError, match=r"head_accuracy: direction is unknown .*'both'.*one of 'dependent', 'head'"):
        head_accuracy(ProbeBatch(attention, labels()), direction="both")  # type: ignore[arg-type]
