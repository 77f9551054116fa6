"""Attention layers with the names, children and attributes of timm's classes, written out for themselves."""

import torch
from torch import Tensor, nn


def weighed(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...ts,...sd->...td", scores.softmax(-1), v)


def joined(out: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return torch.cat(list(out.unbind(1)), -1)


def cut(z: Tensor, H: int) -> Tensor:
    """(B, N, H D) -> (B, H, N, D)."""
    return torch.stack(z.chunk(H, -1), 1)


class Base(nn.Module):
    def __init__(self, dim: int = 12, heads: int = 3, *, drops: bool = True, out: int | None = None, parts: int = 3):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, parts * dim), nn.Linear(dim, dim if out is None else out)
        if drops:
            self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [cut(z, self.num_heads) for z in self.qkv(x).chunk(3, -1)]


class ClassAttn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 3, 0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(12, 12) for _ in range(4))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (cut(f(x), 3) for f in (self.q, self.k, self.v))
        return self.proj(joined(weighed(q[:, :, :1] @ k.mT * self.scale, v)))


class TalkingHeadAttn(Base):
    def __init__(self) -> None:
        super().__init__()
        self.proj_l, self.proj_w = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = self.proj_l((q @ k.mT * self.scale).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj(joined(self.proj_w(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v))


class Rotated(nn.Module):
    """What EvaAttention and AttentionRope have in common."""

    def __init__(
        self, *, dim=12, heads=3, groups=None, out=None, fused=True, normed=False, scaled=False, gated=False,
        half=False, prefix=1, bias=True,
    ) -> None:  # fmt: skip
        super().__init__()
        D = dim // heads
        self.num_heads, self.head_dim, self.scale = heads, D, D**-0.5
        self.num_prefix_tokens, self.rotate_half = prefix, half
        self.q_proj = self.k_proj = self.v_proj = self.qkv = self.gate = None
        if groups is not None:
            self.num_kv_heads = groups
        self.project(dim, D * (groups or heads), fused, bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(D) if normed else nn.Identity() for _ in range(2))
        self.norm = nn.LayerNorm(dim) if scaled else nn.Identity()
        if gated:
            self.gate = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim if out is None else out)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        q, k, v = self.read(x)
        H, N = self.num_heads, x.shape[1]
        groups = getattr(self, "num_kv_heads", H)
        q, k, v = cut(q, H), cut(k, groups), cut(v, groups)
        q, k = self.turn(self.q_norm(q), rope), self.turn(self.k_norm(k), rope)
        k, v = (torch.stack([z[:, h * groups // H] for h in range(H)], 1) for z in (k, v))
        scores = q @ k.mT * self.scale
        if is_causal:
            attn_mask = torch.ones(N, N, dtype=torch.bool).tril()
        if attn_mask is not None:
            hidden = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
            scores = hidden
        out = self.norm(joined(weighed(scores, v)))
        return self.proj(out if self.gate is None else out * self.gate(x).sigmoid())

    def turn(self, z: Tensor, rope: Tensor | None) -> Tensor:
        if rope is None:
            return z
        out, D = z.clone(), z.shape[-1]
        for d in range(D // 2):
            a, b = (d, d + D // 2) if self.rotate_half else (2 * d, 2 * d + 1)
            first, second = (z[:, :, self.num_prefix_tokens :, n] for n in (a, b))
            sin, cos = rope[:, :D], rope[:, D:]
            out[:, :, self.num_prefix_tokens :, a] = first * cos[:, a] - second * sin[:, a]
            out[:, :, self.num_prefix_tokens :, b] = second * cos[:, b] + first * sin[:, b]
        return out


class EvaAttention(Rotated):
    def project(self, dim: int, inner: int, fused: bool, bias: bool) -> None:
        self.q_bias = self.k_bias = self.v_bias = None
        if not fused:
            self.q_proj, self.v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(2))
            self.k_proj = nn.Linear(dim, inner, bias=False)
            return
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        if bias:
            del self.k_bias
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(inner)) for _ in range(2))
            self.register_buffer("k_bias", torch.zeros(inner), persistent=False)

    def read(self, x: Tensor) -> list[Tensor]:
        if self.qkv is None:
            return [f(x) for f in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = self.qkv(x).chunk(3, -1)
        return [q, k, v] if self.q_bias is None else [q + self.q_bias, k, v + self.v_bias]


class AttentionRope(Rotated):
    def project(self, dim: int, inner: int, fused: bool, bias: bool) -> None:
        if fused:
            self.qkv = nn.Linear(dim, 3 * inner, bias=bias)
        else:
            self.q_proj = nn.Linear(dim, dim, bias=bias)
            self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(2))

    def read(self, x: Tensor) -> list[Tensor]:
        if self.qkv is not None:
            return list(self.qkv(x).chunk(3, -1))
        return [f(x) for f in (self.q_proj, self.k_proj, self.v_proj)]


class WindowAttention(Base):
    def __init__(self) -> None:
        super().__init__(drops=False)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.proj(joined(weighed(q @ k.mT * self.scale, v)))


class ChannelAttention(Base):
    def __init__(self) -> None:
        super().__init__(drops=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.proj(joined(weighed(k.mT @ v * self.scale, q.mT).mT))


class ChannelAttentionV2(nn.Module):
    def __init__(self, *, dynamic: bool = True) -> None:
        super().__init__()
        self.groups, self.head_dim, self.dynamic_scale = 3, 4, dynamic
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (cut(z, 3) for z in self.qkv(x).chunk(3, -1))
        size = x.shape[1] if self.dynamic_scale else 4
        return self.proj(joined(weighed(q.mT @ k / size**0.5, v.mT).mT))


class RelPosBias(nn.Module):
    def __init__(self, height: int = 2, width: int = 3, heads: int = 3) -> None:
        super().__init__()
        self.window_size, self.window_area = (height, width), height * width
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), heads))

    def get_bias(self) -> Tensor:
        height, width = self.window_size
        at = torch.tensor([[
            (y - v + height - 1) * (2 * width - 1) + x - u + width - 1
            for v in range(height) for u in range(width)] for y in range(height) for x in range(width)])  # fmt: skip
        return self.relative_position_bias_table[at].permute(2, 0, 1)[None]


class WindowAttentionGlobal(Base):
    def __init__(self, *, use_global: bool = True) -> None:
        super().__init__(parts=2 if use_global else 3)
        self.rel_pos, self.use_global = RelPosBias(), use_global

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        if self.use_global:
            k, v = (cut(z, 3) for z in self.qkv(x).chunk(2, -1))
            images = [q_global[w * len(q_global) // len(x)] for w in range(len(x))]
            q = cut(torch.stack(images), 3)
        else:
            q, k, v = self.heads(x)
        return self.proj(joined(weighed(q @ k.mT * self.scale + self.rel_pos.get_bias(), v)))


class AttentionCl(nn.Module):
    def __init__(self, *, out: int = 12, first: bool = True, biased: bool = True) -> None:
        super().__init__()
        self.num_heads, self.dim_head, self.scale, self.head_first = out // 4, 4, 0.5, first
        self.qkv, self.proj = self.linear(12, 3 * out), self.linear(out, out)
        self.rel_pos = None
        if biased:
            self.rel_pos = RelPosBias(heads=out // 4)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def linear(self, dim: int, out: int) -> nn.Module:
        return nn.Linear(dim, out)

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        out = self.mixed(self.qkv(x).flatten(1, 2), shared_rel_pos)
        return self.proj(out.unflatten(1, x.shape[1:3]))

    def mixed(self, z: Tensor, shared: Tensor | None) -> Tensor:
        H = self.num_heads
        if self.head_first:
            q, k, v = (torch.stack(part, 1) for part in zip(*(each.chunk(3, -1) for each in z.chunk(H, -1))))
        else:
            q, k, v = (cut(part, H) for part in z.chunk(3, -1))
        bias = shared if self.rel_pos is None else self.rel_pos.get_bias()
        return joined(weighed(q @ k.mT * self.scale + (0.0 if bias is None else bias), v))


class Attention2d(AttentionCl):
    def linear(self, dim: int, out: int) -> nn.Module:
        return nn.Conv2d(dim, out, 1)

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        out = self.mixed(self.qkv(x).flatten(2).mT, shared_rel_pos)
        return self.proj(out.mT.unflatten(2, x.shape[2:]))


CLASSES = {
    "ClassAttn": ClassAttn,
    "TalkingHeadAttn": TalkingHeadAttn,
    "EvaAttention/fused": lambda: EvaAttention(normed=True, scaled=True, gated=True),
    "EvaAttention/separate": lambda: EvaAttention(fused=False, half=True, prefix=2),
    "EvaAttention/unbiased": lambda: EvaAttention(bias=False),
    "AttentionRope/fused": lambda: AttentionRope(normed=True),
    "AttentionRope/grouped": lambda: AttentionRope(dim=16, heads=4, groups=2, out=10, fused=False, half=True),
    "WindowAttention": WindowAttention,
    "ChannelAttention": ChannelAttention,
    "ChannelAttentionV2/tokens": ChannelAttentionV2,
    "ChannelAttentionV2/channels": lambda: ChannelAttentionV2(dynamic=False),
    "WindowAttentionGlobal/global": WindowAttentionGlobal,
    "WindowAttentionGlobal/local": lambda: WindowAttentionGlobal(use_global=False),
    "AttentionCl/first": AttentionCl,
    "AttentionCl/wider": lambda: AttentionCl(out=16, first=False, biased=False),
    "Attention2d/first": Attention2d,
    "Attention2d/wider": lambda: Attention2d(out=16, first=False, biased=False),
}
"""By the names that the golden numbers have."""
