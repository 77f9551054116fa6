"""Inherently faithful maps (iFAM): one transformer finds parts, and another sees no more than the patches of these."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, number, refuse, whole
from regard.models.faithful_parts import (
    PartDiscovery,
    background_presence,
    equivariance,
    foreground,
    gumbel,
    orthogonality,
    part_logits,
    pixel_entropy,
    presence,
    thresholded,
    total_variation,
    without_parts,
)
from regard.models.masked_vit import MaskedViT
from regard.shapes import HeadShape


def _inputs(shape: HeadShape) -> tuple[Tensor]:
    """Images of 12 x 12."""
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(2, 3, 12, 12, generator=generator, dtype=torch.float64),)


CARD = Card(
    "faithful_vit",
    equation="""z = ViT1(image);   l_k = -||z - p_k||^2,   maps = softmax_k(l / tau)      K parts and the background
g = softmax_k((l + noise) / tau);   m = 1 where max_{k < K} g_k >= g_K, else 0, with the gradient of sum_{k < K} g_k
logits = W LN(class token of ViT2(image)),   in every block of which patches with m = 0 are no keys
soft: log(max_{k < K} g_k + 1e-10) is added to the scores instead""",
    papers=(
        Paper(
            "Inherently Faithful Attention Maps for Vision Transformers",
            "Aniraj, Dantas, Ienco, Marcos",
            2025,
            "2506.08915",
            "abstract; official code",
        ),
    ),
    protocol="Model",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    cost=Cost(
        "2*B*depth*(2*(Y*X//patch**2 + 1 + registers)**2*M + 8*(Y*X//patch**2 + 1 + registers)*M*M)"
        " + 2*B*channels*Y*X*M + B*(parts + 1)*M*Y*X//patch**2 + B*(parts + 1)*M*classes",
        "",
    ),
    claim="A patch outside of the mask changes nothing: its pixels have a gradient of exactly 0, given the mask: "
    "tests/models/test_faithful.py::test_what_the_mask_hides_has_no_influence.",
    differs=(
        "The gradient of the mask reaches the first stage through weights of keys, where the released code makes the "
        "mask boolean before attention and loses it.",
        "Noise is drawn in training alone; the code draws it in eval too, so that masks differ from call to call.",
        "Hidden patches are kept as rows that nobody reads, in eval too, where the code cuts them out: the same.",
        "Loss of orthogonality between parts, as its formula says; the released trainer hands it a transposed matrix.",
        "Maps are drawn by no noise, which the code has as an option.",
        "`part_logits` are each part's scores of the classes. The rotations for equivariance are the caller's.",
    ),
    verified="third-party",
    example={"size": 12, "patch": 3, "depth": 2, "classes": 4, "parts": 3},
    tries={"size": 9, "tau": 0.5},
    defaults={
        "channels": "ours, colour",
        "classes": "ours",
        "parts": "ours",
        "size": "ours",
        "patch": "ours",
        "depth": "ours, a small host",
        "registers": "code, DINOv2 with registers",
        "mask": "code",
        "tau": "code",
        "noise": "code, there in eval too",
    },
)

WEIGHTS = {"background": 2.0}
"""Of the terms of `faithful_loss` that don't weigh 1."""


class Faithful(NamedTuple):
    """What the model gives."""

    logits: Float[Tensor, "B classes"]
    part_maps: Float[Tensor, "B K P"]
    """The background's last."""
    mask: Float[Tensor, "B P"]
    part_logits: Float[Tensor, "B classes parts"]
    """Of the first stage, each part by itself; their mean over parts is trained."""
    part_features: Float[Tensor, "B M K"]


@CARD.module
class FaithfulViT(nn.Module):
    """Images (B, C, size, size) to classes, by the patches that the first stage shows to the second.

    Args:
        dim, num_heads, depth: of both transformers.
        channels, size, patch: C, sides of images and of patches.
        classes, parts: how many, the background not counted.
        registers: tokens of no patch beside the class's.
        mask: "hard": patches are keys or not; "soft": they are by how much of a part they are.
        tau: temperature of the maps.
        noise: whether the mask is drawn, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        channels: int = 3,
        classes: int = 10,
        parts: int = 8,
        size: int = 32,
        patch: int = 4,
        depth: int = 4,
        registers: int = 4,
        mask: Literal["hard", "soft"] = "hard",
        tau: float = 1.0,
        noise: bool = True,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, classes=classes, parts=parts)
        choice(self, ("hard", "soft"), mask=mask)
        number(self, above=0, tau=tau)
        flag(self, noise=noise)
        self.channels, self.parts, self.mask, self.tau, self.noise = channels, parts, mask, tau, noise
        self.finder, self.reader = (
            MaskedViT(dim, num_heads, channels=channels, size=size, patch=patch, depth=depth, registers=registers)
            for _ in range(2)
        )
        self.discovery = PartDiscovery(dim, parts, classes)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes, bias=False)

    @property
    def mixers(self) -> Sequence[nn.Module]:
        """Attention of all blocks, those of the first stage first."""
        return [block.attention for vit in (self.finder, self.reader) for block in vit.blocks]

    def read(self, image: Float[Tensor, "B C Y X"], mask: Float[Tensor, "B P"]) -> Float[Tensor, "B classes"]:
        """The second stage alone."""
        token = self.reader(image, mask, soft=self.mask == "soft")[:, 0]
        made: Tensor = self.head(self.norm(token))
        return made

    @checked(C="channels")
    def forward(
        self,
        image: Float[Tensor, "B C Y X"],
        *,
        mask: Float[Tensor, "B P"] | None = None,
        drop_parts: Sequence[int] = (),
        thresholds: Float[Tensor, " parts"] | None = None,
    ) -> Faithful:
        """Classes, and what they rest on.

        Args:
            mask: takes the place of the one that is found.
            drop_parts: parts whose patches become background, with masks that are hard.
            thresholds: of z . p_k, which then takes the distances' place: below, a part is not there.
        """
        if drop_parts and self.mask == "soft":
            refuse(self, "drop_parts", "does not go with soft masks", drop_parts, "mask='hard'")
        z, found = self.finder(image)[:, self.finder.prefix :], self.discovery
        if thresholds is None:
            logits = part_logits(z.mT, found.prototypes)
        else:
            logits = thresholded(z.mT, found.prototypes, thresholds)
        maps = (logits / self.tau).softmax(1)
        features = found.features(z, maps)
        if mask is None:
            mask = without_parts(maps, drop_parts) if drop_parts else self._masked(logits)
        return Faithful(self.read(image, mask), maps, mask, found.scores(features), features)

    def _masked(self, logits: Float[Tensor, "B K P"]) -> Float[Tensor, "B P"]:
        drawn = self.noise and self.training
        g = ((logits + gumbel(logits) if drawn else logits) / self.tau).softmax(1)
        keep = None
        if self.training:
            keep = torch.rand(len(g), self.parts, device=g.device) >= self.discovery.dropout
        ground = foreground(g, keep)
        return (ground.hard if self.mask == "hard" else ground.soft)[:, 0]

    def extra_repr(self) -> str:
        return f"parts={self.parts}, mask={self.mask!r}, tau={self.tau}, noise={self.noise}"


def faithful_loss(
    out: Faithful, labels: Int[Tensor, " B"], sides: tuple[int, int], back: Float[Tensor, "B K P"] | None = None
) -> dict[str, Float[Tensor, ""]]:
    """All terms, weighted, by name; their sum is what is trained.

    Args:
        sides: of the map of patches.
        back: maps of a moved image, moved back, for the term of equivariance.
    """
    maps = out.part_maps.unflatten(2, sides)
    terms = {
        "class": F.cross_entropy(out.logits, labels),
        "part_class": F.cross_entropy(out.part_logits.mean(2), labels),
        "presence": presence(maps),
        "background": background_presence(maps),
        "variation": total_variation(maps),
        "entropy": pixel_entropy(maps),
        "orthogonality": orthogonality(out.part_features),
    }
    if back is not None:
        terms["equivariance"] = equivariance(maps, back.unflatten(2, sides))
    return {name: WEIGHTS.get(name, 1.0) * term for name, term in terms.items()}
