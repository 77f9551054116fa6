"""Performer (FAVOR+): positive random features whose products estimate exp(q . k) without bias.

The r directions w_j are Gaussian; within each block of D they are made orthogonal, which lowers the variance. For
stability a maximum is taken out of the exponents (for a query its own, for keys that of all keys) and eps is added
after exp. Another kernel is relu: phi(x) = relu(W x~) + 1e-3.
"""

import math
from typing import Literal, NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, fits, number, whole
from regard.kernels.check import check_inputs
from regard.linear._shared import RecurrentMixer, feature_attention, hide, repeat_heads, widened
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "performer",
    equation="""phi(x)_j = r^(-1/2) exp(w_j . x~ - |x~|^2 / 2),   x~ = D^(-1/4) x
E[phi(q) . phi(k)] = exp(q . k / sqrt(D))
out_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j)),   j <= i when causal""",
    papers=(
        Paper(
            "Rethinking Attention with Performers",
            "Choromanski et al.",
            2020,
            "2009.14794",
            "abstract; official code; a public port of it (lucidrains)",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits=PLAIN,
    cost=Cost("B*H*(T + S)*num_features*(2*D + 1)", "H*num_features*(D + 1) + G"),
    claim="An unbiased estimate by weights of rank r, and orthogonal directions have the lower variance: "
    "tests/linear/test_performer.py::test_unbiased_of_rank_r_and_orthogonal_directions_vary_less.",
    differs=(
        "Q of the QR decomposition gets the signs of R's diagonal: LAPACK's Q alone is not uniformly distributed and "
        "biases the estimate.",
        "The causal maximum is a running one, so that no output depends on later keys; earlier features decay as it "
        "grows.",
        "The maxima have gradients: beside eps they do not cancel, and the port's gradients, without them, are off.",
        "No constant is added to the denominator.",
        "The relu kernel has D^(-1/4) and random directions, as the port; the authors' own has neither by default.",
    ),
    verified="third-party",
    example={"num_features": 8},
    tasks=("mqar",),
    defaults={
        "num_features": "code, lucidrains",
        "kernel": "paper",
        "orthogonal": "paper",
        "eps": "code, the official factory",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)


def random_directions(
    count: int, width: int, *, orthogonal: bool = True, generator: torch.Generator | None = None
) -> Float[Tensor, "r D"]:
    """Rows distributed as N(0, I); orthogonal within blocks of `width` rows if asked for."""
    gaussian = torch.randn(count, width, generator=generator)
    if not orthogonal:
        return gaussian
    blocks = -(-count // width)
    q, r = torch.linalg.qr(torch.randn(blocks, width, width, generator=generator))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    rows = (q * signs.unsqueeze(-2)).mT.flatten(0, 1)[:count]
    return rows * gaussian.norm(dim=1, keepdim=True)


class PerformerState(NamedTuple):
    """All the past leaves behind."""

    sums: Float[Tensor, "B H r V1"]
    """sum_j phi(k_j)^T [v_j, 1], phi relative to `top`."""
    top: Float[Tensor, "B G"]
    """The largest w . k~ so far; -inf before the first key, and always for relu."""


def performer_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    directions: Float[Tensor, "r D"],
    *,
    causal: bool = False,
    keep: Bool[Tensor, "B S"] | None = None,
    kernel: Literal["softmax", "relu"] = "softmax",
    eps: float = 1e-6,
    state: PerformerState | None = None,
) -> tuple[Float[Tensor, "B H T V"], PerformerState]:
    """Outputs, and the state after the keys. Hand it back in to go on causally."""
    check_inputs(q, k, v)
    fits("performer_attention", "r D", {"D": q.shape[3]}, directions=directions)
    q, k, v = widened(q, k, v)
    (B, H), G = q.shape[:2], k.shape[1]
    w = directions.to(q.dtype)
    past = None if state is None else state.sums
    top = q.new_full((B, G), -torch.inf) if state is None else state.top
    decay = None
    if kernel == "relu":
        phi_q, phi_k = relu_features(q, w), relu_features(k, w)
    else:
        z_q, z_k = project(q, w), project(k, w)
        peaks = z_k.amax(-1)  # in the graph, like every maximum here: beside eps it doesn't cancel
        if keep is not None:
            peaks = peaks.masked_fill(~keep[:, None], -torch.inf)
        peaks = torch.cat([top.unsqueeze(-1), peaks], -1)  # one before the first key, so that it is never empty
        if causal:
            tops = peaks.cummax(-1).values
            decay = torch.where(tops[..., :-1] == -torch.inf, 0.0, tops[..., :-1] - tops[..., 1:])
            decay = repeat_heads(decay, H)
        else:
            tops = peaks.amax(-1, keepdim=True).expand_as(peaks)
        top, largest = tops[..., -1].clone(), tops[..., 1:, None]
        phi_k = softmax_features(k, z_k, torch.where(largest == -torch.inf, 0.0, largest), eps)
        phi_q = softmax_features(q, z_q, z_q.amax(-1, keepdim=True), eps)
    phi_k = repeat_heads(hide(phi_k, keep), H)
    out, sums = feature_attention(phi_q, phi_k, repeat_heads(v, H), decay, causal=causal, state=past)
    return out, PerformerState(sums, top)


def project(x: Float[Tensor, "B H T D"], directions: Float[Tensor, "r D"]) -> Float[Tensor, "B H T r"]:
    """w_j . x~."""
    return (x * int(x.shape[-1]) ** -0.25) @ directions.mT


def softmax_features(
    x: Float[Tensor, "B H T D"], z: Float[Tensor, "B H T r"], top: Float[Tensor, "B H #T 1"], eps: float
) -> Float[Tensor, "B H T r"]:
    """r^(-1/2) (exp(z - |x~|^2 / 2 - top) + eps), z = w . x~."""
    r, half = int(z.shape[-1]), 0.5 * x.square().sum(-1, keepdim=True) * int(x.shape[-1]) ** -0.5
    phi = (z - (half + top + 0.5 * math.log(r))).exp_()  # few passes over (T, r), and few new tensors
    return phi + eps * r**-0.5 if phi.requires_grad else phi.add_(eps * r**-0.5)


def relu_features(
    x: Float[Tensor, "B H T D"], directions: Float[Tensor, "r D"] | None, eps: float = 1e-3
) -> Float[Tensor, "B H T r"]:
    """relu(W x~) + eps; without directions the widths of x~ are the features."""
    return (project(x, directions) if directions is not None else x * int(x.shape[-1]) ** -0.25).relu() + eps


@CARD.module
class Performer(RecurrentMixer):
    """Multi-head attention with FAVOR+.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        num_features: r; default D ln D, as the port's; the authors' is 256.
        kernel: what the features stand for: "softmax", or "relu".
        orthogonal: whether directions are orthogonal within blocks of D.
        eps: added to every feature of the softmax kernel.
    """

    directions: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_features: int | None = None,
        kernel: Literal["softmax", "relu"] = "softmax",
        orthogonal: bool = True,
        eps: float = 1e-6,
        **rest: Unpack[Projections],
    ) -> None:
        choice("Performer", ("softmax", "relu"), kernel=kernel)
        number("Performer", least=0, eps=eps)
        super().__init__(dim, num_heads, **rest)
        D = self.head_dim
        num_features = max(1, round(D * math.log(D))) if num_features is None else num_features
        whole("Performer", num_features=num_features)
        self.num_features = num_features
        self.kernel: Literal["softmax", "relu"] = kernel
        self.orthogonal, self.eps = orthogonal, eps
        self.register_buffer("directions", torch.empty(self.num_features, D, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """New directions, from the global generator by default. The authors redraw every so many training steps."""
        if not self.directions.is_meta:
            r, D = self.num_features, self.head_dim
            self.directions.copy_(random_directions(r, D, orthogonal=self.orthogonal, generator=generator))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves between devices, but stays in float32: no parameter could make up for rounded directions."""
        before = self.directions
        super()._apply(fn, recurse)
        if self.directions.dtype != before.dtype:
            self.directions = before.to(self.directions.device)
        return self

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: PerformerState | None
    ) -> tuple[Tensor, PerformerState]:
        return performer_attention(
            q, k, v, self.directions, causal=self.causal, keep=keep, kernel=self.kernel, eps=self.eps, state=state
        )

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> PerformerState:
        B, H, D = batch_size, self.num_heads, self.head_dim
        sums = torch.zeros(B, H, self.num_features, D + 1, device=device, dtype=dtype)
        return PerformerState(sums, torch.full((B, self.num_kv_heads), -torch.inf, device=device, dtype=dtype))
