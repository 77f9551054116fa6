"""Multi-DConv-head attention: a short causal convolution along tokens on queries, keys and values."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import FEATURES, Card, Cost, Paper
from regard.checks import choice, flag, refuse, whole
from regard.kernels.short_conv import short_conv
from regard.stages import HeadMap

CARD = Card(
    "short_conv",
    equation="z_t <- act(b + sum_{j < K} w_j * z_{t - j})   for z in q, k, v;\n"
    "w in R^D for each head and j; zeros before the first token; before rotation",
    papers=(
        Paper(
            "Primer: Searching for Efficient Transformers for Language Modeling",
            "So, Mańke, Liu, Dai, Shazeer, Le",
            2021,
            "2109.08668",
            "abstract; released code (primer/t5_models.py of google-research)",
        ),
        Paper(
            "Gated Delta Networks: Improving Mamba2 with Delta Rule",
            "Yang, Kautz, Hatamizadeh",
            2024,
            "2412.06464",
            'not its own text, but the layer of transformers\' Qwen3-Next: kernel_size=4, activation="silu"',
        ),
    ),
    supports=FEATURES - {"bidirectional", "cross"},
    lacks={
        "bidirectional": "the convolution reads the past only, as in the paper's language models",
        "cross": "the tokens of a context stand in no order with those that ask",
    },
    traits={"linear_in_values", "shift_invariant", "head_independent"},
    cost=Cost("B*H*T*S*D + kernel_size*B*(H*T + 2*G*S)*D", "2*S*G*D + S*M"),
    claim="One layer without positions looks up what followed a token when it was seen before, which needs the token "
    "before each: tests/heads/test_short_conv.py::test_one_layer_looks_up_what_followed.",
    differs=(
        "A call's mask also says which tokens a token reads, so that padding and other documents count as zeros; the "
        "released code does not look at it there.",
        "The released code keeps keys and values alone while it generates; here a stream keeps the tokens, too, and "
        "gives what the whole pass gives.",
        "Bias and activation are of the convolutions before linear attention (Mamba, gated DeltaNet).",
    ),
    verified="third-party",
    defaults={
        "kernel_size": "code, and accounts of the paper",
        "on": "paper, abstract",
        "activation": "code",
        "bias": "code",
    },
    tries={"on": "k"},
)


@CARD.fills("heads")
class ShortConv(HeadMap):
    """Convolves each channel of each head along tokens, its own last tap on the token itself.

    It starts as the authors' code does: 1/2 on the token itself, 1 / (2 K) on each before. What a token reads is
    computed from the tokens that the state keeps.

    Args:
        head_dim, num_heads, num_kv_heads: D, H and G; G is H by default.
        kernel_size: K, the token itself included.
        on: which of queries, keys and values are convolved.
        activation: after the convolution.
        bias: one for each channel.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        kernel_size: int = 3,
        on: Literal["qkv", "qk", "qv", "kv", "q", "k", "v"] = "qkv",
        activation: Literal["silu"] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        whole(self, head_dim=head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, kernel_size=kernel_size)
        choice(self, ("qkv", "qk", "qv", "kv", "q", "k", "v"), on=on)
        choice(self, (None, "silu"), activation=activation)
        flag(self, bias=bias)
        self.kernel_size, self.on, self.activation, self.reach = kernel_size, on, activation, kernel_size - 1
        for name, n in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
            for what, shape in (("weight", (n, head_dim, kernel_size)), ("bias", (n, head_dim))):
                there = name in on and (what == "weight" or bias)
                self.register_parameter(f"{name}_{what}", nn.Parameter(torch.empty(shape)) if there else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._start(0.5, 0.5 / self.kernel_size)

    @torch.no_grad()
    def start_neutral(self) -> bool:
        """The token alone; not with an activation, which nothing undoes."""
        if self.activation is None:
            self._start(1.0, 0.0)
        return self.activation is None

    @torch.no_grad()
    def _start(self, own: float, before: float) -> None:
        for name, parameter in self.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else before)
            if name.endswith("weight"):
                parameter[..., -1] = own

    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T D"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.along(q, k, v)

    def along(
        self,
        q: Float[Tensor, "B H n D"],
        k: Float[Tensor, "B G n D"],
        v: Float[Tensor, "B G n D"],
        before: int = 0,
        sees: Bool[Tensor, "#B T reach"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not q.shape[2] == k.shape[2] == v.shape[2]:
            got = f"{q.shape[2]}, {k.shape[2]} and {v.shape[2]}"
            refuse(self, "q, k and v", "are not of the same tokens", got, "one number of tokens")
        z = [self.convolved(name, part, before, sees) for name, part in zip("qkv", (q, k, v), strict=True)]
        return z[0], z[1], z[2]

    def convolved(self, name: str, z: Tensor, before: int, sees: Tensor | None) -> Tensor:
        new = z[:, :, before:]
        if name not in self.on:
            return new
        past = F.pad(z[:, :, :before], (0, 0, self.reach, 0))[:, :, before:] if before else None
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        weight = weight.expand(z.shape[1], *weight.shape[1:])  # one head's may serve all
        bias = bias if bias is None else bias.expand(z.shape[1], *bias.shape[1:])
        out = short_conv(new, weight, bias, state=past, sees=sees).out
        return (out if self.activation is None else F.silu(out)).to(z.dtype)  # under autocast tokens are narrower

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, on={self.on!r}, activation={self.activation!r}"
