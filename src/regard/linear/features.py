"""Feature maps of linear attention: phi(q) . phi(k) is the weight of a pair, before any sum is divided out."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import choice, number, refuse, whole


def elu_plus_one(x: Tensor) -> Tensor:
    """phi: x + 1 above 0, exp(x) below. (The strides of torch's elu differ between compiled and eager code.)"""
    return x.relu() + x.clamp(max=0).exp()


def hedgehog(y: Float[Tensor, "*n D"]) -> Float[Tensor, "*n 2D"]:
    """softmax over the 2D features [y ; -y]."""
    return torch.cat([y, -y], -1).softmax(-1)


def dpfp(x: Float[Tensor, "*n D"], nu: int) -> Float[Tensor, "*n F"]:
    """z_i z_{i-j} for j = 1 .. nu, with z = [relu(x) ; relu(-x)] in a circle: F = 2 D nu, never negative."""
    z = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([z * z.roll(j, -1) for j in range(1, nu + 1)], -1)


def squares(x: Float[Tensor, "*n D"]) -> tuple[Float[Tensor, "*n D"], Float[Tensor, "*n P"]]:
    """x_i^2, and x_i x_j of all i < j."""
    # Not by whole rows, as `pair_products` does: compiled, those have other strides.
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device).unbind()
    return x.square(), x[..., i] * x[..., j]


def taylor(x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n F"]:
    """exp's series to the second term: phi(a) . phi(b) = 1 + s + s^2 / 2 with s = a . b / sqrt(D)."""
    x = x * x.shape[-1] ** -0.25
    same, mixed = squares(x)
    return torch.cat([torch.ones_like(x[..., :1]), x, same / math.sqrt(2), mixed], -1)


def quadratic(u: Float[Tensor, "*n D"]) -> Float[Tensor, "*n F"]:
    """phi(a) . phi(b) = (a . b)^2 / D."""
    same, mixed = squares(u * u.shape[-1] ** -0.25)
    return torch.cat([same, math.sqrt(2) * mixed], -1)


class FeatureMap(nn.Module):
    """A map of queries or keys, the same for all heads. Subclasses give `forward` and how many features there are.

    Args:
        width: D.

    Shapes: x (B, H, T, D) -> (B, H, T, F), in the dtype of x.
    """

    positive = True
    """Whether no product of two features vectors is negative, so that their sums may be divided by."""
    features: int
    """F."""

    def __init__(self, width: int) -> None:
        super().__init__()
        whole(self, width=width)
        self.width = self.features = width

    def extra_repr(self) -> str:
        return f"{self.width} -> {self.features}"


def applied(linear: nn.Linear, x: Tensor) -> Tensor:
    """In the dtype of x."""
    return F.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))


class EluPlusOne(FeatureMap):
    """elu(x) + 1."""

    def forward(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T F"]:
        return elu_plus_one(x)


class Hedgehog(FeatureMap):
    """softmax([y ; -y]) with y = factor (W x + b), W = 1 and b = 0 at the start."""

    def __init__(self, width: int, factor: float = 2.0) -> None:
        super().__init__(width)
        number(self, above=0, factor=factor)
        self.factor, self.features = factor, 2 * width
        self.linear = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T F"]:
        return hedgehog(self.factor * applied(self.linear, x))


class T2R(FeatureMap):
    """relu(W x), of `features` rows; default D."""

    def __init__(self, width: int, features: int | None = None) -> None:
        super().__init__(width)
        self.features = width if features is None else features
        whole(self, features=self.features)
        self.linear = nn.Linear(width, self.features, bias=False)

    def forward(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T F"]:
        return applied(self.linear, x).relu()


class DPFP(FeatureMap):
    """Products of neighbours in the circle of positive and negative parts, at distances up to nu."""

    def __init__(self, width: int, nu: int = 4) -> None:
        super().__init__(width)
        whole(self, most=2 * width, nu=nu)
        self.nu, self.features = nu, 2 * width * nu

    def forward(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T F"]:
        return dpfp(x, self.nu)


class Taylor(FeatureMap):
    """1 + s + s^2 / 2 in place of exp(s), which is above 0 for all s."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.features = 1 + width + width * (width + 1) // 2

    def forward(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T F"]:
        return taylor(x)


class Rebased(FeatureMap):
    """The square of the product of normalised vectors, which a learned scale and offset move."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.features = width * (width + 1) // 2
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T F"]:
        gamma, beta = (p.to(x.dtype) for p in (self.norm.weight, self.norm.bias))
        return quadratic(F.layer_norm(x, (self.width,), gamma, beta, self.norm.eps))


class Hadamard(FeatureMap):
    """The product of two linear maps, entry by entry; it may be negative."""

    positive = False

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.one, self.other = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T F"]:
        return applied(self.one, x) * applied(self.other, x)


Feature = Literal["elu", "hedgehog", "t2r", "dpfp", "taylor", "rebased", "hadamard"]
MAPS: dict[str, Callable[[int], FeatureMap]] = {
    "elu": EluPlusOne,
    "hedgehog": Hedgehog,
    "t2r": T2R,
    "dpfp": DPFP,
    "taylor": Taylor,
    "rebased": Rebased,
    "hadamard": Hadamard,
}


def feature_map(who: object, feature: str | Callable[[int], FeatureMap], width: int) -> FeatureMap:
    """The map of that name, or what the function makes for this width.

    Raises:
        ValueError: an unknown name.
        TypeError: what makes no `FeatureMap`.
    """
    if isinstance(feature, str):
        choice(who, get_args(Feature), feature=feature)
        return MAPS[feature](width)
    made = feature(width) if callable(feature) else feature
    if not isinstance(made, FeatureMap):
        wanted = "a name, or a function of D that makes a FeatureMap"
        refuse(who, "feature", "makes no feature map", type(made).__name__, wanted, error=TypeError)
    return made
