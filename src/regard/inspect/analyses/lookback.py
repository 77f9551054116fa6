"""Lookback ratio: whether each head looks at the context or at what the model has written itself.

    step i predicts the i-th new token; its row a has N + i keys, the first C of which are the context
    old = mean_(j < C) a_j        new = mean_(j >= C) a_j        ratio = old / (old + new)
    features of a span: means over its steps of all heads' ratios        P(faithful) = sigmoid(w . features + b)

Chuang, Qiu, Hsieh, Krishna, Kim, Glass 2024, "Lookback Lens: Detecting and Mitigating Contextual Hallucinations in
Large Language Models Using Only Attention Maps" (https://arxiv.org/abs/2407.07071): abstract and the authors' code read
(step01_extract_attns.py, step03_lookback_lens.py, generation.py). Means, not sums: a ratio of 1/2 is equal weight for
each token. A prompt's closing marker ("Summary:") is no context; without one the first step has nothing new: NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._former import Card, Cost, Paper, register
from regard.inspect.analyses._maps import all_heads


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
    maps = all_heads("lookback_ratio", attention, square=True)
    T = maps.shape[-1]
    if not 1 <= context <= prompt <= T:
        raise ValueError(
            f"lookback_ratio: 1 <= context <= prompt <= {T} tokens must hold (got context {context}, prompt {prompt})"
        )
    rows = maps[..., prompt - 1 :, :]
    length = torch.arange(prompt, T + 1, device=maps.device)
    # Later keys have weight 0 in a causal map, so that sums need no bound.
    old = rows[..., :context].sum(-1) / context
    new = rows[..., context:].sum(-1) / (length - context)
    return old / (old + new)


def span_features(ratio: Float[Tensor, "L B H I"]) -> Float[Tensor, "B F"]:
    """The mean over a span's steps, all heads in one row, layer by layer: F = L H."""
    return ratio.mean(-1).transpose(0, 1).flatten(1)


def window_features(
    ratio: Float[Tensor, "L B H I"], faithful: Bool[Tensor, "B I"], *, window: int = 8
) -> tuple[Float[Tensor, "B W F"], Bool[Tensor, "B W"]]:
    """Features of every run of `window` steps, and whether all its tokens are faithful."""
    steps = ratio.shape[-1]
    if not 1 <= window <= steps:
        raise ValueError(f"window_features: window must be from 1 to {steps} (got {window})")
    if faithful.dtype != torch.bool or faithful.shape != (ratio.shape[1], steps):
        raise ValueError(
            f"window_features: faithful is {faithful.dtype} {tuple(faithful.shape)}; expected bool "
            f"({ratio.shape[1]}, {steps})"
        )
    features = ratio.unfold(-1, window, 1).mean(-1).permute(1, 3, 0, 2).flatten(2)
    return features, faithful.unfold(-1, window, 1).all(-1)


class LookbackLens(NamedTuple):
    """The linear classifier: which heads' looking back speaks for a faithful answer."""

    weight: Float[Tensor, "F"]
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
        if not candidates or any(ratio.dim() != 4 or ratio.shape[1] != 1 for ratio in candidates):
            raise ValueError("LookbackLens.choose: expected one candidate at least, each of ratios (L, 1, H, steps)")
        scores = [self.probability(span_features(ratio))[0] for ratio in candidates]
        return int(torch.stack(scores).argmax())


def fit_lookback_lens(features: Float[Tensor, "N F"], faithful: Bool[Tensor, "N"]) -> LookbackLens:
    """Logistic regression with scikit-learn's defaults, as in the paper.

    Raises:
        ValueError: features or labels that don't fit or are NaN, or labels all alike.
        ImportError: scikit-learn is missing.
    """
    if features.dim() != 2 or faithful.dtype != torch.bool or faithful.shape != features.shape[:1]:
        raise ValueError(
            f"fit_lookback_lens: features {tuple(features.shape)} and faithful {faithful.dtype} "
            f"{tuple(faithful.shape)} do not fit; expected (N, F) and bool (N,)"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("fit_lookback_lens: features are NaN or infinite somewhere; leave the first step out")
    if len(faithful.unique()) < 2:
        raise ValueError("fit_lookback_lens: all labels are alike; expected both faithful and unfaithful examples")
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError('fit_lookback_lens needs scikit-learn: pip install "regard[inspect]"') from error
    fitted = LogisticRegression(max_iter=1000).fit(features.double().cpu().numpy(), faithful.cpu().numpy())
    weight, bias = torch.from_numpy(fitted.coef_[0]), torch.tensor(float(fitted.intercept_[0]), dtype=torch.float64)
    return LookbackLens(weight.to(features.device), bias.to(features.device))


CARD = register(
    Card(
        name="lookback_ratio",
        family="inspect",
        gist="Whether each head looks at the context or at the model's own words.",
        equation="ratio = old / (old + new), old and new the mean weights on context and on new tokens\n"
        "P(faithful) = sigmoid(w . mean ratios + b)",
        paper=Paper(
            "Lookback Lens: Detecting and Mitigating Contextual Hallucinations in Large Language Models Using Only "
            "Attention Maps",
            "Chuang, Qiu, Hsieh, Krishna, Kim, Glass",
            2024,
            "2407.07071",
            "abstract; the authors' code",
        ),
        build=lookback_ratio,
        protocol="Analysis",
        supports=frozenset(),
        cost=Cost("B*H*T*S", ""),
        claim="A linear classifier of ratios tells faithful from invented text: heads that copy against those that go "
        "on by themselves, in tests/inspect/analyses/test_lookback.py.",
        verified="third-party",
    )
)
