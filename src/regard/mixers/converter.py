"""Converter: tokens are filtered in a unitary transform of their own making; no weights of pairs."""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, refuse, whole
from regard.masks import Mask, full, padding
from regard.mixers.exponential import work_dtype
from regard.mixers.givens import Rotations, digraph_fourier, earlier, inverse_digraph_fourier
from regard.mixers.kernel_polynomial import Damping, chebyshev, gibbs_damping
from regard.mixers.siren import Siren, scale_norm
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.tracing import as_it_is

CARD = Card(
    "converter",
    equation="""y = Phi^H Diag(e^{i f(lambda)}) Phi V,   V = W_r x + i W_i x
Phi = Diag(e^{2 pi i theta}) (G^l_{T-2} .. G^l_0) (G^u_0 .. G^u_{T-2}) P,   G_i rotates tokens i and i + 1 (unitary)
angles   7 numbers a token: mean over 7 parts of l2norm(siren(x)),   siren(x) = sin(W2 SN(sin(W1 x + b1)) + b2)
lambda   mean over features of another siren(x);   f = c_0 + sum_{k=1..K} c_k g_k T_k(lambda), Chebyshev polynomials
u = SN(y + x),   z = W6 (softplus(W5 Re u + b5) * tanh(W5' Im u + b5')) + b6 + a Re u + (1 - a) Im u,   out = SN(z)
SN(z) = w z / (|z| + 1e-5)""",
    papers=(
        Paper(
            "Converting Transformers into DGNNs Form",
            "Zhang, Mao, Chiu, Sun",
            2025,
            "2502.00585",
            "abstract; the authors' code and its drawing",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "dropout", "compile"},
    cost=Cost("B*T*M*(14*M + 256)", ""),
    claim="A T x T matrix of the tokens' own making, unitary to 1e-12, that costs linear time and is never formed: "
    "tests/mixers/test_converter.py::test_keeps_all_energy_at_linear_cost.",
    differs=(
        "As released the transform is not unitary, for both sweeps drop a token and the inverse runs its sweeps in the "
        "forward order; its parallel scan has a wrong gradient, too. Here are the drawing's Phi and its true adjoint.",
        "By default the angles of a rotation are those of the tokens that it turns. The released code flattens its "
        'T x 7 table row by row and cuts it in 7, so that a rotation has angles of other tokens: angles="released".',
        "theta turns nothing in y, for diagonals commute: the formula has it, and so has the code.",
        "One set of coefficients c; the released code has one for each place in the batch.",
        "Any length and any batch; hidden tokens are as if they were not there, in the layout of angles, too.",
        "Tokens beyond the last whole table of a permutation stay where they are; the released code takes whole ones.",
        "One dropout, behind both inner norms, of V and of the gate, in place of four.",
        "The damping of Vekic and White is applied to all orders, where the released code reads the wrong axis.",
        "The loss of f's slope is added to the task's, whose weight the authors' training lowers by as much.",
    ),
    verified="third-party",
    auxiliary="kernel_loss",
    exceptions={
        "L43 every_parameter_has_a_gradient": "a begins at 1, the end of its range; moved beyond, it has no gradient"
    },
    tries={"permutation": 3, "damping": "fejer", "sharpness": {"damping": "lorentz", "sharpness": 2.0}},
    defaults={
        "order": "code",
        "hidden_dim": "code, 4 M",
        "permutation": "code",
        "angles": "ours, as the formula has it",
        "damping": "code",
        "sharpness": "code, mu = 3 and xi = 4",
        "auxiliary_weight": "code",
    },
)

Angles = Literal["token", "released"]


class UnitaryDigraphConv(nn.Module):
    """The convolution alone: real tokens (B, T, M) -> complex ones (B, T, M), by a unitary map of V.

    Args:
        dim: M.
        order: K, of the polynomial.
        permutation: m: tokens are read as a table of m columns, and turned; None leaves them in place.
        angles: whose angles a rotation has: its own "token"s', or as "released".
        damping, sharpness: of the polynomial, see `gibbs_damping`.
        dropout: behind the inner norms, and of V.
    """

    def __init__(
        self,
        dim: int,
        *,
        order: int = 2,
        permutation: int | None = None,
        angles: Angles = "token",
        damping: Damping = "none",
        sharpness: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole(self, dim=dim)
        whole(self, 0, order=order)
        choice(self, get_args(Angles), angles=angles)
        if permutation is not None:
            whole(self, permutation=permutation)
        if sharpness is not None:
            number(self, above=0, sharpness=sharpness)
            if damping not in ("lanczos", "lorentz"):
                refuse(self, "sharpness", f"says nothing to damping {damping!r}", sharpness, "lanczos or lorentz")
        self.dim, self.permutation, self.angles = dim, permutation, angles
        self.damping = gibbs_damping(damping, order, sharpness)
        self.spectrum, self.turns = Siren(dim, dropout=dropout), Siren(dim, dropout=dropout)
        self.real_proj, self.imag_proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.coefficients, self.dropout = nn.Parameter(torch.empty(order + 1)), nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors': c_0 = 1 / (K + 1), c_k = 2 / (K + 1); V's maps have a variance of 1 / 2, whatever M."""
        with torch.no_grad():
            self.coefficients.fill_(2 / len(self.coefficients))
            self.coefficients[:1] /= 2
        for proj in (self.real_proj, self.imag_proj):
            nn.init.normal_(proj.weight, std=math.sqrt(0.5))

    def rotations(self, x: Float[Tensor, "B T M"], keep: Bool[Tensor, "B T"] | None = None) -> Rotations:
        """Of the real tokens, which come first; none between the others."""
        T = x.shape[1]
        table = F.adaptive_avg_pool1d(scale_norm(self.turns(x)), 7)
        table = table.to(work_dtype(table))
        at = torch.arange(T, device=x.device)
        n = at.new_full((1, 1), T) if keep is None else keep.sum(1, keepdim=True)
        if self.angles == "released":
            place = (at * 1 + torch.arange(7, device=x.device)[:, None] * n[..., None]).clamp(max=max(7 * T - 1, 0))
            table = table.flatten(1).gather(1, place.flatten(1).expand(len(x), -1)).unflatten(1, (7, T)).mT
        hidden = (at >= n - 1)[..., None]  # rotation i turns token i and the one behind
        lower, upper = (z.masked_fill(hidden, 0) for z in (table[..., :3], earlier(table[..., 3:6])))
        order = None
        if self.permutation is not None:
            m, rows = self.permutation, n // self.permutation
            order = torch.where(at < rows * m, at % rows.clamp(min=1) * m + at // rows.clamp(min=1), at)
            order = order.expand(len(x), -1)
        return Rotations(lower, upper, table[..., 6], order)

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B T M"], keep: Bool[Tensor, "B T"] | None = None) -> Complex[Tensor, "B T M"]:
        """`keep`: True = a real token; 0 stands at the others."""
        order = None if keep is None else torch.where(keep, 0, 1).argsort(dim=1, stable=True)[..., None]
        if order is not None and keep is not None:  # the real ones first, as they come
            x, keep = x.gather(1, order.expand_as(x)), keep.gather(1, order[..., 0])
        v = self.dropout(torch.stack([self.real_proj(x), self.imag_proj(x)], -1))
        turns, rate = self.rotations(x, keep), self.spectrum(x).mean(-1)
        with as_it_is(x.device):
            work = turns.theta.dtype
            v = torch.view_as_complex(v.to(work).contiguous())
            v = v if keep is None else v * keep[..., None]
            f = chebyshev(rate.to(work), self.coefficients.to(work), self.damping)
            filtered = torch.polar(torch.ones_like(f), f)[..., None] * digraph_fourier(v, turns)
            y = inverse_digraph_fourier(filtered, turns)
        return y if order is None else y.gather(1, order.argsort(1).expand_as(y))


@CARD.module
class Converter(nn.Module):
    """One bidirectional layer, its gated read-out, norms and residual included.

    Args:
        dim: M.
        hidden_dim: of the gate; default 4 M.
        order, permutation, angles, damping, sharpness: of `UnitaryDigraphConv`.
        dropout: behind the inner norms, of V and of the gate, in training.
        auxiliary_weight: of `kernel_loss` in training.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        order: int = 2,
        permutation: int | None = None,
        angles: Angles = "token",
        damping: Damping = "none",
        sharpness: float | None = None,
        dropout: float = 0.0,
        auxiliary_weight: float = 1e-3,
    ) -> None:
        super().__init__()
        whole(self, dim=dim)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        whole(self, hidden_dim=hidden_dim)
        number(self, least=0, auxiliary_weight=auxiliary_weight)
        number(self, least=0, most=1, dropout=dropout)
        options: dict[str, Any] = {"permutation": permutation, "angles": angles, "damping": damping}
        self.conv = UnitaryDigraphConv(dim, order=order, sharpness=sharpness, dropout=dropout, **options)
        self.dim, self.auxiliary_weight = dim, auxiliary_weight
        self.plain = damping == "none"
        self.real_gate, self.imag_gate = (nn.Linear(dim, hidden_dim) for _ in range(2))
        self.o_proj, self.dropout = nn.Linear(hidden_dim, dim), nn.Dropout(dropout)
        self.norm, self.out_norm, self.share = (nn.Parameter(torch.empty(n)) for n in (dim, dim, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in (self.norm, self.out_norm, self.share):
            nn.init.ones_(p)
        for proj in (self.real_gate, self.imag_gate, self.o_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.zeros_(proj.bias)

    def receptive_field(self) -> Mask:
        return full()

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens: `regard.masks.padding`, or True = a real token."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        x, bad = quarantine(x)
        out = self.read_out(self.conv(x, keep), x) if x.shape[1] else x
        return spoil(out, bad, bad, None if keep is None else padding(keep))

    def read_out(self, y: Complex[Tensor, "B T M"], x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """What becomes of the complex tokens: out of the card's equation."""
        u = scale_norm(y + x, self.norm)
        gate = F.softplus(self.real_gate(u.real.to(x.dtype))) * self.imag_gate(u.imag.to(x.dtype)).tanh()
        z, a = self.o_proj(self.dropout(gate)), self.share.clamp(0, 1)
        return scale_norm(z + a * u.real + (1 - a) * u.imag, self.out_norm).to(z.dtype)

    def kernel_loss(self, x: Tensor | None = None, **_: Any) -> Float[Tensor, ""]:
        """pi sum_k k^2 c_k^2, the mean square of f's slope against its angle; 0 where f is damped."""
        c = self.conv.coefficients
        loss = math.pi * (c * torch.arange(len(c), device=c.device)).square().sum()
        return loss if self.plain else 0 * loss
