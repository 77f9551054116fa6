"""timm's Attention with any mechanism: same constructor, same state dict (`qkv`, `proj`), same call.

q, k, v = qkv(x);   q, k = norm(q), norm(k);   y = proj(gate(norm(attention(q, k, v))))
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from regard.integrations import timm_layers, timm_maps
from regard.integrations.slots import check_mechanism
from regard.integrations.timm_attend import attend
from regard.integrations.timm_layers import Adapted
from regard.integrations.torch_mha import parts_for
from regard.shapes import HeadShape, head_shape

fx.wrap("attend")  # said where it is called from

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
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        options: dict[str, Any] = {"drop": self.attn_drop, "attn_mask": attn_mask, "is_causal": is_causal}
        out = attend(self.parts, q, k, v, x, scale=self.head_dim**-0.5, **options)
        out = self.norm(out.flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


KINDS: dict[str, type[Adapted]] = {
    kind.__name__: kind
    for kind in (
        *(timm_layers.ClassAttn, timm_layers.TalkingHeadAttn, timm_layers.EvaAttention, timm_layers.AttentionRope),
        *(timm_maps.WindowAttention, timm_maps.ChannelAttention, timm_maps.ChannelAttentionV2),
        *(timm_maps.WindowAttentionGlobal, timm_maps.AttentionCl, timm_maps.Attention2d),
    )
}
"""Whose place is taken, by the name of timm's class, beside `Attention`."""


def replace(model: nn.Module, mechanism: Any, **options: Any) -> list[str]:
    """Give every attention layer of a timm model another mechanism, in place; projections, norms and weights stay.

    Knows timm's Attention, and the classes of Cait, EVA, DaViT, MaxxViT and GCViT. Each layer is first compared with
    regard's exact attention on random tokens.

    Returns:
        The replaced layers' paths.

    Raises:
        ValueError: a model without such layers, or one whose layers compute something else; a mechanism that can't
            serve one of them.
    """
    found = {name: module for name, module in model.named_modules() if _known(module)}
    if not found:
        known = ", ".join(["Attention", *KINDS])
        raise ValueError(f"replace: {type(model).__name__} has no timm Attention layers (classes {known})")
    made = {}
    for name, module in found.items():
        if not isinstance(module, Attention | Adapted):
            _check(name, module)
        try:
            made[name] = _made(module, mechanism, options)
        except ValueError as error:
            raise ValueError(f"replace: {name}: {error}; nothing was replaced") from error
    for name, attention in made.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, attention)
    return list(made)


def _known(module: nn.Module) -> bool:
    name = type(module).__name__
    return (name == "Attention" and _no_attention(module) is None) or (name in KINDS and KINDS[name].takes(module))


def _made(module: nn.Module, mechanism: Any, options: dict[str, Any]) -> Attention | Adapted:
    kind = KINDS.get(type(module).__name__)
    return Attention.from_timm(module, mechanism, **options) if kind is None else kind(module, mechanism, options)


@torch.no_grad()
def _check(name: str, module: nn.Module) -> None:
    old = copy.deepcopy(module).eval()
    new = _made(copy.deepcopy(module), "softmax", {}).eval()
    weight, generator = new.proj.weight, torch.Generator().manual_seed(0)
    inputs = (
        new.samples(generator)
        if isinstance(new, Adapted)
        else (torch.randn(2, 5, new.qkv.in_features, generator=generator),)
    )
    inputs = tuple(x.to(weight) for x in inputs)
    ours, theirs = new(*inputs).double(), old(*inputs).double()
    if not bool((ours - theirs).abs().max() <= 1e-4 * (1 + theirs.abs().max())) and weight.element_size() > 2:
        who = type(module).__name__
        raise ValueError(f"replace: {name} does not compute what timm's {who} does; nothing was replaced")


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
