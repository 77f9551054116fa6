"""Reformer: tokens sorted by random hashes see the chunk that they fall into, and the one before.

Queries and keys are one. Each round of hashing sorts all tokens by bucket and cuts them into chunks. Rounds count as
one softmax over all that was seen in any. A token sees itself only where it sees nothing else. No gradient of a bucket.

Causality: no value, and no gradient, of a later token reaches an earlier output. But all tokens of a sequence share
the chunks, so a later one can change which keys an earlier one sees; a prefix alone can give other outputs.
"""

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, refuse, whole
from regard.kernels.blocks import first, in_blocks
from regard.pipeline.head_mixer import HeadMixer
from regard.routing._lsh import columns, gathered, halves, hashed, met, near_chunks, one_softmax, together
from regard.tracing import as_it_is, exporting
from regard.weights import Loaded, same

SHARE = "all tokens of a sequence share its chunks, so later ones can change which keys an earlier one sees"
CARD = Card(
    "reformer",
    equation="""z = x W_qk,   k_j = z_j / (sqrt(D) rms(z_j))           rms(z)^2 = mean of z^2 + 1e-6
bucket_r(i) = argmax of [z_i R_r ; -z_i R_r]           rounds r, each with a random R_r, and buckets = two factors
P_r(i) = tokens in i's chunk and the one before, all sorted by (r, bucket_r, position) and cut every C = chunk
out_i = softmax over r and j in P_r(i), j != i (j < i when causal) of z_i . k_j, times v_j;  v_i where there is none""",
    papers=(
        Paper(
            "Reformer: The Efficient Transformer",
            "Kitaev, Kaiser, Levskaya",
            2020,
            "2001.04451",
            "abstract; the authors' code, in part; transformers' LSHSelfAttention",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "compile"},
    traits={"routed", "sparse", "normalised", "nonnegative", "linear_in_values", "head_independent"},
    cost=Cost("B*H*T*D*rounds*(2*chunk*(1 + before + after) + min(2**floor(log2(T/chunk)), chunk))", ""),
    claim="More rounds bring attention nearer to all keys; equal tokens always share a bucket: "
    "tests/routing/test_reformer.py::test_more_rounds_come_nearer_to_all_keys, "
    "tests/routing/test_reformer.py::test_equal_tokens_share_buckets.",
    differs=(
        "T need not be a multiple of C: the last chunk of a round may be short.",
        "Padded tokens stand behind all others, so that chunks, and by default the number of buckets, are those of a "
        "row without them; the first chunk sees the last one that holds real tokens.",
        "A token that sees nothing but itself gets its value by a mask, not by a logit of -1e5.",
        "The mask to one bucket and the correction for keys met in several rounds are the paper's; not the code's.",
        "draws='kept' keeps one set of rotations, so that a call can be repeated; the code draws in each call.",
        "A window longer than the circle of chunks sees each once, in the code twice; two factors are two hashes, "
        "as in the code. No decoding from a cache, which hashes into old chunks.",
    ),
    verified="third-party",
    example={"chunk": 3, "rounds": 2, "buckets": 2, "bias": True, "draws": "kept"},
    tries={"buckets": (2, 4), "before": 0, "after": 1},
    exceptions={"L4": SHARE, "L6": SHARE},
    defaults={
        **dict.fromkeys(("chunk", "rounds", "buckets", "before", "after", "bias", "draws"), "code, transformers"),
        **dict.fromkeys(("same_bucket_only", "exclude_duplicates"), "code, transformers, which has no such choice"),
    },
)
PAIRS = 2**20
"""Scores formed together while no gradient is asked for."""
Draws = Literal["fresh", "kept"]


@checked()
def lsh_attention(
    z: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T V"],
    rotations: Float[Tensor, "H D R C"],
    *,
    chunk: int = 64,
    buckets: int | tuple[int, int] | None = None,
    before: int = 1,
    after: int = 0,
    causal: bool = False,
    same_bucket_only: bool = False,
    exclude_duplicates: bool = False,
    keep: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T V"]:
    """Attention of tokens that are queries and keys at once. Arguments are those of `Reformer`; the rest:

    Args:
        rotations: R_r of each head, as many columns as half the buckets, or half of both factors together.
        keep: True at real tokens. A padded one sees real tokens, too, or else gives 0.
    """
    (B, H, T, D), dtype = z.shape, v.dtype
    if T == 0:
        return v
    wide = torch.promote_types(torch.promote_types(z.dtype, v.dtype), torch.float32)
    real = torch.ones(1, T, dtype=torch.bool, device=z.device) if keep is None else keep
    chunk = chunk if exporting() else min(chunk, T)
    count = real.sum(1)
    # Padded to whole chunks: by tokens that are none.
    z, v, real = (
        in_blocks(t, chunk, axis).flatten(axis, axis + 1) for t, axis in ((z.to(wide), 2), (v.to(wide), 2), (real, 1))
    )
    if not exporting() and chunk == T:  # all tokens share a chunk: nothing need be sorted
        bucket, before, after = (~real[:, None, None]).long().expand(B, H, 1, -1), 0, 0
    else:
        bucket = hashed(z, rotations, halves(buckets, count, chunk), real)
        bucket = bucket.masked_fill(((count <= chunk)[:, None] & real)[:, None, None], 0)
    order = bucket.argsort(stable=True, dim=3)
    R, N = order.shape[2], order.shape[3] // chunk
    queries = order.unflatten(3, (N, chunk)).flatten(2, 3)
    near, once = near_chunks(count, R, N, chunk, before, after)
    keys = queries.gather(2, near.flatten(1)[:, None, :, None].expand(B, H, -1, chunk))
    keys = keys.unflatten(2, near.shape[1:]).flatten(3)
    rank = order.argsort(3)
    k = z * torch.rsqrt(z.square().mean(3, keepdim=True) + 1e-6) / math.sqrt(D)
    parts = []
    step = max(1, PAIRS // max(1, B * H * chunk * keys.shape[3]))
    places = torch.arange(R * N, device=z.device)
    for some in [places] if torch.compiler.is_compiling() or torch.is_grad_enabled() else places.split(step):
        i, j = queries[:, :, some], keys[:, :, some]
        scores = gathered(z, i) @ gathered(k, j).mT
        allowed = (j[..., None, :] < i[..., :, None]) if causal else (j[..., None, :] != i[..., :, None])
        allowed = allowed & real.expand(B, -1).gather(1, j.flatten(1)).view(j.shape)[..., None, :]
        counts = once[:, some]
        if same_bucket_only:
            counts = counts & (near[:, some] // N == (some // N)[:, None])  # hashed in the query's round
            allowed = allowed & together(bucket, some // N, i, j)
        allowed = allowed & counts.repeat_interleave(chunk, 2)[:, None, :, None]
        if exclude_duplicates:
            times = met(bucket, rank // chunk, torch.where(once, near, -1), i, j, same_bucket_only)
            scores = scores - times.clamp(min=1).to(wide).log()
        top = scores.detach().masked_fill(~allowed, -math.inf).amax(4, keepdim=True)
        e = (scores - top.masked_fill(top == -math.inf, 0)).masked_fill(~allowed, -math.inf).exp()
        parts.append((top, e.sum(4, keepdim=True), e @ gathered(v, j)))
    total, mixed = one_softmax(parts, rank)
    out = torch.where(total > 0, mixed / total.clamp(min=torch.finfo(wide).tiny), v * real[:, None, :, None])
    return first(out, T, 2).to(dtype)


@CARD.module
class Reformer(HeadMixer):
    """Self-attention by locality-sensitive hashing, with one projection for queries and keys.

    Args:
        dim, num_heads, head_dim, causal, bias: as of `HeadMixer`.
        chunk: C, tokens in a chunk.
        rounds: of hashing.
        buckets: even, or two even factors. By default about 2 T / C, in two factors if that is above 2 C.
        before, after: chunks that a token sees beside its own.
        same_bucket_only: in each round see only tokens of the same bucket.
        exclude_duplicates: a key that is met in several rounds counts once.
        draws: "fresh" rotations for each call, or "kept" ones, which `redraw` renews.

    Raises:
        ValueError: if options are out of range, or buckets are odd.
    """

    rotations: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        chunk: int = 64,
        rounds: int = 1,
        buckets: int | tuple[int, int] | None = None,
        before: int = 1,
        after: int = 0,
        same_bucket_only: bool = False,
        exclude_duplicates: bool = False,
        draws: Draws = "fresh",
    ) -> None:
        super().__init__(dim, num_heads, head_dim=head_dim, causal=causal, bias=bias)
        whole(self, chunk=chunk, rounds=rounds)
        whole(self, 0, before=before, after=after)
        flag(self, same_bucket_only=same_bucket_only, exclude_duplicates=exclude_duplicates)
        choice(self, get_args(Draws), draws=draws)
        each = buckets if isinstance(buckets, tuple) else () if buckets is None else (buckets,)
        for n in each:
            whole(self, 2, buckets=n)
        if any(n % 2 for n in each) or (isinstance(buckets, tuple) and len(each) != 2):
            refuse(self, "buckets", "is neither even nor two even factors", buckets, "such as 64 or (8, 16), or None")
        self.chunk, self.rounds, self.buckets, self.before, self.after = chunk, rounds, buckets, before, after
        self.same_bucket_only, self.exclude_duplicates, self.draws = same_bucket_only, exclude_duplicates, draws
        self.register_module("k_proj", None)
        self.register_buffer("rotations", self.draw(None) if draws == "kept" else None)

    def draw(self, T: int | None, device: Any = None, generator: torch.Generator | None = None, **more: Any) -> Tensor:
        """Random rotations for T tokens, or for any number."""
        sizes = self.num_heads, self.head_dim, self.rounds, columns(self.buckets, T, self.chunk)
        return torch.randn(sizes, device=device, generator=generator, **more)

    def reset_parameters(self) -> None:
        self.redraw()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves between devices, but stays in float32: other rotations make other chunks."""
        before = self.rotations
        super()._apply(fn, recurse)
        after = self.rotations
        if before is not None and after is not None and after.dtype != before.dtype:
            self.rotations = before.to(after.device)
        return self

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """New rotations, where they are kept; from the global generator by default."""
        if self.rotations is not None and not self.rotations.is_meta:
            self.rotations.copy_(self.draw(None, generator=generator))

    def split(self, x: Float[Tensor, "B T M"], source: Float[Tensor, "B T M"]) -> tuple[Tensor, Tensor, Tensor]:
        z, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.v_proj))
        return z, z, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Bool[Tensor, "B T"] | None) -> Float[Tensor, "B H T D"]:
        T = None if keep is not None or torch.compiler.is_compiling() else q.shape[2]
        rotations = self.rotations
        if rotations is None:
            wide = torch.promote_types(q.dtype, torch.float32)
            rotations = self.draw(T, q.device, dtype=wide)
        elif self.buckets is None and T is not None:
            rotations = rotations[..., : columns(None, T, self.chunk)]
        names = ("chunk", "buckets", "before", "after", "causal", "same_bucket_only", "exclude_duplicates")
        told: dict[str, Any] = {n: getattr(self, n) for n in names}
        with as_it_is(q.device):
            return lsh_attention(q, v, rotations, keep=keep, **told)


@CARD.loads("transformers", "LSHSelfAttention")
def _transformers(theirs: Any) -> Loaded:
    """Theirs has no output projection, and draws rotations in each call, from a seed if the config has one."""

    def build() -> Reformer:
        names = {"chunk": "chunk_length", "rounds": "num_hashes", "head_dim": "attention_head_size"}
        names |= {"before": "num_chunks_before", "after": "num_chunks_after", "causal": "is_decoder"}
        told: dict[str, Any] = {ours: getattr(theirs, name) for ours, name in names.items()}
        number = theirs.num_buckets
        told["buckets"] = tuple(number) if isinstance(number, list) else number
        return Reformer(theirs.hidden_size, theirs.num_attention_heads, **told)

    return Loaded(build, same(theirs, {"q_proj": "query_key", "v_proj": "value"}))
