"""HyperZZW's block: ten maps, global, local and gated, side by side in one bottleneck; no residual.

    K = x * W,   fast = IN(RGU_a(K) + RGU_b(x)),   m = IN(L x),   h = IN(channel gate(x)),   o = K @ fast
    maps: o, local_2(h; x), fast, K @ m, local_1(x; h), sigmoid(o) o, local_3(m; x), K @ h, local_4(x; m),
          interaction(o, x), and earlier blocks' maps        local(a; b): b under the kernel that a makes
    out = dropout(gelu(IN(1 x 1 of all maps)) + b)

The group standardisation in front of the activation was not in what could be read of the author's code: each map is
standardised by itself. GELU stands in the place of an activation that the code leaves to a setting. The author's blocks
widen, by 4, 3, 2, 2 and 2; the network around them is left to the caller.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import checked, number, refuse, whole
from regard.vision.coordinate_kernel import standardised
from regard.vision.hyper_gates import HyperChannelGate, HyperInteraction
from regard.vision.hyperzzw import GlobalHyperZZW, hyper_product
from regard.vision.hyperzzw_local import LocalHyperZZW


class Blocked(NamedTuple):
    out: Float[Tensor, "B O S S"]
    kernel: Float[Tensor, "C S S"]
    """The slow network's, for `slow_loss`."""


def slow_loss(kernels: Sequence[Float[Tensor, "_c S S"]]) -> Float[Tensor, ""]:
    """How far the blocks' global kernels are from one another: mean squares, summed over pairs.

    Channels of the narrower are repeated, as often as the wider has more.

    Raises:
        ValueError: channels of which a later block's are no multiple.
    """
    total = kernels[0].new_zeros(())
    for i, deep in enumerate(kernels):
        for shallow in kernels[:i]:
            if len(deep) % len(shallow):
                refuse(
                    "slow_loss", "kernels", "are no multiples", f"{len(shallow)} and {len(deep)}", "channels that are"
                )
            total = total + (shallow.tile(len(deep) // len(shallow), 1, 1) - deep).square().mean()
    return total


class HyperZZWBlock(nn.Module):
    """The branches, joined.

    Args:
        dim: C.
        grid: of the slow kernel, grid x grid; maps are square, of any size.
        kernel_sizes: of the four local branches.
        expansion: times C, the outputs.
        earlier: channels of earlier maps that `forward` is given, repeated to C each.
        hidden, layers, frequency: of the slow network of the global kernel; local ones have half as many channels.
        dropout: of whole maps, in training.

    Shapes: x (B, C, S, S) -> (B, C * expansion, S, S).
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: int = 32,
        kernel_sizes: Sequence[int] = (3, 9, 5, 7),
        expansion: int = 1,
        earlier: Sequence[int] = (),
        hidden: int = 64,
        layers: int = 2,
        frequency: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, expansion=expansion)
        number(self, least=0, most=1, dropout=dropout)
        if len(kernel_sizes) != 4:
            refuse(self, "kernel_sizes", "are not four", tuple(kernel_sizes), "one for each local branch")
        for n in earlier:
            if n < 1 or dim % n:
                refuse(self, "earlier", "does not divide dim", n, f"channels of which {dim} is a multiple")
        self.dim, self.earlier = dim, tuple(earlier)
        self.branch = GlobalHyperZZW(dim, grid=grid, hidden=hidden, layers=layers, frequency=frequency)
        self.mixer, self.gate = nn.Conv2d(dim, dim, 1), HyperChannelGate(dim, frequency=frequency)
        half = max(1, hidden // 2)
        self.locals = nn.ModuleList(
            LocalHyperZZW(dim, kernel_size=k, hidden=half, frequency=frequency) for k in kernel_sizes
        )
        self.interaction = HyperInteraction(dim, grid=grid, hidden=hidden, frequency=frequency)
        self.join = nn.Conv2d(dim * (10 + len(self.earlier)), dim * expansion, 1)
        self.dropout, self.bias = nn.Dropout2d(dropout), nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for conv in (self.mixer, self.join):
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.bias)

    def maps(self, x: Float[Tensor, "B C S S"], *earlier: Float[Tensor, "B _c S S"]) -> list[Tensor]:
        """What is joined."""
        kernel = self.branch.kernel(x)
        fast = standardised(self.branch.slow_gate(kernel) + self.branch.fast_gate(x))
        mixed, gated = standardised(self.mixer(x)), standardised(self.gate(x))
        out, of_mixed, of_gated = (hyper_product(kernel.to(z.dtype), z) for z in (fast, mixed, gated))
        pairs = ((x, gated), (gated, x), (mixed, x), (x, mixed))
        first, second, third, fourth = (f(a, b.to(a.dtype)) for f, (a, b) in zip(self.locals, pairs, strict=True))
        wide = [z.repeat(1, self.dim // z.shape[1], 1, 1) for z in earlier]
        glu, meeting = out.sigmoid() * out, self.interaction(out, x.to(out.dtype))
        return [out, second, fast, of_mixed, first, glu, third, of_gated, fourth, meeting, *wide]

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"], *earlier: Tensor) -> Float[Tensor, "B O Y X"]:
        if (got := tuple(z.shape[1] for z in earlier)) != self.earlier:
            refuse(self, "earlier", "are other maps than it was built for", got, f"channels {self.earlier}")
        maps = self.maps(x, *earlier)
        joined = self.join(torch.cat([z.to(maps[0].dtype) for z in maps], 1))
        return self.dropout(F.gelu(standardised(joined)) + self.bias.to(joined.dtype))

    def with_kernel(self, x: Float[Tensor, "B C S S"], *earlier: Tensor) -> Blocked:
        """The same, and the slow kernel beside it."""
        return Blocked(self(x, *earlier), self.branch.slow(sizes=x.shape[2:]))
