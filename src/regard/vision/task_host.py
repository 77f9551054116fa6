"""A small multitask model: windows that are frozen, task-adapted blocks, and adapters that run beside them.

The paper, and what was read of it, stand on the card of `regard.vision.task_adapted`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.checks import checked, whole
from regard.vision.maps import to_map, to_tokens
from regard.vision.task_adapted import TaskAdaptedAttention, TaskAdapter


class TaskBlock(nn.Module):
    """x + attention(LN x[, task]), then x + MLP(LN x).

    Args:
        dim, num_heads, window, shift, task_dim: as of the attention.
        conditioned: whether the task reaches the attention.
    """

    def __init__(
        self, dim: int, num_heads: int, *, window: int, shift: int, task_dim: int, conditioned: bool = False
    ) -> None:
        super().__init__()
        self.conditioned = conditioned
        self.attention = TaskAdaptedAttention(dim, num_heads, window=window, shift=shift, task_dim=task_dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "B M Y X"], task: Float[Tensor, "B Et"]) -> Float[Tensor, "B M Y X"]:
        sizes = x.shape[2:]
        x = x + self.attention(to_map(self.norm1(to_tokens(x)), sizes), task if self.conditioned else None)
        return x + to_map(self.mlp(self.norm2(to_tokens(x))), sizes)


class TaskHost(nn.Module):
    """Images and the number of a task for each: (B, C, Y, X), (B,) -> (B, outputs, Y / patch, X / patch).

    What the adapters carry, not the backbone's tokens, is what the task's head reads.

    Args:
        channels, outputs: of images and answers.
        dim, num_heads, window: as of the attention.
        tasks: how many.
        depth: how many blocks; the last is conditioned, every other one is shifted.
        patch: sides of the patches that become tokens.
        task_dim: Et; default window^3.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        dim: int,
        num_heads: int,
        *,
        tasks: int,
        depth: int = 2,
        window: int = 4,
        patch: int = 2,
        task_dim: int | None = None,
    ) -> None:
        super().__init__()
        whole(self, channels=channels, outputs=outputs, tasks=tasks, depth=depth, window=window, patch=patch)
        task_dim = window**3 if task_dim is None else task_dim
        self.channels = channels
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.tasks = nn.Embedding(tasks, task_dim)
        shifts = [window // 2 * (n % 2) for n in range(depth)]
        self.blocks = nn.ModuleList(
            TaskBlock(dim, num_heads, window=window, shift=s, task_dim=task_dim, conditioned=n == depth - 1)
            for n, s in enumerate(shifts)
        )
        self.adapters = nn.ModuleList(TaskAdapter(task_dim, dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, outputs) for _ in range(tasks))

    def backbone(self) -> Iterator[nn.Parameter]:
        """What stays as it was trained before: the blocks that no task reaches."""
        for block in self.blocks:
            if not block.conditioned:
                yield from block.parameters()

    @checked(C="channels")
    def forward(self, x: Float[Tensor, "B C Y X"], task: Int[Tensor, " B"]) -> Float[Tensor, "B O y x"]:
        z, e = self.embed(x), self.tasks(task)
        sizes, h = z.shape[2:], torch.zeros_like(to_tokens(z))
        for block, adapter in zip(self.blocks, self.adapters, strict=True):
            z = block(z, e)
            h = adapter(e, to_tokens(z) + h)
        h = self.norm(h)
        every = torch.stack([head(h) for head in self.heads], 1)
        chosen = F.one_hot(task, len(self.heads)).to(every.dtype)
        return to_map(torch.einsum("btno,bt->bno", every, chosen), sizes)
