"""Lookback ratio: whether each head looks at the context or at what the model has written itself.

Means, not sums: a ratio of 1/2 is equal weight for each token. A prompt's closing marker ("Summary:") is no context;
without one the first step has nothing new: NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, fits, refuse, whole
from regard.inspect.analyses._maps import all_heads

CARD = Card(
    "lookback_ratio",
    equation="""step i predicts the i-th new token; its row a has N + i keys, the first C of which are the context
old = mean_(j < C) a_j        new = mean_(j >= C) a_j        ratio = old / (old + new)
features of a span: means over its steps of all heads' ratios        P(faithful) = sigmoid(w . features + b)""",
    papers=(
        Paper(
            "Lookback Lens: Detecting and Mitigating Contextual Hallucinations in Large Language Models Using Only "
            "Attention Maps",
            "Chuang, Qiu, Hsieh, Krishna, Kim, Glass",
            2024,
            "2407.07071",
            "abstract; the authors' code (step01_extract_attns.py, step03_lookback_lens.py, generation.py)",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*H*T*S", ""),
    claim="A linear classifier of ratios tells faithful from invented text: heads that copy against those that go on "
    "by themselves: tests/inspect/analyses/test_lookback.py::test_tells_copies_from_inventions.",
    verified="third-party",
)


@CARD.function
def lookback_ratio(
    attention: Sequence[Float[Tensor, "B H T T"]], *, prompt: int, context: int
) -> Float[Tensor, "L B H I"]:
    """One ratio for each step, head and layer.

    Args:
        attention: the causal weights over prompt and new tokens, T = prompt + steps - 1: what the last token attends
            to has not been used, as in one pass over prompt and answer without its last token.
        prompt: N, how many tokens the prompt has.
        context: C, how many of them are context; the rest counts as new.

    Raises:
        ValueError, TypeError: maps that are not (B, H, T, T) floats, lengths that don't fit.
    """
    maps = all_heads("lookback_ratio", attention, "B H T T")
    T = maps.shape[-1]
    whole("lookback_ratio", most=T, prompt=prompt)
    whole("lookback_ratio", most=prompt, context=context)
    rows = maps[..., prompt - 1 :, :]
    length = torch.arange(prompt, T + 1, device=maps.device)
    # Later keys have weight 0 in a causal map, so that sums need no bound.
    old = rows[..., :context].sum(-1) / context
    new = rows[..., context:].sum(-1) / (length - context)
    return old / (old + new)


@checked()
def span_features(ratio: Float[Tensor, "L B H I"]) -> Float[Tensor, "B F"]:
    """The mean over a span's steps, all heads in one row, layer by layer: F = L H."""
    return ratio.mean(-1).transpose(0, 1).flatten(1)


@checked()
def window_features(
    ratio: Float[Tensor, "L B H I"], faithful: Bool[Tensor, "B I"], *, window: int = 8
) -> tuple[Float[Tensor, "B W F"], Bool[Tensor, "B W"]]:
    """Features of every run of `window` steps, and whether all its tokens are faithful."""
    whole("window_features", most=ratio.shape[-1], window=window)
    features = ratio.unfold(-1, window, 1).mean(-1).permute(1, 3, 0, 2).flatten(2)
    return features, faithful.unfold(-1, window, 1).all(-1)


class LookbackLens(NamedTuple):
    """The linear classifier: which heads' looking back speaks for a faithful answer."""

    weight: Float[Tensor, " F"]
    bias: Float[Tensor, ""]

    def probability(self, features: Float[Tensor, "*n F"]) -> Float[Tensor, "*n"]:
        """Of being faithful to the context."""
        return (features.to(self.weight) @ self.weight + self.bias).sigmoid()

    def choose(self, candidates: Sequence[Float[Tensor, "L B H I"]]) -> int:
        """Which of several continuations is most likely faithful; the first where they tie.

        Args:
            candidates: the ratios of each one's own steps, B = 1. Guided decoding draws, say, 8 continuations of 8
                tokens, keeps the chosen one, and goes on from there.
        """
        if not candidates:
            refuse("LookbackLens", "candidates", "is empty", candidates, "one at least")
        sizes: dict[str, int] = {}
        for n, ratio in enumerate(candidates):
            sizes = fits("LookbackLens", "L 1 H _I", sizes, **{f"candidates[{n}]": ratio})
        scores = [self.probability(span_features(ratio))[0] for ratio in candidates]
        return int(torch.stack(scores).argmax())


@checked()
def fit_lookback_lens(features: Float[Tensor, "N F"], faithful: Bool[Tensor, " N"]) -> LookbackLens:
    """Logistic regression with scikit-learn's defaults, as in the paper.

    Raises:
        ValueError: features or labels that don't fit or are NaN, or labels all alike.
        ImportError: scikit-learn is missing.
    """
    name = "fit_lookback_lens"
    if bool((wrong := ~features.isfinite()).any()):
        got = float(features[wrong][0])
        refuse(name, "features", "are not finite everywhere", got, "finite ones; leave the first step out")
    if len(faithful.unique()) < 2:
        refuse(
            name, "faithful", "is the same for all", faithful.unique().tolist(), "both faithful and unfaithful examples"
        )
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError('fit_lookback_lens needs scikit-learn: pip install "regard[inspect]"') from error
    fitted = LogisticRegression(max_iter=1000).fit(features.double().cpu().numpy(), faithful.cpu().numpy())
    weight, bias = torch.from_numpy(fitted.coef_[0]), torch.tensor(float(fitted.intercept_[0]), dtype=torch.float64)
    return LookbackLens(weight.to(features.device), bias.to(features.device))
