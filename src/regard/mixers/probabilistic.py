"""Probabilistic attention: keys and values are units of a mixture of Gaussians, and may adapt.

A unit's key is the mean of its queries, and outputs are the most probable values given their queries, after one step of
EM. Further steps move keys to the queries, and values to those that are known.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, choice, flag, number, refuse, whole
from regard.kernels.check import check_inputs, check_mask
from regard.kernels.problem import chunk_rows
from regard.linear._shared import repeat_heads, widened
from regard.masks import Mask, full, padding
from regard.mixers._mixture import MOST, TILE_BYTES, Magnitude, Mixture, Positions, fit, many, moved, precisions
from regard.pipeline.head_mixer import HeadMixer, Projections
from regard.pipeline.tokens import key_padding, quarantine, spoil
from regard.tracing import as_it_is, autocasts

CARD = Card(
    "probabilistic",
    equation="""log w_ij = log pi_ij - (a_j/2) |q_i - k_j|^2 [- (b_j/2) |v0_i - v_j|^2],   softmax over j
out_i = sum_j w_ij v_j
log_prior = "magnitude": log pi_ij = (a_j/2) |k_j|^2 + (b_j/2) |v_j|^2: with one a and b = 0, softmax(a q.k)
key step:    k_j <- (theta_j k_j + a sum_i w_ij q_i) / (theta_j + a sum_i w_ij), and w anew
value step:  v_j <- (phi_j v_j + b sum_i w_ij f_i u_i) / (phi_j + b sum_i w_ij f_i), and w anew; u_i are known""",
    papers=(
        Paper(
            "Probabilistic Attention for Interactive Segmentation",
            "Gabbur, Bilkhu, Movellan",
            2021,
            "2106.15338",
            "abstract; official code",
        ),
        Paper("Probabilistic Transformers", "Movellan, Gabbur", 2020, "2010.15583", "official code"),
    ),
    supports={"bidirectional", "padding", "packed", "cross", "gqa", "compile"},
    lacks=dict.fromkeys(("causal", "streaming"), "keys learn from all queries, later ones too"),
    traits=PLAIN,
    cost=Cost("2*B*H*T*S*D + key_steps*B*H*T*S*(2*D + 1)", ""),
    claim="Key steps never lower the likelihood of queries, and a known value is told to its cluster: "
    "tests/mixers/test_probabilistic.py::test_key_steps_never_lower_the_likelihood, "
    "tests/mixers/test_probabilistic.py::test_a_known_value_reaches_its_cluster.",
    differs=(
        "As in the authors' code, the prior of a key step is centred on the key as it is, not as it was at first.",
        "A unit that no query, or no known value, falls to stays as it is; in the code it is 0 / 0, or gets value 0.",
        "What a mask hides does not count, however high its score; in the code it may empty a row.",
        "Precisions of each key go with steps too, where the code takes one number.",
        "Inferred: in the layer known tokens go through the values' projection, and hidden tokens tell keys nothing.",
    ),
    verified="third-party",
    example={"key_steps": 1},
    tries={"key_prior": 0.5, "value_precision": 0.4},
    defaults={
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
        "key_precision": "code, where it is dot-product attention",
        "value_precision": "code, where it is dot-product attention",
        "log_prior": "code, where it is dot-product attention",
        "key_steps": "code, where it is dot-product attention",
        "key_prior": "code",
        "own_values": "code",
    },
)


@checked()
def probabilistic_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    key_precision: float | int | Float[Tensor, "B H S"] | None = None,
    value_precision: float | int | Float[Tensor, "B H S"] = 0.0,
    log_prior: str | Float[Tensor, "#B #H #T #S"] | None = "magnitude",
    key_steps: int = 0,
    key_prior: float | int | Float[Tensor, "B H S D"] | None = None,
    value_steps: int = 0,
    known: tuple[Tensor, ...] | None = None,
    value_prior: float | int | Float[Tensor, "B H S V"] | None = None,
    initial_values: Float[Tensor, "B H T V"] | None = None,
    mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
    tells: Bool[Tensor, "B T"] | None = None,
    positions: Positions = (None, None, None),
    rows: int | None = None,
) -> Float[Tensor, "B H T Y"]:
    """What the units answer: Y = V, or 2 V with positions of values, whose part stands in every second channel.

    Steps hand on what all queries say to all that may see the key: a causal mask does not hold them back.

    Args:
        key_precision: a; default 1 / sqrt(D).
        value_precision: b. With the magnitude prior it weighs |v|^2 also where there are no initial values.
        log_prior: log pi; None is uniform.
        key_steps, value_steps: of adaptation, at most 100.
        key_prior, value_prior: theta and phi, the precisions of a prior around the present means.
        known: u (B, H, T, V), and f (B, H, T), True where it is known; with positions of values also theirs,
            (B, H, S, V), which each value step adds to their part.
        initial_values: v0.
        mask: which query may see which key.
        tells: the queries that keys and values adapt to; default all.
        positions: of queries (T, S, D), keys (S, T, D) and values (T, S, V), each or None.
        rows: queries worked on at a time.

    Raises:
        ValueError, TypeError: inputs that don't fit together, before any work is done.
    """
    check_inputs(q, k, v)
    (B, H, T, D), S, who = q.shape, k.shape[2], "probabilistic_attention"
    whole(who, 0, most=MOST, key_steps=key_steps, value_steps=value_steps)
    if isinstance(log_prior, str):
        choice(who, get_args(Magnitude), log_prior=log_prior)
    given = {"key_precision": key_precision, "value_precision": value_precision}
    precisions(who, **given, key_prior=key_prior, value_prior=value_prior)
    whole(who, rows=1 if rows is None else rows)
    sizes, kind = {"B": B, "H": H, "T": T, "S": S, "D": D, "V": v.shape[3]}, v.dtype
    fit("positions", ("T S D", "S T D", "T S V"), positions, sizes)
    fit("known", ("B H T V", "B H T", "B H S V")[: 2 if positions[2] is None else 3], known, sizes)
    rows = chunk_rows(T, TILE_BYTES // (4 * B * H * S or 1)) if rows is None else rows
    q, k, v = widened(q, repeat_heads(k, H), repeat_heads(v, H))

    def wide(z: Any) -> Any:
        return z.to(q.dtype) if isinstance(z, Tensor) else z

    each: tuple[Any, Any] = key_precision, value_precision
    a, b = (wide(z[:, :, None] if many(z) else z) for z in each)
    (rq, rk, rv), seen = map(wide, positions), check_mask(mask, B, H, T, S, q.device)
    p = Mixture(q, D**-0.5 if a is None else a, b, wide(log_prior), wide(initial_values), (rq, rk, rv), seen, rows)
    told = None if tells is None else tells[:, None]
    for _ in range(key_steps):
        k = moved(k, p.told(k, v, q, told), p.a, wide(key_prior))
    beside: Any = 0
    for _ in range(0 if known is None else value_steps):
        u, f, *placed = known  # type: ignore[misc]
        f = f.bool() if told is None else f.bool() & told
        beside = beside + p.read(k, v, wide(placed[0])) if placed else 0
        v = moved(v, p.told(k, v, wide(u), f), p.b, wide(value_prior))
    out = p.read(k, v, v)
    if rv is not None:
        out = torch.stack([out, p.placed(k, v) + beside], -1).flatten(-2)
    return out.to(kind)


@CARD.module
class Probabilistic(HeadMixer):
    """Bidirectional attention whose keys adapt to its queries, and whose values to known ones, by steps of EM.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias, context_dim: as of `HeadMixer`.
        key_precision: a; default 1 / sqrt(D).
        value_precision: b.
        log_prior: "magnitude" or "uniform".
        key_steps: how often keys adapt, at most 100.
        key_prior: theta, the precision of a prior around the present keys.
        own_values: whether a token's own value is its initial one, v0; then there is no context.

    Shapes: x (B, T, M), context (B, S, context_dim) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        context_dim: int | None = None,
        key_precision: float | None = None,
        value_precision: float = 0.0,
        log_prior: Literal["magnitude", "uniform"] = "magnitude",
        key_steps: int = 0,
        key_prior: float | None = None,
        own_values: bool = False,
    ) -> None:
        kv: Projections = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "bias": bias, "context_dim": context_dim}
        super().__init__(dim, num_heads, **kv)
        given: dict[str, Any] = {"key_precision": key_precision, "key_prior": key_prior}
        number(self, above=0, **{name: z for name, z in given.items() if z is not None})
        number(self, least=0, value_precision=value_precision)
        choice(self, ("magnitude", "uniform"), log_prior=log_prior)
        whole(self, 0, most=MOST, key_steps=key_steps)
        flag(self, own_values=own_values)
        self.context_dim, self.key_steps, self.own_values = self.v_proj.in_features, key_steps, own_values
        given |= {"value_precision": value_precision, "log_prior": log_prior if log_prior == "magnitude" else None}
        self.options = given

    def _check_context(self, x: Tensor, context: Tensor) -> None:
        if self.own_values:
            refuse(self, "context", "holds no values of x", type(context).__name__, "none, or own_values=False")
        super()._check_context(x, context)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.key_steps or not (x.dtype.itemsize < 4 or autocasts(x.device)):
            return super().split(x, source)
        pairs = ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        with as_it_is(x.device):  # steps multiply rounding errors: those of half precision are kept out
            q, k, v = (_widely(p, z).unflatten(-1, (-1, self.head_dim)) for p, z in pairs)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, alone: bool, **steps: Any) -> Tensor:
        own = repeat_heads(v, self.num_heads) if self.own_values else None
        given: dict[str, Any] = {"mask": None if keep is None else padding(keep), "tells": keep if alone else None}
        given |= self.options | steps
        with as_it_is(q.device):
            out = probabilistic_attention(q, k, v, initial_values=own, key_steps=self.key_steps, **given)
        return out.to(self.o_proj.weight.dtype)

    @checked(M="dim", C="context_dim")
    def propagate(
        self,
        x: Float[Tensor, "B T M"],
        known: Float[Tensor, "B T C"],
        flags: Bool[Tensor, "B T"],
        *,
        steps: int = 1,
        prior: float | None = 1.0,
        mask: Mask | Tensor | None = None,
    ) -> Float[Tensor, "B T M"]:
        """What `forward` gives once values have moved to those of `known`, where `flags` are True.

        Args:
            known: what the values of flagged tokens are made of, as those of x are; anything elsewhere.
            steps: of values, at most 100.
            prior: phi, the precision of a prior around the present values; None for none. With one, b must be > 0.
            mask: padding, as of `forward`.
        """
        keep, (x, bad) = key_padding(self, mask, x), quarantine(x)
        u = self.v_proj(known.masked_fill(~flags[..., None], 0)).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        told = repeat_heads(u, self.num_heads), flags[:, None].expand(-1, self.num_heads, -1)
        given: dict[str, Any] = {"value_steps": steps, "value_prior": prior, "known": told}
        out = self.merge(self.mixed(*self.split(x, x), keep, alone=True, **given))
        return spoil(out, bad, bad, full() if keep is None else padding(keep))


def _widely(module: nn.Module, x: Tensor) -> Tensor:
    """What a module gives, with hooks and whatever it is made of, computed in float32 at least."""
    held = {n: z for n, z in (*module.named_parameters(), *module.named_buffers()) if z.is_floating_point()}
    wide = dict(zip(held, widened(*held.values()), strict=True))
    return torch.func.functional_call(module, wide, tuple(widened(x)))
