"""Grouped attention: frames that follow each other are joined to tokens, g times fewer and wider.

Heads are cut from the joined vector, so they do not mix the frames of a group evenly. If g divides H, every head lies
within one frame: phase p of the groups attends to phase p alone, which is dilated attention, with H / g heads of width
g M / H, and phases meet elsewhere in the model. Else some heads straddle two neighbouring phases.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, flag, refuse, tokens, whole
from regard.kernels import Problem, execute
from regard.kernels.check import check_inputs
from regard.masks import Mask, block_causal, causal, dense, padding
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.tokens import shown
from regard.positions.relative_sinusoids import RelativeSinusoids
from regard.tracing import exporting

CARD = Card(
    "grouped",
    equation="""group n of queries: Q_n = [q_gn | .. | q_gn+g-1], K_n and V_n likewise; zeros behind the last frame
head h: features h d .. (h + 1) d of Q, K and V,   d = g M / H
O_n = softmax_m((Q_n + u) . K_m + (Q_n + w) . E_n-m) / sqrt(d)) V_m;   y = W_o [its g frames] + b_o
E_D = [W_p PE(g D + c_0) + b_p | .. | W_p PE(g D + c_g-1) + b_p],   c_r = (g - 1) / 2 - r;   g - 1 - r if causal
g even: c_r = g/2 - 1 - r where that makes the position >= 0, else g/2 - r""",
    papers=(
        Paper(
            "Efficient conformer: Progressive downsampling and grouped attention for automatic speech recognition",
            "Burchi, Vielzeuf",
            2021,
            "2109.01163",
            "abstract; official code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "streaming", "compile"},
    traits={"nonnegative", "linear_in_values", "sparse"},
    cost=Cost("(2*B*T*S*M + B*T*S*H*M/group)/group + B*T*M*M", "2*S*M"),
    claim="Groups make attention g times cheaper, and where g divides H a frame changes frames of its phase alone: "
    "tests/mixers/test_grouped.py::test_a_frame_changes_its_own_phase_alone, "
    "tests/mixers/test_grouped.py::test_the_products_fall_with_the_group.",
    differs=(
        "Hidden frames are left out wherever they stand, so that groups are those of the real frames by themselves; "
        "the code keeps whatever they hold in a group whose first frame is real.",
        "A causal layer takes g that divides H, so that no frame sees a later one; lookahead=True takes others, whose "
        "frames see up to g - 1 later ones of their group, as in the code.",
        "A stream's groups count from its first frame; the code drops the oldest frames to make the past whole groups.",
        "Towards a context, groups of both count from their starts, and distances are between these numbers; the code "
        "has relative positions in self-attention only.",
        "The Conformer around it, with its stages of other lengths and widths, is left to the model.",
    ),
    verified="third-party",
    example={"group": 2, "bias": False},
    tries={"lookahead": ..., "group": 3},
    defaults={
        "group": "code, the first stage's",
        "position": "code",
        "lookahead": "ours, none",
        "bias": "code",
        "context_dim": "ours, as wide as dim",
    },
)


LONGEST = 256
"""Frames of a group, which are laid out even where a sequence is shorter."""


def joined(z: Float[Tensor, "B H T D"], group: int) -> Float[Tensor, "B H N d"]:
    """Frames side by side in groups, of which there is one at least, zeros behind the last, cut into heads again."""
    _, H, S, D = z.shape
    N = (max(S, 1) + group - 1) // group + int(exporting())  # one more, for torch would ask whether there is but one
    at = torch.arange(N * group, device=z.device).clamp(max=S)
    frames = F.pad(z.transpose(1, 2).flatten(2), (0, 0, 0, 1)).index_select(1, at)
    return frames.unfold(1, group, group).mT.flatten(2).unflatten(-1, (H, group * D)).transpose(1, 2)


def grouped_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    *,
    group: int = 3,
    mask: Mask | None = None,
    keep: Bool[Tensor, "B S"] | None = None,
    relative: RelativeSinusoids | None = None,
    where: Int[Tensor, "*b N"] | None = None,
) -> Float[Tensor, "B H T D"]:
    """Attention of groups to groups, which are cut into as many heads, of width g D.

    Args:
        mask: of groups.
        keep: True at real keys. Others are zeros, and a group counts where its first frame does.
        relative: what makes scores depend on distances.
        where: the numbers of the queries' groups; default 0, 1, ...
    """
    check_inputs(q, k, v)
    whole("grouped_attention", most=LONGEST, group=group)
    if (got := (k.shape[1], v.shape[3])) != (wanted := (q.shape[1], q.shape[3])):
        refuse("grouped_attention", "k and v", "have other heads or width than q", got, f"{wanted}")
    if exporting() and keep is None:
        keep = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
    if keep is not None:
        k, v = (z.masked_fill(~keep[:, None, :, None], 0) for z in (k, v))
        real = padding(joined(keep[:, None, :, None], group)[:, 0, :, 0])
        mask = real if mask is None else mask & real
    Q, K, V = (joined(z, group) for z in (q, k, v))
    where = torch.arange(Q.shape[2], device=q.device) if where is None else where
    out = execute(Problem(Q, K, V, int(Q.shape[3]) ** -0.5, mask, position=relative, positions=where))
    frames = out.transpose(1, 2).flatten(2).unflatten(-1, (group, -1)).flatten(1, 2)
    frames = frames.index_select(1, torch.arange(q.shape[2], device=q.device))
    return frames.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)


def to_front(
    keep: Bool[Tensor, "B S"], *heads: Float[Tensor, "B H S D"]
) -> tuple[Int[Tensor, "B 1 S 1"], Bool[Tensor, "B S"], list[Tensor]]:
    """The order that has real frames first, which are real then, and all in that order, zeros behind."""
    order = keep.long().argsort(dim=1, descending=True, stable=True)[:, None, :, None]
    real = torch.arange(keep.shape[1], device=keep.device) < keep.sum(1, keepdim=True)
    moved = [z.gather(2, order.expand_as(z)).masked_fill(~real[:, None, :, None], 0) for z in heads]
    return order, real, moved


class GroupedState(NamedTuple):
    """The past: keys, values and which are real."""

    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S D"]
    held: Bool[Tensor, "B S"]


@CARD.module
class GroupedAttention(HeadMixer):
    """Projections of frames, `grouped_attention` between them, and a projection of frames.

    Args:
        dim, num_heads, bias, context_dim: as of `HeadMixer`; H divides M.
        group: g.
        position: "relative", or "none".
        causal: no frame sees a later one, for which g must divide H.
        lookahead: lets a causal layer have another g; its frames see all frames of their own group.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        group: int = 3,
        position: Literal["relative", "none"] = "relative",
        causal: bool = False,
        lookahead: bool = False,
        bias: bool = True,
        context_dim: int | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, bias=bias, context_dim=context_dim)
        whole(self, most=LONGEST, group=group)
        divides(self, num_heads=num_heads, dim=dim)
        choice(self, ("relative", "none"), position=position)
        flag(self, lookahead=lookahead)
        if causal and num_heads % group and not lookahead:
            wanted = "a number that divides num_heads, or lookahead=True"
            refuse(self, "group", "makes heads that see later frames", f"{group} for {num_heads} heads", wanted)
        self.group, self.lookahead, self.straddles = group, lookahead, causal and num_heads % group > 0
        self.relative = (
            RelativeSinusoids(dim, num_heads, group=group, causal=causal) if position == "relative" else None
        )

    def receptive_field(self) -> Mask:
        """Which frames may reach which at most: those of other phases may not where g divides H."""
        return block_causal(self.group) if self.straddles else super().receptive_field()

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, alone: bool) -> Tensor:
        if keep is None:
            return self.mix(q, k, v, None)
        order, keep, (k, v, *own) = to_front(keep, k, v, *([q] if alone else []))
        if not alone:
            return self.mix(q, k, v, keep)
        out = self.mix(own[0], k, v, keep)
        return torch.zeros_like(out).scatter(2, order.expand_as(out), out)

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B H S D"],
        v: Float[Tensor, "B H S D"],
        keep: Bool[Tensor, "B S"] | None,
    ) -> Float[Tensor, "B H T D"]:
        mask = causal() if self.causal else None
        return grouped_attention(q, k, v, group=self.group, mask=mask, keep=keep, relative=self.relative)

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GroupedState:
        """The state before any frame; it grows by what it is given, whatever the capacity."""
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        if not self.causal:
            refuse(self, "causal", "is off, so that it can't stream", False, "a layer built with causal=True")
        z = self.q_proj.weight.new_zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        return GroupedState(z, z.clone(), torch.zeros(batch_size, 0, device=z.device, dtype=torch.bool))

    def step(
        self, x: Float[Tensor, "B t M"], state: GroupedState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], GroupedState]:
        """The next t frames: what `forward` would give at these positions, and the state with them in it.

        With `lookahead` every step begins with a group.

        Args:
            mask: True = a real frame, of these t.
        """
        tokens(self, "x", x, self.dim)
        x = shown(self, x, mask)
        if not isinstance(state, GroupedState):
            got = type(state).__name__
            refuse(self, "state", "has the wrong type", got, "the GroupedState of init_state", error=TypeError)
        if len(state.k) != len(x):
            refuse(self, "state", "has another batch than x", len(state.k), f"{len(x)} sequences")
        g, keep = self.group, x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        before = state.held.sum(1, keepdim=True)
        if self.straddles and bool((before % g).any()):
            refuse(self, "state", "ends within a group", before.flatten().tolist(), f"multiples of {g} frames")
        q, k, v = self.split(x, x)
        k, v = (torch.cat([old, new.to(old.dtype)], 2) for old, new in ((state.k, k), (state.v, v)))
        held = torch.cat([state.held, keep], 1)
        _, real, (K, V) = to_front(held, k.to(q.dtype), v.to(q.dtype))
        groups = (x.shape[1] + 2 * g - 2) // g  # queries stand where they do in theirs, hidden ones behind all
        place = (before % g + keep.cumsum(1) - 1).masked_fill(~keep, groups * g)[:, None, :, None].expand_as(q)
        Q = q.new_zeros(*q.shape[:2], groups * g + 1, q.shape[3]).scatter(2, place, q)[:, :, :-1]
        where = before // g + torch.arange(groups, device=x.device)
        sees = dense(torch.arange((max(K.shape[2], 1) + g - 1) // g, device=x.device) <= where[:, None, :, None])
        out = grouped_attention(Q, K, V, group=g, mask=sees, keep=real, relative=self.relative, where=where)
        out = F.pad(out, (0, 0, 0, 1)).gather(2, place)
        return self.merge(out), GroupedState(k, v, held)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"
