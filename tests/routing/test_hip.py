"""HiP's tree search and outputs against loops, and what it finds against the exact best keys.

The loops' author has read neither the code nor these tests.
"""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing import kept
from regard.routing.hip import HiP, hip, hip_blocks
from regard.routing.tree import tree_topk
from routing import naive_hip as naive


def heads(seed: int, T: int, S: int, *, B: int = 2, H: int = 4, G: int = 2, D: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, H, T, D), (B, G, S, D), (B, G, S, D + 2))
    return [torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in sizes]


CASES = [
    (23, 23, {"mask_k": 4, "block_q": 4, "block_k": 2, "window": 3, "sinks": 2}),
    (17, 17, {"mask_k": 6, "block_q": 4, "block_k": 1, "window": 2, "sinks": 0, "representative": "first"}),
    (21, 21, {"mask_k": 3, "block_q": 5, "block_k": 1, "window": 1, "sinks": 1, "representative": "last"}),
    (7, 26, {"mask_k": 4, "block_q": 3, "block_k": 2, "window": 4, "sinks": 3, "query_stride": 3}),
    (1, 19, {"mask_k": 2, "block_q": 64, "block_k": 1, "window": 2, "sinks": 1}),
    (14, 14, {"mask_k": 2, "block_q": 1, "block_k": 2, "window": 2, "sinks": 0, "query_stride": 1}),
    (9, 9, {"mask_k": 8, "block_q": 4, "block_k": 2, "window": 2, "sinks": 0}),
]


@pytest.mark.parametrize(("T", "S", "options"), CASES)
def test_is_the_definition(T: int, S: int, options: dict) -> None:
    q, k, v = heads(T + S, T, S)
    search = {name: value for name, value in options.items() if name != "sinks"}
    kind = search.pop("representative", "center")
    want, _ = naive.hip(q, k, kind=kind, **search)
    assert torch.equal(hip_blocks(q.detach(), k.detach(), representative=kind, **search), want)
    out = regard.attention(q, k, v, mask=masks.causal(), selector=HiP(**options))
    sees = {name: options[name] for name in ("block_q", "block_k", "window", "sinks")}
    loops = naive.attend(q, k, v, want, **sees)
    close(out, loops, "out")
    g = torch.randn(out.shape, dtype=torch.float64)
    for mine, theirs, name in zip(*(torch.autograd.grad((o * g).sum(), (q, k, v)) for o in (out, loops)), "qkv"):
        close(mine, theirs, f"gradient of {name}")


@pytest.mark.parametrize("kind", ["first", "center", "last"])
def test_the_tree_alone(kind: str) -> None:
    """Several searches at once, of unequal lengths, each as the loops run it by itself."""
    scores = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    blocks = torch.tensor([40, 33, 17, 8, 3, 1])
    found = tree_topk(lambda at: scores.gather(1, at), blocks, 8, representative=kind)
    for row, n, mine in zip(scores, blocks.tolist(), found.tolist(), strict=True):
        want, asked = naive.tree_topk(lambda j, row=row: float(row[j]), n, 8, kind)
        assert mine == want
        assert asked <= 2 * 8 * max(0, math.ceil(math.log2(n / 8)))
        assert n > 8 or set(mine) == set(range(n))


def test_every_key_where_there_are_few() -> None:
    q, k, v = (z.detach() for z in heads(1, 20, 20))
    dense = regard.attention(q, k, v, mask=masks.causal())
    for mask_k, window in ((18, 2), (2, 18)):
        selector = HiP(mask_k=mask_k, block_q=4, block_k=2, window=window, sinks=0)
        close(regard.attention(q, k, v, mask=masks.causal(), selector=selector), dense)


def walk(T: int, D: int, stays: float, g: torch.Generator) -> Tensor:
    """Numbers of variance 1 whose neighbours are alike: `stays` is their correlation."""
    z = torch.randn(T, D, generator=g)
    for t in range(1, T):
        z[t] = stays * z[t - 1] + math.sqrt(1 - stays * stays) * z[t]
    return z[None, None]


@pytest.mark.parametrize("seed", range(3))
def test_finds_what_lies_together(seed: int) -> None:
    """64 of 480 keys before the window: the share of the 64 best that is found, and of the attention that is kept."""
    g = torch.Generator().manual_seed(seed)
    found, mass = [], []
    for stays in (0.99, 0.0):
        q, k = 10 * walk(512, 8, stays, g), walk(512, 8, stays, g)
        selected = HiP(mask_k=64, block_q=8, block_k=2, window=32, sinks=0)(q, k, masks.causal())
        allowed = selected.dense(512)[:, :, -8:, :480]
        scores = (q[:, :, -8:] @ k.mT)[..., 1::2, :480].amax(2)
        best = scores.topk(64).indices[0, 0]
        found.append(float(allowed[0, 0, -1, best].float().mean()))
        report = kept(q, k, selected, mask=masks.causal())
        assert report.pairs < 0.4
        mass.append(float(report.mass.mean()))
    assert found[0] > 0.85
    assert found[1] < 0.6
    assert mass[0] > 0.95
    assert mass[1] < 0.75


def test_a_lone_key_is_lost() -> None:
    """The strongest key of all, where it stands for no branch."""
    q, k = torch.ones(1, 1, 64, 2), torch.zeros(1, 1, 64, 2)
    k[:, :, 21] = 10
    options = {"mask_k": 4, "block_q": 1, "block_k": 1, "window": 2, "sinks": 0}
    seen = hip(q, k, mask=masks.causal(), **options).dense(64)[0, 0, -1]
    assert not seen[21]
    k[:, :, 16:32] = 10
    seen = hip(q, k, mask=masks.causal(), **options).dense(64)[0, 0, -1]
    assert int(seen[16:32].sum()) == 4


def test_padding_is_not_searched() -> None:
    q, k, v = (z.detach() for z in heads(4, 22, 22))
    keep = torch.arange(22) < torch.tensor([[22], [13]])
    mask = masks.causal() & masks.padding(keep)
    selector = HiP(mask_k=2, block_q=4, block_k=2, window=2, sinks=1)
    got = regard.attention(q, k, v, mask=mask, selector=selector)
    alone = regard.attention(*(z[1:, :, :13] for z in (q, k, v)), mask=masks.causal(), selector=selector)
    close(got[1:, :, :13], alone)
    assert (got - regard.attention(q, k, v, mask=mask)).abs().max() > 0.1


def test_a_query_that_searches_for_itself_streams() -> None:
    options = {"mask_k": 4, "block_k": 2, "window": 2, "sinks": 1}
    layer = regard.create("hip_each", dim=8, num_heads=2, causal=True, dtype=torch.float64, **options)
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    state, outs = layer.init_state(1, 20), []
    for t in range(20):
        out, state = layer.step(x[:, t : t + 1], state)
        outs.append(out)
    close(torch.cat(outs, 1), layer(x))
    plain = regard.create("softmax", dim=8, num_heads=2, causal=True, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    assert (plain(x) - layer(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="stream"):
        regard.create("hip", dim=8, num_heads=2, causal=True).init_state(1, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_k": 9, "block_k": 2}, r"mask_k is no multiple of block_k = 2 \(got 9\)"),
        ({"window": 0}, r"window is too small \(got 0\)"),
        ({"sinks": -1}, r"sinks is too small \(got -1\)"),
        ({"representative": "middle"}, r"representative .*'middle'"),
    ],
)
def test_refuses_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"HiP: {words}"):
        HiP(**options)


def test_refuses_masks() -> None:
    q, k, v = (z.detach() for z in heads(6, 8, 8))
    with pytest.raises(ValueError, match="causality and padding alone"):
        regard.attention(q, k, v, mask=masks.causal() & masks.window(3), selector=HiP())
