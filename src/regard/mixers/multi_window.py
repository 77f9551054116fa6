"""Multi-window attention: each head cuts the tokens into windows of its own size, and some see all."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import fits, flag, refuse, whole
from regard.masks import multi_window
from regard.pipeline.layer import Attention
from regard.positions._shared import work_dtype
from regard.slots import Slots
from regard.stages import Position, Rows

CARD = Card(
    "multi_window",
    equation="""w = windows[h] > 0:   softmax(q_i . k_j / sqrt(D) + R_h[i - j]) over floor(i / w) == floor(j / w)
windows[h] = 0:       softmax(q_i . k_j / sqrt(D)) over all j
R_h: 2 w - 1 numbers for -w < i - j < w
shift: windows begin floor(w / 2) later, and the tokens before them are one by themselves""",
    papers=(
        Paper(
            "Masked Autoencoders with Multi-Window Local-Global Attention Are Better Audio Learners",
            "Yadav, Theodoridis, Hansen, Tan",
            2024,
            "2306.00561",
            "abstract and start of the introduction; official code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "mask", "streaming", "dropout", "compile"},
    lacks={"cross": "its windows are those of one sequence"},
    traits=PLAIN - {"position_free", "shift_invariant"},
    cost=Cost("2*B*T*D*(max(1, floor(H/4))*S + (H - max(1, floor(H/4)))*min(S, 21))", "2*S*H*D"),
    claim="A layer has heads of every reach: a token changes a head inside its own window and nowhere else, and how "
    "far heads look grows with their windows: "
    "tests/mixers/test_multi_window.py::test_a_head_hears_its_own_window_alone.",
    differs=(
        "The last window may be short; the authors' code takes lengths that all windows divide.",
        "Shifted windows are cut hard, where the authors' code adds -100 to what it rolled around.",
        "A causal layer, packed documents and padding are not the paper's; its decoder sees all and is never padded.",
        "Windows count from the first token of a row, padding among them: pad on the right.",
        "Left out: the masked autoencoder around it.",
    ),
    verified="third-party",
    tries={"windows": 4, "shift": True},
    defaults={
        "windows": "ours, the paper's are the divisors of its 250 tokens",
        "relative": "code",
        "shift": "code",
        "bias": "ours",
    },
)


def spread_windows(heads: int) -> tuple[int, ...]:
    """Powers of two from 2 to 64, evenly over three quarters of the heads; the others see all."""
    local = heads - max(1, heads // 4)
    return (*(2 ** (1 + 6 * h // local) for h in range(local)), *(0,) * (heads - local))


class WindowTables(Position):
    """A number for each difference of place within a head's window. 0 beyond, where there is nothing to see, and in
    heads that see all.

    Args:
        windows: w of each head, or 0.
    """

    by_distance = True

    def __init__(self, windows: Sequence[int]) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.tables = nn.ParameterDict({str(h): torch.empty(2 * w - 1) for h, w in enumerate(self.windows) if w})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': a variance of 0.02 / (2 w - 1), by a normal cut at two of its deviations."""
        for table in self.tables.values():
            std = math.sqrt(0.02 / len(table)) / 0.87962566103423978  # which the cut narrows
            nn.init.trunc_normal_(table, std=std, a=-2 * std, b=2 * std)

    def start_neutral(self) -> bool:
        """All 0, which is attention within windows."""
        for table in self.tables.values():
            nn.init.zeros_(table)
        return True

    def bias(self, rows: Rows) -> Float[Tensor, "1 H t s"]:
        fits(self, "B H t D", {"H": len(self.windows)}, q=rows.q)
        work, widest = work_dtype(rows.q), max(1, *self.windows)
        none = rows.q.new_zeros(2 * widest + 1, dtype=work)
        table = torch.stack(
            [
                nn.functional.pad(self.tables[str(h)].to(work), (widest - w + 1,) * 2) if w else none
                for h, w in enumerate(self.windows)
            ]
        )
        difference = rows.i.unsqueeze(-1) - rows.j
        return table[:, difference.clamp(-widest, widest) + widest].to(rows.q.dtype).unsqueeze(0)

    def extra_repr(self) -> str:
        return f"{self.windows}"


@CARD.module(closed=("kernel",))
class MultiWindowAttention(Attention):
    """Self-attention with a window for each head.

    Args:
        dim, num_heads, causal, dropout, kernel: as in `regard.Attention`.
        windows: one int >= 0 for each head, or for all; 0 sees all. Default: powers of two, and 0 in a quarter of them.
        relative: whether heads with a window have a table of biases.
        shift: whether windows begin half their size later, as in odd layers of a stack.
        bias: whether the projections have one, as in the authors' model.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        windows: int | Sequence[int] | None = None,
        relative: bool = True,
        shift: bool = False,
        bias: bool = False,
        causal: bool = False,
        dropout: float = 0.0,
        kernel: str = "auto",
    ) -> None:
        whole(self, num_heads=num_heads)
        flag(self, relative=relative, shift=shift)
        windows = spread_windows(num_heads) if windows is None else windows
        windows = (windows,) * num_heads if isinstance(windows, int) else windows
        mask = multi_window(windows, shift=shift)
        if len(windows) != num_heads:
            refuse(self, "windows", "are not one for each head", len(windows), f"{num_heads} of them")
        position = WindowTables(windows) if relative and any(windows) else None
        parts: Slots = {"mask": mask, "position": position}
        super().__init__(dim, num_heads, bias=bias, causal=causal, dropout=dropout, kernel=kernel, **parts)
        self.windows, self.shift = tuple(windows), shift
        inner = math.sqrt(6 / (4 * dim))  # one Glorot map gives queries, keys and values
        for proj, bound in ((self.q_proj, inner), (self.k_proj, inner), (self.v_proj, inner), (self.o_proj, None)):
            if bound is None:
                nn.init.xavier_uniform_(proj.weight)
            else:
                nn.init.uniform_(proj.weight, -bound, bound)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
