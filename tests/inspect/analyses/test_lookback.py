"""The lookback ratio against loops and the authors' numbers (B133); a classifier on heads of known kinds."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.inspect.analyses.naive_lookback import naive_lookback
from tests.inspect.analyses.test_rollout import maps
from torch import Tensor

from regard.inspect.analyses.lookback import (
    LookbackLens,
    fit_lookback_lens,
    lookback_ratio,
    span_features,
    window_features,
)
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[2] / "vectors" / "B133.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}.")}


def test_by_hand() -> None:
    """Two tokens of context, one of marker: even rows give 1/2, and all weight on the context 1."""
    even = torch.ones(5, 5, dtype=torch.float64).tril()
    even = even / even.sum(-1, keepdim=True)
    context_only = torch.zeros(5, 5, dtype=torch.float64)
    context_only[:, 1] = 1
    got = lookback_ratio([torch.stack([even, context_only])[None]], prompt=3, context=2)
    close(got[0, 0], torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.0, 1.0]], dtype=torch.float64))
    some = torch.zeros(3, 3, dtype=torch.float64)
    some[2] = torch.tensor([0.2, 0.4, 0.4])
    close(
        lookback_ratio([some[None, None]], prompt=3, context=2).flatten(),
        torch.tensor([0.3 / 0.7], dtype=torch.float64),
    )


@pytest.mark.parametrize("case", "AB")
def test_gives_the_authors_numbers(case: str) -> None:
    """Theirs are float32. In B nothing of the prompt counts as new, so that the first step is NaN in both."""
    z = vectors(case)
    attention = [layer[None] for layer in z["attention_full"]]
    got = lookback_ratio(attention, prompt=int(z["n_prompt"]), context=int(z["context_length"]))[:, 0]
    torch.testing.assert_close(got.float(), z["ratio"], rtol=1e-6, atol=1e-7, equal_nan=True)
    assert got.isnan().any() == (case == "B")
    if case == "A":
        faithful = z["token_labels"].bool()[None]
        features, labels = window_features(got[:, None], faithful, window=int(z["window"]))
        torch.testing.assert_close(features[0].float(), z["window_features"], rtol=1e-6, atol=1e-7)
        assert torch.equal(labels[0], z["window_labels"].bool())


def test_equals_the_loops() -> None:
    given = maps(2, 2, 3, 7, 7, causal=True)
    got = lookback_ratio(given, prompt=4, context=3)
    for layer in range(2):
        for b in range(2):
            for h in range(3):
                close(got[layer, b, h], naive_lookback(given[layer][b, h], 4, 3))
    close(span_features(got)[1, 4], got[1, 1, 1].mean())
    features, _ = window_features(got, torch.ones(2, 4, dtype=torch.bool), window=4)
    close(features[:, 0], span_features(got))


def answers(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ratios (2, count, 2, 6): in faithful answers the second layer's first head copies from the context."""
    g = torch.Generator().manual_seed(seed)
    faithful = torch.arange(count) % 2 == 0
    logits = torch.randn(2, count, 2, 12, 12, generator=g)
    logits[1, :, 0, :, :6] += torch.where(faithful, 2.0, -2.0)[:, None, None]
    logits = logits.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
    return lookback_ratio(list(logits.softmax(-1)), prompt=7, context=6), faithful


def test_tells_copies_from_inventions() -> None:
    """The claim, in small."""
    ratio, faithful = answers(80, 0)
    lens = fit_lookback_lens(span_features(ratio), faithful)
    assert lens.weight.argmax() == 2
    other, truth = answers(80, 1)
    assert ((lens.probability(span_features(other)) > 0.5) == truth).float().mean() > 0.95
    candidates = [other[:, [b]] for b in (1, 3, 4, 5)]
    assert lens.choose(candidates) == 2, "the only faithful one"
    assert lens.choose([candidates[0]] * 3) == 0


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given = maps(1, 1, 2, 5, 5, causal=True)
    with pytest.raises(
        ValueError, match=r"lookback_ratio: context is too large \(got 4\); expected an int from 1 to 3"
    ):
        lookback_ratio(given, prompt=3, context=4)
    with pytest.raises(ValueError, match=r"lookback_ratio: prompt is too large \(got 6\); expected an int from 1 to 5"):
        lookback_ratio(given, prompt=6, context=4)
    ratio = lookback_ratio(given, prompt=3, context=2)
    with pytest.raises(
        ValueError, match=r"window_features: window is too large \(got 4\); expected an int from 1 to 3"
    ):
        window_features(ratio, torch.ones(1, 3, dtype=torch.bool), window=4)
    with pytest.raises(TypeError, match=r"window_features: faithful has the wrong dtype \(got torch.float32"):
        window_features(ratio, torch.ones(1, 3), window=2)
    with pytest.raises(ValueError, match=r"LookbackLens: candidates is empty \(got \[\]\); expected one at least"):
        LookbackLens(torch.ones(2), torch.zeros(())).choose([])
    features = torch.rand(4, 3)
    labels = torch.tensor([True, False, True, False])
    with pytest.raises(ValueError, match=r"fit_lookback_lens: faithful .*\(got \(3,\)\); expected \(N = 4\)"):
        fit_lookback_lens(features, labels[:3])
    with pytest.raises(ValueError, match=r"fit_lookback_lens: features are not finite everywhere \(got nan\)"):
        fit_lookback_lens(features * torch.nan, labels)
    with pytest.raises(
        ValueError, match=r"fit_lookback_lens: faithful is the same for all \(got \[True\]\); expected both"
    ):
        fit_lookback_lens(features, torch.ones(4, dtype=torch.bool))
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r'pip install "regard\[inspect\]"'):
        fit_lookback_lens(features, labels)
