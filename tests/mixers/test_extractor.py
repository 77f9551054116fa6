"""Extractors against loops over tokens, whose author read neither code nor test, and what holds for any reading.

The paper's formulas could not be read, and there are no numbers of its author's.
"""

import pytest
import torch
from torch import Tensor, nn

import regard
from laws.measured import flops
from mixers import naive_extractor as naive
from regard import masks
from regard.laws.agreement import close, same
from regard.mixers.extractor import Extractor, extract
from vision.shared import filled, gradients, leaves, normal

KEEP = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
LEVELS = ["she", "he", "we", "me"]


def made(**options) -> Extractor:
    options = {"max_length": 7, **options}
    return filled(regard.create("extractor", dim=4, num_heads=1, causal=True, **options))


def parts(layer: Extractor) -> dict[str, object]:
    found: dict[str, object] = {"level": layer.level, "index": layer.index, "bias": layer.bias}
    for name, part in (("v", layer.v_proj), ("a", layer.adjustment), ("o", layer.o_proj)):
        if isinstance(part, nn.Linear):
            found |= {f"w{name}": part.weight, f"b{name}": part.bias}
    return found


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "padded"])
@pytest.mark.parametrize("index", ["offset", "pair"])
@pytest.mark.parametrize("level", LEVELS)
def test_equals_the_loops(level: str, index: str, keep: Tensor | None) -> None:
    for options in ({}, {"adjust": False, "project": True}):
        layer = made(level=level, index=index, **options)
        (x,) = leaves(normal(1, 2, 5, 4))
        want = naive.extractor(x, layer.weights, keep=keep, **parts(layer))
        got = layer(x, mask=keep)
        close(got, want)
        inputs = [x, *layer.parameters()]
        for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("index", ["offset", "pair"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rows_from_any_token_on(rank: int, index: str) -> None:
    z, weights = normal(1, 2, 5, 3), normal(2, *(6,) * (1 if index == "offset" else 2), *(3,) * rank)
    whole = naive.extract(z, weights, index)
    for first in range(6):
        close(extract(z, weights, index=index, first=first), whole[:, first:])


@pytest.mark.parametrize("level", LEVELS)
def test_weights_know_no_contents(level: str) -> None:
    """Without the adjustment the layer is linear with the same weights for all inputs; with it, it isn't."""
    layer, x, y = made(level=level, adjust=False), normal(1, 2, 6, 4), normal(2, 2, 6, 4)
    nothing = layer(torch.zeros_like(x))
    close(layer(2 * x - y) - nothing, 2 * (layer(x) - nothing) - (layer(y) - nothing))
    assert (layer(x) - nothing).abs().max() > 0.1
    if level != "me":
        layer = made(level=level)
        assert (layer(2 * x) - 2 * layer(x)).abs().max() > 0.1


def test_learns_what_the_last_two_tokens_decide() -> None:
    """The product of two signs: no sum of the two tells it, and the adjustment makes products."""
    torch.manual_seed(0)
    layer, read, embed = Extractor(6, max_length=10), nn.Linear(6, 1), nn.Embedding(2, 6)
    named = torch.randint(2, (512, 10))
    wanted = (named[:, 1:] ^ named[:, :-1]).float()
    optimizer = torch.optim.Adam([*layer.parameters(), *read.parameters(), *embed.parameters()], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(read(layer(embed(named)))[:, 1:, 0], wanted)
        loss.backward()
        optimizer.step()
    assert loss < 0.1, float(loss)


def test_what_the_levels_cost() -> None:
    """Multiplications of a token at full length: the first is dearer than attention, the others cheaper."""
    T, M = 16, 8
    found = {}
    for level in LEVELS:
        layer = Extractor(M, max_length=T, level=level).double()
        found[level] = flops(lambda layer=layer: layer(normal(1, 1, T, M))) / 2 / T
    for level in ("he", "we", "me"):
        assert found[level] == naive.multiplications(level, T, M)
    assert found["she"] == naive.multiplications("she", T, M) + M * M, "and the adjustment"
    assert found["she"] > naive.multiplications("attention", T, M) > found["he"] >= found["we"] > found["me"]


@pytest.mark.parametrize("index", ["offset", "pair"])
@pytest.mark.parametrize("level", LEVELS)
def test_streams(level: str, index: str) -> None:
    layer, x = made(level=level, index=index), normal(1, 2, 5, 4)
    for mask in (None, KEEP):
        state, outs = layer.init_state(2, 7), []
        for at in (slice(0, 1), slice(1, 1), slice(1, 4), slice(4, 5)):
            y, state = layer.step(x[:, at], state, mask=None if mask is None else mask[:, at])
            outs.append(y)
        got, want = torch.cat(outs, 1), layer(x, mask=mask)
        close(got if mask is None else got[KEEP], want if mask is None else want[KEEP])
        assert state.z.shape == (2, 5, 4)


def test_hidden_tokens() -> None:
    """By offset, padding may stand on either side; whatever it holds."""
    layer, x = made(), normal(1, 2, 5, 4)
    for kept in (torch.arange(5) < 3, torch.arange(5) > 1):
        mask = kept.expand(2, 5)
        hurt = x.masked_fill(~mask[..., None], torch.nan)
        close(layer(hurt, mask=masks.padding(mask))[:, kept], layer(x[:, kept]))
        found = [gradients(layer(z, mask=mask)[:, kept], list(layer.parameters())) for z in (x, hurt)]
        for a, b in zip(*found, strict=True):
            same(a, b)


@pytest.mark.parametrize("index", ["offset", "pair"])
def test_no_token_sees_a_later_one(index: str) -> None:
    for level in LEVELS:
        layer = made(level=level, index=index)
        seen = torch.autograd.functional.jacobian(lambda x, f=layer: f(x).sum((0, 2)), normal(1, 1, 6, 4))
        same(seen[:, 0].ne(0).any(-1), torch.ones(6, 6, dtype=torch.bool).tril())


def test_starts_as_itself() -> None:
    torch.manual_seed(0)
    x = normal(1, 2, 9, 4).float()
    for level in ("she", "me"):
        for index in ("offset", "pair"):
            layer = Extractor(4, max_length=5000 if index == "offset" else 300, level=level, index=index, adjust=False)
            assert (layer(x) - x).abs().max() < 0.1
    weights = Extractor(4, max_length=1000).weights
    assert (weights[0] == 1).all()
    assert abs(weights[1:].std() * 1000 - 1) < 0.1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        regard.create("extractor", dim=8, num_heads=2, causal=False)
    with pytest.raises(ValueError, match=r"level is unknown \(got 'xe'\); expected one of 'she', 'he'"):
        Extractor(4, level="xe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"index is unknown \(got 'place'\)"):
        Extractor(4, index="place")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_length is too small \(got 0\)"):
        Extractor(4, max_length=0)
    layer = made()
    with pytest.raises(ValueError, match=r"x is too long \(got 8 tokens\); expected at most max_length = 7"):
        layer(normal(1, 1, 8, 4))
    with pytest.raises(ValueError, match=r"capacity is too large \(got 8\)"):
        layer.init_state(1, 8)
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the ExtractorState"):
        layer.step(normal(1, 1, 1, 4), None)
    with pytest.raises(ValueError, match=r"x has another batch than the state \(got 1\); expected 2"):
        layer.step(normal(1, 1, 1, 4), layer.init_state(2, 4))
    z = normal(1, 2, 5, 3)
    with pytest.raises(
        ValueError, match=r"weights have the wrong shape \(got \(6, 2\)\); expected \(N\), and after that"
    ):
        extract(z, normal(2, 6, 2))
    with pytest.raises(ValueError, match=r"z is too long \(got 5 tokens\); expected at most 4"):
        extract(z, normal(2, 4))
    with pytest.raises(ValueError, match=r"index is unknown"):
        extract(z, normal(2, 6), index="both")  # type: ignore[arg-type]
