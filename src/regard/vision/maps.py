"""What mixers of feature maps share."""

from jaxtyping import Float
from torch import Tensor


def check_map(who: str, x: Tensor, channels: int, axes: int | None = 2, *, name: str = "x") -> None:
    """Raises ValueError unless x is (batch, channels, *sizes) with that many axes (None: one or more)."""
    if x.ndim < 3 or x.shape[1] != channels or (axes is not None and x.ndim != axes + 2):
        sizes = "*sizes" if axes is None else ", ".join(("Z", "Y", "X")[-axes:])
        raise ValueError(f"{who}: {name} has shape {tuple(x.shape)}; expected (batch, {channels}, {sizes})")


def to_tokens(x: Float[Tensor, "B C *sizes"]) -> Float[Tensor, "B N C"]:
    """Places in row-major order as tokens."""
    return x.flatten(2).mT


def to_map(tokens: Float[Tensor, "B N C"], sizes: tuple[int, ...]) -> Float[Tensor, "B C *sizes"]:
    """The reverse."""
    return tokens.mT.unflatten(2, sizes)
