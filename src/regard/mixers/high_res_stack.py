"""Layers of `HighResAttention` behind one another: each reads what the one before has selected, and selects anew."""

from collections.abc import Sequence
from typing import NamedTuple, cast

from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import refuse, whole
from regard.masks import Mask
from regard.mixers.detail_selection import grid_of
from regard.mixers.high_res import HighResAttention


class Looked(NamedTuple):
    """What comes of a stack."""

    out: Float[Tensor, "B T M"]
    chosen: list[Bool[Tensor, "B T N"]]
    """By every layer from the first that selects."""


class HighResStack(nn.Module):
    """A tiny language model's body: attention and whatever stands behind it, each layer with a residual.

    Args:
        layers: of one `image`.
        first: the layer that is the first to select; those up to it read no detail. The code's is 8 of 32.
        norms: before each attention; None: none.
        after: what each layer does then, as `z + mlp(norm(z))`; None: nothing.
    """

    def __init__(
        self,
        layers: Sequence[HighResAttention],
        *,
        first: int = 0,
        norms: Sequence[nn.Module] | None = None,
        after: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        whole(self, 0, first=first)
        if not layers:
            refuse(self, "layers", "are none", 0, "one or more")
        for name, parts in (("norms", norms), ("after", after)):
            if parts is not None and len(parts) != len(layers):
                refuse(self, name, "are not one for each layer", len(parts), str(len(layers)))
        self.first, self.layers = first, nn.ModuleList(layers)
        self.norms, self.after = (nn.ModuleList(z or [nn.Identity() for _ in layers]) for z in (norms, after))

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        detail: Float[Tensor, "B N M"],
        rows: Bool[Tensor, "B T"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "B T"] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Looked:
        """Run all layers. `rows`, `mask` and `sizes` are those of `HighResAttention.select`."""
        g, made = grid_of(self, "detail", detail.shape[1]), list[Tensor]()
        for at, (norm, layer, after) in enumerate(zip(self.norms, self.layers, self.after, strict=True)):
            layer, z = cast(HighResAttention, layer), norm(x)
            x = after(x + layer(z, detail, made[-1] if made else None, mask=mask))
            if at >= self.first:
                made.append(layer.select(z, g, rows, mask=mask, sizes=sizes))
        return Looked(x, made)
