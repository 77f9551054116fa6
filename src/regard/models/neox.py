"""GPT-NeoX's decoder around any causal mixers: attention and MLP side by side, each behind a norm of its own.

Black et al. 2022, "GPT-NeoX-20B: An Open-Source Autoregressive Language Model" (arXiv 2204.06745), section 2.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import divides
from regard.masks import Mask
from regard.models.mixer import layers
from regard.pipeline.layer import Attention
from regard.positions import Rotary

START = 0.02
"""The deviation that embeddings and linear layers start with."""


class ParallelBlock(nn.Module):
    """One layer: what a mixer and an MLP make of two normed copies is added together."""

    mixer: Any

    def __init__(self, mixer: nn.Module, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        for part in (self.up, self.down):
            nn.init.normal_(part.weight, std=START)
            nn.init.zeros_(part.bias)

    def mlp(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        return self.down(F.gelu(self.up(self.mlp_norm(x))))

    def forward(self, x: Float[Tensor, "B T M"], mask: Mask | None = None) -> Float[Tensor, "B T M"]:
        z = self.mixer_norm(x)
        return x + (self.mixer(z) if mask is None else self.mixer(z, mask=mask)) + self.mlp(x)

    def step(self, x: Float[Tensor, "B t M"], state: object) -> tuple[Float[Tensor, "B t M"], object]:
        y, state = self.mixer.step(self.mixer_norm(x), state)
        return x + y + self.mlp(x), state


class NeoXDecoder(nn.Module):
    """Such layers, and a last norm. Without mixers that stream, its state is all tokens, and a step runs them again."""

    layers: Sequence[ParallelBlock]

    def __init__(self, mechanism: str | None, dim: int, num_heads: int, depth: int, mlp_dim: int) -> None:
        super().__init__()
        if mechanism is None:
            mixers: list[nn.Module] = [neox_attention(dim, num_heads) for _ in range(depth)]
        else:
            mixers = layers(mechanism, dim=dim, num_heads=num_heads, depth=depth, causal=True)
        self.layers = nn.ModuleList(ParallelBlock(mixer, dim, mlp_dim) for mixer in mixers)  # type: ignore[assignment]
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B T M"], mask: Mask | None = None) -> Float[Tensor, "B T M"]:
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def init_state(self, batch_size: int, capacity: int) -> Any:
        try:
            return [layer.mixer.init_state(batch_size, capacity) for layer in self.layers]
        except (ValueError, TypeError, NotImplementedError, AttributeError):
            return self.norm.weight.new_empty(batch_size, 0, self.norm.weight.shape[0])

    def step(self, x: Float[Tensor, "B t M"], state: Any) -> tuple[Float[Tensor, "B t M"], Any]:
        if isinstance(state, Tensor):
            state = torch.cat([state.to(x.dtype), x], 1)
            return self(state)[:, -x.shape[1] :], state
        after = []
        for layer, one in zip(self.layers, state, strict=True):
            x, one = layer.step(x, one)
            after.append(one)
        return self.norm(x), after


def neox_attention(dim: int, num_heads: int) -> Attention:
    """Causal, with biases, and rotary positions on the first quarter of each head's channels."""
    divides("NeoXDecoder", num_heads=num_heads, dim=dim)
    D = dim // num_heads
    part = min(1.0, (max(2, D // 8 * 2) + 0.5) / D)  # half a channel more, against rounding
    return Attention(dim, num_heads, causal=True, bias=True, position=Rotary(D, partial_rotary_factor=part))
