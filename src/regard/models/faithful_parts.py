"""What iFAM finds in patches: which part each belongs to, which of them are foreground, and losses that shape both.

The paper, and what was read of it, stand on the card of `regard.models.faithful`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import refuse, whole


def part_logits(z: Float[Tensor, "B M P"], prototypes: Float[Tensor, "K M"]) -> Float[Tensor, "B K P"]:
    """-||z - p_k||^2 for each prototype, the background's last."""
    return torch.stack([-(z - p[:, None]).square().sum(1) for p in prototypes], 1)


def thresholded(
    z: Float[Tensor, "B M P"], prototypes: Float[Tensor, "K M"], thresholds: Float[Tensor, " parts"]
) -> Float[Tensor, "B K P"]:
    """z . p_k, and -inf where a part has less than its threshold; the background has none."""
    dots = torch.einsum("bmp,km->bkp", z, prototypes)
    least = F.pad(thresholds, (0, 1), value=-torch.inf)
    return dots.masked_fill(dots < least[:, None], -torch.inf)


def gumbel(like: Tensor) -> Tensor:
    """Noise of the standard Gumbel distribution."""
    return -torch.empty_like(like).exponential_().log()


class Ground(NamedTuple):
    """Foreground and background of each patch."""

    soft: Float[Tensor, "B 2 P"]
    """The best part, and the background."""
    hard: Float[Tensor, "B 2 P"]
    """1 for the larger of both, 0 for the other, with the gradient of the sum of all parts."""


def foreground(g: Float[Tensor, "B K P"], keep: Bool[Tensor, "B parts"] | None = None) -> Ground:
    """From maps of parts and of the background; equals are foreground.

    Args:
        keep: False at parts that are dropped; the others stay as they are.
    """
    parts, back = g[:, :-1], g[:, -1]
    if keep is not None:
        parts = parts * keep[..., None].to(g.dtype)
    best, passed = parts.amax(1), parts.sum(1)
    one = (best >= back).to(g.dtype)
    through = passed - passed.detach()
    return Ground(torch.stack([best, back], 1), torch.stack([one + through, 1 - one + through], 1))


def without_parts(maps: Float[Tensor, "B K P"], drop: Sequence[int]) -> Float[Tensor, "B P"]:
    """A mask in which patches of these parts are background; elsewhere the best of the other parts decides."""
    parts = maps.shape[1] - 1
    for k in drop:
        whole("without_parts", 0, most=parts - 1, part=k)
    rest = [k for k in range(parts) if k not in drop]
    if not rest:
        return maps.new_zeros(len(maps), maps.shape[2])
    removed = (maps.argmax(1)[..., None] == torch.tensor(list(drop), device=maps.device, dtype=torch.long)).any(-1)
    return ((maps[:, rest].amax(1) >= maps[:, -1]) & ~removed).to(maps.dtype)


class PartDiscovery(nn.Module):
    """Patches' tokens (B, P, M) -> maps of parts, their features and their classes' scores.

    Args:
        dim, parts, classes: M, K, and how many classes.
        dropout: share of parts whose features are dropped in training.
    """

    def __init__(self, dim: int, parts: int, classes: int, *, dropout: float = 0.3) -> None:
        super().__init__()
        whole(self, dim=dim, parts=parts, classes=classes)
        self.dim, self.parts, self.dropout = dim, parts, dropout
        self.prototypes = nn.Parameter(torch.empty(parts + 1, dim))
        self.weight, self.bias = nn.Parameter(torch.ones(dim, parts + 1)), nn.Parameter(torch.zeros(dim, parts + 1))
        self.head = nn.Linear(dim, classes, bias=False)
        nn.init.uniform_(self.prototypes, -(dim**-0.5), dim**-0.5)

    def features(self, z: Float[Tensor, "B P M"], maps: Float[Tensor, "B K P"]) -> Float[Tensor, "B M K"]:
        """Means of maps times tokens over all patches, normed as one matrix."""
        v = torch.einsum("bkp,bpm->bmk", maps, z) / z.shape[1]
        return F.layer_norm(v, tuple(v.shape[1:]), self.weight, self.bias)

    def scores(self, features: Float[Tensor, "B M K"]) -> Float[Tensor, "B classes parts"]:
        """Of each part by itself, without the background."""
        v = features[..., :-1]
        v = v * F.dropout(torch.ones_like(v[:, :1]), self.dropout, self.training)
        made: Tensor = self.head(v.mT).mT
        return made


# --- losses, of maps (B, K, Y, X) whose last is the background's


def presence(maps: Float[Tensor, "B K Y X"]) -> Float[Tensor, ""]:
    """Every part should be somewhere in the batch."""
    return 1 - _means(maps[:, :-1]).amax((0, 2, 3)).mean()


def background_presence(maps: Float[Tensor, "B K Y X"]) -> Float[Tensor, ""]:
    """The background should be at the border of every image."""
    found = _means(maps[:, -1:])[:, 0]
    sides = [torch.linspace(-1, 1, n, device=maps.device, dtype=maps.dtype) for n in found.shape[1:]]
    far = sides[0].square()[:, None] + sides[1].square()
    return -(found * far / far.max()).amax((1, 2)).log().mean()


def total_variation(maps: Float[Tensor, "B K Y X"]) -> Float[Tensor, ""]:
    """Maps should have few edges."""
    edges = maps.diff(dim=2).abs().sum() + maps.diff(dim=3).abs().sum()
    return edges / (maps.shape[0] * maps.shape[2] * maps.shape[3])


def pixel_entropy(maps: Float[Tensor, "B K Y X"]) -> Float[Tensor, ""]:
    """A patch should be of one part."""
    return torch.special.entr(maps).sum(1).mean()


def orthogonality(features: Float[Tensor, "B M K"]) -> Float[Tensor, ""]:
    """Parts should have features of their own."""
    unit = F.normalize(features, dim=1)
    return (unit.mT @ unit - torch.eye(unit.shape[2], device=unit.device, dtype=unit.dtype)).square().mean()


def equivariance(maps: Float[Tensor, "B K Y X"], back: Float[Tensor, "B K Y X"]) -> Float[Tensor, ""]:
    """Parts of a moved image, moved back, should be those of the image."""
    return 1 - F.cosine_similarity(maps[:, :-1].flatten(2), back[:, :-1].flatten(2), dim=2).mean()


def _means(maps: Float[Tensor, "B K Y X"]) -> Float[Tensor, "B K y x"]:
    if min(maps.shape[2:]) < 4:
        refuse("maps", "sides", "are too small", tuple(maps.shape[2:]), "at least 4 patches a side")
    return F.avg_pool2d(maps, 3, 1)
