"""WaveBlock: in training all rows of a map but a random stripe are made larger."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, whole
from regard.vision.cbam import CBAM
from regard.vision.non_local import NonLocal

PAPERS = (
    Paper(
        "Attentive WaveBlock: Complementarity-enhanced Mutual Networks for Unsupervised Domain Adaptation in Person "
        "Re-identification and Beyond",
        "Wang, Zhao, Liao, Shao",
        2022,
        "2006.06525",
        "abstract; official code",
    ),
)
DRAWN = "in training the stripe is drawn anew at each call"

CARD = Card(
    "wave_block",
    equation="""y_i = x_i  for rows i of top .. top + h - 1, else scale x_i      h = round(ratio Y)
top drawn from 0 .. Y - h, once for the whole batch; in eval y = x""",
    papers=PAPERS,
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("0", ""),
    claim="Equal networks with other draws see other maps, at no parameter, and in eval the same: "
    "tests/vision/test_wave_block.py::test_two_equal_networks_differ_while_they_train.",
    verified="third-party",
    exceptions={"L0 wrong_inputs_are_refused": "it has no parameters, and maps may be of any width", "L29": DRAWN},
    defaults={"ratio": "code", "scale": "code"},
)

ATTENTIVE = Card(
    "attentive_wave_block",
    gist="Attentive WaveBlock: CBAM or a dot-product non-local block, before or after a wave.",
    equation="""pre: wave(attention(x)),   post: attention(wave(x))
attention: x + CBAM(x), or the non-local block of dot products, x + BN(W o)""",
    papers=PAPERS,
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("4*B*M*((M + 8)//16) + 98*B*Y*X", ""),
    claim="What a wave does, attention before it does not see and attention after it does: "
    "tests/vision/test_wave_block.py::test_attention_stands_before_or_after.",
    differs=(
        "The released models have CBAM before the wave and the non-local block after it; here any goes with any.",
        "The mutual training of two networks and their averages is left to the caller.",
        "The non-local block multiplies keys and values first: the same sums, without a map of all pairs.",
    ),
    verified="third-party",
    exceptions={
        "L10 batch_rows_do_not_meet_in_training": "both attentions' batch norms read the whole batch",
        "L29": DRAWN,
    },
    defaults={"order": "code, the first of both", "attention": "code, as it goes with order"},
)


@checked()
def waved(
    x: Float[Tensor, "B C Y X"], top: int | Tensor, *, ratio: float = 0.3, scale: float = 1.5
) -> Float[Tensor, "B C Y X"]:
    """`scale` times all rows but the stripe that begins at `top`. Its height is rounded to even numbers at halves."""
    at = torch.arange(x.shape[2], device=x.device)
    kept = (at >= top) & (at < top + stripe(x.shape[2], ratio))
    return torch.where(kept[:, None], x, scale * x)


def stripe(rows: int, ratio: float = 0.3) -> int:
    """h."""
    return round(ratio * rows)


@CARD.module
class WaveBlock(nn.Module):
    """`waved` with a stripe drawn in training; the identity in eval. No parameters.

    `generator` may be set, so that two networks have the draws that one wants.

    Args:
        ratio: of the rows that stay as they are, between 0 and 1.
        scale: of all others.
    """

    generator: torch.Generator | None = None

    def __init__(self, *, ratio: float = 0.3, scale: float = 1.5) -> None:
        super().__init__()
        number(self, least=0, most=1, ratio=ratio)
        number(self, scale=scale)
        self.ratio, self.scale = ratio, scale

    @checked()
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        if not self.training:
            return x.clone()
        most = x.shape[2] - stripe(x.shape[2], self.ratio)
        top = torch.randint(most + 1, (), generator=self.generator, device=x.device)
        return waved(x, top, ratio=self.ratio, scale=self.scale)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, scale={self.scale}"


@ATTENTIVE.module
class AttentiveWaveBlock(nn.Module):
    """An attention of the map and a `WaveBlock`.

    Args:
        dim: C.
        order: "pre": attention before the wave, "post": after it.
        attention: x + CBAM(x), or the non-local block of dot products, which starts as the identity.
    """

    def __init__(
        self, dim: int, *, order: Literal["pre", "post"] = "pre", attention: Literal["cbam", "nonlocal"] = "cbam"
    ) -> None:
        super().__init__()
        whole(self, dim=dim)
        choice(self, ("pre", "post"), order=order)
        choice(self, ("cbam", "nonlocal"), attention=attention)
        self.dim, self.order = dim, order
        self.attention = CBAM(dim, bias=True) if attention == "cbam" else NonLocal(dim, pairwise="dot")
        self.wave = WaveBlock()

    def attended(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """x with its attention."""
        out: Tensor = self.attention(x)
        return x + out if isinstance(self.attention, CBAM) else out

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        out: Tensor = self.wave(self.attended(x)) if self.order == "pre" else self.attended(self.wave(x))
        return out

    def extra_repr(self) -> str:
        return f"{self.dim}, order={self.order!r}"
