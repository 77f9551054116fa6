"""Around neighborhood attention: its log-sum-exp, keys that every query sees, and DiNAT's dilations."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from regard.checks import checked, fits, refuse, whole
from regard.kernels import neighborhood as kernel
from regard.kernels.check import check_inputs
from regard.kernels.finite import cleaned
from regard.kernels.problem import Problem
from regard.masks import neighborhood as neighborhood_mask
from regard.masks.grids import Neighborhood
from regard.tracing import as_it_is


class WithSum(NamedTuple):
    """Outputs, and the log of the sum of exponentials of each query's scaled scores."""

    out: Float[Tensor, "B H X *sizes V"]
    lse: Float[Tensor, "B H X *sizes"]


@checked()
def neighborhood_with_lse(
    q: Float[Tensor, "B H X *sizes D"],
    k: Float[Tensor, "B G X *sizes D"],
    v: Float[Tensor, "B G X *sizes V"],
    *,
    bias: Float[Tensor, " H *differences"] | None = None,
    scale: float | None = None,
    extra_keys: Float[Tensor, "B G E D"] | None = None,
    extra_values: Float[Tensor, "B G E V"] | None = None,
    **axes: Any,
) -> WithSum:
    """`neighborhood_attention`, of the same arguments, and the log-sum-exps, with which it merges with attention to
    other keys: softmax over two sets of keys is that over each, weighted by exp(lse).

    Both outputs have gradients. The scores of all windows are kept for them.
    """
    p, extra = posed("neighborhood_with_lse", q, k, v, axes, bias, scale, extra_keys, extra_values)
    with as_it_is(q.device):
        clean, hit = cleaned(p)
        both = kernel.with_lse(clean, bias, extra)
    out, lse = (z.masked_fill(hit[..., None] if z.dim() == 4 else hit, math.nan) for z in both)
    lse = spoilt(lse[..., None], extra_keys, extra_values)[..., 0]
    sizes = q.shape[2:-1]
    return WithSum(spoilt(out, extra_keys, extra_values).unflatten(2, sizes), lse.unflatten(2, sizes))


def posed(
    who: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Mapping[str, Any],
    bias: Tensor | None,
    scale: float | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
) -> tuple[Problem, kernel.Extra | None]:
    """The problem that is asked, looked at, and the extra keys with zeros for what is not finite."""
    mask = neighborhood_mask(q.shape[2:-1], **axes)
    if bias is not None:
        fits(who, f"H {' '.join(map(str, differences(who, mask)))}", {"H": q.shape[1]}, bias=bias)
    if (extra_keys is None) != (extra_values is None) or (
        extra_keys is not None and extra_values is not None and extra_keys.shape[2] != extra_values.shape[2]
    ):
        refuse(who, "extra_keys", "differ in number from extra_values", _number(extra_keys), _number(extra_values))
    flat_q, flat_k, flat_v = (z.flatten(2, -2) for z in (q, k, v))
    check_inputs(flat_q, flat_k, flat_v)
    p = Problem(flat_q, flat_k, flat_v, int(q.shape[-1]) ** -0.5 if scale is None else scale, mask)
    if extra_keys is None or extra_values is None:
        return p, None
    keys, values = (z.masked_fill(~z.detach().isfinite(), 0) for z in (extra_keys, extra_values))
    return p, kernel.Extra(keys, values)


def _number(extra: Tensor | None) -> str:
    return "none" if extra is None else f"{extra.shape[2]} of them"


def spoilt(out: Float[Tensor, "B H T V"], *extra: Tensor | None) -> Float[Tensor, "B H T V"]:
    """NaN in all rows of heads whose extra keys or values are not finite: every query sees them."""
    for z in extra:
        if z is not None:
            bad = ~z.detach().isfinite().flatten(2).all(-1)
            hit = bad.repeat_interleave(out.shape[1] // z.shape[1], 1)
            out = out.masked_fill(hit[..., None, None], math.nan)
    return out


def differences(who: object, mask: Neighborhood) -> list[int]:
    """How many differences of place there are on each axis, 2 k - 1; refuses windows that have no bias."""
    if any(axis.stride > 1 or axis.causal or axis.window % 2 == 0 for axis in mask.axes):
        refuse(who, "bias", "does not go with this window", repr(mask), "odd windows, stride 1 and no causal axis")
    return [2 * axis.window - 1 for axis in mask.axes]


def alternating_dilations(depth: int, side: int, window: int = 7) -> list[int]:
    """The dilations of a stage's blocks as in DiNAT: 1 and the largest that fits the map, in turn.

    Args:
        depth: blocks of the stage.
        side: of its maps, the shorter one.
    """
    whole("alternating_dilations", depth=depth, side=side, window=window)
    return [1 if n % 2 == 0 else max(1, side // window) for n in range(depth)]
