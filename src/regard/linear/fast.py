"""FAST (Fastmax): exp(q . k) is cut to a polynomial, which factorises into moments of keys and values."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, refuse, whole
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import Scan, linear_scan
from regard.linear._shared import RecurrentMixer, hide, pair_products, ratio, repeat_heads, widened, with_ones
from regard.pipeline.head_mixer import Projections
from regard.tracing import exporting

CARD = Card(
    "fast",
    equation="""out_i = sum_j f(q'_i . k'_j) v_j / sum_j f(q'_i . k'_j),   j <= i when causal
f(s) = sum_{l=0..p} s^l / l!,   p = 1 or 2: exp(s), cut to its Taylor polynomial
q', k' = q and k divided by a norm, so that |q' . k'| <= 1: then f >= 0 for p = 1 (for p = 2 it is >= 1/2 anywhere)
factorised:  f(q' . k') = phi(q') . psi(k'),   phi = (1, q', q' x q' / 2),   psi = (1, k', k' x k')""",
    papers=(
        Paper(
            "FAST: Factorizable Attention for Speeding up Transformers",
            "Gerami, Hoover, Dulepet, Duraiswami",
            2024,
            "2402.07901",
            "abstract; official code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits=PLAIN,
    cost=Cost("B*H*(T + S)*(1 + D + (order - 1)*D*(D + 1)/2)*(D + 1)", "H*(1 + D + D*(D + 1)/2)*(D + 1)"),
    claim="Equals the explicit polynomial attention matrix, in memory linear in T: "
    "tests/linear/test_fast.py::test_equals_the_explicit_matrix, "
    "tests/linear/test_fast.py::test_backward_keeps_no_features.",
    differs=(
        "Queries and keys are divided by their own norm; the code divides all by the largest of the sequence, which "
        "shows the future to the past: that is norm='sequence', for bidirectional layers only.",
        "The symmetric half of the products x_a x_b is left out.",
        "The code's dropout of features is not there.",
    ),
    verified="third-party",
    defaults={
        "order": "code, example.py",
        "norm": "ours, no token sees a later one",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)

Norm = Literal["token", "sequence", "none"]

SEGMENT = 256
"""Tokens whose D^2 / 2 features exist at once; backward forms them again."""


def normalise(
    x: Float[Tensor, "B H S D"],
    norm: Norm = "token",
    *,
    keep: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H S D"]:
    """Divide every token by its own norm, or by the largest of its sequence and head; zeros stay zeros."""
    if norm == "none" or x.shape[2] == 0:
        return x
    (x,) = widened(x)
    sizes = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if norm == "sequence":
        sizes = hide(sizes, keep).amax(2, keepdim=True)
    return x / torch.where(sizes == 0, 1.0, sizes)


def fast_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    order: int = 2,
    causal: bool = False,
    keep: Bool[Tensor, "B S"] | None = None,
    divide: bool = True,
    eps: float = 0.0,
    state: Float[Tensor, "B H K V1"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Scan:
    """Polynomial attention on q and k as they are (`normalise` comes first), and the moments psi(k)^T [v, 1].

    Hand the moments back in as `state` to go on causally. `starts` are those of `linear_scan`, where causal.

    Args:
        divide: whether sums are divided by the sum of weights and `eps`.
    """
    check_inputs(q, k, v)
    whole("fast_attention", most=2, order=order)
    if causal and q.shape[2] != k.shape[2]:
        refuse("fast_attention", "q", "has another length than k", q.shape[2], f"{k.shape[2]} tokens where causal")
    q, k, v = widened(q, k, v)
    k, v = repeat_heads(k, q.shape[1]), with_ones(repeat_heads(v, q.shape[1]))

    k, v = hide(k, keep), hide(v, keep)

    def part_of(q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None, state: Tensor | None) -> Scan:
        if exporting():  # one part of any length
            return linear_scan(taylor(q, order), monomials(k, order), v, state=state, starts=begins)
        return _causal_part(q, k, v, begins, state, order)

    def moments(k: Tensor, v: Tensor) -> Tensor:
        return monomials(k, order).mT @ v

    outs: list[Tensor] = []
    for part in segments(k.shape[2]):
        if causal:
            begins = None if starts is None else starts[:, part]
            qkv = (q[:, :, part], k[:, :, part], v[:, :, part])
            out, state = lean(part_of, *qkv, begins, state, length=k.shape[2])
            outs.append(out)
        else:
            added = lean(moments, k[:, :, part], v[:, :, part], length=k.shape[2])
            state = added if state is None else state + added
    assert state is not None  # there is at least one part
    if not causal:
        for part in segments(q.shape[2]):
            outs.append(lean(lambda q, m: taylor(q, order) @ m, q[:, :, part], state, length=q.shape[2]))
    out = torch.cat(outs, 2)
    return Scan(ratio(out, eps) if divide else out[..., :-1], state)


def _causal_part(
    q: Tensor, k: Tensor, v: Tensor, begins: Bool[Tensor, "#B t"] | None, state: Tensor | None, order: int
) -> Scan:
    """f of the scores within the part, whose features only the past beyond it is asked with."""
    z = q @ k.mT
    weights = (1 + z if order == 1 else 1 + z + z.square() / 2).tril()
    kept, past = v, state
    if begins is not None:
        document = begins.cumsum(1)
        here = document == document[:, -1:]
        weights = weights.masked_fill((document[:, :, None] != document[:, None])[:, None], 0.0)
        kept = hide(v, here)
        if state is not None:
            past = state.masked_fill(begins.any(1)[:, None, None, None], 0.0)
    out = weights @ v
    if state is not None:
        read = taylor(q, order) @ state
        out = out + (read if begins is None else hide(read, document == 0))
    added = monomials(k, order).mT @ kept
    return Scan(out, added if past is None else past + added)


def segments(length: int) -> list[slice]:
    """The tokens in parts; one part, maybe empty, where they are few, or where nobody may count them."""
    if exporting() or length <= SEGMENT:
        return [slice(None)]
    return [slice(n * SEGMENT, (n + 1) * SEGMENT) for n in range(-(-length // SEGMENT))]


def lean(f: Callable[..., Any], *given: Tensor | None, length: int) -> Any:
    """f(*given), forgetting what it computed on the way where the sequence has more than one part."""
    if torch.is_grad_enabled() and not exporting() and length > SEGMENT:
        return checkpoint(f, *given, use_reentrant=False, preserve_rng_state=False)
    return f(*given)


def monomials(x: Float[Tensor, "B H T D"], order: int) -> Float[Tensor, "B H T K"]:
    """psi: 1, x_a, and x_a x_b for a <= b."""
    parts = [torch.ones_like(x[..., :1]), x]
    return torch.cat([z.mT for z in (parts if order == 1 else [*parts, pair_products(x)])], 2).mT


def taylor(x: Float[Tensor, "B H T D"], order: int) -> Float[Tensor, "B H T K"]:
    """phi: the monomials times their share in f. x_a x_b stands for x_b x_a too, so only squares are halved."""
    D = x.shape[3]
    share = x.new_ones(1 + D)
    if order == 2:
        a, b = torch.triu_indices(D, D, device=x.device)
        share = torch.cat([share, torch.where(a == b, 0.5, 1.0).to(x.dtype)])
    return monomials(x, order) * share


class FastState(NamedTuple):
    """All the past leaves behind."""

    moments: Float[Tensor, "B H K V1"]


@CARD.module
class FastAttention(RecurrentMixer):
    """Multi-head polynomial attention.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        order: p; cost and state grow as D^(p+1).
        norm: what queries and keys are divided by.
    """

    resets = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        order: int = 2,
        norm: Norm = "token",
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        whole(self, most=2, order=order)
        choice(self, get_args(Norm), norm=norm)
        if self.causal and norm == "sequence":
            refuse(self, "norm", "shows later tokens to earlier ones", repr(norm), "'token' or 'none' where causal")
        self.order = order
        self.norm: Norm = norm

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        state: FastState | None,
        *,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, FastState]:
        (v,) = widened(v)
        q, k = normalise(q, self.norm).to(v.dtype), normalise(k, self.norm, keep=keep).to(v.dtype)
        past = None if state is None else state.moments
        options: dict[str, Any] = {
            "order": self.order,
            "causal": self.causal,
            "keep": keep,
            "state": past,
            "starts": starts,
        }
        out, moments = fast_attention(q, k, v, **options)
        return out, FastState(moments)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> FastState:
        D = self.head_dim
        K = 1 + D + (D * (D + 1) // 2 if self.order == 2 else 0)
        return FastState(torch.zeros(batch_size, self.num_heads, K, D + 1, device=device, dtype=dtype))
