"""PaTH attention: between a key and a query stand reflections that the tokens in between choose.

Products of the reflections of a chunk come of one triangular system (the UT transform); queries meet the keys of
earlier chunks one chunk after another, turned by each on the way.
"""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.cards import Card, Cost, Paper
from regard.checks import checked, flag, refuse, whole
from regard.heads.qk_norm import QKNorm
from regard.kernels.blocks import in_blocks
from regard.kernels.check import check_inputs
from regard.kernels.problem import combine, softmax
from regard.kernels.short_conv import short_conv
from regard.linear._shared import RecurrentMixer, hide, widened
from regard.pipeline.head_mixer import Projections
from regard.positions.forgetting import ForgetGate, forget_bias, log_gates
from regard.tracing import exporting, transformed

CARD = Card(
    "path",
    equation="""H_t = I - beta_t w_t^T w_t,   |w_t| = 1,   beta_t = 2 sigmoid(x_t W_b + b)
score[i,j] = q_i H_i H_{i-1} .. H_{j+1} k_j^T / sqrt(D),   j <= i, the own key without any H;   softmax
w = l2norm(silu(convolution of 3 tokens of x W_1 W_2)), W_1 (M, rank)
forget_gate: + sum_{j < l <= i} log f_l / sqrt(D),   f = sigmoid(x W_f + b_f)
streaming: k_j <- k_j H_t for all keys held, when token t comes
a chunk: Z = (I + tril(beta W W^T, -1))^-1 tril(beta W K^T, -1),   scores tril(Q K^T - tril(Q W^T) Z)""",
    papers=(
        Paper(
            "PaTH Attention: Position Encoding via Accumulating Householder Transformations",
            "Yang, Shen, Wen, Tan, Mishra, Ren, Panda, Kim",
            2025,
            "2505.16381",
            "abstract and introduction; the authors' layer (flash-linear-attention); their reference by an "
            "account of it and its numbers",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "streaming", "compile"},
    traits={"normalised", "nonnegative", "linear_in_values", "shift_invariant"},
    cost=Cost("B*H*(2*T*S*D + 320*T*D + 4096*T) + B*T*(rank*(M + G*D) + M*G)", "2*S*G*D + S + 2*G*D"),
    claim="One layer learns to track an item through swaps, which one with rotary positions does not: "
    "tests/mixers/test_path.py::test_tracks_an_item_through_swaps.",
    differs=(
        "Gates are divided by sqrt(D) with the dot products, as in the released code, but not as in `forgetting`.",
        "Grouped keys share directions and strengths, as in the released code, which has rank=None for them.",
        "The released code narrows directions to float16 in training; here they are as wide as the sums.",
        "Hidden tokens reflect nothing and forget nothing, and count as zeros in the convolution.",
    ),
    verified="third-party",
    tries={"rank": 3, "kernel_size": 2},
    defaults=dict.fromkeys(("forget_gate", "qk_norm", "kernel_size", "rank", "bias"), "code")
    | {"context_dim": "ours, as wide as dim"},
)

CHUNK = 64
"""Tokens a chunk."""
MANY = 1024
"""From so many tokens on, each chunk of queries is computed again in backward."""


class PathState(NamedTuple):
    """The keys held, turned by all reflections since, and what goes with them."""

    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S V"]
    log_forget: Float[Tensor, "B h S"]
    """log f of each; no heads where there are no gates."""
    held: Bool[Tensor, "B S"]
    """False for hidden tokens."""
    recent: Float[Tensor, "B n C"]
    """The layer's last directions before the convolution."""


def ut_transform(
    k: Float[Tensor, "*b C D"], w: Float[Tensor, "*b C D"], beta: Float[Tensor, "*b C 1"]
) -> tuple[Float[Tensor, "*b C D"], Float[Tensor, "*b C C"]]:
    """U and Z of a chunk: z H_C .. H_1 = z - (z W^T) U, and (z W^T) Z is what that takes from z K^T."""
    system = (beta * (w @ w.mT)).tril(-1)  # ones on the diagonal go without saying
    sides = torch.cat([beta * w, (beta * (w @ k.mT)).tril(-1)], -1)
    given = (z.float() if z.element_size() < 4 else z for z in (system, sides))  # torch solves none in half precision
    solved = torch.linalg.solve_triangular(*given, upper=False, unitriangular=True).to(w.dtype)
    return solved[..., : w.shape[-1]], solved[..., w.shape[-1] :]


@checked()
def path_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    w: Float[Tensor, "B G T D"],
    beta: Float[Tensor, "B G T"],
    log_forget: Float[Tensor, "B H T"] | None = None,
    keep: Bool[Tensor, "B T"] | None = None,
    *,
    state: PathState | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "B H T V"], PathState | None]:
    """Causal self-attention; from a `state`, also the state after these tokens.

    Args:
        w: directions of length 1; others are taken as they come.
        beta: strengths, 0 (no reflection) to 2 (a whole one).
        log_forget: log f of gates, <= 0.
        keep: True = a real token.
        chunk: tokens a chunk; as many as there are make it the quadratic form.

    Raises:
        ValueError: shapes that don't fit together, or no token a chunk.
    """
    check_inputs(q, k, v)
    whole("path_attention", chunk=chunk)
    q, k, v, w, beta = widened(q, k, v, w, beta)
    (B, H, T, D), G = q.shape, k.shape[1]
    gates = q.new_zeros(B, 0, T) if log_forget is None else log_forget.to(q.dtype)
    if keep is not None:
        k, w, beta = hide(k, keep), hide(w, keep), beta.masked_fill(~keep[:, None], 0)
    held = q.new_ones(B, T, dtype=torch.bool) if keep is None else keep
    values, past = v, 0
    if state is not None:
        past = state.k.shape[2]
        values, held = torch.cat([state.v.to(v.dtype), v], 2), torch.cat([state.held, held], 1)
        gates = torch.cat([state.log_forget.to(q.dtype), gates], 2)
    if T == 0:
        return combine(q.new_zeros(B, H, 0, 0), v), state

    one = exporting() or chunk >= T
    C = T if one else chunk

    def cut(z: Tensor, dim: int) -> Tensor:
        return z.unsqueeze(dim) if one else in_blocks(z, C, dim)

    ks, ws, betas = cut(k, 2), cut(w, 2), cut(beta[..., None], 2)
    U, Z = ut_transform(ks, ws, betas)
    ended = ks - Z.mT @ ws  # keys at the end of their chunk
    qs, w_, U_, ended_ = cut(q.unflatten(1, (G, -1)), 3), ws[:, :, None], U[:, :, None], ended[:, :, None]
    along = (qs @ w_.mT).tril()
    within = qs @ ks[:, :, None].mT - along @ Z[:, :, None]
    qs = qs - along @ U_  # queries at the start of their chunk

    def attended(n: int) -> Tensor:
        z, parts = qs[:, :, :, n], [within[:, :, :, n]]
        for m in reversed(range(n)):
            parts.append(z @ ended_[:, :, :, m].mT)
            z = z - (z @ w_[:, :, :, m].mT) @ U_[:, :, :, m]
        if state is not None:
            parts.append(z @ state.k[:, :, None].to(z.dtype).mT)
        start, end = n * C, T if one else min(n * C + C, T)
        scores = torch.cat(parts[::-1], -1).flatten(1, 2)[:, :, : end - start, : past + end]
        j = torch.arange(past + end, device=q.device)
        i = j[past + start :]
        allowed = ((j <= i[:, None]) & held[:, None, : past + end])[:, None]
        if gates.shape[1]:
            scores = scores + forget_bias(gates[..., : past + end], i, j, allowed)
        return combine(softmax(scores * D**-0.5, allowed), values[:, :, : past + end])

    again = not one and T > MANY and torch.is_grad_enabled() and not transformed(q, k, v, w, beta, gates)
    call = partial(checkpoint, attended, use_reentrant=False, preserve_rng_state=False) if again else attended
    out = torch.cat([call(n) for n in range(ks.shape[2])], 2)
    if state is None:
        return out, None
    keys = state.k.to(k.dtype)
    for n in range(ks.shape[2]):
        keys = torch.cat([keys - (keys @ U[:, :, n].mT) @ ws[:, :, n], ended[:, :, n]], 2)
    return out, PathState(keys[:, :, : past + T], values, gates, held, state.recent)


@CARD.module
class Path(RecurrentMixer):
    """Multi-head PaTH attention, causal alone; arguments as of `HeadMixer`.

    Args:
        forget_gate: whether scores also fall by forget gates, one for each query head (PaTH-FoX).
        qk_norm: whether queries and keys are normed, over all heads together.
        kernel_size: of the convolution of directions along tokens; None = neither that nor the silu behind it.
        rank: of the map to directions; None = its full rank.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        forget_gate: bool = False,
        qk_norm: bool = False,
        kernel_size: int | None = 3,
        rank: int | None = 32,
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        if not self.causal:
            refuse(self, "causal", "is off, and reflections stand between a key and later queries", False, "True")
        flag(self, forget_gate=forget_gate, qk_norm=qk_norm)
        whole(self, **{n: z for n, z in (("kernel_size", kernel_size), ("rank", rank)) if z is not None})
        G, D = self.num_kv_heads, self.head_dim
        self.kernel_size, self.rank = kernel_size, rank
        widths = [dim, *([] if rank is None else [rank]), G * D]
        self.w_proj = nn.Sequential(*(nn.Linear(m, n, bias=False) for m, n in pairwise(widths)))
        self.conv_weight = None if kernel_size is None else nn.Parameter(torch.empty(G * D, kernel_size))
        self.beta_proj = nn.Linear(dim, G)
        self.forget_gate = ForgetGate(dim, num_heads) if forget_gate else None
        self.norm = QKNorm(D, num_heads, G, weights="joint", eps=1e-5) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The convolution as torch's; the rest resets itself."""
        if self.conv_weight is not None:
            nn.init.kaiming_uniform_(self.conv_weight, a=5**0.5)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of gates travel beside the queries, directions and logits of strengths beside the keys."""
        q, k, v = super().split(x, source)
        if self.norm is not None:
            q, k, v = self.norm(q, k, v)
        beside = (self.w_proj(x).unflatten(-1, (self.num_kv_heads, -1)), self.beta_proj(x)[..., None])
        k = torch.cat([k, *(z.transpose(1, 2) for z in beside)], -1)
        if self.forget_gate is not None:
            q = torch.cat([q, self.forget_gate(x).mT[..., None]], -1)
        return q, k, v

    def run(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: PathState | None) -> tuple[Tensor, Any]:
        D = self.head_dim
        q, k, v = widened(q, k, v)
        q, logits = q[..., :D], q[..., D:].squeeze(-1) if self.forget_gate is not None else None
        k, w, beta = k[..., :D], k[..., D : 2 * D], 2 * k[..., 2 * D].sigmoid()
        recent = None if state is None else state.recent
        if self.conv_weight is not None:
            weight = self.conv_weight.to(w.dtype)
            w, recent = short_conv(w.transpose(1, 2).flatten(2), weight, state=recent, keep=keep)
            w = F.silu(w).unflatten(-1, (-1, D)).transpose(1, 2)
        w = w * torch.rsqrt(w.square().sum(-1, keepdim=True) + 1e-6)
        gates = None if logits is None else log_gates(logits.mT)
        out, state = path_attention(q, k, v, w, beta, gates, keep, state=state)
        return out, state if state is None or recent is None else state._replace(recent=recent)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> PathState:
        z = torch.zeros(batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        gates = z.new_zeros(batch_size, self.num_heads if self.forget_gate is not None else 0, 0)
        recent = z.new_zeros(batch_size, (self.kernel_size or 1) - 1, self.num_kv_heads * self.head_dim)
        return PathState(z, z.clone(), gates, z[:, 0, :, 0].bool(), recent)
