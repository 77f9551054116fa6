"""Shapes: a sample's pattern says where to look; name the figure that stands there, and the pattern that it wears.

    = | o        The sample, top left, is filled with horizontal stripes: they ask for the figure on the right.
    --+--        Vertical ones ask for the one below, and a plain sample for the one across.
    + | x

It takes texture (of the sample and of the figure), shape, and place; and what is seen in one corner decides what is
read in another. A mechanism that sees its surroundings alone can name a lone figure, and guesses among several. Of
training images a quarter shows one figure, a quarter two, and half three, all of them upright, large and clear.
Held-out images are like those, or distorted in ways that training never shows: turned, small, faint, noisy.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.checks import refuse
from regard.models.mixer import Mechanism
from regard.tasks import HELDOUT_SEED, Batch, Defaults, Metric, Size, Task, counts
from regard.tasks._pictures import classifier

FIGURES = ("disc", "ring", "cross", "triangle")
PATTERNS = ("horizontal", "vertical", "plain")
"""Of a sample the n-th asks for the n-th place: on the right, below, across."""
DARK = 0.35
"""What a dark stripe has of a bright one."""
STRIDE = 4
"""Pixels a side of a token."""


@dataclass(frozen=True)
class Look:
    """How figures are drawn; the defaults are those of training."""

    turn: tuple[float, float] = (0.0, 0.25)
    """From and to which angle, in radians, either way."""
    radius: tuple[float, float] = (0.75, 0.95)
    """In halves of a quarter's side."""
    contrast: tuple[float, float] = (0.7, 1.0)
    noise: float = 0.05
    """The standard deviation of each pixel's, where a bright stripe is `contrast` above the ground."""


LOOKS = {
    "as trained": Look(),
    "turned": Look(turn=(0.4, 0.8)),
    "small": Look(radius=(0.6, 0.72)),
    "faint": Look(contrast=(0.45, 0.6)),
    "noisy": Look(noise=0.3),
}


@dataclass(frozen=True)
class Scenes:
    """What images show, before it is drawn. Figures stand at the places of their axis."""

    there: Bool[Tensor, "N 3"]
    kind: Int[Tensor, "N 3"]
    worn: Int[Tensor, "N 3"]
    asked: Int[Tensor, " N"]
    """The place that the sample asks for: that of a figure."""

    @property
    def classes(self) -> Int[Tensor, " N"]:
        """The asked figure's kind and pattern as one number."""
        kind, worn = (z.gather(1, self.asked[:, None])[:, 0] for z in (self.kind, self.worn))
        return kind * len(PATTERNS) + worn


def scenes(count: int, generator: torch.Generator) -> Scenes:
    """One, two, three and three figures in turn, at random places, and a sample that asks for one of them."""
    places = len(PATTERNS)
    order = torch.rand(count, places, generator=generator).argsort(1)
    kind = torch.randint(len(FIGURES), (count, places), generator=generator)
    worn = torch.randint(len(PATTERNS), (count, places), generator=generator)
    # The place of rank 0 always has a figure, and is asked for.
    there = order.argsort(1) <= (torch.arange(count) % 4).clamp(max=places - 1)[:, None]
    return Scenes(there, kind, worn, order[:, 0])


def figures(u: Float[Tensor, "*b Y X"], v: Float[Tensor, "*b Y X"]) -> Bool[Tensor, "4 *b Y X"]:
    """Where each figure is, in coordinates in which it fills -1 to 1."""
    r, a, b = (u.square() + v.square()).sqrt(), u.abs(), v.abs()
    ring = (r < 1) & (r > 0.55)
    cross = (torch.maximum(a, b) < 1) & (torch.minimum(a, b) < 0.36)
    triangle = (v < 0.75) & (v > 2 * a - 1)
    return torch.stack([r < 0.95, ring, cross, triangle])


def draw(seen: Scenes, size: int, look: Look, generator: torch.Generator) -> Float[Tensor, "N 1 size size"]:
    """The images, from about -0.5 to 1.5: two pixels bright, two dark where there are stripes, whatever the size."""
    count, places = seen.kind.shape
    half = size / 2

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    radius = between(*look.radius, places) * half / 2
    turn = between(*look.turn, places) * between(-1, 1, places).sign()
    corner = torch.tensor([[half, 0], [0, half], [half, half]])[..., None, None]
    centre_x, centre_y = (corner[:, axis] + half / 2 + between(-1, 1, places) * (half / 2 - radius) for axis in (0, 1))
    pixel = torch.arange(size) + 0.5
    x, y = pixel[None, :].expand(size, size), pixel[:, None].expand(size, size)
    dx, dy = (x - centre_x) / radius, (y - centre_y) / radius
    all_kinds = figures(turn.cos() * dx + turn.sin() * dy, turn.cos() * dy - turn.sin() * dx)
    kind = seen.kind[None, ..., None, None].expand(1, -1, -1, size, size)
    inside = all_kinds.gather(0, kind)[0] & seen.there[..., None, None]

    start = torch.randint(4, (2, count, places + 1, 1, 1), generator=generator)
    down, across = (((z.floor() + start[n]) / 2).floor() % 2 for n, z in enumerate((y, x)))
    every = torch.stack([down, across, torch.ones_like(down)])
    worn = torch.cat([seen.worn, seen.asked[:, None]], 1)[None, ..., None, None].expand(1, -1, -1, size, size)
    bright = DARK + (1 - DARK) * every.gather(0, worn)[0]

    far = torch.maximum((x - half / 2).abs(), (y - half / 2).abs())
    sample = torch.where(far < half / 2 - 1.5, bright[:, -1], 1.5 * (far < half / 2 - 0.5))
    shown = sample[:, None] + (inside * bright[:, :-1]).sum(1, keepdim=True)
    noisy = between(*look.contrast, 1) * shown + look.noise * torch.randn(shown.shape, generator=generator)
    return 2 * noisy - 0.5


class Read(nn.Module):
    """Two convolutions that halve the image, the same for all mechanisms: tokens of 4 x 4 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, dim // 2, 3, stride=2, padding=1)
        self.second = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm = nn.RMSNorm(dim)  # so that the tokens are heard beside learned positions

    def forward(self, x: Float[Tensor, "B 1 Y X"]) -> Float[Tensor, "B T M"]:
        return self.norm(self.second(F.gelu(self.first(x))).flatten(2).mT)


@dataclass(frozen=True)
class Shapes(Task):
    """Tokens of 4 x 4 pixels with learned positions, or a map of them; behind the layers stands the mean over them.

    A Pooler takes the place of that mean, behind layers of the baseline. A batch is images (B, 1, size, size) and
    classes (B,), kind times 3 plus pattern; a seed draws its own without end, and no run has that of held-out images.
    """

    name: ClassVar[str] = "shapes"
    gist: ClassVar[str] = "Name the figure and its pattern that a sample's pattern asks for."
    takes: ClassVar[Mapping[str, frozenset[str]]] = {
        kind: frozenset({"bidirectional"}) for kind in ("TokenMixer", "FeatureMixer", "Pooler")
    }
    metric: ClassVar[Metric] = Metric(
        "accuracy", "accuracy", better=1, main="mean", along="", loss="bits", percent=True
    )
    loss_scale: ClassVar[float] = 1 / math.log(2)
    defaults: ClassVar[Defaults] = Defaults(steps=600, batch=32, dim=48, depth=2, heads=4, lr=5e-3)

    size: int = 32
    """32, 64 or another multiple of 8."""
    heldout: int = 510
    """Held-out images of each look."""

    def __post_init__(self) -> None:
        counts(self, size=24, heldout=1)
        if self.size % (2 * STRIDE):
            refuse(self, "size", "is no multiple of 8", self.size, "such as 32 or 64")

    @property
    def side(self) -> int:
        """Tokens a side."""
        return self.size // STRIDE

    @property
    def tokens(self) -> int:
        return self.side**2

    def describe(self) -> str:
        return f"images of {self.size} x {self.size} pixels with a sample and up to {len(PATTERNS)} figures, generated"

    def model(self, mechanism: Mechanism, size: Size) -> nn.Module:
        classes = len(FIGURES) * len(PATTERNS)
        return classifier(mechanism, size, Read(size.dim), self.side, classes, baseline=self.baseline)

    def example(self) -> Batch:
        return (torch.zeros(1, 1, self.size, self.size),)

    def images(self, count: int, look: Look, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images of this look, and their classes."""
        seen = scenes(count, generator)
        return draw(seen, self.size, look, generator), seen.classes

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.images(batch, Look(), generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, classes = batch
        return F.cross_entropy(model(images).float(), classes)

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: int, device: torch.device) -> tuple[dict[str, float], list[str]]:
        generator, shares = torch.Generator().manual_seed(HELDOUT_SEED), {}
        for label, look in LOOKS.items():
            images, classes = self.images(self.heldout, look, generator)
            told = torch.cat([model(x.to(device)).argmax(-1).cpu() for x in images.split(batch)])
            shares[label] = (told == classes).double().mean().item()
        return {self.metric.main: sum(shares.values()) / len(shares), **shares}, []
