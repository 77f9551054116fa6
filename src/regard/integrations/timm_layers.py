"""Attention layers of other classes of timm's, with any mechanism: each has the name of the class whose place it takes.

A layer here takes over all that the original holds, under the same names, and reads it as the original does.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from regard.checks import refuse
from regard.integrations.slots import check_mechanism
from regard.integrations.timm_attend import attend, rotated
from regard.integrations.torch_mha import parts_for
from regard.shapes import HeadShape

fx.wrap("attend")  # said where they are called from
fx.wrap("rotated")

DROPS = frozenset({"attn_drop", "proj_drop"})


class Adapted(nn.Module):
    """A layer of timm's with a mechanism in it. Its parameters are in `parts`."""

    holds: ClassVar[frozenset[str]]
    """The children that the class of timm's has."""
    may_hold: ClassVar[frozenset[str]] = frozenset()
    """And those that it has at times."""
    placed: ClassVar[bool] = True
    """Whether queries and keys stand one beside the other in the tokens' order."""
    rotary: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    """Whether it maps scores or weights across heads itself."""
    has_tokens: ClassVar[bool] = True
    """Whether there is a token behind each query, which a gate could read."""

    # What the originals have, each some of it.
    num_heads: int
    scale: float
    num_prefix_tokens: int
    q: Any
    k: Any
    v: Any
    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_bias: Any
    k_bias: Any
    v_bias: Any
    q_norm: Any
    k_norm: Any
    norm: Any
    gate: Any
    proj: Any
    proj_l: Any
    proj_w: Any
    attn_drop: Any
    proj_drop: Any
    rotate_half: bool

    def __init__(self, module: nn.Module, mechanism: Any, options: dict[str, Any]) -> None:
        super().__init__()
        own = set(vars(self))
        for name in ("_parameters", "_buffers", "_modules"):
            getattr(self, name).update(getattr(module, name))
        self._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        for name, value in vars(module).items():
            if name not in own and name != "forward":  # one that somebody put on the layer itself would hide ours
                setattr(self, name, value)
        supports = check_mechanism(mechanism)
        parts = parts_for(mechanism, self._shape(), supports, options, rotary=self.rotary)
        name = type(self).__name__
        if not self.placed and not parts.placeless:
            wanted = "one that doesn't: here they do not stand as the tokens do"
            refuse(name, "mechanism", "asks where queries and keys stand", repr(mechanism), wanted)
        if not self.has_tokens and parts.gate is not None:
            wanted = "one without: there is no token behind a query here"
            refuse(name, "mechanism", "has a gate that reads tokens", repr(mechanism), wanted)
        if self.mixes and (parts.score_mix is not None or parts.weight_mix is not None):
            wanted = "one that doesn't: the layer does so too, and the order of the two is not defined"
            refuse(name, "mechanism", "maps scores or weights across heads", repr(mechanism), wanted)
        weight = self.proj.weight
        self.parts = parts.to(device=weight.device, dtype=weight.dtype)
        self.train(module.training)

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether the module is built as the class that this one stands for."""
        children = set(module._modules) - {"parts"}
        return type(module).__name__ == cls.__name__ and cls.holds <= children <= cls.holds | cls.may_hold

    def samples(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Something to call it with."""
        return (torch.randn(2, 5, self._shape().dim, generator=generator),)

    def _shape(self) -> HeadShape:
        H = self._heads()
        return HeadShape(self.qkv.in_features, H, H, self.qkv.out_features // 3 // H)

    def _heads(self) -> int:
        return self.num_heads

    def _stacked(self, x: Tensor) -> Tensor:
        """(3, B, H, N, D)."""
        return self.qkv(x).unflatten(-1, (3, self._heads(), -1)).permute(2, 0, 3, 1, 4)

    def _out(self, out: Tensor) -> Tensor:
        return self.proj_drop(self.proj(out.flatten(2)))


def _split(z: Float[Tensor, "B N C"], heads: int) -> Float[Tensor, "B H N D"]:
    return z.unflatten(-1, (heads, -1)).transpose(1, 2)


class ClassAttn(Adapted):
    """Cait's: the class token attends to all tokens."""

    holds = frozenset({"q", "k", "v", "proj"}) | DROPS
    placed = False

    def _shape(self) -> HeadShape:
        return HeadShape(self.q.in_features, self.num_heads, self.num_heads, self.q.out_features // self.num_heads)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B 1 C"]:
        first = x[:, :1]
        q, k, v = (_split(z, self.num_heads) for z in (self.q(first), self.k(x), self.v(x)))
        return self._out(attend(self.parts, q, k, v, first, scale=self.scale, drop=self.attn_drop, cross=True))


class TalkingHeadAttn(Adapted):
    """Cait's: scores and weights are mapped across heads."""

    holds = frozenset({"qkv", "proj", "proj_l", "proj_w"}) | DROPS
    mixes = True

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        q, k, v = self._stacked(x).unbind(0)
        mixes = {"score_mix": self.proj_l, "weight_mix": self.proj_w}
        return self._out(attend(self.parts, q, k, v, x, scale=self.scale, drop=self.attn_drop, **mixes))


class EvaAttention(Adapted):
    """EVA's: rotated but for the first tokens, and no bias on the keys."""

    holds = frozenset({"q_norm", "k_norm", "norm", "proj"}) | DROPS
    may_hold = frozenset({"qkv", "q_proj", "k_proj", "v_proj", "gate"})
    rotary = True

    def samples(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = self._shape()
        x = torch.randn(2, 5 + self.num_prefix_tokens, shape.dim, generator=generator)
        return x, torch.randn(5, 2 * shape.head_dim, generator=generator)

    def _shape(self) -> HeadShape:
        width = (self.q_proj if self.qkv is None else self.qkv).in_features
        return HeadShape(width, self.num_heads, self._groups(), self.proj.in_features // self.num_heads)

    def _groups(self) -> int:
        return getattr(self, "num_kv_heads", self.num_heads)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            k, v = (_split(proj(x), self._groups()) for proj in (self.k_proj, self.v_proj))
            return _split(self.q_proj(x), self.num_heads), k, v
        q, k, v = self._stacked(x).unbind(0)
        if getattr(self, "q_bias", None) is not None:
            biases = ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            q, k, v = (z + bias.view(self.num_heads, 1, -1) for z, bias in biases)
        return q, k, v

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "B N C"]:
        q, k, v = self._project(x)
        at = (self.num_prefix_tokens, self.rotate_half, v.dtype)
        q, k = rotated(self.q_norm(q), rope, *at), rotated(self.k_norm(k), rope, *at)
        options = {"scale": self.scale, "drop": self.attn_drop, "attn_mask": attn_mask, "is_causal": is_causal}
        out = self.norm(attend(self.parts, q, k, v, x, **options).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class AttentionRope(EvaAttention):
    """The one in timm's layers, which EVA has too; its key heads may be fewer."""
