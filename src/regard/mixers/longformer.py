"""Longformer: tokens see a window and a few global tokens, which see all by their own projections."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, flag, number, refuse, whole
from regard.masks import Mask, dilated, full, global_tokens, padding, per_head
from regard.pipeline.function import attention
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.shapes import head_shape
from regard.tracing import readable
from regard.weights import Loaded, same

CARD = Card(
    "longformer",
    equation="""local i:   softmax over j in Gl or |j - i| <= W/2 of (q_i . k_j / sqrt(D)),  times v_j
global i:  softmax over all j of (qg_i . kg_j / sqrt(D)),  times vg_j
Gl the global tokens; with dilation d |j - i| <= d W/2 and d divides j - i      time O(T (W + 1 + 2 |Gl|))""",
    papers=(
        Paper(
            "Longformer: The Long-Document Transformer",
            "Beltagy, Peters, Cohan",
            2020,
            "2004.05150",
            "the authors' code; the layer in transformers; summaries by others, which tell of the starting values",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "gqa", "dropout", "compile"},
    traits={"normalised", "nonnegative", "linear_in_values"},
    cost=Cost(
        "2*B*H*D*(T*(2*min(window/2, T - 1) + 1 + 3*num_global) - min(window/2, T - 1)*(min(window/2, T - 1) + 1))", ""
    ),
    claim="Far tokens are reached in two layers through a global one, and in no other way: "
    "tests/mixers/test_longformer.py::test_far_tokens_are_reached_in_two_layers_through_a_global_one.",
    differs=(
        "Dilation is for bidirectional windows and leaves global keys alone; the paper's own use of it, in causal "
        "language models without global tokens, is the mask `dilated_window`.",
        "Lengths need not be multiples of the window, and a window of 2 works, where the code fails.",
        "The code stops before the output projection, in which a padded token's 0 becomes the bias here.",
    ),
    verified="third-party",
    example={"window": 4, "num_global": 2},
    tries={"dilation": 2},
    defaults={
        "window": "code, transformers: the base model",
        "num_global": "ours, the token that classifiers read",
        "dilation": "code, transformers: none",
        "share_global": "code, transformers",
        "bias": "code, transformers",
    },
)


@CARD.module
class LongformerAttention(nn.Module):
    """Window attention with global tokens, which stand anywhere and may differ by sample.

    Args:
        dim, num_heads, num_kv_heads, head_dim, dropout: as for `regard.Attention`.
        window: W, even: a token sees W / 2 neighbours on each side besides itself.
        num_global: so many first tokens are global where `forward` is not told which.
        dilation: d, of all heads or of each.
        share_global: whether global tokens ask by the local projections; else by three of their own, which start as
            copies of these.
        bias: of the projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 512,
        num_global: int = 1,
        dilation: int | Sequence[int] = 1,
        share_global: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who=type(self).__name__)
        flag(self, share_global=share_global, bias=bias)
        whole(self, 2, window=window)
        whole(self, 0, num_global=num_global)
        number(self, least=0, most=1, dropout=dropout)
        if window % 2:
            refuse(self, "window", "is odd", window, "an even int, half of it for each side")
        each = dilation if isinstance(dilation, Sequence) else [dilation]
        if isinstance(dilation, Sequence) and len(dilation) != num_heads:
            refuse(self, "dilation", "is of another number of heads", dilation, f"one for all, or {num_heads}")
        for one in each:
            whole(self, dilation=one)
        G, D = shape.num_kv_heads, shape.head_dim
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, G, D
        self.window, self.num_global, self.dilation = window, num_global, tuple(each)
        self.share_global, self.dropout = share_global, dropout
        sides = (
            ["local"] if share_global else ["local", "globals"]
        )  # "global" is a word of Python, which torch.export writes as a name

        def projections(n: int) -> nn.ModuleDict:
            return nn.ModuleDict({side: nn.Linear(dim, n * D, bias=bias) for side in sides})

        self.q_proj, self.k_proj, self.v_proj = projections(num_heads), projections(G), projections(G)
        self.o_proj = nn.Linear(num_heads * D, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The global projections start as the local ones."""
        if not self.share_global:
            for projections in (self.q_proj, self.k_proj, self.v_proj):
                projections["globals"].load_state_dict(projections["local"].state_dict())

    def receptive_field(self) -> Mask:
        """Who sees whom where `forward` is not told which tokens are global."""
        return self._near() | global_tokens(self.num_global)

    def _near(self) -> Mask:
        near = [dilated(self.window // 2 + 1, d) for d in self.dilation]
        return near[0] if len(set(near)) == 1 else per_head(near)

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        global_at: Bool[Tensor, "B T"] | Int[Tensor, "B P"] | None = None,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix x.

        Args:
            global_at: which tokens are global, True = global, or their places, filled up by -1, which is the form to
                compile for. Default the first `num_global`. A hidden token is never global.
            mask: hides keys, `regard.masks.padding` or True = a real one; or packs documents. What is hidden gives 0
                before the output projection.

        Raises:
            ValueError, TypeError: x, mask or global_at do not fit.
        """
        keep, packed = key_mask(self, mask, x)
        if packed is not None and global_at is None:  # every document's own first tokens
            return apart(self, x, packed, keep)
        places = self._places(x, global_at, keep)
        x, bad = quarantine(x, always=packed is not None)
        limits = [z for z in (None if keep is None else padding(keep), packed) if z is not None]
        field, all_real = self._near() | global_tokens(places), full()
        for limit in limits:
            field, all_real = field & limit, all_real & limit
        dropout = self.dropout if self.training else 0.0
        q, k, v = self._heads("local", x, x)
        out = attention(q, k, v, mask=field, dropout=dropout)
        if not self.share_global and places.shape[1]:
            T = x.shape[1]
            at = places.masked_fill(places < 0, T)[..., None]  # those that are none go behind the last, and are cut off
            q, k, v = self._heads("globals", F.pad(x, (0, 0, 0, 1)).gather(1, at.expand(-1, -1, self.dim)), x)
            b, j = torch.arange(len(x), device=x.device)[:, None, None, None], torch.arange(T, device=x.device)
            seen = None
            if limits:
                seen = all_real(b, torch.zeros_like(b), at[:, None].clamp(max=T - 1), j).expand(-1, -1, at.shape[1], T)
            rows = attention(q, k, v, mask=seen, dropout=dropout)
            index = at[:, None].expand_as(rows)
            out = F.pad(out, (0, 0, 0, 1)).scatter(2, index, rows.to(out.dtype))[:, :, :T]
        if keep is not None:
            out = out.masked_fill(~keep[:, None, :, None], 0)
        y = self.o_proj(out.transpose(1, 2).flatten(2))
        return spoil(y, bad, bad, field)

    def _heads(self, side: str, asks: Tensor, x: Tensor) -> list[Float[Tensor, "B heads t D"]]:
        """Queries of `asks`, keys and values of x."""
        z = self.q_proj[side](asks), self.k_proj[side](x), self.v_proj[side](x)
        return [one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in z]

    def _places(self, x: Tensor, global_at: Tensor | None, keep: Tensor | None) -> Int[Tensor, "B P"]:
        """The places of the global tokens of each sample, each once, filled up by -1."""
        (B, T), n = x.shape[:2], self.num_global
        if global_at is None:
            chosen = (torch.arange(T, device=x.device) < n).expand(B, T)
        else:
            chosen = self._flags(global_at, B, T)
            n = T if global_at.dtype == torch.bool else global_at.shape[1]
        chosen = chosen if keep is None else chosen & keep
        if global_at is not None and readable(chosen):
            n = int(chosen.sum(1).max()) if chosen.numel() else 0
        flags, order = chosen.byte().sort(dim=1, descending=True, stable=True)
        return order[:, :n].masked_fill(flags[:, :n] == 0, -1)

    def _flags(self, at: Tensor, B: int, T: int) -> Bool[Tensor, "B T"]:
        """Which tokens are global, as a caller told."""
        if at.dtype == torch.bool:
            return at
        if readable(at) and bool(((at < -1) | (at >= T)).any()):
            refuse(self, "global_at", "names no places of x", at.tolist(), f"{B} rows of -1 .. {T - 1}")
        nowhere = at.new_zeros(B, T + 1, dtype=torch.bool)
        return nowhere.scatter(1, at.long().masked_fill(at < 0, T), True)[:, :T]

    def extra_repr(self) -> str:
        d = self.dilation[0] if len(self.dilation) == 1 else self.dilation
        return f"{self.dim}, {self.num_heads}, window={self.window}, num_global={self.num_global}, dilation={d}"


@CARD.loads("transformers", "LongformerSelfAttention")
def _transformers(theirs: Any) -> Loaded:
    """It has no output projection, and is told which tokens are global by its mask."""
    dim, window = theirs.embed_dim, 2 * theirs.one_sided_attn_window_size

    def build() -> LongformerAttention:
        return LongformerAttention(dim, theirs.num_heads, window=window, dropout=theirs.dropout)

    moves: dict[str, str] = {}
    for name, their in (("q", "query"), ("k", "key"), ("v", "value")):
        moves |= {f"{name}_proj.local": their, f"{name}_proj.globals": f"{their}_global"}
    return Loaded(build, same(theirs, moves))
