"""Boxes: find the shapes in an image, say where each is and which it is. The data of object detection, in small.

Images show a few squares, discs and crosses of any proportions, one to a cell of a 2 x 2 grid, in noise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard import catalog
from regard.cards import Card
from regard.checks import number
from regard.detection.places import Reads
from regard.models.detector import NOTHING, Detector, box_quality, detection_loss
from regard.models.mixer import Mechanism, Part, Spec, build
from regard.tasks import HELDOUT_SEED, Batch, Defaults, Metric, Size, Task, counts

SHAPES = ("square", "disc", "cross")


def shapes(
    count: int, size: int, noise: float, generator: torch.Generator
) -> tuple[Float[Tensor, "count 1 size size"], Float[Tensor, "count 4 4"], Int[Tensor, "count 4"]]:
    """Images, boxes (cx, cy, w, h) in [0, 1], and classes; -1 where a cell of the grid is empty."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, 4, *shape, generator=generator)

    extent = 0.16 + 0.28 * draw(2)
    cell = torch.tensor([(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)])
    centre = cell + (draw(2) - 0.5) * (0.5 - extent)
    kind = torch.randint(len(SHAPES), (count, 4), generator=generator)
    there = draw() < 0.6
    there[:, 0] |= ~there.any(1)
    pixel = (torch.arange(size) + 0.5) / size
    dx = ((pixel - centre[..., :1]) / extent[..., :1]).abs()[:, :, None]
    dy = ((pixel - centre[..., 1:]) / extent[..., 1:]).abs()[..., None]
    square = (dx < 0.5) & (dy < 0.5)
    disc = dx.square() + dy.square() < 0.25
    cross = square & ((dx < 1 / 6) | (dy < 1 / 6))
    inside = torch.stack([square, disc, cross], 2)
    mine = inside.gather(2, kind[:, :, None, None, None].expand(-1, -1, 1, size, size))[:, :, 0]
    brightness = (0.6 + 0.4 * draw())[..., None, None]
    image = torch.where(mine & there[..., None, None], brightness, 0).amax(1, keepdim=True)
    image = image + noise * torch.randn(image.shape, generator=generator)
    return image, torch.cat([centre, extent], -1), kind.masked_fill(~there, NOTHING)


@dataclass(frozen=True)
class Boxes(Task):
    """The mechanism is the decoder's cross-attention of a small DETR."""

    name: ClassVar[str] = "boxes"
    gist: ClassVar[str] = "Box and name the shapes in an image, through a detector's cross-attention."
    takes: ClassVar[Mapping[str, frozenset[str]]] = {
        "CrossMixer": frozenset({"bidirectional"}),
        "TokenMixer": frozenset({"bidirectional", "cross"}),
    }
    metric: ClassVar[Metric] = Metric("mean IoU", "IoU", better=1, main="IoU", along="", loss="matching loss")
    defaults: ClassVar[Defaults] = Defaults(
        steps=300,
        batch=32,
        dim=48,
        depth=2,
        heads=4,
        lr=2e-3,
    )

    size: int = 32
    noise: float = 0.1
    heldout: int = 512

    def __post_init__(self) -> None:
        counts(self, size=16, heldout=1)
        number(self, least=0, noise=self.noise)

    def fits(self, card: Card) -> list[str]:
        lacking = super().fits(card)
        reads = getattr(card.builder, "reads", ())
        if not lacking and (set(reads) - set(get_args(Reads)) or (card.inputs is not None and not reads)):
            return ["needs more than queries, their places and an image, which is all that this task has"]
        return lacking

    @property
    def tokens(self) -> int:
        return sum((self.size // step) ** 2 for step in (4, 8, 16))

    def describe(self) -> str:
        return f"images of {self.size} x {self.size} pixels with up to 4 of {len(SHAPES)} shapes, generated"

    def model(self, mechanism: Mechanism, size: Size) -> nn.Module:
        specs = [
            spec if spec.own else Spec(tuple(map(_with_levels, spec.parts))) for spec in mechanism.layers(size.depth)
        ]
        return Detector(
            [build(spec, size.dim, size.heads, causal=False) for spec in specs],
            dim=size.dim,
            num_heads=size.heads,
            mlp_dim=size.mlp_dim,
            classes=len(SHAPES),
        )

    def example(self) -> Batch:
        return (torch.zeros(1, 1, self.size, self.size),)

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield shapes(batch, self.size, self.noise, generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, boxes, classes = batch
        return detection_loss(model(images), boxes, classes)

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: int, device: torch.device) -> tuple[dict[str, float], list[str]]:
        held = shapes(self.heldout, self.size, self.noise, torch.Generator().manual_seed(HELDOUT_SEED))
        total, count = 0.0, 0
        for images, boxes, classes in zip(*(z.to(device).split(batch) for z in held)):
            more, seen = box_quality(model(images), boxes, classes)
            total, count = total + more, count + seen
        return {self.metric.main: total / max(count, 1)}, []


def _with_levels(part: Part) -> Part:
    """The part, told how many maps there are if it asks for that."""
    asks = "num_levels" in catalog.card(part.name).options
    return Part(part.name, {"num_levels": 3, **part.options}) if asks else part
