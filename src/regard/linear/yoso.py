"""YOSO: a value counts when random hashes of query and key collide; hash tables sum it in linear time.

A hash is tau signs of random projections. Backward takes tau/2 times a weight for its slope in the cosine: a lower
bound of the true one, which has a pole where query and key agree.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits, flag, refuse, whole
from regard.kernels.check import check_inputs
from regard.kernels.short_conv import centred_conv
from regard.linear._hashes import Codes, dense_codes, fast_codes, random_flips, random_planes, table_sum
from regard.linear._shared import hide, repeat_heads, value_conv, widened
from regard.pipeline.head_mixer import HeadMixer
from regard.tracing import as_it_is, transformed
from regard.weights import Loaded, same

BOUND = "backward takes a lower bound of the slope by design; its formulas have a test of their own"
CARD = Card(
    "yoso",
    equation="""w_ij = (1 - arccos(cos(q_i, k_j)) / pi)^tau          = P[hash(q_i) = hash(k_j)]
y_i = sum_j w_ij v_j,   sampled:  y_i = 1/m sum_h sum_{j: hash_h(k_j) = hash_h(q_i)} v_j
out_i = y_i / |y_i|  [+ depthwise convolution of v]
backward:  d w / d cos := (tau / 2) w""",
    papers=(
        Paper(
            "You Only Sample (Almost) Once: Linear Cost Self-Attention Via Bernoulli Sampling",
            "Zeng et al.",
            2021,
            "2111.09714",
            "abstract; the authors' code, of its CUDA kernels those of hash tables; transformers' YosoSelfAttention",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "cross", "gqa", "compile"},
    lacks={"causal": "a hash table holds keys from everywhere"},
    traits={"position_free", "shift_invariant", "head_independent"},
    cost=Cost("B*H*(T + S)*num_hashes*(hash_length + D)", ""),
    claim="Tables of m hashes estimate the expectation with an error as 1/sqrt(m), and where query and key agree the "
    "slope stays finite: tests/linear/test_yoso.py::test_the_error_falls_as_the_root_of_the_hashes, "
    "tests/linear/test_yoso.py::test_the_slope_is_finite_where_query_and_key_agree.",
    differs=(
        "draws='kept' keeps one set of hashes a head, so that a call can be repeated; the authors draw in each call.",
        "The cosine is clamped, so that rounding gives no NaN; one version of the authors' code multiplies it by 0.98.",
        "Gradients through hash tables are those of the sum of (q . k) v over collisions, with T D V numbers a head.",
        "form='expected' and gradient='exact' form all T x S weights, as in their code.",
    ),
    verified="third-party",
    example={"form": "sampled", "hash_length": 2, "num_hashes": 6, "draws": "kept"},
    tries={"gradient": ...},
    exceptions={"L23": BOUND, "L24": BOUND, "L51": BOUND},
    defaults={
        "bias": "ours, BERT has one",
        "context_dim": "ours, as wide as dim",
        "form": "paper",
        **dict.fromkeys(("hash_length", "num_hashes", "conv_width"), "code, transformers"),
        **dict.fromkeys(("fast_hash", "gradient", "draws"), "code"),
    },
)
EXPECTED = CARD.variant(
    "yoso_e",
    "YOSO-E: weights are the probabilities with which random hashes of query and key collide.",
    preset={"form": "expected", "num_hashes": 1, "fast_hash": False, "gradient": "exact", "draws": "kept"},
    equation="""out_i = y_i / |y_i|,   y_i = sum_j (1 - arccos(cos(q_i, k_j)) / pi)^tau v_j""",
    cost=Cost("2*B*H*T*S*D", ""),
    claim="Each head's output has norm 1: tests/linear/test_yoso.py::test_expected_rows_have_norm_one.",
    differs=(CARD.differs[1], "Forms all T x S weights, as the authors' code does."),
    example={"hash_length": 2},
    exceptions=CARD.exceptions,
    defaults={n: CARD.defaults[n] for n in ("bias", "context_dim", "hash_length", "conv_width")},
)

Form = Literal["sampled", "expected"]
Gradient = Literal["hashed", "exact"]
Draws = Literal["fresh", "kept"]


def collision(cosine: Float[Tensor, "*n"], length: int) -> Float[Tensor, "*n"]:
    """(1 - arccos(x) / pi)^length, whose gradient is length / 2 times it."""
    w = (1 - torch.arccos(cosine.detach().clamp(-1, 1)) / math.pi) ** length
    return w + length / 2 * w * (cosine - cosine.detach())


def sampled_sum(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S V"],
    codes: Codes,
    gradient: Gradient = "hashed",
) -> Float[Tensor, "B H T V"]:
    """The estimate of sum_j w_ij v_j by hashes."""
    y = table_sum(codes, v)
    if not (torch.is_grad_enabled() and (any(z.requires_grad for z in (q, k, v)) or transformed(q, k, v))):
        return y
    if gradient == "exact":
        exact = collision(q @ k.mT, codes.length) @ v
        return y.detach() + (exact - exact.detach())
    pairs = (k.unsqueeze(-1) * v.detach().unsqueeze(-2)).flatten(-2)
    slope = codes.length / 2 * (q.unsqueeze(-2) @ table_sum(codes, pairs).unflatten(-1, (-1, v.shape[3]))).squeeze(-2)
    return y + (slope - slope.detach())


def yoso_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    length: int = 9,
    hashes: Float[Tensor, "#B H m tau D"] | Float[Tensor, "#B H 3 P W"] | None = None,
    fast: int | None = None,
    keep: Bool[Tensor, "B S"] | None = None,
    gradient: Gradient = "hashed",
) -> Float[Tensor, "B H T V"]:
    """Sums of norm 1, or 0 where nothing collides.

    Args:
        length: tau, signs a hash.
        hashes: Gaussian planes (1 or B, H, m, tau, D), or with `fast` flips of 1 or -1; None: the expectation.
        fast: how many hashes the flips are for: P random rotations to W numbers.
        keep: True at real keys.
        gradient: of queries and keys where sampled, "hashed" by the same hashes, or "exact".
    """
    check_inputs(q, k, v)
    whole("yoso_attention", length=length)
    choice("yoso_attention", get_args(Gradient), gradient=gradient)
    dtype, H = v.dtype, q.shape[1]
    q, k, v = widened(q, k, v)
    q, k = F.normalize(q, dim=-1), repeat_heads(F.normalize(k, dim=-1), H)
    v = repeat_heads(hide(v, keep), H)
    if hashes is None:
        y = collision(q @ k.mT, length) @ v
    else:
        axes = "#B H m tau D" if fast is None else "#B H 3 P W"
        fits("yoso_attention", axes, {"B": len(q), "H": H, "tau": length, "D": q.shape[3]}, hashes=hashes)
        found = [dense_codes(z, hashes) if fast is None else fast_codes(z, hashes, length, fast) for z in (q, k)]
        y = sampled_sum(q, k, v, Codes(found[0], found[1], length), gradient)
    return F.normalize(y, dim=-1, eps=1e-12).to(dtype)


@CARD.module
class YOSO(HeadMixer):
    """Multi-head attention by random hashes.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias, context_dim: as of `HeadMixer`.
        form: "sampled", in time linear in the number of tokens, or "expected", its mean.
        hash_length: tau, signs a hash; at most 16.
        num_hashes: m.
        fast_hash: random rotations in place of dense Gaussian planes.
        gradient: of queries and keys, "hashed" by the same hashes or "exact", which forms T x S weights.
        draws: "fresh" hashes for each call, sequence and head, or "kept" ones, which `redraw` renews.
        conv_width: of a depthwise convolution of values, odd; None: no convolution.
    """

    hashes: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        context_dim: int | None = None,
        form: Form = "sampled",
        hash_length: int = 9,
        num_hashes: int = 64,
        fast_hash: bool = True,
        gradient: Gradient = "hashed",
        draws: Draws = "fresh",
        conv_width: int | None = None,
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias, context_dim=context_dim
        )
        choice(self, get_args(Form), form=form)
        choice(self, get_args(Gradient), gradient=gradient)
        choice(self, get_args(Draws), draws=draws)
        whole(self, most=16, hash_length=hash_length)
        whole(self, num_hashes=num_hashes)
        flag(self, fast_hash=fast_hash)
        self.form, self.gradient, self.draws = form, gradient, draws
        self.hash_length, self.num_hashes, self.fast_hash = hash_length, num_hashes, fast_hash
        self.conv = None if conv_width is None else value_conv(self, num_heads, conv_width)
        self.register_buffer("hashes", self.draw(1) if form == "sampled" and draws == "kept" else None)

    def draw(self, batch: int, device: Any = None, generator: torch.Generator | None = None) -> Tensor:
        sizes = self.head_dim, self.num_hashes, self.hash_length
        make = random_flips if self.fast_hash else random_planes
        return make(batch, self.num_heads, *sizes, device=device, generator=generator)

    def reset_parameters(self) -> None:
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """New hashes, where they are kept; from the global generator by default."""
        if self.hashes is not None and not self.hashes.is_meta:
            self.hashes.copy_(self.draw(1, generator=generator))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, alone: bool) -> Tensor:
        if self.conv is not None and not alone:
            refuse(self, "context", "has no tokens beside the queries", "one", "none, or a layer without conv_width")
        out = hide(self.mix(q, k, v, keep), keep if alone else None)  # hidden tokens are no queries either
        if self.conv is None or q.shape[2] == 0:
            return out
        return out + centred_conv(repeat_heads(hide(v, keep), self.num_heads), self.conv.weight[:, 0, :, 0])

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        keep: Bool[Tensor, "B S"] | None,
    ) -> Float[Tensor, "B H T D"]:
        hashes = None
        if self.form == "sampled":
            hashes = self.hashes if self.draws == "kept" else self.draw(q.shape[0], q.device)
        fast = self.num_hashes if self.fast_hash else None
        told: dict[str, Any] = {"length": self.hash_length, "gradient": self.gradient, "fast": fast}
        with as_it_is(q.device):
            return yoso_attention(q, k, v, hashes=hashes, keep=keep, **told)


@CARD.loads("transformers", "YosoSelfAttention")
def _transformers(theirs: Any) -> Loaded:
    """Theirs counts hidden tokens, too, and has no output projection; its sampling needs kernels of its own."""

    def build() -> YOSO:
        told: dict[str, Any] = {
            "form": "expected" if theirs.use_expectation else "sampled",
            "gradient": "hashed" if theirs.lsh_backward else "exact",
            "conv_width": theirs.conv.kernel_size[0] if theirs.use_conv else None,
        }
        sizes = {"hash_length": theirs.hash_code_len, "num_hashes": theirs.num_hash, "fast_hash": theirs.use_fast_hash}
        told |= {"head_dim": theirs.attention_head_size, "bias": True}
        return YOSO(theirs.query.in_features, theirs.num_attention_heads, **sizes, **told)

    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", **({"conv": "conv"} if theirs.use_conv else {})}
    return Loaded(build, same(theirs, names))
