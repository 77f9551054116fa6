"""What layers of timm's kind ask of regard, as functions that torch.fx leaves whole: a graph holds each as one call.

What they look at, masks that may be None and how many tokens there are, is not known while a graph is drawn.
"""

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional as F

from regard.checks import foreign, refuse
from regard.integrations.slots import Parts
from regard.integrations.torch_mha import check_call
from regard.integrations.transformers_call import Call, same_dtype
from regard.kernels import Problem, execute
from regard.kernels.check import check_bias, check_inputs, check_mask
from regard.masks import causal
from regard.stages import Mix, Rows

WHO = "Attention"


@fx.wrap
def attend(
    parts: Parts,
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    x: Float[Tensor, "B T M"] | None,
    *,
    scale: float,
    drop: nn.Dropout | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Float[Tensor, "#B #H #T #S"] | None = None,
    score_mix: nn.Linear | None = None,
    weight_mix: nn.Linear | None = None,
    cross: bool = False,
) -> Float[Tensor, "B T H V"]:
    """The heads' outputs, gated by the tokens `x`.

    Args:
        attn_mask: True = may attend, or numbers to add; it counts for nothing where `is_causal`, as in timm.
        score_mix, weight_mix: what the layer itself does across heads before and after its softmax.
    """
    q, k, v = same_dtype(q, k, v)
    check_inputs(q, k, v)
    (B, H, T, _), S = q.shape, k.shape[2]
    mask = None
    if attn_mask is not None and not is_causal:
        attn_mask = _square(attn_mask, (B, H, T, S))
        if attn_mask.dtype == torch.bool:
            mask = attn_mask.expand(-1, -1, T, S)
        else:
            bias = attn_mask
    problem = Problem(
        q=q,
        k=k,
        v=v,
        scale=float(scale),
        mask=causal() if is_causal else check_mask(mask, B, H, T, S, q.device),
        bias=bias,
        score_mix=None if score_mix is None else AcrossHeads(score_mix),
        weight_mix=None if weight_mix is None else AcrossHeads(weight_mix, after=True),
        dropout=drop.p if drop is not None and drop.training else 0.0,
    )
    call = Call(check_bias(problem), None, False)
    check_call(parts.supports, call, cross=cross)
    parts.x = x
    out = parts.gated(execute(parts.applied(call), parts.kernel).transpose(1, 2))
    parts.x = None
    return out


@fx.wrap
def rotated(
    z: Float[Tensor, "B H T D"], rope: Float[Tensor, "*b t D2"] | None, prefix: int, half: bool, dtype: torch.dtype
) -> Float[Tensor, "B H T D"]:
    """Queries or keys behind the first `prefix` turned by what `rope` holds, sines and cosines side by side; the two
    numbers of a pair lie next to each other, or half the width apart."""
    if rope is None:
        return z
    sin, cos = rope.chunk(2, -1)
    first, rest = z[:, :, :prefix], z[:, :, prefix:]
    if half:
        a, b = rest.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).flatten(-2)
    return torch.cat([first, (rest * cos + turned * sin).to(z.dtype)], 2).to(dtype)


class AcrossHeads(Mix):
    """A linear map of the heads' scores or weights at each pair: talking heads.

    Args:
        linear: the host's own, H -> H.
        after: whether it maps weights, of which hidden pairs have none.
    """

    def __init__(self, linear: nn.Linear, *, after: bool = False) -> None:
        super().__init__()
        self.linear, self.after = linear, after

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        weight, bias = self.linear.weight.to(z.dtype), self.linear.bias
        z = F.linear(z.movedim(1, -1), weight, None if bias is None else bias.to(z.dtype)).movedim(-1, 1)
        return z if rows.allowed is None or not self.after else z.masked_fill(~rows.allowed, 0.0)


def _square(mask: object, shape: tuple[int, int, int, int]) -> Tensor:
    """A mask of four axes that broadcasts to (B, H, T, S)."""
    if not isinstance(mask, Tensor):
        words = "a Tensor" + foreign("attn_mask", mask)
        refuse(WHO, "attn_mask", "has the wrong type", type(mask).__name__, words, error=TypeError)
    wide = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(wide) != 4 or any(n not in (1, size) for n, size in zip(wide, shape)):
        refuse(WHO, "attn_mask", "does not broadcast to the scores", tuple(mask.shape), f"(B, H, T, S) = {shape}, or 1")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        words = "bool with True = may attend, or floating point"
        refuse(WHO, "attn_mask", "has the wrong dtype", mask.dtype, words, error=TypeError)
    return mask.view(wide)
