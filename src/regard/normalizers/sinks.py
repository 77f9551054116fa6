"""Sink logits: each head has a learned logit in the softmax's denominator, to which no value belongs.

With m the log-sum-exp of the scores that a query sees, its weights are softmax's times

    exp(m) / (exp(m) + exp(b)) = sigmoid(m - b)

so that any kernel which tells m serves, by one multiplication of its outputs. A query that sees nothing has m = -inf,
and gives 0 as ever.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Paper
from regard.checks import checked, number
from regard.normalizers.softmax import softmax
from regard.stages import Normalizer
from regard.weights import Loaded, same

_STREAMING = "Efficient Streaming Language Models with Attention Sinks"

CARD = Card(
    "sink_softmax",
    equation="""A_hts = exp(P_hts) / (exp(b_h) + sum_s' exp(P_hts')),   P = q k^T / sqrt(D),   b_h a parameter""",
    papers=(
        Paper("gpt-oss-120b & gpt-oss-20b Model Card", "OpenAI", 2025, "2508.10925", "recalled; transformers' code"),
        Paper(_STREAMING, "Xiao, Tian, Chen, Han, Lewis", 2023, "2309.17453", "recalled: its learned sink is a token"),
    ),
    traits=PLAIN - {"normalised"},
    claim="A head that should add nothing learns to, by its sink alone, where softmax's weights sum to 1: "
    "tests/normalizers/test_sinks.py::test_a_head_learns_to_add_nothing.",
    verified="third-party",
    defaults={"std": "code, gpt-oss in transformers"},
)
ONE = Card(
    "softmax_one",
    gist="Softmax off by one: 1 more in the denominator, so that a head whose scores are all low adds little.",
    equation="A_hts = exp(P_hts) / (1 + sum_s' exp(P_hts')),   P = q k^T / sqrt(D)",
    papers=(
        Paper(_STREAMING, "Xiao, Tian, Chen, Han, Lewis", 2023, "2309.17453", "recalled: its zero sink, SoftMax1"),
    ),
    traits=PLAIN - {"normalised"},
    claim="Where no key fits, it puts out next to nothing: "
    "tests/normalizers/test_sinks.py::test_where_no_key_fits_next_to_nothing_is_put_out.",
    verified="third-party",
)


def sink_softmax(
    scores: Float[Tensor, "B H t S"],
    sinks: Float[Tensor, "#H"],
    allowed: Bool[Tensor, "#B #H t S"] | None = None,
) -> Float[Tensor, "B H t S"]:
    """Softmax over the allowed keys and one more with logit `sinks`, whose weight is left out. In at least fp32."""
    if scores.shape[-1] == 0:
        return scores
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf)
    empty = z.detach().amax(-1, keepdim=True) == -torch.inf  # exp(-inf - -inf) would be NaN
    lse = z.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    return (softmax(z) * kept(lse, sinks)[..., None]).to(scores.dtype)


def kept(lse: Float[Tensor, "B H t"], sinks: Float[Tensor, "#H"]) -> Float[Tensor, "B H t"]:
    """What the sink leaves of a row's weight: sigmoid(lse - b)."""
    # -inf, which is plain softmax, as the least finite number: beside a row that sees nothing it would give NaN.
    return torch.sigmoid(lse - sinks.to(lse.dtype).clamp(min=torch.finfo(lse.dtype).min)[:, None])


class Sinks(Normalizer):
    """Softmax with these logits in its denominator, one a head or one for all. A parameter stays whose it is.

    Args:
        sinks: b, (H,) or (1,).
    """

    def __init__(self, sinks: Float[Tensor, "#H"]) -> None:
        super().__init__()
        self.sinks = sinks

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return sink_softmax(scores, self.sinks, allowed)

    def share(self, lse: Float[Tensor, "B H t"]) -> Float[Tensor, "B H t"]:
        return kept(lse, self.sinks)


@CARD.fills("normalizer")
class SinkSoftmax(Sinks):
    """Softmax with a learned sink logit for each head; `sinks` (H,) is the parameter.

    Args:
        std: of the normal distribution that logits start from.
    """

    def __init__(self, num_heads: int, *, std: float = 0.02) -> None:
        number(type(self).__name__, least=0, std=std)
        super().__init__(nn.Parameter(torch.empty(num_heads)))
        self.std = std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.sinks, std=self.std)

    def start_neutral(self) -> bool:
        """Scores of about 0 leave a sink of -8 no more than e^-8 of a row's weight."""
        nn.init.constant_(self.sinks, -8.0)
        return True


@ONE.fills("normalizer")
class SoftmaxOne(Normalizer):
    """Softmax with a sink whose logit is 0. No parameters."""

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return sink_softmax(scores, scores.new_zeros(1), allowed)

    def share(self, lse: Float[Tensor, "B H t"]) -> Float[Tensor, "B H t"]:
        return torch.sigmoid(lse)


@CARD.loads("transformers", "GptOssAttention")
def _gpt_oss(theirs: Any) -> Loaded:
    return Loaded(lambda: SinkSoftmax(len(theirs.sinks)), same(theirs, {"normalizer.sinks": "sinks"}))
