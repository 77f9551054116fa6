"""Task-adapted attention: a task's embedding adds a bias to attention in windows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, whole
from regard.pipeline.function import attention
from regard.shapes import HeadShape
from regard.vision.maps import differences, in_windows, to_tokens
from regard.vision.swin import ShiftedWindowAttention, shift_mask


def _inputs(shape: HeadShape) -> tuple[Tensor, Tensor]:
    """Maps of 5 x 6, and a task for each."""
    generator = torch.Generator().manual_seed(2)
    x, task = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((2, shape.dim, 5, 6), (2, 27)))
    return x, task


CARD = Card(
    "task_adapted",
    equation="""softmax(Q K^T / sqrt(D) + R + T(e) + M) V      R and M as Swin's, e the task's embedding
T(e)_ij = (1 + gamma_(x_j)) R0[i, x_j] + beta_(x_j)  where i and j are of one row of the window, else 0
[gamma | beta] = W_g e + b_g;      T is the same for all heads and for all windows of a sample""",
    papers=(
        Paper(
            "Vision Transformer Adapters for Generalizable Multitask Learning",
            "Bhattacharjee, Susstrunk, Salzmann",
            2023,
            "2308.12372",
            "abstract; official code",
        ),
    ),
    protocol="FeatureMixer",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    cost=Cost(
        "2*B*M*(ceil(Y/window)*window**2 - 2*(window//2)*(window - window//2))"
        "*(ceil(X/window)*window**2 - 2*(window//2)*(window - window//2)) + 2*B*window*task_dim",
        "",
    ),
    claim="A task changes scores between pixels of one row of a window alone, and with W_g, b_g and R0 at 0 the layer "
    "is the backbone's own: tests/vision/test_task_adapted.py::test_a_task_changes_rows_alone, "
    "tests/vision/test_task_adapted.py::test_without_adapters_it_is_the_backbone.",
    differs=(
        "The abstract's similarities of tasks by their gradients are not in the released code, and not here.",
        "Blocks of T are as wide as the window, the code's default; there their number follows from the embedding's "
        "width.",
        "What the shift brought together from opposite borders is hidden, where the code adds -100.",
        "A side that is not longer than the window is one window without shift, and has T's first rows and columns.",
        "TaskScaledNorm gives each sample its own embedding, where the code takes that of its task's first sample.",
    ),
    verified="third-party",
    example={"window": 3, "task_dim": 27},
    tries={"window": 4, "shift": 0, "task_dim": 8},
    defaults={
        "window": "code, Swin's",
        "shift": "code, Swin's: of every other block",
        "bias": "code",
        "task_dim": "code, window^3",
    },
)


class TaskBias(nn.Module):
    """T(e): (B, Et) -> (B, 1, w^2, w^2), to be added to the scores of all heads and windows of a sample.

    R0 is 0 at first; beta is not, so that exactly the backbone's scores need `film` at 0 as well.

    Args:
        window: w.
        task_dim: Et.
    """

    def __init__(self, window: int, task_dim: int) -> None:
        super().__init__()
        whole(self, window=window, task_dim=task_dim)
        self.window, self.task_dim = window, task_dim
        self.base = nn.Parameter(torch.zeros(window * window, window))
        self.film = nn.Linear(task_dim, 2 * window)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.base)
        _start(self.film)

    @checked(Et="task_dim")
    def forward(self, task: Float[Tensor, "B Et"]) -> Float[Tensor, "B 1 N N"]:
        return self.rows(task, self.window, self.window)

    def rows(self, task: Float[Tensor, "B Et"], tall: int, wide: int) -> Float[Tensor, "B 1 N N"]:
        """T of the first rows and columns of a window."""
        gamma, beta = (z[:, None, None, :wide] for z in self.film(task).chunk(2, -1))
        base = self.base.view(self.window, self.window, self.window)[:tall, :wide, :wide]
        within = (1 + gamma) * base + beta  # of a row: (B, y, x_i, x_j)
        same = torch.eye(tall, dtype=within.dtype, device=within.device)[:, None, :, None]
        return (within[:, :, :, None] * same).flatten(3).flatten(1, 2)[:, None]


def _within(
    q: Float[Tensor, "B H Y X D"],
    k: Float[Tensor, "B H Y X D"],
    v: Float[Tensor, "B H Y X D"],
    bias: Float[Tensor, "B H pixels pixels"],
    *,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
) -> Float[Tensor, "B H Y X D"]:
    """Attention within each window of a map rolled by `shift`, with a bias for each sample and head.

    Samples stand where heads do, windows where samples do: the biases aren't laid out for each window.
    """
    B, H, Y, X, D = q.shape
    tall, wide = window
    down, across = Y // tall, X // wide
    count = down * across
    parts = [
        in_windows(z, window).unflatten(0, (B, count)).transpose(0, 1).reshape(count, B * H, tall * wide, D)
        for z in (q, k, v)
    ]
    mask = shift_mask((Y, X), window, shift, q.device)[:, None] if any(shift) else None
    out = attention(*parts, bias=bias.reshape(1, B * H, tall * wide, tall * wide), mask=mask)
    out = out.view(down, across, B, H, tall, wide, D).permute(2, 3, 0, 4, 1, 5, 6)
    return out.reshape(B, H, Y, X, D)


@CARD.module
class TaskAdaptedAttention(ShiftedWindowAttention):
    """Swin's attention with `TaskBias`: a map (B, M, Y, X) and a task (B, Et) -> (B, M, Y, X).

    Args:
        dim, num_heads, window, shift, bias: as of `ShiftedWindowAttention`.
        task_dim: Et; default window^3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        shift: int | None = None,
        bias: bool = True,
        task_dim: int | None = None,
    ) -> None:
        super().__init__(dim, num_heads, window=window, shift=shift, bias=bias)
        self.task_dim = window**3 if task_dim is None else task_dim
        self.task_bias = TaskBias(window, self.task_dim)

    @checked(M="dim", Et="task_dim")
    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B M Y X"], task: Float[Tensor, "B Et"] | None
    ) -> Float[Tensor, "B M Y X"]:
        """With None for the task it is the backbone's attention."""
        if task is None or not len(x):
            return super().forward(x)
        Y, X = x.shape[2:]
        tall, wide = (max(1, min(self.window, size)) for size in (Y, X))
        down, right = (0 if size <= self.window else self.shift for size in (Y, X))
        z = F.pad(x, (0, -X % wide, 0, -Y % tall)).roll((-down, -right), (2, 3))
        q, k, v = (one.unflatten(2, z.shape[2:]) for one in self._heads(to_tokens(z)))
        bias = differences(self.table, tall, wide) + self.task_bias.rows(task, tall, wide)
        out = _within(q, k, v, bias, window=(tall, wide), shift=(down, right))
        out = out.roll((down, right), (2, 3))
        return self._merged(out[:, :, :Y, :X].flatten(2, 3), (Y, X))


class TaskAdapter(nn.Module):
    """h -> W_up W_down ((1 + gamma) h + beta): no nonlinearity, nothing beside it. Tasks (B, Et), tokens (B, N, M).

    Args:
        task_dim, dim: Et and M.
        reduction: M over the width between the two maps.
    """

    def __init__(self, task_dim: int, dim: int, *, reduction: int = 3) -> None:
        super().__init__()
        whole(self, task_dim=task_dim, dim=dim, reduction=reduction)
        inner = max(1, dim // reduction)
        self.task_dim, self.dim = task_dim, dim
        self.embed, self.film = nn.Linear(task_dim, task_dim), nn.Linear(task_dim, 2 * dim)
        self.down, self.up = nn.Linear(dim, inner), nn.Linear(inner, dim)
        _start(self.embed, self.film, self.down, self.up)

    @checked(Et="task_dim", M="dim")
    def forward(self, task: Float[Tensor, "B Et"], h: Float[Tensor, "B N M"]) -> Float[Tensor, "B N M"]:
        gamma, beta = self.film(self.embed(task))[:, None].chunk(2, -1)
        made: Tensor = self.up(self.down((1 + gamma) * h + beta))
        return made


class TaskScaledNorm(nn.Module):
    """Layer norm whose scale is (1 + gamma) weight + beta, by the task; its own bias is the only offset.

    Args:
        dim, task_dim: M and Et.
    """

    def __init__(self, dim: int, task_dim: int) -> None:
        super().__init__()
        whole(self, dim=dim, task_dim=task_dim)
        self.dim, self.task_dim = dim, task_dim
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.film = nn.Linear(task_dim, 2 * dim)
        _start(self.film)

    @checked(M="dim", Et="task_dim")
    def forward(self, x: Float[Tensor, "B N M"], task: Float[Tensor, "B Et"]) -> Float[Tensor, "B N M"]:
        gamma, beta = self.film(task)[:, None].chunk(2, -1)
        return F.layer_norm(x, (self.dim,)) * ((1 + gamma) * self.weight + beta) + self.bias


def _start(*linears: nn.Linear) -> None:
    """Truncated normal of 0.02, no bias."""
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
