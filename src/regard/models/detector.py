"""A small DETR: a convolutional stem, an encoder and a decoder of any mechanism, and the matching that trains it.

    queries look at feature maps through the cross-attention under test, layer by layer, and refine a box each
    loss: predicted and true boxes are matched one to one at least cost; class, L1 and generalised IoU of the pairs

Carion et al. 2020, "End-to-End Object Detection with Transformers" (arXiv 2005.12872), for matching and loss; boxes are
refined from layer to layer as in Deformable DETR. Boxes are (cx, cy, w, h), in [0, 1]. Matching needs scipy.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.detection.places import Reads, pixel_centres, sine_embedding
from regard.pipeline.layer import Attention

NOTHING = -1
"""The class of a place in a list of true boxes that holds none."""


class Detections(NamedTuple):
    """What every decoder layer says of every query; the last layer's word counts."""

    logits: Float[Tensor, "layers B Q classes+1"]
    """The last class is "nothing"."""
    boxes: Float[Tensor, "layers B Q 4"]


# --- boxes ---------------------------------------------------------------------------------------------------


def corners(boxes: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b 4"]:
    """(cx, cy, w, h) as (left, top, right, bottom)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def overlap(
    one: Float[Tensor, "*b 4"], other: Float[Tensor, "*b 4"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """IoU and generalised IoU of boxes (cx, cy, w, h), pair by pair."""
    a, b = corners(one), corners(other)

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(-1)

    both = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    either = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    iou = both / either.clamp(min=1e-9)
    return iou, iou - (hull - either) / hull.clamp(min=1e-9)


# --- matching and loss ---------------------------------------------------------------------------------------


@torch.no_grad()
def match(
    logits: Float[Tensor, "B Q classes+1"],
    boxes: Float[Tensor, "B Q 4"],
    true_boxes: Float[Tensor, "B N 4"],
    classes: Int[Tensor, "B N"],
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Which query (second) stands for which true box (third) of which image (first): the assignment of least cost."""
    from scipy.optimize import linear_sum_assignment

    chance = logits.float().softmax(-1)
    index = classes.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
    distance = (boxes[:, :, None] - true_boxes[:, None]).abs().sum(-1)
    generalised = overlap(boxes[:, :, None], true_boxes[:, None])[1]
    # A diverged model is told by its loss, not by an assignment that cannot be found.
    cost = (5 * distance - 2 * generalised - chance.gather(2, index)).nan_to_num(1e6, 1e6, -1e6).cpu()
    pairs = []
    for image, row in enumerate(classes.cpu()):
        real = (row != NOTHING).nonzero()[:, 0]
        query, found = linear_sum_assignment(cost[image][:, real].numpy())
        pairs += [(image, int(q), int(real[n])) for q, n in zip(query, found)]
    images, queries, truths = torch.tensor(pairs, dtype=torch.long, device=logits.device).reshape(-1, 3).T
    return images, queries, truths


def detection_loss(
    detections: Detections,
    true_boxes: Float[Tensor, "B N 4"],
    classes: Int[Tensor, "B N"],
    *,
    nothing_weight: float = 0.2,
) -> Float[Tensor, ""]:
    """Class + 5 L1 + 2 (1 - GIoU) of the matched pairs, the mean over decoder layers, each matched by itself.

    Queries without a true box are to say "nothing", which counts `nothing_weight` times as much as a class.
    """
    total = detections.logits.new_zeros(())
    for logits, boxes in zip(*detections):
        image, query, truth = match(logits, boxes, true_boxes, classes)
        nothing = logits.shape[-1] - 1
        label = torch.full(logits.shape[:2], nothing, device=logits.device)
        label[image, query] = classes[image, truth]
        weight = logits.new_ones(nothing + 1)
        weight[nothing] = nothing_weight
        found, wanted = boxes[image, query], true_boxes[image, truth]
        count = max(len(image), 1)
        total = total + F.cross_entropy(logits.flatten(0, 1), label.flatten(), weight)
        total = total + 5 * (found - wanted).abs().sum() / count + 2 * (1 - overlap(found, wanted)[1]).sum() / count
    return total / len(detections.logits)


@torch.no_grad()
def box_quality(
    detections: Detections, true_boxes: Float[Tensor, "B N 4"], classes: Int[Tensor, "B N"]
) -> tuple[float, int]:
    """The sum of IoUs over true boxes and surplus detections, and how many there are: their ratio is the mean IoU.

    A detection is a query whose likeliest class is not "nothing". It may stand for one true box of its class; a true
    box that none stands for, and a detection that stands for none, count as IoU 0.
    """
    from scipy.optimize import linear_sum_assignment

    total, count = 0.0, 0
    said = detections.logits[-1].argmax(-1)
    for guess, boxes, truth, label in zip(said, detections.boxes[-1], true_boxes, classes):
        detected, real = guess != detections.logits.shape[-1] - 1, label != NOTHING
        iou = overlap(boxes[detected][:, None], truth[real])[0]
        iou = torch.where(guess[detected][:, None] == label[real], iou, 0).cpu()
        rows, columns = linear_sum_assignment(iou.numpy(), maximize=True)
        hits = iou[rows, columns]
        total += float(hits.sum())
        count += len(label[real]) + int(detected.sum()) - int((hits > 0).sum())
    return total, count


# --- the model -----------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """Images to maps of 1/4, 1/8, ... of their size, as tokens level by level."""

    def __init__(self, channels: int, dim: int, levels: int):
        super().__init__()
        first = [nn.Conv2d(channels, dim // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.GELU()]
        self.first = nn.Sequential(*first, nn.Conv2d(dim, dim, 3, 1, 1))
        self.down = nn.ModuleList(nn.Sequential(nn.GELU(), nn.Conv2d(dim, dim, 3, 2, 1)) for _ in range(levels - 1))
        self.norm = nn.LayerNorm(dim)
        self.level = nn.Parameter(torch.zeros(levels, dim))

    def forward(
        self, images: Float[Tensor, "B C Y X"]
    ) -> tuple[Float[Tensor, "B S M"], Float[Tensor, "B S M"], list[tuple[int, int]]]:
        """The tokens, the embedding of their places, and the maps' sizes."""
        maps = [self.first(images)]
        for down in self.down:
            maps.append(down(maps[-1]))
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        tokens = self.norm(torch.cat([m.flatten(2).mT for m in maps], 1))
        dim = tokens.shape[-1]
        place = sine_embedding(pixel_centres(shapes, device=images.device), dim).to(tokens.dtype)
        level = torch.cat([one.expand(Y * X, dim) for one, (Y, X) in zip(self.level, shapes)])
        return tokens + level, place.expand_as(tokens), shapes


class MLP(nn.Sequential):
    """A GELU MLP on a normalised copy that is added back."""

    def __init__(self, dim: int, width: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def look(
    mixer: nn.Module,
    x: Float[Tensor, "B T M"],
    own_place: Float[Tensor, "*b T M"],
    context: Float[Tensor, "B S M"] | None,
    told: Mapping[Reads, Any],
) -> Float[Tensor, "B T M"]:
    """What x finds in context, or among its own tokens, through any mechanism: it is told what it `reads`."""
    reads = getattr(mixer, "reads", ())
    if not reads:
        return mixer(x + own_place) if context is None else mixer(x + own_place, context + told["place"])
    query = x if "place" in reads else x + own_place
    return mixer(query, x if context is None else context, *(told[name] for name in reads))


class EncoderLayer(nn.Module):
    """Pixels of all levels look at each other, through any TokenMixer, or a CrossMixer that `look` can serve."""

    def __init__(self, mixer: nn.Module, dim: int, mlp_dim: int):
        super().__init__()
        self.norm, self.mixer, self.mlp = nn.LayerNorm(dim), mixer, MLP(dim, mlp_dim)

    def forward(self, x: Tensor, place: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        centres = pixel_centres(shapes, device=x.device, dtype=x.dtype).expand(len(x), -1, -1)
        told = {"reference": centres[:, :, None], "point": centres, "shapes": shapes, "place": place}
        seen = look(self.mixer, self.norm(x), place, None, told)  # type: ignore[arg-type]
        return self.mlp(x + seen)


class DecoderLayer(nn.Module):
    """Queries look at each other, then at the maps through the cross-attention under test."""

    def __init__(self, cross: nn.Module, dim: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention, self.cross, self.mlp = Attention(dim, num_heads), cross, MLP(dim, mlp_dim)

    def forward(
        self,
        x: Float[Tensor, "B Q M"],
        own_place: Float[Tensor, "B Q M"],
        box: Float[Tensor, "B Q 4"],
        memory: Float[Tensor, "B S M"],
        place: Float[Tensor, "B S M"],
        shapes: Sequence[tuple[int, int]],
    ) -> Float[Tensor, "B Q M"]:
        """`box` is what each query believes so far: where to look, for mechanisms that ask."""
        x = x + self.attention(self.norms[0](x) + own_place)
        told = {"reference": box[:, :, None], "point": box[..., :2], "shapes": shapes, "place": place}
        seen = look(self.cross, self.norms[1](x), own_place, memory, told)  # type: ignore[arg-type]
        return self.mlp(x + seen)


class Detector(nn.Module):
    """Finds boxes in images.

    Args:
        decoder: the cross-attention of each decoder layer: any module called with (x, context), such as softmax
            attention, and what it names in `reads` (see `regard.detection.places`).
        encoder: for the pixels, which look at each other: modules called with x, or also with what they name in
            `reads`; none by default.
        classes: how many, without "nothing".
        queries: how many boxes it can find.
        levels: how many maps, the first of a quarter of the image's size.
    """

    def __init__(
        self,
        decoder: Sequence[nn.Module],
        *,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        classes: int,
        encoder: Sequence[nn.Module] = (),
        queries: int = 12,
        levels: int = 3,
        channels: int = 1,
    ):
        super().__init__()
        if not decoder:
            raise ValueError("Detector: decoder must hold at least one cross-attention (got none)")
        if dim % 8:
            raise ValueError(f"Detector: dim must be a multiple of 8 to embed boxes (got {dim})")
        self.stem = Stem(channels, dim, levels)
        self.encoder = nn.ModuleList(EncoderLayer(mixer, dim, mlp_dim) for mixer in encoder)
        self.decoder = nn.ModuleList(DecoderLayer(cross, dim, num_heads, mlp_dim) for cross in decoder)
        self.content = nn.Parameter(0.02 * torch.randn(queries, dim))
        # Boxes start small, on a grid over the image.
        side = math.ceil(queries**0.5)
        centres = pixel_centres([(side, side)])[:queries]
        self.start = nn.Parameter(torch.cat([centres.logit(), torch.full((queries, 2), 0.25).logit()], -1))
        self.place = nn.Linear(2 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, classes + 1)
        self.move = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 4)) for _ in decoder)
        for move in self.move:
            nn.init.zeros_(move[-1].weight)  # type: ignore[index]
            nn.init.zeros_(move[-1].bias)  # type: ignore[index]

    @property
    def mixers(self) -> list[nn.Module]:
        """The mechanisms' own modules."""
        encoder, decoder = list[Any](self.encoder), list[Any](self.decoder)
        return [*(layer.mixer for layer in encoder), *(layer.cross for layer in decoder)]

    def forward(self, images: Float[Tensor, "B C Y X"]) -> Detections:
        tokens, place, shapes = self.stem(images)
        for layer in self.encoder:
            tokens = layer(tokens, place, shapes)
        x = self.content.expand(len(images), -1, -1)
        at = self.start.expand(len(images), -1, -1)
        logits, boxes = [], []
        for layer, move in zip(self.decoder, self.move):
            box = at.sigmoid()
            own_place = self.place(torch.cat([sine_embedding(z, tokens.shape[-1]) for z in box.split(2, -1)], -1))
            x = layer(x, own_place, box, tokens, place, shapes)
            z = self.norm(x)
            at = at + move(z)
            logits.append(self.classify(z))
            boxes.append(at.sigmoid())
            at = at.detach()  # each layer learns its own step
        return Detections(torch.stack(logits), torch.stack(boxes))
