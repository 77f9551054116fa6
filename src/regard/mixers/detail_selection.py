"""Which parts of an image are worth a closer look: what attention has put on a small copy of it says so."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import fits, number, refuse, whole
from regard.pipeline.function import attention


def grid_of(who: object, name: str, places: int) -> int:
    """g of a square map of g x g places; any other number of places raises ValueError."""
    g = math.isqrt(max(places, 0))
    if g * g != places or g == 0:
        refuse(who, name, "has places that make no square map", places, "1, 4, 9, 16, ...")
    return g


def resize_table(table: Float[Tensor, "P D"], detail_grid: int) -> Float[Tensor, "N D"]:
    """A table for the places of a square map, as one for detail_grid x detail_grid: bicubic, in each channel alone.

    Of cosines and sines it makes what is not quite a rotation: their squares need not sum to 1.
    """
    fits("resize_table", "P D", table=table)
    whole("resize_table", detail_grid=detail_grid)
    g = grid_of("resize_table", "table", table.shape[0])
    z = table.T.unflatten(1, (g, g))[None]
    return F.interpolate(z, (detail_grid, detail_grid), mode="bicubic", align_corners=False)[0].flatten(1).T


def _inside(size: tuple[int, int], g: int) -> list[list[bool]]:
    """Which cells of a padded square map show the image, whose (width, height) is given."""
    width, height = size
    margin = int((abs(width - height) // 2) / max(width, height) * g)

    def shows(place: int) -> bool:
        return margin <= place < g - margin

    return [[shows(y if width > height else x) for x in range(g)] for y in range(g)]


@torch.no_grad()
def select_detail(
    weights: Float[Tensor, "B T P"],
    detail_grid: int,
    *,
    threshold: float = 64,
    cells: int = 9,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Bool[Tensor, "B T N"]:
    """The detail tokens, of detail_grid x detail_grid, in the cells on which a row's weights are large. No gradient.

    Args:
        weights: of each row on the places of a square map, summed over heads.
        threshold: of weights that are scaled to 0 .. 255, a row's least to its largest; those above it count.
        cells: the map is cut into cells x cells, of which each is chosen as a whole.
        sizes: (width, height) of each image, where images were padded to squares: the margins don't count.
    """
    sized = fits("select_detail", "B T P", weights=weights)
    whole("select_detail", detail_grid=detail_grid, cells=cells)
    number("select_detail", least=0, most=255, threshold=threshold)
    g, w = grid_of("select_detail", "weights", sized["P"]), weights.detach()
    if sizes is not None:
        if len(sizes) != len(w) or any(min(size) < 1 for size in sizes):
            refuse("select_detail", "sizes", "are not of these images", sizes, f"{len(w)} of (width, height)")
        inside = torch.tensor([_inside(size, g) for size in sizes], dtype=torch.bool, device=w.device)
        w = w * inside.reshape(len(w), 1, g * g)
    low, high = w.amin(2, keepdim=True), w.amax(2, keepdim=True)
    bits = (w - low) / (high - low) * 255 > threshold  # 0 / 0 where all are alike: none
    pooled = F.adaptive_max_pool2d(bits.reshape(-1, 1, g, g).float(), cells)[:, 0] > 0
    cell = torch.arange(detail_grid, device=w.device) * cells // detail_grid
    return pooled[:, cell[:, None], cell].reshape(*w.shape[:2], -1)


@torch.no_grad()
def weights_on(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    seen: Bool[Tensor, "B L S"],
    places: tuple[int, int],
) -> Float[Tensor, "B L P"]:
    """Softmax weights of these queries on keys from the first place to the last, summed over heads. No gradient.

    The weights are attention to values that name their places, so that those on other keys are never formed.
    """
    B, group, (start, stop) = q.shape[0], q.shape[1] // k.shape[1], places
    names = torch.eye(k.shape[2], dtype=q.dtype, device=q.device)[:, start:stop].expand(B, 1, -1, -1)
    total = q.new_zeros(B, q.shape[2], stop - start)
    for h in range(q.shape[1]):
        one = attention(q[:, h, None], k[:, h // group, None], names, mask=seen[:, None])
        total = total + one[:, 0]
    return total
