"""The row encoder of image-to-markup models: an LSTM along each row, so that a cell knows what stands beside it.

The paper is that of `regard.recurrent.coarse_to_fine`.
"""

from jaxtyping import Float
from torch import Tensor, nn, zeros

from regard.checks import checked, refuse, whole


class RowEncoder(nn.Module):
    """A grid (B, Y, X, dim) read row by row by an LSTM -> (B, Y, X, hidden); each row starts from a state of its own.

    Args:
        rows: the most rows that there are states for.
    """

    def __init__(self, dim: int, hidden: int, *, rows: int = 64) -> None:
        super().__init__()
        whole(self, dim=dim, hidden=hidden, rows=rows)
        self.dim = dim
        self.lstm = nn.LSTM(dim, hidden, batch_first=True)
        self.start = nn.Parameter(zeros(2, rows, hidden))

    @checked(M="dim")
    def forward(self, grid: Float[Tensor, "B Y X M"]) -> Float[Tensor, "B Y X N"]:
        B, Y = grid.shape[:2]
        if self.start.shape[1] < Y:
            refuse(self, "grid", "has too many rows", Y, f"at most rows = {self.start.shape[1]}")
        h, c = (z[None, :Y].repeat(1, B, 1) for z in self.start)
        return self.lstm(grid.flatten(0, 1), (h, c))[0].unflatten(0, (B, Y))
