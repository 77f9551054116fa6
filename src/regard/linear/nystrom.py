"""Nystrom attention: m landmarks, the means of segments of tokens, stand for all queries and keys."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, whole
from regard.kernels.check import check_inputs
from regard.kernels.short_conv import centred_conv
from regard.linear._shared import repeat_heads, value_conv
from regard.normalizers.softmax import softmax
from regard.pipeline.head_mixer import HeadMixer
from regard.tracing import as_it_is, exporting
from regard.weights import Loaded, same

CARD = Card(
    "nystromformer",
    equation="""qt, kt = means of q and k over m segments,   s = 1 / sqrt(D)
F = softmax(s q kt^T),   A = softmax(s qt kt^T),   Bm = softmax(s qt k^T)
out = F Z (Bm v) + conv(v),   Z ~ pinv(A):  Z_0 = A^T / c,  Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4
c: the largest column sum of A;   conv: depthwise over positions, one kernel a head""",
    papers=(
        Paper(
            "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention",
            "Xiong et al.",
            2021,
            "2102.03902",
            "abstract; the authors' and the transformers library's code",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "gqa", "compile"},
    traits={"linear_in_values", "shift_invariant", "head_independent"},
    cost=Cost("B*H*(7*T*num_landmarks*D + 4*iterations*num_landmarks**3 + 2*num_landmarks**2*D + T*conv_width*D)", ""),
    claim="Linear in length for fixed m, of rank m; larger m comes nearer to softmax attention: "
    "tests/linear/test_nystrom.py::test_no_square_matrix, "
    "tests/linear/test_nystrom.py::test_nearer_with_more_landmarks.",
    differs=(
        "Any length: segments hold real tokens only and differ in length by at most one; the released code needs "
        "lengths that m divides and averages padding in.",
        "No more than m tokens are attended to exactly, as in the released code where m = T.",
        "The inverse starts from each matrix's own column sums; coefficient='original' is the released default.",
    ),
    verified="third-party",
    example={"num_landmarks": 4, "conv_width": 3},
    defaults={
        "bias": "ours, the authors' code has one",
        "num_landmarks": "code, transformers",
        "conv_width": "code, transformers",
        "iterations": "code, transformers",
        "coefficient": "ours, samples of a batch don't touch",
    },
)

Coefficient = Literal["exact", "original"]
MOST = 100
"""Iterations. Each makes what is small in A Z, a squared singular value, 13/4 times as large: 1e-32 is 1 by then."""


def segment_means(
    length: int, num_landmarks: int, keep: Bool[Tensor, "B T"] | None = None, *, like: Tensor
) -> Float[Tensor, "#B m T"]:
    """The matrix that takes tokens to landmarks. Rows left over, where there are fewer tokens than landmarks, are 0."""
    real = like.new_ones(1, length, dtype=torch.bool) if keep is None else keep
    count = real.sum(1, keepdim=True)
    used = count.clamp(max=num_landmarks)
    segment = (real.cumsum(1) - 1) * used // count.clamp(min=1)
    landmark = torch.arange(num_landmarks if exporting() else min(num_landmarks, length), device=like.device)
    member = ((segment[:, None] == landmark[:, None]) & real[:, None]).to(like.dtype)
    return member / member.sum(-1, keepdim=True).clamp(min=1)


def pseudo_inverse(
    a: Float[Tensor, "B H m m"], *, iterations: int = 6, coefficient: Coefficient = "exact"
) -> Float[Tensor, "B H m m"]:
    """The iteration for the Moore-Penrose inverse of matrices with rows that sum to 1 (or are 0, with their columns).

    c is the largest column sum: of each matrix ("exact"), or of the whole batch ("original", as first released).
    """
    columns = a.sum(-2)
    largest = columns.amax(-1)[..., None, None] if coefficient == "exact" else columns.amax()
    z = a.mT / torch.where(largest > 0, largest, 1.0)
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def landmark_values(
    q_marks: Float[Tensor, "B H m D"],
    k_marks: Float[Tensor, "B H m D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T V"],
    *,
    real: Bool[Tensor, "#B m"] | None = None,
    keep: Bool[Tensor, "B T"] | None = None,
    iterations: int = 6,
    coefficient: Coefficient = "exact",
) -> Float[Tensor, "B H m V"]:
    """Z (Bm v), what queries read from each landmark. Queries come scaled; `real` is True at landmarks in use."""
    a = _weights(q_marks @ k_marks.mT, real)
    if real is not None:
        a = a.masked_fill(~real[:, None, :, None], 0)
    b = _weights(q_marks @ k.mT, keep)
    return pseudo_inverse(a, iterations=iterations, coefficient=coefficient) @ (b @ v)


def _weights(scores: Float[Tensor, "B H t s"], allowed: Bool[Tensor, "#B s"] | None) -> Float[Tensor, "B H t s"]:
    return scores.softmax(-1) if allowed is None else softmax(scores, allowed[:, None, None])


@checked()
def nystrom_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    means: Float[Tensor, "#B m T"],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    iterations: int = 6,
    coefficient: Coefficient = "exact",
) -> Float[Tensor, "B H T V"]:
    """F Z (Bm v), with landmarks `means @ q` and `means @ k` (`segment_means`). `keep` is True at real tokens.

    Rows of `means` that are 0 are no landmarks, where `keep` is given.
    """
    check_inputs(q, k, v)
    wide, m = torch.promote_types(v.dtype, torch.float32), means.shape[1]
    # The inverse multiplies rounding errors: half precision would drown it, under autocast too.
    with as_it_is(q.device):
        query = q.to(wide) * int(q.shape[-1]) ** -0.5
        key, value = (repeat_heads(z.to(wide), q.shape[1]) for z in (k, v))
        if keep is not None:
            query, key, value = (z.masked_fill(~keep[:, None, :, None], 0) for z in (query, key, value))
        means = means.to(wide)[:, None]
        real = None if keep is None else means[:, 0].ne(0).any(-1)
        q_marks, k_marks = means @ query, means @ key
        # Up to m tokens are their own landmarks: reading them directly is softmax attention.
        if q.shape[2] == 0 or (keep is None and q.shape[2] <= m):
            held = means @ value
        else:
            options: dict[str, Any] = {"real": real, "keep": keep, "iterations": iterations, "coefficient": coefficient}
            held = landmark_values(q_marks, k_marks, key, value, **options)
            if keep is not None:
                held = torch.where((keep.sum(1) <= m)[:, None, None, None], means @ value, held)
        return (_weights(query @ k_marks.mT, real) @ held).to(v.dtype)


@CARD.module
class NystromAttention(HeadMixer):
    """Bidirectional self-attention through landmarks, linear in the number of tokens.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: as of `HeadMixer`.
        num_landmarks: m; 64 in transformers.
        conv_width: K of the depthwise convolution of the values, odd; None leaves it out. 65 in transformers.
        iterations: steps towards the pseudo-inverse, at most 100; 6 in the authors' code. They leave a visible error;
            20 none.
        coefficient: "exact", or "original", by which the samples of a batch touch each other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        num_landmarks: int = 64,
        conv_width: int | None = 65,
        iterations: int = 6,
        coefficient: Coefficient = "exact",
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias)
        whole(self, num_landmarks=num_landmarks)
        whole(self, most=MOST, iterations=iterations)
        choice(self, get_args(Coefficient), coefficient=coefficient)
        self.num_landmarks, self.iterations = num_landmarks, iterations
        self.coefficient: Coefficient = coefficient
        self.conv = None if conv_width is None else value_conv(self, num_heads, conv_width)

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G T D"],
        v: Float[Tensor, "B G T D"],
        keep: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B H T D"]:
        T = q.shape[2]
        if exporting() and keep is None:  # whether there are more tokens than landmarks is for tensors to tell
            keep = torch.ones(q.shape[0], T, dtype=torch.bool, device=q.device)
        like = q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32))
        means = segment_means(T, self.num_landmarks, keep, like=like)
        out = nystrom_attention(q, k, v, means, keep=keep, iterations=self.iterations, coefficient=self.coefficient)
        if self.conv is None or T == 0:
            return out
        values = repeat_heads(v, self.num_heads)
        values = values if keep is None else values.masked_fill(~keep[:, None, :, None], 0)
        return out + centred_conv(values, self.conv.weight[:, 0, :, 0])


@CARD.loads("transformers", "NystromformerSelfAttention")
def _transformers(theirs: Any) -> Loaded:
    """Equal for lengths that landmarks divide; theirs also sees landmarks of padding. It has no output projection."""

    def build() -> NystromAttention:
        H, D = theirs.num_attention_heads, theirs.attention_head_size
        conv = {"num_landmarks": theirs.num_landmarks, "conv_width": theirs.conv_kernel_size}
        return NystromAttention(theirs.query.in_features, H, head_dim=D, bias=True, coefficient="original", **conv)

    return Loaded(build, same(theirs, {"q_proj": "query", "k_proj": "key", "v_proj": "value", "conv": "conv"}))
