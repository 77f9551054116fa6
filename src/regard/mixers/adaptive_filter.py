"""Adaptive filter attention: tokens are measurements of one linear system, and weigh as they fit it."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits, flag, number, refuse, whole
from regard.kernels.problem import chunk_rows
from regard.linear._shared import RecurrentMixer, repeat_heads, widened
from regard.masks import Mask, padding
from regard.mixers._filter import TILE_BYTES, filtered
from regard.mixers.linear_system import Bias, LinearSystem
from regard.mixers.selective import by_rows
from regard.pipeline.tokens import key_padding, quarantine, spoil
from regard.positions.rotary import rotate
from regard.tracing import as_it_is, exporting

CARD = Card(
    "adaptive_filter",
    equation="""q, k, v complex, D features a head;   d = |t_i - t_j|,   E = e^(mu d),   mu < 0
V = sigma^2 (1 - e^(2 mu d)) / (-2 mu) + eta^2 e^(2 mu d) + gamma^2
R = |q_i - E e^(i omega (t_i - t_j)) k_j|^2
A = softmax_j(tau^2 (B - log(1 + R S))),   or B - R S where not robust
B = -log V | -nu d | 0,   S = 1 / (nu D V) | 1 / (D (sigma^2 d + eta^2)) | 1 / D
y_i = sum_j A E e^(i omega (t_i - t_j)) v_j,   then g y + (1 - g) v_i | y + v_i | y,   e^(mu + i omega) of it ahead
not isotropic: mu and V of each feature, R S = sum_c R_c S_c, and A of each feature""",
    papers=(
        Paper(
            "Attention as an Adaptive Filter",
            "Racioppo",
            2025,
            "2509.04154",
            "abstract; official code, the isotropic form and an earlier anisotropic one",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "gqa", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost("2*B*H*T*T*D", "S*(2*G*D + 1)"),
    claim="It filters a noisy oscillation to a tenth of the error of its last measurement, and a measurement that "
    "doesn't fit is left out: tests/mixers/test_adaptive_filter.py::test_filters_a_noisy_oscillation.",
    differs=(
        "head_dim counts real numbers, two for each complex feature, side by side for each head; by default the heads "
        "together are as wide as tokens, where the code has twice that.",
        "Both directions are inferred: everything follows from |t_i - t_j| and t_i - t_j.",
        "The form that is not isotropic follows the sums that the isotropic one is a case of, as remembered; the "
        "authors' earlier code has one mean decay in its variances, and one weight for all features.",
        "The gate is learned and starts even; in the code it is drawn once and stays. The gate by total precision, and "
        "dynamics of keys apart from those of values, which fail in the code, are left out.",
        "Without rotate_values values stay as they are, as in the earlier code; the later one turns them one way.",
        "A robust weight of the product alone, a logarithm of what may be negative, is refused.",
    ),
    verified="third-party",
    example={"horizon": 12},
    tries={"residual_metric": {"robust": False}, "eps": 0.5, "isotropic": {"head_dim": 8}},
    defaults={
        **dict.fromkeys(("residual_metric", "robust", "additive", "multiplicative"), "code, Main.ipynb"),
        **dict.fromkeys(("rotate_values", "decay", "inner_residual", "norm"), "code, Main.ipynb"),
        **dict.fromkeys(("isotropic", "learn_rotation", "eps", "bias"), "code"),
        "horizon": "ours, Main.ipynb has 101",
        "predict_next": "ours, Main.ipynb has it on",
    },
)

Residual = Literal["gate", "add"]


class FilterState(NamedTuple):
    """All tokens so far."""

    k: Float[Tensor, "B G S W"]
    v: Float[Tensor, "B G S W"]
    held: Bool[Tensor, "B S"]
    """False for hidden ones."""


def rms(z: Float[Tensor, "B N T W"], scale: Float[Tensor, "N D"]) -> Float[Tensor, "B N T W"]:
    """Complex vectors over the root of the mean square of their real numbers, each feature times its scale."""
    return z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * torch.cat([scale, scale], -1)[:, None]


@CARD.module
class AdaptiveFilter(RecurrentMixer):
    """Filters its tokens as measurements of a linear system with noise, which it learns.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, bias: as of `HeadMixer`; head_dim = 2 D, D even.
        horizon: n, a length that decays and frequencies are counted in; a constant of the layer.
        isotropic: whether all features of a head decay alike. If not, memory and time grow D times.
        residual_metric: R; if not, its last term alone, a dot product.
        robust: log(1 + R S) in place of R S.
        additive, multiplicative: B and S, "covariance", "linear" or None.
        rotate_values: whether values turn too.
        decay: whether there is a mu; without, E = 1.
        inner_residual: "gate", "add" or None.
        predict_next: whether outputs are taken a step ahead.
        norm: of queries, keys and values.
        learn_rotation: whether frequencies are learned; if not they are a geometric series.
        eps: the least variances and nu.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    q_scale: Any
    k_scale: Any
    v_scale: Any

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
        horizon: int = 256,
        isotropic: bool = True,
        residual_metric: bool = True,
        robust: bool = True,
        additive: Bias | None = "covariance",
        multiplicative: Bias | None = "covariance",
        rotate_values: bool = True,
        decay: bool = True,
        inner_residual: Residual | None = "gate",
        predict_next: bool = False,
        norm: bool = False,
        learn_rotation: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=causal, bias=bias)
        flag(self, isotropic=isotropic, residual_metric=residual_metric, robust=robust, rotate_values=rotate_values)
        flag(self, decay=decay, predict_next=predict_next, norm=norm, learn_rotation=learn_rotation)
        choice(self, (*get_args(Bias), None), additive=additive)
        choice(self, (*get_args(Bias), None), multiplicative=multiplicative)
        choice(self, (*get_args(Residual), None), inner_residual=inner_residual)
        whole(self, horizon=horizon)
        number(self, above=0, eps=eps)
        if self.head_dim % 4:
            wanted = "a multiple of 4: pairs of complex features that turn against each other"
            refuse(self, "head_dim", "holds no such pairs", self.head_dim, wanted)
        if robust and not residual_metric:
            refuse(self, "robust", "takes a logarithm, and a product alone may be negative", robust, "robust=False")
        (H, D), G = (num_heads, self.head_dim // 2), self.num_kv_heads
        self.isotropic, self.rotate_values, self.predict_next, self.norm = isotropic, rotate_values, predict_next, norm
        self.inner_residual = inner_residual
        self.way: dict[str, Any] = {"residual_metric": residual_metric, "robust": robust}
        self.way |= {"additive": additive, "multiplicative": multiplicative}
        given: dict[str, Any] = {
            "decay": decay,
            "learn_rotation": learn_rotation,
            "biases": (additive, multiplicative),
            "eps": eps,
        }
        self.system = LinearSystem(H, D, horizon=horizon, isotropic=isotropic, **given)
        self.gate = nn.Parameter(torch.empty(H, D)) if inner_residual == "gate" else None
        for name, n in (("q_scale", H), ("k_scale", G), ("v_scale", G)):
            self.register_parameter(name, nn.Parameter(torch.empty(n, D)) if norm else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections of complex numbers of any phase, and an even gate."""
        spread = (2 / (self.dim + self.o_proj.in_features // 2)) ** 0.5
        for proj, axis in ((self.q_proj, 0), (self.k_proj, 0), (self.v_proj, 0), (self.o_proj, 1)):
            parts = proj.weight.detach().unflatten(axis, (-1, 2, self.head_dim // 2))
            real, imaginary = parts.unbind(axis + 1)
            size, phase = spread * torch.randn_like(real), 2 * math.pi * torch.rand_like(real)
            real.copy_(size * phase.cos())
            imaginary.copy_(size * phase.sin())
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
        for part, value in ((self.q_scale, 1.0), (self.k_scale, 1.0), (self.v_scale, 1.0), (self.gate, 0.0)):
            if part is not None:
                nn.init.constant_(part, value)

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        times: Float[Tensor, "#B T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens; `times` are those of the measurements, 0, 1, 2 ... unless given."""
        if times is None:
            return super().forward(x, context, mask=mask)
        sizes = fits(self, "B T M", {"M": self.dim}, x=x)
        fits(self, "#B T", sizes, times=times)
        if context is not None:
            self._check_context(x, context)
        keep, (x, bad) = key_padding(self, mask, x), quarantine(x)
        with as_it_is(x.device):
            out = self.run(*self.split(x, x), keep, None, times=times)[0]
        out = self.merge(out.to(x.dtype))
        allowed = self.receptive_field()
        return spoil(out, bad, bad, allowed if keep is None else allowed & padding(keep))

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: Any, *, times: Tensor | None = None
    ) -> tuple[Tensor, FilterState]:
        (H, T), (q, k, v) = q.shape[1:3], widened(q, k, v)
        p, own = self.system(q.dtype), repeat_heads(v, H)
        if self.norm:
            q, k, v = (rms(z, s.to(z.dtype)) for z, s in ((q, self.q_scale), (k, self.k_scale), (v, self.v_scale)))
        held = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if keep is None else keep
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], 2), torch.cat([state.v.to(v.dtype), v], 2)
            held = torch.cat([state.held, held], 1)
        state, S = FilterState(k, v, held), k.shape[2]
        t = torch.arange(S, device=q.device)[None] if times is None else times
        t, order = t.to(q.dtype), torch.arange(S, device=q.device)

        def turned(z: Tensor, t: Tensor) -> Tensor:
            return rotate(z, t[:, None, :, None] * p.omega[:, None])

        q, k, v = turned(q, -t[:, S - T :]), turned(repeat_heads(k, H), -t), repeat_heads(v, H)
        v = turned(v, -t) if self.rotate_values else v

        def some(at: slice, q: Tensor) -> tuple[Tensor, Tensor]:
            end = S - T + at.stop if self.causal and not exporting() else S
            far = (t[:, S - T :][:, at, None] - t[:, None, :end]).abs()
            allowed = held[:, None, None, :end]
            if self.causal:
                allowed = allowed & (order[:end] <= order[S - T :][at, None])
            return filtered(q[:, :, at], k[:, :, :end], v[:, :, :end], far, p, allowed, **self.way), q

        numbers = 4 * q.shape[0] * H * S * (1 if self.isotropic else self.head_dim // 2)
        y, _ = by_rows(T, chunk_rows(T, TILE_BYTES // (numbers or 1)), some, q)
        y = turned(y, t[:, S - T :]) if self.rotate_values else y
        if self.gate is not None:
            g = torch.sigmoid(self.gate.to(y.dtype)).repeat(1, 2)[:, None]
            y = g * y + (1 - g) * own
        elif self.inner_residual == "add":
            y = y + own
        if self.predict_next:
            y = rotate(y, p.omega[None, :, None]) * p.mu.exp().expand(-1, self.head_dim // 2).repeat(1, 2)[:, None]
        return y, state

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> FilterState:
        z = torch.zeros(batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        return FilterState(z, z.clone(), z[:, 0, :, 0].bool())
