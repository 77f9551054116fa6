"""Attention over pages against the formula written out, page by page and token by token, in float64."""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.cache.paged_attention import paged_attention
from regard.kernels import execute
from regard.kernels.native import build
from regard.kernels.pages import Pages
from regard.kernels.problem import Problem
from regard.laws.agreement import close, near


def naive(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """For every sequence, head and query: all its tokens up to the query's own, found by the table."""
    B, H, T, D = q.shape
    G, page = k.shape[1:3]
    out = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64)
    for b in range(B):
        length = int(lengths[b])
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                sums, total = torch.zeros(v.shape[3], dtype=torch.float64), 0.0
                for n in range(length - T + t + 1):
                    at = int(table[b, n // page]), g, n % page
                    e = math.exp(float(q[b, h, t].double() @ k[at].double()) / math.sqrt(D))
                    sums, total = sums + e * v[at].double(), total + e
                if total:
                    out[b, h, t] = sums / total
    return out


def pool(G: int, page: int, D: int, V: int, lengths: list[int]) -> tuple[Tensor, ...]:
    """Pages in no order, NaN wherever no sequence has a token, and a table that names no page behind its end."""
    torch.manual_seed(0)
    n = max(1, -(-max(lengths) // page))
    order = torch.randperm(n * len(lengths)).view(len(lengths), n)
    k, v = (torch.full((order.numel(), G, page, width), math.nan, dtype=torch.float64) for width in (D, V))
    table = torch.full_like(order, 99999)
    for b, length in enumerate(lengths):
        for i in range(-(-length // page)):
            table[b, i], used = order[b, i], min(page, length - i * page)
            k[order[b, i], :, :used] = torch.randn(G, used, D).double()
            v[order[b, i], :, :used] = torch.randn(G, used, V).double()
    return k, v, table.int(), torch.tensor(lengths, dtype=torch.int32)


CASES = {
    "one sequence": (2, 2, 4, 8, 8, [11]),
    "unequal lengths": (4, 2, 3, 16, 16, [7, 1, 12]),
    "odd widths": (6, 2, 5, 7, 13, [9, 9]),
    "seven heads to one": (7, 1, 16, 33, 70, [40, 17]),
    "an empty one": (2, 1, 4, 8, 8, [0, 5]),
    "a page of one": (2, 2, 1, 8, 8, [6, 3]),
    "a long page": (2, 1, 300, 8, 8, [290, 600]),
}


native = pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {'; '.join(build.why_not())}")


@pytest.mark.parametrize("kernel", ["auto", "eager", "decode", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_gathered(case: str, kernel: str) -> None:
    H, G, page, D, V, lengths = CASES[case]
    k, v, table, seqlens = pool(G, page, D, V, lengths)
    q = torch.randn(len(lengths), H, 1, D).double()
    close(paged_attention(q, k, v, table, seqlens, kernel=kernel), naive(q, k, v, table, seqlens))


@native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_where_they_lie(case: str, threads: int) -> None:
    H, G, page, D, V, lengths = CASES[case]
    k, v, table, seqlens = pool(G, page, D, V, lengths)
    q = torch.randn(len(lengths), H, 1, D)
    before, want = torch.get_num_threads(), naive(q.double(), k, v, table, seqlens)
    k, v = k.float(), v.float()
    torch.set_num_threads(threads)
    try:
        got = paged_attention(q, k, v, table, seqlens, kernel="paged")
    finally:
        torch.set_num_threads(before)
    near(got, want, paged_attention(q, k, v, table, seqlens, kernel="eager"))


def test_several_queries() -> None:
    k, v, table, seqlens = pool(2, 4, 8, 8, [9, 4])
    q = torch.randn(2, 4, 3, 8).double()
    close(paged_attention(q, k, v, table, seqlens), naive(q, k, v, table, seqlens))


@native
def test_parts_of_a_long_sequence() -> None:
    """Cut for the threads, and put together: among 5000 keys one has nearly all the weight, wherever it is."""
    k, v, table, seqlens = pool(1, 16, 8, 8, [5000])
    q = torch.randn(1, 2, 1, 8)
    for place in (0, 1024, 2500, 4999):
        loud = k.clone()
        loud[table[0, place // 16].long(), 0, place % 16] += 9 * q[0, 0, 0]
        want = naive(q.double(), loud, v, table, seqlens)
        given = q, loud.float(), v.float(), table, seqlens
        near(paged_attention(*given, kernel="paged"), want, paged_attention(*given, kernel="eager"))


@native
def test_equal_weights_add_up() -> None:
    """The mean of 300000 equal values is that value, but for what 64 additions of floats lose."""
    n, page = 300000, 1024
    pages = -(-n // page)
    k, v = torch.zeros(pages, 1, page, 8), torch.full((pages, 1, page, 8), 1.1)
    table, seqlens = torch.arange(pages, dtype=torch.int32)[None], torch.tensor([n], dtype=torch.int32)
    got = paged_attention(torch.ones(1, 1, 1, 8), k, v, table, seqlens, kernel="paged")
    assert (got.double() - v[0, 0, 0, 0].double()).abs().max() <= 64 * torch.finfo(torch.float32).eps


@native
@pytest.mark.parametrize(
    "mask", [masks.window(3), masks.strided(2), masks.per_head([masks.window(1), masks.window(4)])]
)
def test_any_mask(mask: masks.Mask) -> None:
    k, v, table, _ = pool(1, 4, 8, 8, [10])
    k, v, q = k.float(), v.float(), torch.randn(1, 2, 1, 8)
    pages = Pages(k, v, list(table), [0], [10], 10)
    a, b = pages.gathered()
    stand_ins = pages.stand_ins()
    p = Problem(q=q, k=stand_ins[0], v=stand_ins[1], scale=0.5, mask=mask & masks.causal(), pages=pages)
    want = regard.attention(q.double(), a.double(), b.double(), scale=0.5, mask=mask & masks.causal())
    near(execute(p, "paged"), want, execute(p, "eager"))


@native
def test_nan_is_seen_and_not_hidden() -> None:
    k, v, table, seqlens = pool(1, 4, 8, 8, [6, 6])
    k, v, q = k.float(), v.float(), torch.randn(2, 2, 1, 8)
    want = naive(q.double(), k.double(), v.double(), table, seqlens)
    plain = paged_attention(q, k, v, table, seqlens, kernel="eager")
    for pages in (k, v):
        bad = pages.clone()
        bad[table[1, 0].long(), 0, 1, 3] = math.nan
        given = (bad, v) if pages is k else (k, bad)
        out = paged_attention(q, *given, table, seqlens, kernel="paged")
        near(out[:1], want[:1], plain[:1])
        assert out[1].isnan().all(), "all of a row that sees it, as everywhere"
        p = Pages(*given, list(table), [0, 0], [6, 6], 6)
        mask = masks.padding((torch.arange(6) != 1).expand(2, 6))
        a, b = p.stand_ins()
        hidden = execute(Problem(q=q, k=a, v=b, scale=1.0, mask=mask, pages=p), "paged")
        assert hidden.isfinite().all()


@native
def test_plan_says_why_not() -> None:
    k, v, table, seqlens = pool(1, 4, 8, 8, [6])
    for q, why in ((torch.zeros(1, 1, 2, 8), "2 queries"), (torch.zeros(1, 1, 1, 8).requires_grad_(), "gradient")):
        with pytest.raises(ValueError, match=f"kernel 'paged' can't run this: .*{why}"):
            paged_attention(q, k.float(), v.float(), table, seqlens, kernel="paged")
    with pytest.raises(ValueError, match=r"queries are torch.float64 and pages torch.float64, not float32"):
        paged_attention(torch.zeros(1, 1, 1, 8).double(), k, v, table, seqlens, kernel="paged")
    z = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="don't lie in pages"):
        regard.attention(z, z, z, kernel="paged")


def test_bad_arguments() -> None:
    k, v, table, seqlens = pool(1, 4, 8, 8, [6, 3])
    q = torch.zeros(2, 1, 1, 8).double()
    with pytest.raises(ValueError, match=r"block_table is out of range \(got -1 to \d\); expected pages from 0 to 3"):
        paged_attention(q, k, v, table.clone().fill_(1).index_fill(1, torch.tensor([0]), -1), seqlens)
    with pytest.raises(ValueError, match=r"block_table is out of range \(got .* to 4\)"):
        paged_attention(q, k, v, table.clone().fill_(4), seqlens)
    for wrong in ([9, 3], [6, -1]):
        with pytest.raises(ValueError, match=r"cache_seqlens are out of range .*from 0 to 8, as 2 pages of 4 tokens"):
            paged_attention(q, k, v, table, torch.tensor(wrong))
    with pytest.raises(ValueError, match="k_pages are not contiguous"):
        paged_attention(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, table, seqlens)
    with pytest.raises(ValueError, match="block_table"):
        paged_attention(q, k, v, table[:1], seqlens)
    with pytest.raises((ValueError, TypeError), match="cache_seqlens"):
        paged_attention(q, k, v, table, seqlens.float())
