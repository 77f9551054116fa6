"""Attention of the newest tokens of sequences whose keys and values lie in pages, found by a block table.

    out_t = softmax(scale q_t k^T) v over the sequence up to t,    k_n = pages[block_table[n // page], n % page]

The paging of Kwon et al. 2023 (PagedAttention, https://arxiv.org/abs/2309.06180), whose text was not to be had; the
arguments are those of flash-attention's `flash_attn_with_kvcache`, but for regard's order of axes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.checks import checked, refuse
from regard.kernels import Problem, execute
from regard.kernels.pages import Pages
from regard.masks import causal, padding


@checked()
def paged_attention(
    q: Float[Tensor, "B H T D"],
    k_pages: Float[Tensor, "P G page D"],
    v_pages: Float[Tensor, "P G page V"],
    block_table: Int[Tensor, "B n"],
    cache_seqlens: Int[Tensor, " B"],
    *,
    scale: float | None = None,
    kernel: str = "auto",
) -> Float[Tensor, "B H T V"]:
    """Causal attention of the last T tokens of each sequence, which are in the pages already.

    Args:
        block_table: which pages a sequence has, in order; what stands behind those that its length takes is not read.
        cache_seqlens: tokens of each sequence.
        scale: default 1 / sqrt(D).
        kernel: as in `regard.attention`; "paged" reads pages where they lie, all others have them gathered.

    Raises:
        ValueError: shapes that don't fit, a length beyond its row of the table, pages that the pool doesn't have.
    """
    (B, _, _, D), (P, _, page, _), n = q.shape, k_pages.shape, block_table.shape[1]
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if not pages.is_contiguous():
            refuse("paged_attention", name, "are not contiguous", f"strides {pages.stride()}", "pages that are")
    lengths = cache_seqlens.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= n * page:
        expected = f"from 0 to {n * page}, as {n} pages of {page} tokens hold"
        refuse("paged_attention", "cache_seqlens", "are out of range", lengths, expected)
    table = block_table.to("cpu", torch.int32)
    used = table[torch.arange(n, device="cpu") * page < torch.tensor(lengths, device="cpu")[:, None]]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < P:
        got = f"{int(used.min())} to {int(used.max())}"
        refuse("paged_attention", "block_table", "is out of range", got, f"pages from 0 to {P - 1}")
    S = max(lengths, default=0)
    pages_ = Pages(k_pages, v_pages, list(table), [0] * B, lengths, S)
    k, v = pages_.stand_ins()
    mask = causal()
    if len(set(lengths)) > 1:
        mask = mask & padding(torch.arange(S, device=q.device) >= S - cache_seqlens.to(q.device)[:, None])
    scale = D**-0.5 if scale is None else float(scale)
    return execute(Problem(q=q, k=k, v=v, scale=scale, mask=mask, pages=pages_), kernel)
