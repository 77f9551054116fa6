"""ComplexFormer: rotary whose heads each scale and shift the angle between features of query and key.

The paper was withdrawn by its first author. A pair of channels is a number rho e^(i phi); rotary adds angles of
positions to phi as it is, and this to delta phi + b, with delta and b of each head. What belongs to the query and what
to the key are apart, so that turned queries and keys go into any kernel and cache.

Where delta is no whole number the map jumps at phi = pi: features that are next to each other on both sides of it come
apart, by as much as 2 rho for delta = 1/2. That is the mechanism's own.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, divides, fits, flag, number, whole
from regard.positions._shared import angles, frequencies, work_dtype
from regard.positions.rotary import rotate
from regard.stages import Position

CARD = Card(
    "complexformer",
    equation="""(q_2a, q_2a+1) = rho_q (cos phi_q, sin phi_q),   and k likewise
score[m,n] = sum_a rho_q rho_k cos(delta_h (phi_q - phi_k) + b_h + (m - n) w_a) / sqrt(D),   w_a = base^(-2a/D)
as rotary of   rho_q e^(i (delta_h phi_q + b_h))   and   rho_k e^(i delta_h phi_k);   delta = 1, b = 0 is rotary""",
    papers=(
        Paper(
            "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector "
            "Attention",
            "Shao et al.",
            2025,
            "2505.10222",
            "withdrawn by its first author (version 2); abstract alone; the code of EulerFormer (SIGIR 2024), whose "
            "transformation this makes each head's own",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + 12*(B*H*T*D + B*G*S*D)", "2*S*G*D"),
    claim="The withdrawn paper's of lower perplexity is not to be expected. In small: a head chooses how far the angle "
    "of features counts, and with delta = 0 it sees lengths and positions only: "
    "tests/positions/test_complexformer.py::test_without_delta_only_lengths_and_positions_count.",
    differs=(
        "The paper was withdrawn, and its method is not to be read: only that each head has an exp[i(Adapt(semantic "
        "angle) + Delta(position))] is from the abstract.",
        "Inferred, as in EulerFormer: Adapt is delta s + b, starting as rotary; Delta has rotary's fixed frequencies.",
        "Inferred: frequencies go over a head's width, where EulerFormer's go over all heads together.",
        "A head of keys and the heads of queries that read it have one delta; each head of queries has its own b.",
        "A pair that is 0 stays so with gradient 0; EulerFormer's LLaMA file shifts what it takes angles of instead.",
    ),
    verified="reconstructed",
    tries={"init": 0.5},
    defaults={
        "base": "code, EulerFormer",
        "init": "ours, starts as rotary",
        "per_feature": "code, EulerFormer",
        "shift": "code, EulerFormer, where it is an option",
        "interleaved": "code, EulerFormer's LLaMA",
    },
)


def _pairs(z: Float[Tensor, "B H T D"], interleaved: bool) -> tuple[Tensor, Tensor]:
    """First and second channels of pairs."""
    first, second = z.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(-1 if interleaved else -2)
    return first, second


def _joined(first: Tensor, second: Tensor, interleaved: bool) -> Float[Tensor, "B H T D"]:
    return torch.stack((first, second), -1 if interleaved else -2).flatten(-2)


def euler_transform(
    z: Float[Tensor, "B H T D"], *, interleaved: bool = False
) -> tuple[Float[Tensor, "B H T half"], Float[Tensor, "B H T half"]]:
    """Magnitude and angle of each pair of channels; 0 and 0, with gradient 0, for pairs of zeros."""
    r, p = _pairs(z, interleaved)
    none = torch.maximum(r.detach().abs(), p.detach().abs()) < torch.finfo(z.dtype).tiny
    r, p = r.masked_fill(none, 1), p.masked_fill(none, 0)
    rho = torch.hypot(r, p)
    phi = torch.atan2(p / rho, r / rho)  # the derivative at (p, r) would divide by their squares
    return rho.masked_fill(none, 0), phi.masked_fill(none, 0)


def euler_adapt(
    z: Float[Tensor, "B H T D"], delta: Float[Tensor, "H _half"], *, interleaved: bool = False
) -> Float[Tensor, "B H T D"]:
    """rho e^(i delta phi) for each pair rho e^(i phi), before positions turn it."""
    rho, phi = euler_transform(z, interleaved=interleaved)
    phi = delta[:, None] * phi
    return _joined(rho * phi.cos(), rho * phi.sin(), interleaved)


def phase_contrast(
    phi: Float[Tensor, "*b T half"],
    dropped: Float[Tensor, "*b T half"],
    weight: Float[Tensor, " half"] | None = None,
    *,
    temperature: float = 1.0,
    eps: float = 1e-5,
) -> Float[Tensor, ""]:
    """A loss that tells each position's angles from all others', by a copy of them with dropout; the mean.

    EulerFormer adds it for turned queries and for turned keys, times a small number.

    Args:
        weight: of pairs; EulerFormer trains it, from ones.
        eps: added to the sum of exponentials, as EulerFormer does.
    """
    fits("phase_contrast", "*b T half", None, phi=phi, dropped=dropped)
    number("phase_contrast", above=0, temperature=temperature)
    number("phase_contrast", least=0, eps=eps)
    w = 1.0 if weight is None else weight
    near = (w * phi.cos()) @ dropped.cos().mT + (w * phi.sin()) @ dropped.sin().mT
    near = near / temperature
    total = near.logsumexp(-1)
    if eps:
        total = torch.logaddexp(total, total.new_tensor(eps).log())
    return (total - near.diagonal(dim1=-2, dim2=-1)).mean()


@CARD.fills("position")
class EulerRotary(Position):
    """Rotary of features whose angles each head scales by `delta` (G, 1 or D/2) and shifts by `b` (H, 1 or D/2).

    Args:
        head_dim: D, even.
        num_heads, num_kv_heads: H and G.
        base: of the geometric w_a.
        init: where delta starts; 1 is rotary. b starts at 0.
        per_feature: whether each pair of a head has its own delta and b.
        shift: whether there is a b.
        interleaved: whether pairs are neighbours, as in EulerFormer's first code, or D/2 apart.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        base: float = 10000.0,
        init: float = 1.0,
        per_feature: bool = False,
        shift: bool = True,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        whole(self, head_dim=head_dim, num_heads=num_heads)
        divides(self, pair=2, head_dim=head_dim)
        G = num_heads if num_kv_heads is None else num_kv_heads
        whole(self, num_kv_heads=G)
        divides(self, num_kv_heads=G, num_heads=num_heads)
        number(self, above=1, base=base)
        number(self, init=init)
        flag(self, per_feature=per_feature, shift=shift, interleaved=interleaved)
        self.head_dim, self.base, self.init, self.interleaved = head_dim, base, init, interleaved
        width = head_dim // 2 if per_feature else 1
        self.delta = nn.Parameter(torch.empty(G, width))
        self.b = nn.Parameter(torch.empty(num_heads, width)) if shift else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.delta, self.init)
        if self.b is not None:
            nn.init.zeros_(self.b)

    @checked(D="head_dim")
    def rotate(self, z: Float[Tensor, "B H T D"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B H T D"]:
        work = work_dtype(z)
        delta = self.delta.to(work).repeat_interleave(z.shape[1] // len(self.delta), 0)
        adapted = euler_adapt(z.to(work), delta, interleaved=self.interleaved)
        turn = angles(positions, frequencies(self.head_dim, self.base, z.device))
        return rotate(adapted, turn, interleaved=self.interleaved).to(z.dtype)

    def turn(
        self, q: Tensor, k: Tensor, at: Int[Tensor, "*b T"], keys: Int[Tensor, "*b S"]
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G S D"]]:
        q, k = super().turn(q, k, at, keys)
        if self.b is not None:  # of queries alone: on both sides it would cancel out
            b = self.b.to(work_dtype(q)).expand(-1, self.head_dim // 2)
            q = rotate(q, b[None, :, None], interleaved=self.interleaved)
        return q, k

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}, init={self.init:g}, interleaved={self.interleaved}"
