"""A classifier with MEDUSA's gates: four stages of convolutions, and behind each a gate by what one body has seen.

The paper, and what was read of it, stand on the card of `regard.vision.medusa`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import checked, whole
from regard.vision._shared import MapNorm
from regard.vision.medusa import GlobalAttentionBody, MultiScaleGate


class MedusaClassifier(nn.Module):
    """Images to logits. Each stage but the first halves the sides, and the next one sees what its gate lets pass.

    As the paper's is recalled to be trained: first the body alone, to tell the region that counts (`region_loss`), and
    then all for the class.

    Args:
        channels: of the images.
        classes: how many there are.
        dims: channels of the stages.
        widths: of the body's levels.
        residual: as for `MultiScaleGate`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        dims: Sequence[int] = (16, 32, 64, 128),
        widths: Sequence[int] = (16, 32, 64),
        residual: bool = False,
    ) -> None:
        super().__init__()
        whole(self, channels=channels, classes=classes)
        self.dim = channels
        self.gates = MultiScaleGate(GlobalAttentionBody(channels, widths=widths), dims, residual=residual)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=1 if n == 0 else 2, padding=1), MapNorm(b), nn.ReLU())
            for n, (a, b) in enumerate(pairwise((channels, *dims)))
        )
        self.head = nn.Linear(dims[-1], classes)

    @checked(I="dim")
    def forward(self, image: Float[Tensor, "B I Y X"]) -> Float[Tensor, "B classes"]:
        Y, X = image.shape[2:]
        sizes = [(-(-Y // 2**n), -(-X // 2**n)) for n in range(len(self.stages))]
        h = image
        for stage, gate in zip(self.stages, self.gates.prepare(image, sizes), strict=True):
            h = self.gates.apply_gate(stage(h), gate)
        return cast(Tensor, self.head(h.mean((2, 3))))

    def region_loss(self, image: Float[Tensor, "B I Y X"], region: Float[Tensor, "B Y X"]) -> Float[Tensor, ""]:
        """Binary cross entropy between sigmoid(S) and a mask of the region that counts, 1 inside."""
        return F.binary_cross_entropy_with_logits(self.gates.body(image)[:, 0], region)
