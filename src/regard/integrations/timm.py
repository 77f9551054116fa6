"""timm's Attention with any mechanism: same constructor, same state dict (`qkv`, `proj`), same call.

q, k, v = qkv(x);   q, k = norm(q), norm(k);   y = proj(gate(norm(attention(q, k, v))))
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.integrations.slots import check_mechanism
from regard.integrations.torch_mha import check_call, parts_for
from regard.integrations.transformers_call import Call
from regard.kernels import Problem, execute
from regard.kernels.check import check_bias, check_mask
from regard.masks import causal
from regard.shapes import HeadShape, head_shape

_CHILDREN = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class Attention(nn.Module):
    """Drop-in for timm.layers.Attention (timm 1.0).

    Args:
        dim ... dtype: timm's own.
        mechanism, options: as in `regard.swap`. Its parameters are in `parts`, and start where the layer is softmax's.

    Shapes: x (B, T, dim) -> (B, T, dim_out).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mechanism: Any = "softmax",
        **options: Any,
    ) -> None:
        super().__init__()
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("Attention: qk_norm and scale_norm need a norm_layer")
        D = head_shape(dim, num_heads, None, attn_head_dim, who="Attention").head_dim
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim, self.attn_dim = num_heads, D, num_heads * D
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **at)
        self.q_norm, self.k_norm, self.norm = (
            norm_layer(width, **at) if wanted and norm_layer is not None else nn.Identity()
            for wanted, width in ((qk_norm, D), (qk_norm, D), (scale_norm, self.attn_dim))
        )
        self.attn_drop = nn.Dropout(attn_drop)
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **at) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim if dim_out is None else dim_out, bias=proj_bias, **at)
        self.proj_drop = nn.Dropout(proj_drop)
        self.supports = check_mechanism(mechanism)
        shape = HeadShape(dim, num_heads, num_heads, D)
        self.parts = parts_for(mechanism, shape, self.supports, options).to(**at)

    @classmethod
    def from_timm(cls, module: nn.Module, mechanism: Any = "softmax", **options: Any) -> "Attention":
        """The same layer with another mechanism; it takes over the module's own projections and norms."""
        if (reason := _no_attention(module)) is not None:
            raise ValueError(f"Attention: {type(module).__name__} is not timm's Attention: {reason}")
        qkv: nn.Linear = module.qkv  # type: ignore[assignment]
        H: int = module.num_heads  # type: ignore[assignment]
        made = cls(
            qkv.in_features,
            H,
            attn_head_dim=qkv.out_features // 3 // H,
            device=qkv.weight.device,
            dtype=qkv.weight.dtype,
            mechanism=mechanism,
            **options,
        )
        for name in _CHILDREN & set(module._modules):
            setattr(made, name, getattr(module, name))
        return made.train(module.training)

    def forward(
        self, x: Float[Tensor, "B T M"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "B T N"]:
        """`attn_mask`: True = may attend, or numbers to add; it counts for nothing where `is_causal`, as in timm."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        mask: Bool[Tensor, "B H T T"] | None = None
        bias = None
        if attn_mask is not None and not is_causal:
            attn_mask = attn_mask.view((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
            if attn_mask.dtype == torch.bool:
                mask = attn_mask.expand(-1, -1, T, T)
            else:
                bias = attn_mask
        allowed = causal() if is_causal else check_mask(mask, B, self.num_heads, T, T, x.device)
        dropout = self.attn_drop.p if self.training else 0.0
        call = Call(
            check_bias(Problem(q, k, v, self.head_dim**-0.5, mask=allowed, bias=bias, dropout=dropout)), None, False
        )
        check_call(self.supports, call, cross=False)
        self.parts.x = x
        out = self.parts.gated(execute(self.parts.applied(call), self.parts.kernel).transpose(1, 2))
        self.parts.x = None
        out = self.norm(out.flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def replace(model: nn.Module, mechanism: Any, **options: Any) -> list[str]:
    """Give every Attention of a timm model another mechanism, in place; projections, norms and their weights stay.

    Each layer is first compared with regard's exact attention on random tokens.

    Returns:
        The replaced layers' paths.

    Raises:
        ValueError: a model without such layers, or one whose layers compute something else.
    """
    found = {
        name: m for name, m in model.named_modules() if type(m).__name__ == "Attention" and _no_attention(m) is None
    }
    if not found:
        raise ValueError(f"replace: {type(model).__name__} has no timm Attention layers (qkv, proj, num_heads)")
    made = {}
    for name, module in found.items():
        if not isinstance(module, Attention):
            _check(name, module)
        made[name] = Attention.from_timm(module, mechanism, **options)
    for name, attention in made.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, attention)
    return list(made)


@torch.no_grad()
def _check(name: str, module: nn.Module) -> None:
    old = copy.deepcopy(module).eval()
    new = Attention.from_timm(copy.deepcopy(module)).eval()
    weight = new.qkv.weight
    x = torch.randn(2, 5, new.qkv.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    ours, theirs = new(x).double(), old(x).double()
    if not bool((ours - theirs).abs().max() <= 1e-4 * (1 + theirs.abs().max())) and weight.element_size() > 2:
        raise ValueError(f"replace: {name} does not compute what timm's Attention does; nothing was replaced")


def _no_attention(module: nn.Module) -> str | None:
    """Why it can't be taken for timm's Attention; None if it can."""
    children = set(module._modules)
    if not {"qkv", "proj"} <= children or not isinstance(getattr(module, "num_heads", None), int):
        return "it has no qkv, proj and num_heads"
    if odd := children - _CHILDREN - ({"parts"} if isinstance(module, Attention) else set()):
        return f"it also has {', '.join(sorted(odd))}"
    if own := [name for name, _ in module.named_parameters(recurse=False)]:
        return f"it has parameters of its own ({', '.join(own)})"
    return None
