"""A small pre-norm host for every kind of mixer: it reads tokens, mixes them, and tells something of each or of all.

The parts that differ from task to task are handed in: what reads, what mixes, what pools, what tells. The layers are
those of the language model: a mixer and a GELU MLP, each on a normalised copy that is added back.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.models.lm import Block, scale_blocks


class TokenModel(nn.Module):
    """`tell(pool(layers(read(x))))`, for tokens (B, T, M) or the nodes (N, M) of a graph."""

    blocks: Sequence[Block]

    def __init__(
        self,
        read: nn.Module,
        mixers: Sequence[nn.Module],
        tell: nn.Module,
        *,
        dim: int,
        mlp_dim: int,
        positions: int = 0,
        pool: nn.Module | None = None,
    ):
        """`positions`: for how many tokens there are learned positions, 0 for none."""
        super().__init__()
        self.read = read
        self.positions = nn.Embedding(positions, dim) if positions else None
        self.blocks = nn.ModuleList(Block(mixer, dim, mlp_dim) for mixer in mixers)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(dim)
        self.pool = pool
        self.tell = tell
        if isinstance(read, nn.Embedding):
            for embedding in filter(None, (read, self.positions)):
                nn.init.normal_(embedding.weight, std=0.02)
        scale_blocks(self.blocks)

    @property
    def mixers(self) -> list[nn.Module]:
        """The mechanism's own modules."""
        if isinstance(self.pool, Mean | None):
            return [getattr(block.mixer, "mixer", block.mixer) for block in self.blocks]
        return [self.pool]

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """`others` are handed on to every mixer, such as the edges of a graph."""
        x = self.read(x)
        if self.positions is not None:
            x = x + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block.mlp(x + block.mixer(block.mixer_norm(x), *others))
        x = self.norm(x)
        return self.tell(x if self.pool is None else self.pool(x))


class Mean(nn.Module):
    """The mean over tokens: the plainest pooler."""

    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B M"]:
        return x.mean(1)


class AfterConvolution(nn.Module):
    """A causal mixer behind a short depthwise convolution, which lets a token see the two before it.

    It is how a mixer without positions learns what stood next to what, the same for every mechanism.
    """

    def __init__(self, mixer: nn.Module, dim: int, width: int = 3):
        super().__init__()
        self.mixer = mixer
        self.convolution = nn.Conv1d(dim, dim, width, groups=dim)

    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        back = self.convolution.kernel_size[0] - 1
        return self.mixer(self.convolution(F.pad(x.mT, (back, 0))).mT)


class OnMaps(nn.Module):
    """A FeatureMixer among tokens: they are laid out as a map of the given size, row by row."""

    def __init__(self, mixer: nn.Module, size: tuple[int, ...]):
        super().__init__()
        self.mixer, self.size = mixer, size

    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        return self.mixer(x.mT.unflatten(2, self.size)).flatten(2).mT
