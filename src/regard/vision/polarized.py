"""Polarized self-attention: a gate for each channel and one for each position, added or in turn."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, refuse

CARD = Card(
    "polarized",
    equation="""channel gate:  c = sum_n v_n softmax_n(q)_n                  g = sigmoid(LayerNorm(W c))     y = g * x
spatial gate:  q = mean_n q'_n;  s_n = softmax_c(q) . v'_n   g_n = sigmoid(s_n)              y_n = g_n x_n
parallel: channel(x) + spatial(x)        sequential: spatial(channel(x))
q is one channel, v, q' and v' have M / 2: the first gate keeps channels and collapses space, the second the reverse""",
    papers=(
        Paper(
            "Polarized Self-Attention: Towards High-quality Pixel-wise Regression",
            "Liu, Liu, Fan, Huang",
            2021,
            "2107.00782",
            "abstract; summaries of the formulas; official and third-party code; not the paper's body",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*M*(3*M/2 + 2)", ""),
    claim="Cost is linear in pixels: tests/vision/test_polarized.py::test_cost_is_linear_in_pixels.",
    differs=(
        'Text and code disagree, so there are two forms: "paper" as above, and "code" (DeLightCMU/PSA), in which the '
        "parallel layout has no LayerNorm and s = softmax_n(q . v'_n), whose sigmoid hardly leaves 1/2, and the "
        "sequential one has W = W2 ReLU(LayerNorm(W1 c)) of inner width M / 8 and s_n = q . softmax_n(v'_n).",
    ),
    verified="third-party",
    tasks=("digits", "shapes"),
    defaults={"layout": "ours", "form": "ours, the code's spatial gate hardly leaves 1/2"},
)

Score = Literal["channels", "positions", "values"]


def channel_pool(q: Float[Tensor, "B 1 N"], v: Float[Tensor, "B C N"]) -> Float[Tensor, "B C"]:
    """What the channel gate is made of: values averaged over positions with the weights softmax(q)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return (v.to(wide) @ q.softmax(-1, dtype=wide).mT)[..., 0].to(v.dtype)


def spatial_score(
    q: Float[Tensor, "B C N"], v: Float[Tensor, "B C N"], *, softmax: Score = "channels"
) -> Float[Tensor, "B N"]:
    """What the spatial gate is the sigmoid of.

    The softmax is over the channels of the mean query, over the positions of its products with the values, or over
    the positions of each value channel.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    query, value = q.to(wide).mean(-1), v.to(wide)
    if softmax == "channels":
        query = query.softmax(-1)
    elif softmax == "values":
        value = value.softmax(-1)
    score = (query[:, None] @ value)[:, 0]
    return (score.softmax(-1) if softmax == "positions" else score).to(v.dtype)


@CARD.module
class PolarizedAttention(nn.Module):
    """Both gates on a feature map of any number of axes.

    Args:
        dim: M, even; for the sequential layout of form "code" a multiple of 8.
        layout: whether the gated maps are added, or the spatial gate follows the channel gate.
        form: the formulas of the paper, or those of the authors' code.
    """

    def __init__(
        self,
        dim: int,
        *,
        layout: Literal["parallel", "sequential"] = "parallel",
        form: Literal["paper", "code"] = "paper",
    ) -> None:
        super().__init__()
        choice(self, ("parallel", "sequential"), layout=layout)
        choice(self, ("paper", "code"), form=form)
        bottleneck = form == "code" and layout == "sequential"
        parts = 8 if bottleneck else 2
        if dim % parts:
            refuse(self, "dim", "can't be divided so", dim, f"a multiple of {parts}")
        bias = form == "paper"
        C = dim // 2
        self.dim, self.layout, self.form = dim, layout, form
        self.softmax: Score = "channels" if form == "paper" else "values" if bottleneck else "positions"
        self.channel_query = nn.Conv1d(dim, 1, 1, bias=bias)
        self.channel_value = nn.Conv1d(dim, C, 1, bias=bias)
        self.spatial_query = nn.Conv1d(dim, C, 1, bias=bias)
        self.spatial_value = nn.Conv1d(dim, C, 1, bias=bias)
        up: list[nn.Module] = [nn.Linear(C, dim, bias=bias)]
        if form == "paper":
            up.append(nn.LayerNorm(dim))
        elif bottleneck:
            up = [nn.Linear(C, C // 4), nn.LayerNorm(C // 4), nn.ReLU(), nn.Linear(C // 4, dim)]
        self.up = nn.Sequential(*up)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.channel_query, self.channel_value, self.spatial_query, self.spatial_value):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def channel_gate(self, x: Float[Tensor, "B M N"]) -> Float[Tensor, "B M 1"]:
        """In (0, 1), one for each channel."""
        return self.up(channel_pool(self.channel_query(x), self.channel_value(x))).sigmoid()[..., None]

    def spatial_gate(self, x: Float[Tensor, "B M N"]) -> Float[Tensor, "B 1 N"]:
        """In (0, 1), one for each position."""
        score = spatial_score(self.spatial_query(x), self.spatial_value(x), softmax=self.softmax)
        return score.sigmoid()[:, None]

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M X *sizes"]) -> Float[Tensor, "B M X *sizes"]:
        z = x.flatten(2)
        channels = self.channel_gate(z) * z
        if self.layout == "parallel":
            out = channels + self.spatial_gate(z) * z
        else:
            out = self.spatial_gate(channels) * channels
        return out.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.dim}, layout={self.layout!r}, form={self.form!r}"
