"""Every kernel that says it is able, by name, under every form of mask and odd lengths, against the naive formula."""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.kernels.native import build as native

LENGTHS = torch.tensor([9, 4])
PLACES = torch.tensor([[5, 0], [3, -1]])
PARENTS = torch.tensor([[-1, 0, 0, 1, 3], [-1, 0, 1, 1, -1]])
FORMS = {
    "numbers by head": masks.per_head([masks.window(2), masks.window(3)]),
    "numbers by head, joined": masks.per_head([masks.window(2), masks.causal()]) & ~masks.strided(3),
    "numbers and tensors by head": masks.per_head([masks.prefix(LENGTHS), masks.blocks(3)]),
    "rows of the batch": masks.padding(lengths=LENGTHS),
    "rows and heads": masks.padding(lengths=LENGTHS) & masks.per_head([masks.causal(), masks.global_tokens(2)]),
    "numbers alone": (masks.causal() & masks.window(4)) | masks.prefix(1),
    "nothing": masks.nothing(),
    "a rule by head": masks.predicate(lambda b, h, i, j: (i + j + h) % 3 != 0, heads=2),
    "a tensor by head": masks.dense(torch.rand(1, 2, 21, 21, generator=torch.Generator().manual_seed(0)) < 0.5),
    "global places": masks.global_tokens(PLACES) | masks.window(2),
    "a tree": masks.tree(PARENTS, prefix=torch.tensor([16, 12])),
    "a tree, causal": masks.tree(PARENTS[0], prefix=4) & masks.causal(),
    "shared prefix": masks.shared_prefix(4, [5, 1, 7]) & masks.causal(),
    "shared prefixes": masks.shared_prefix(torch.tensor([2, 3]), torch.tensor([[5, 4], [9, 9]])),
    "block causal": masks.block_causal(4),
    "block diffusion": masks.block_diffusion(3, 10),
    "block diffusion by head": masks.per_head([masks.block_diffusion(3, 10), masks.block_causal(5)]),
}
SLOW = ("triton", "triton_decode", "flex")
"""An interpreter, and what torch traces anew at every call: they have tests of their own."""


def naive(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    z = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    weights = (z - z.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v


BOUND = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Of single precision some hundred roundings of numbers near 1; a wrong key is off by thousands of times as much."""


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("lengths", [(1, 21), (5, 5), (7, 21), (21, 21)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_able_kernel(form: str, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    (T, S), mask = lengths, FORMS[form]
    generator = torch.Generator().manual_seed(T)
    exact = [torch.randn(2, 2, n, 4, dtype=torch.float64, generator=generator) for n in (T, S, S, T)]
    q, k, v, d = (x.requires_grad_() for x in exact)
    want = naive(q, k, v, mask.dense(T, S))
    wanted = [want, *torch.autograd.grad(want, (q, k, v), d)]
    given = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    ran = set()
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            for kernel in regard.plan(*given, mask=mask).costs:
                if kernel in SLOW:
                    continue
                found = [regard.attention(*given, mask=mask, kernel=kernel)]
                if grads:
                    found += torch.autograd.grad(found[0], given, d.detach().to(dtype))
                for what, got, exactly in zip(("the output", "dq", "dk", "dv"), found, wanted, strict=False):
                    off = (got.double() - exactly).abs().max()
                    assert off <= BOUND[dtype] * (1 + exactly.abs().max()), f"{kernel}: {what} is off by {off:.1e}"
                ran.add(kernel)
    assert {"eager", "chunked", "sdpa"} <= ran
    if dtype == torch.float32 and T == S == 21 and not native.why_not():
        assert ran & {"native", "block_sparse"}


STREAMED = {
    "global places": masks.global_tokens([0, 5]),
    "a tree": masks.tree(PARENTS[:1, :3], prefix=9),
    "shared prefix": masks.shared_prefix(3, [5, 4]),
    "block causal": masks.block_causal(4),
    "block diffusion": masks.block_diffusion(2, 6),
}


@pytest.mark.parametrize("form", STREAMED)
def test_token_by_token_where_nothing_is_seen_ahead(form: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    layer = regard.Attention(16, 4, causal=True, mask=STREAMED[form]).double().eval()
    state, outs = layer.init_state(1, 12), []
    for t in range(12):
        out, state = layer.step(x[:, t : t + 1], state)
        outs.append(out)
    assert (torch.cat(outs, 1) - layer(x)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="this layer sees later tokens"):
        regard.Attention(16, 4, mask=STREAMED[form]).init_state(1, 12)
