"""Attention that chooses its pairs by content, the choice included, against torch's dense kernel with the same mask.

    python -m benchmarks.routing

Texts have topics: a run of tokens shares a direction, and queries ask for some run's, so that there is something to
find. Beside each ratio stand the share of the mask's pairs that were kept, and of its attention.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Figure, Run, agree, command, compared, race
from regard import masks
from regard.masks import Mask
from regard.routing.anchor_stripes import AnchorStripes
from regard.routing.biformer import region_attention, route_regions
from regard.routing.clusters import clustered_attention, nearest
from regard.routing.flex_prefill import FlexPrefill
from regard.routing.hip import HiP
from regard.routing.lightning_indexer import LightningIndexer
from regard.routing.moba import MoBA
from regard.routing.nsa_branches import Brief, cut, mean, native_sparse_attention
from regard.routing.report import kept
from regard.routing.running_best import dynamic_mask_attention
from regard.routing.xattention import XAttention
from regard.stages import Made, Selector

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
RUN = 128
"""Tokens of a topic."""


def selectors(length: int) -> dict[str, tuple[Callable[[], Selector], Mask]]:
    """What is timed, with the mask that torch's kernel gets. Options keep at most a tenth of 8k tokens' pairs."""
    causal = masks.causal()
    return {
        "moba": (lambda: MoBA(block=min(RUN, length // 4), topk=3), causal),
        "xattention": (lambda: XAttention(block=min(RUN, length // 4), stride=8, threshold=0.4), causal),
        "xattention, full": (lambda: XAttention(block=min(RUN, length // 4), stride=8, threshold=0.4), masks.full()),
        "flex_prefill": (lambda: FlexPrefill(block=min(RUN, length // 4), gamma=0.4), causal),
        "anchor_stripes": (lambda: AnchorStripes(theta=0.0, block=min(RUN, length // 4), step=4), causal),
        "hip": (lambda: HiP(mask_k=min(256, length // 4), window=min(RUN, length // 4)), causal),
    }


def layers(length: int, heads: int, width: int) -> dict[str, tuple[Attend, str]]:
    """What chooses in the middle of its own sums, and the share of pairs that it reads in full."""
    g, block, window = torch.Generator().manual_seed(3), 64, length // 32
    gates = torch.rand(1, heads, length, 3, generator=g)
    delta = torch.randn(1, heads, length, generator=g)

    def nsa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cuts = (cut(z, block, block) for z in (k, v))
        means = [mean(z) for z in cuts]
        brief = Brief(*means, torch.ones(1, means[0].shape[2], dtype=torch.bool), block, block)
        return native_sparse_attention(q, k, v, gates, brief, block=block, count=3, window=window)

    def dynamic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dynamic_mask_attention(q, k, v, delta, window=window)[0]

    sizes = {"num_index_heads": 4, "index_dim": 16, "topk": window, "rope_dim": 0}
    indexer = LightningIndexer(heads * width, **sizes)
    small = Made(torch.randn(1, 4, length, 17, generator=g), torch.randn(1, 1, length, 16, generator=g))

    def indexed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = masks.causal()
        return regard.attention(q, k, v, mask=causal & indexer(q, k, causal, small))

    chosen = 2 * (3 * block + window) / length
    return {
        "nsa": (nsa, f"3 blocks of {block} and a window of {window}: {chosen:.1%} of the pairs"),
        "dynamic_mask": (dynamic, f"{window} keys a query: {2 * window / length:.1%} of the pairs"),
        "lightning_indexer": (
            indexed,
            f"{window} keys a query: {2 * window / length:.1%} of the pairs; as in the paper, 4 small heads of 16 "
            "score every pair to choose them, in O(T^2)",
        ),
    }


def inputs(length: int, heads: int, width: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    runs = -(-length // RUN)
    topics = F.normalize(torch.randn(heads, runs, width, generator=g), dim=-1) * width**0.5
    asked = torch.randint(runs, (runs,), generator=g)
    q, k = (topics[:, at].repeat_interleave(RUN, 1)[None, :, :length] for at in (asked, torch.arange(runs)))
    q, k = (0.7 * z + torch.randn(z.shape, generator=g) for z in (q, k))
    return [q, k, torch.randn(1, heads, length, width, generator=g)]


def shares(q: Tensor, k: Tensor, selected: Mask, mask: Mask) -> str:
    found = kept(q, k, selected, mask=mask)
    return f"{found.pairs:.1%} of the pairs, {float(found.mass.mean()):.0%} of the attention"


def measure(*, repeats: int, length: int = 8192, heads: int = 2, width: int = 64, side: int = 88) -> Benchmark:
    shape = {"B": 1, "H": heads, "T": length, "D": width, "dtype": "fp32"}
    result = Benchmark("routing", f"Attention that chooses by content, T = {length}, choosing included", shape=shape)
    q, k, v = inputs(length, heads, width)
    with torch.no_grad():
        for name, (make, mask) in selectors(length).items():
            selector = make()
            selected = selector(q, k, mask)
            some = torch.arange(0, length, max(1, length // 64))
            want = F.scaled_dot_product_attention(
                q[:, :, some], k, v, (mask & selected).at(some, torch.arange(length)).expand(1, heads, -1, -1)
            )
            runs: dict[str, Run] = {
                "regard": partial(regard.attention, q, k, v, mask=mask, selector=selector),
                "SDPA": partial(F.scaled_dot_product_attention, q, k, v, is_causal=mask.is_causal),
            }
            agree(runs["regard"]()[:, :, some], want)
            times = race(runs, repeats=repeats, seconds=6)
            limit = goal("routing moba") if name == "moba" else goal("routing")
            result.add(compared(name, times, "regard", "SDPA", note=shares(q, k, selected, mask), **limit))
        for name, (attend, note) in layers(length, heads, width).items():
            runs = {
                "regard": partial(attend, q, k, v),
                "SDPA": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
            }
            times = race(runs, repeats=repeats, seconds=6)
            result.add(compared(name, times, "regard", "SDPA", note=note, **goal("routing")))
        result.add(clusters(q, v, repeats), regions(side, heads, width, repeats))
    return result


def clusters(x: Tensor, v: Tensor, repeats: int) -> Figure:
    """Routing attention: tokens near the same of 16 centroids."""
    length, size = x.shape[2], max(1, x.shape[2] // 16)
    centroids = x[0, :, :: max(1, length // 16)][:, :16].clone()

    def ours() -> Tensor:
        at = nearest(x, centroids, size=size)
        return clustered_attention(x, x, v, at, at, causal=True)

    runs: dict[str, Run] = {"regard": ours, "SDPA": partial(F.scaled_dot_product_attention, x, x, v, is_causal=True)}
    times = race(runs, repeats=repeats, seconds=6)
    note = f"16 clusters of {size}: {2 * 16 * size**2 / 2 / length**2:.1%} of the pairs"
    return compared("routing_transformer", times, "regard", "SDPA", note=note, **goal("routing"))


def regions(side: int, heads: int, width: int, repeats: int) -> Figure:
    """Bi-level routing: 8 x 8 regions of a map of `side` x (side + 8), 4 for each."""
    each = side * (side + 8) // 64
    q, k, v = (z.unflatten(2, (64, each)) for z in inputs(64 * each, heads, width))
    runs: dict[str, Run] = {
        "regard": lambda: region_attention(q, k, v, route_regions(q, k, topk=4)),
        "SDPA": partial(F.scaled_dot_product_attention, *(z.flatten(2, 3) for z in (q, k, v))),
    }
    times = race(runs, repeats=repeats, seconds=6)
    note = f"4 of 64 regions of {each}: {4 / 64:.1%} of the pairs"
    return compared(f"biformer, {side + 8} x {side}", times, "regard", "SDPA", note=note, **goal("routing"))


if __name__ == "__main__":
    command(measure, __doc__)
