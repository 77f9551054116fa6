"""What several position schemes need: phases in full precision, distances, and checks of sizes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.stages import Rows


def work_dtype(z: Tensor) -> torch.dtype:
    """The dtype that biases and rotations of `z` are computed in: float32, or float64 for float64 inputs."""
    return torch.promote_types(z.dtype, torch.float32)


def frequencies(width: int, base: float, device: torch.device) -> Float[Tensor, "half"]:
    """w_a = base^(-2a / width) for a = 0 .. width/2 - 1, in the widest float that the device has.

    float64 because an angle is position * w_a: at position 10^6 float32 is off by some 0.06 rad.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return base ** (-torch.arange(0, width, 2, device=device, dtype=dtype) / width)


def angles(positions: Int[Tensor, "*b T"], w: Float[Tensor, "half"]) -> Float[Tensor, "*b T half"]:
    """position * w, one row a position. The integers are never stored in a type that rounds them."""
    return positions.to(w.dtype).unsqueeze(-1) * w


def distances(rows: Rows) -> Float[Tensor, "t s"]:
    """|i - j| as floats of the precision that biases are computed in."""
    return (rows.i.unsqueeze(-1) - rows.j).abs().to(work_dtype(rows.q))


def check_int(owner: str, name: str, value: object, least: int = 1) -> None:
    """Refuse what is no int >= least (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} has the wrong type (got {value!r}); expected an int >= {least}")
    if value < least:
        raise ValueError(f"{owner}: {name} is too small (got {value}); expected an int >= {least}")


def check_even(owner: str, name: str, value: object) -> None:
    """Refuse what is no even int >= 2: channels are used in pairs."""
    check_int(owner, name, value, least=2)
    if value % 2:  # type: ignore[operator]
        raise ValueError(f"{owner}: {name} is odd (got {value}); expected an even int, channels are used in pairs")


def check_above(owner: str, name: str, value: float, bound: float, *, inclusive: bool = False) -> None:
    """Refuse what is not a finite number > bound (>= bound where inclusive); NaN is refused too."""
    ok = (value >= bound if inclusive else value > bound) and value != float("inf")
    if not ok:
        sign = ">=" if inclusive else ">"
        raise ValueError(f"{owner}: {name} is out of range (got {value}); expected a finite number {sign} {bound:g}")


def check_width(owner: str, name: str, tensor: Tensor, width: int) -> None:
    """Refuse a tensor whose last axis isn't the width that the part was built for."""
    if tensor.shape[-1] != width:
        raise ValueError(
            f"{owner}: {name} has the wrong width (got shape {tuple(tensor.shape)}); expected width {width}"
        )


def check_heads(owner: str, q: Float[Tensor, "B H t D"], num_heads: int) -> None:
    """Refuse queries of another number of heads: a bias of one head would broadcast in silence."""
    if q.shape[1] != num_heads:
        raise ValueError(f"{owner}: q has the wrong number of heads (got {q.shape[1]}); expected {num_heads}")
