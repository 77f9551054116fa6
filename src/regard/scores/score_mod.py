"""FlexAttention's programming model: a function of one score and where it stands is a mechanism."""

from pkgutil import resolve_name
from typing import Any

from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import refuse
from regard.pairwise import PairMix, ScoreFunction

CARD = Card(
    "score_mod",
    equation="""A = softmax(mask(f(P[b,h,t,s], b, h, t, s))) v,   P = scale q k^T + bias
f = function, the identity by default; a pair that f gives -inf is masked""",
    papers=(
        Paper(
            "Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
            "Dong, Feng, Guessous, Liang, He",
            2024,
            "2412.05496",
            "abstract; the authors' code in torch",
        ),
    ),
    traits=PLAIN - {"position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
    claim="A few lines give ALiBi, soft caps, relative biases, documents, windows with sinks and more, with gradients "
    "to what they read: tests/scores/test_score_mod.py::test_is_flex_attention.",
    differs=(
        "q_idx is the query's position counted from the first key, as in masks here; torch counts queries from 0, "
        "which is the same where T = S. `from_score_mod` takes a function that counts as torch does.",
        "Functions are asked about index tensors that broadcast, and entry by entry only where that gives another "
        "answer.",
        "On CPUs nothing is compiled, and there are gradients. On GPUs the function is handed to torch's own kernel, "
        "which was not run on one.",
    ),
    verified="third-party",
    example={"function": "regard.scores.score_mod:nearer"},
    defaults={"function": "code, torch's score_mod is None"},
)


def identity(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The score as it is."""
    return score


def nearer(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """An example: keys count for less with distance."""
    return score - (q_idx - kv_idx).abs() / 8


class ScoreMod(PairMix):
    """A `score_mod` as a part; see `regard.pairwise.PairMix`.

        ScoreMod(lambda score, b, h, q_idx, kv_idx, slope: score + slope[h] * (kv_idx - q_idx), slope=nn.Parameter(...))

    Args:
        function: of (score, b, h, q_idx, kv_idx) and `tensors`; a module's parameters are this one's too.
        tensors: what it takes by name. They move with `.to()`, are saved, and train where they are parameters.
    """


@CARD.fills("score_mix")
def score_mod(*, function: ScoreFunction | str | None = None) -> ScoreMod:
    """The part for a function.

    Args:
        function: of (score, b, h, q_idx, kv_idx), as in `ScoreMod`, or its name as "module:function"; None leaves
            scores as they are.
    """
    if isinstance(function, str):
        try:
            found = resolve_name(function)
        except (ImportError, AttributeError, ValueError) as error:
            wanted = '"module:function" that can be imported'
            refuse("score_mod", "function", "can't be found", f"{function!r}, {error}", wanted)
        return ScoreMod(found)
    return ScoreMod(identity if function is None else function)


def from_score_mod(function: ScoreFunction, T: int, S: int, **tensors: Tensor) -> ScoreMod:
    """A function whose q_idx counts T queries from 0, as torch's does, where there are S keys."""

    def shifted(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, **named: Any) -> Tensor:
        return function(score, b, h, i - (S - T), j, **named)

    return ScoreMod(shifted, **tensors)
