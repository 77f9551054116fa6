"""Sparse Sinkhorn attention: blocks of keys are sorted softly; a query sees its own and a sorted one.

Which block goes where is a nearly doubly stochastic matrix, made from scores between mean queries and mean keys of
blocks by Sinkhorn's normalisation of rows and columns in turn. Blocks are counted from the first place of a row.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import fits, flag, number, refuse, whole
from regard.kernels.blocks import from_blocks, in_blocks
from regard.kernels.check import check_inputs
from regard.kernels.problem import dots
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import HeadMixer
from regard.tracing import as_it_is, exporting

CARD = Card(
    "sinkhorn",
    equation="""n = T / b blocks,  b = block;   R0[u, w] = qbar_u . kbar_w / sqrt(D),   means over blocks
soft:  L = (log(relu(R0) + 1e-6) + g) / tau,   g Gumbel noise in training
       `iterations` times:  L -= logsumexp over w;  L -= logsumexp over u;     R = exp(L)
hard:  R[u, w] = softmax over w of R0, at its largest in each row, else 0
k'_u = sum_w R[u, w] k_w,   v'_u = sum_w R[u, w] v_w                        place by place
out_u = softmax(q_u . [k'_u ; k_u] / sqrt(D)) [v'_u ; v_u]""",
    papers=(
        Paper(
            "Sparse Sinkhorn Attention",
            "Tay et al.",
            2020,
            "2002.11296",
            "abstract; lucidrains' code, not the authors'",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "gqa", "compile"},
    lacks={"causal": "its sorting reads the whole sequence; a causal form, which sorts past blocks, is not built"},
    traits={"nonnegative", "linear_in_values", "head_independent"},
    cost=Cost("B*H*D*(4*T*block + 2*T*T/block + (T/block)**2)", ""),
    claim="A query reads its own block and one more, which fits it best of all: "
    "tests/routing/test_sinkhorn.py::test_a_query_reads_its_own_block_and_the_best_other.",
    differs=(
        "Blocks are scored by mean queries and keys, as in the port; the paper has a small network with an output for "
        "each block, which ties a layer to one number of blocks.",
        "Sorted values are made of values; the port that was read makes them of keys, by one wrong name.",
        "Noise in training alone; the port has it in evaluation, too.",
        "T need not be a multiple of b. Padded tokens are in no mean and no sum, and a block of them is not sorted.",
    ),
    verified="third-party",
    example={"block": 3, "iterations": 5, "noise": False},
    tries={"hard": True, "noise": True},
    defaults={
        "block": "ours",
        "num_kv_heads": "ours, as many as query heads",
        "iterations": "code, lucidrains",
        "temperature": "code, lucidrains",
        "hard": "ours, the paper's soft sorting; lucidrains' default is hard",
        "noise": "paper, told by others",
        "bias": "ours",
    },
)
MOST = 1000
"""Iterations; after these nothing moves any more."""


def sinkhorn_order(
    scores: Float[Tensor, "B H n m"],
    *,
    iterations: int = 8,
    temperature: float = 0.75,
    gumbel: Float[Tensor, "B H n m"] | None = None,
    real: Bool[Tensor, "#B n"] | None = None,
) -> Float[Tensor, "B H n m"]:
    """R: nearly doubly stochastic, columns exactly so. Blocks that are not real are left out: 0."""
    L = torch.log(scores.relu() + 1e-6)
    L = (L if gumbel is None else L + gumbel) / temperature
    hidden = None if real is None else ~(real[:, None, :, None] & real[:, None, None, :])
    for axis in (0, *(3, 2) * iterations):
        L = L - L.logsumexp(axis, keepdim=True) if axis else L
        L = (
            L if hidden is None else L.masked_fill(hidden, torch.finfo(L.dtype).min / 4)
        )  # not -inf, of which no sum can be taken off
    return L.exp()


def sinkhorn_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    *,
    block: int = 64,
    iterations: int = 8,
    temperature: float = 0.75,
    hard: bool = False,
    gumbel: Float[Tensor, "B H n n"] | bool = False,
    keep: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T V"]:
    """Attention to one's own block and the one that is sorted there. `gumbel`: the noise, or whether to draw it."""
    check_inputs(q, k, v)
    (B, H, T, D), dtype = q.shape, q.dtype
    if k.shape[2] != T:
        refuse("sinkhorn_attention", "k", "has other tokens than q", k.shape[2], f"{T} tokens")
    if keep is not None:
        fits("sinkhorn_attention", "B T", {"B": B, "T": T}, keep=keep)
    if T == 0:
        return q.new_zeros(B, H, 0, v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
    block = block if exporting() else min(block, T)
    real = torch.ones(1, T, dtype=torch.bool, device=q.device) if keep is None else keep
    q, k, v = (z.masked_fill(~real[:, None, :, None], 0.0) for z in (q, k, v))
    k, v = (z.repeat_interleave(H // z.shape[1], 1) for z in (k, v))
    (q, k, v), real = (in_blocks(z, block, 2) for z in (q, k, v)), in_blocks(real, block, 1)  # (B, H, n, b, D)
    wide = torch.promote_types(dtype, torch.float32)
    count = real.sum(2).clamp(min=1)[:, None, :, None]
    n = real.shape[1]
    if isinstance(gumbel, Tensor):
        fits("sinkhorn_attention", "#B #H n n", {"B": B, "H": H, "n": n}, gumbel=gumbel)
    scores = dots(*(z.to(wide).sum(3) / count for z in (q, k))) / math.sqrt(D)
    there = real.any(2)
    if hard:
        scores = scores.masked_fill(~there[:, None, None], torch.finfo(scores.dtype).min)
        share, source = scores.softmax(3).max(3, keepdim=True)
        at = source[..., None].expand(-1, -1, -1, block, -1)
        sorted_ = [share[..., None] * z.to(wide).gather(2, at.expand(-1, -1, -1, -1, z.shape[4])) for z in (k, v)]
    else:
        if gumbel is True:
            gumbel = -torch.empty_like(scores).exponential_().log()
        noise = None if isinstance(gumbel, bool) else gumbel
        R = sinkhorn_order(scores, iterations=iterations, temperature=temperature, gumbel=noise, real=there)
        source = R.argmax(3, keepdim=True)
        sorted_ = [(R @ z.to(wide).flatten(3)).view(z.shape) for z in (k, v)]
    keys, values = (torch.cat([s.to(z.dtype), z], 3).flatten(1, 2) for s, z in zip(sorted_, (k, v), strict=True))
    # What stands in the sorted block is padding where its main source is.
    own = real[:, None].expand(B, H, -1, -1)
    seen = torch.cat([own.gather(2, source.expand(-1, -1, -1, block)), own], 3).flatten(1, 2)
    out = attention(q.flatten(1, 2), keys, values, mask=seen[:, :, None].expand(-1, -1, block, -1))
    return from_blocks(out.unflatten(1, (H, -1)), T, 2)


@CARD.module
class Sinkhorn(HeadMixer):
    """Self-attention to blocks of keys that are sorted to where they are wanted.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: as of `HeadMixer`.
        block: b, tokens in a block.
        iterations: of normalising rows and columns.
        temperature: tau; the lower, the nearer to a permutation.
        hard: one block for each, with its probability as a factor of keys and values, in place of a mixture.
        noise: whether Gumbel noise explores other orders in training; not with `hard`.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        block: int = 64,
        iterations: int = 8,
        temperature: float = 0.75,
        hard: bool = False,
        noise: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias)
        whole(self, block=block)
        whole(self, 0, most=MOST, iterations=iterations)
        number(self, above=0, temperature=temperature)
        flag(self, hard=hard, noise=noise)
        self.block, self.iterations, self.temperature = block, iterations, temperature
        self.hard, self.noise = hard, noise

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}, hard={self.hard}"

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G T D"],
        v: Float[Tensor, "B G T D"],
        keep: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B H T D"]:
        with as_it_is(q.device):
            return sinkhorn_attention(
                q,
                k,
                v,
                block=self.block,
                iterations=self.iterations,
                temperature=self.temperature,
                hard=self.hard,
                gumbel=self.noise and self.training,
                keep=keep,
            )
