"""Linear maps and convolutions whose weight is divided by its largest singular value."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.tracing import recomputing

STEPS = 15
"""Power steps before the first pass, as torch takes them."""


class Spectral(nn.Module):
    """What they share: sigma = u^T W v, followed by one power step a call in training. u and v take no gradient, sigma
    does; its start is torch's."""

    weight: Tensor
    u: Tensor
    v: Tensor

    def _register(self) -> None:
        outputs, inputs = self.weight.flatten(1).shape
        self.register_buffer("u", torch.empty(outputs))
        self.register_buffer("v", torch.empty(inputs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Glorot uniform, as SAGAN's authors have it, and vectors that several steps have turned."""
        nn.init.xavier_uniform_(self.weight)
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        if hasattr(self, "v"):  # the parent resets what it has made
            self.u.copy_(F.normalize(nn.init.normal_(self.u), dim=0))
            self.v.copy_(F.normalize(self.u @ self.weight.flatten(1).to(self.u.dtype), dim=0))
            for _ in range(STEPS):
                self._step()

    def normalised(self) -> Tensor:
        """W / sigma."""
        if self.training and not recomputing():  # a checkpoint's second run finds them moved
            self._step()
        W = self.weight.flatten(1).to(torch.promote_types(self.weight.dtype, torch.float32))
        u, v = (z.clone().to(W.dtype) for z in (self.u, self.v))  # a later call must not write into this one's
        return (W / (u @ (W @ v))).to(self.weight.dtype).view_as(self.weight)

    @torch.no_grad()
    def _step(self) -> None:
        W = self.weight.flatten(1).to(self.u.dtype)
        self.u.copy_(F.normalize(W @ self.v, dim=0))
        self.v.copy_(F.normalize(self.u @ W, dim=0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As for every module, but that nothing rounds u and v."""
        before = {name: z for name, z in self._buffers.items() if z is not None}
        super()._apply(fn, recurse)
        for name, z in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype.itemsize < min(4, z.dtype.itemsize):
                self._buffers[name] = z.to(after.device)
        return self


class SpectralLinear(Spectral, nn.Linear):
    """W x / sigma."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self._register()

    def forward(self, x: Float[Tensor, "*b inputs"]) -> Float[Tensor, "*b outputs"]:
        out = x.reshape(-1, self.in_features) @ self.normalised().mT  # one product, whether or not gradients are kept
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)


class SpectralConv2d(Spectral, nn.Conv2d):
    """The same of a convolution that keeps the map's size, W a matrix of (outputs, inputs k k)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self._register()

    def forward(self, x: Float[Tensor, "B I Y X"]) -> Float[Tensor, "B O Y X"]:
        return F.conv2d(x, self.normalised(), self.bias, padding=self.kernel_size[0] // 2)
