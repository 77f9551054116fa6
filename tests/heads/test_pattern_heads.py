"""Heads with stated patterns against loops (naive_pattern_heads.py), whose author has read neither code nor test, and
the authors' numbers (B007)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from heads import naive_pattern_heads as naive
from regard import masks
from regard.heads.pattern_heads import FixedHeads, pattern_mask
from regard.laws.agreement import close
from regard.masks import Mask
from regard.stages import Rows

VECTORS = Path(__file__).parents[1] / "vectors" / "B007.npz"
KINDS = ["mask", "mask", "fixed", "fixed", "free"]
IDS = {
    "summ": torch.tensor([[4, 1, 7, 2, 1, 7, 9, 9, 2], [1, 5, 6, 5, 2, 8, 0, 0, 0]]),
    "seg": torch.tensor([[1, 7, 8, 2, 6, 7, 9, 9, 5], [1, 5, 6, 5, 3, 2, 0, 0, 0]]),
}


def golden(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}


def content(ids: Tensor, case: str) -> dict[int, Mask]:
    """The patterns of ids: 1 begins a sentence, 2 ends it or parts two texts."""
    if case == "summ":
        return {0: masks.same_token(ids), 1: masks.segments(ids, begin=1, end=2)}
    first = masks.queries(torch.arange(ids.shape[1]) == 0)
    return {0: masks.same_token(ids, itself=True), 1: masks.segments(ids == 2) | first}


def layer(g: dict[str, Tensor], **options) -> regard.Attention:
    """Without an output projection."""
    made = regard.create("pattern_heads", dim=15, num_heads=5, bias=True, **options).double()
    with torch.no_grad():
        for name, proj in zip("qkv", (made.q_proj, made.k_proj, made.v_proj), strict=True):
            proj.weight.copy_(g[f"W{name}"]), proj.bias.copy_(g[f"b{name}"])
        made.o_proj.weight.copy_(torch.eye(15)), made.o_proj.bias.zero_()
    return made


def test_masks_are_the_definition() -> None:
    for case, task, turn in (("summ", "summarization", 1), ("seg", "segmentation", -1)):
        want = torch.stack([naive.patterns(ids, 5, task)[0] for ids in IDS[case]])
        assert torch.equal(pattern_mask({**content(IDS[case], case), 2: turn, 3: -turn}, 5).dense(9), want)


@pytest.mark.parametrize("case", ["summ", "seg"])
def test_masks_are_the_authors(case: str) -> None:
    g = golden(case)
    got = pattern_mask({**content(g["ids"], case), 2: 1, 3: -1}, 5)
    assert torch.equal(got.dense(9), g["mask"].bool())


@pytest.mark.parametrize("case", ["summ", "seg"])
def test_is_the_loops_where_empty_rows_are_zero(case: str) -> None:
    g = golden(case)
    made = layer(g)
    x = g["x"].clone().requires_grad_()
    call = pattern_mask(content(g["ids"], case), 5) & masks.padding(~g["key_is_padding"].bool())
    out = made(x, mask=call)
    given = [made.q_proj, made.k_proj, made.v_proj]
    flat = [t for proj in given for t in (proj.weight, proj.bias)]
    want, _ = naive.attention(x, *flat, g["mask"].bool(), KINDS, g["key_is_padding"].bool(), empty="zero")
    close(out, want, "out")
    for mine, theirs in zip(*(torch.autograd.grad((y * g["w"]).sum(), [x, *flat]) for y in (out, want)), strict=True):
        close(mine, theirs, "gradient")
    real = (g["mask"].bool() & ~g["key_is_padding"].bool()[:, None, None]).any(-1).mT[..., None].expand(2, 9, 5, 3)
    real = real.reshape(2, 9, 15)
    assert (~real).any()
    close(out[real], g["out"][real], "the authors' numbers, but for empty rows")


@pytest.mark.parametrize("case", ["summ", "seg"])
def test_is_the_authors_numbers_where_empty_rows_see_all(case: str) -> None:
    """Their -10000 on all keys of a row is as none, padding included."""

    class Theirs(FixedHeads):
        """Fixed scores are the pattern over sqrt(D), which tells where a row's one allowed key is padding."""

        def forward(self, z: Tensor, rows: Rows) -> Tensor:
            pattern = g["mask"][..., rows.i, :][..., rows.j].to(z) / 3**0.5
            pattern[:, [0, 1, 4]] = 0
            return super().forward(z, rows) + pattern

    g = golden(case)
    made = layer(g, patterns={}, fixed=[2, 3])
    made.score_mix = Theirs(5, [2, 3])
    call = g["mask"].bool() & ~g["key_is_padding"].bool()[:, None, None]
    x = g["x"].clone().requires_grad_()
    out = made(x, mask=call | ~call.any(-1, keepdim=True))
    close(out, g["out"], "out")
    grad_x, grad_k = torch.autograd.grad((out * g["w"]).sum(), [x, made.k_proj.weight])
    close(grad_x, g["grad_x"], "grad_x")
    close(grad_k, g["grad_Wk"], "grad_Wk")
    assert not grad_k[6:12].any(), "fixed heads give their keys none"


def test_the_next_value_is_copied() -> None:
    made = regard.create("pattern_heads", dim=20, num_heads=5).double()
    x = torch.randn(2, 7, 20, dtype=torch.float64)
    made.o_proj = nn.Identity()
    v = made.v_proj(x)
    assert torch.equal(made(x)[:, :-1, 8:12], v[:, 1:, 8:12])
    assert torch.equal(made(x)[:, 1:, 12:16], v[:, :-1, 12:16])
    assert not made(x)[:, -1, 8:12].any()


def test_a_matching_head_finds_what_occurs_again() -> None:
    """Each token holds a sign at random, and is asked for that of its twin."""
    left = {}
    torch.manual_seed(0)
    ids = torch.stack([torch.arange(8).repeat_interleave(2)[torch.randperm(16)] for _ in range(16)])
    twin = ((ids[:, :, None] == ids[:, None]) & ~torch.eye(16, dtype=torch.bool)).float()
    for pattern in (False, True):
        torch.manual_seed(1)
        patterns = {0: masks.same_token(ids)} if pattern else {}
        made = regard.create("pattern_heads", dim=12, num_heads=2, patterns=patterns)
        optimiser = torch.optim.Adam(made.parameters(), 0.03)
        for _ in range(40):
            signs = torch.randint(2, (16, 16, 1)) * 2.0 - 1
            tokens = torch.randn(16, 8, 11).gather(1, ids[..., None].expand(-1, -1, 11))
            loss = nn.functional.mse_loss(made(torch.cat([tokens, signs], -1))[..., -1:], twin @ signs)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        left[pattern] = float(loss.detach())
    assert left[True] < 0.05
    assert left[False] > 0.2


def test_even_weights_are_exactly_even() -> None:
    made = regard.create("pattern_heads", dim=12, num_heads=3, patterns={0: masks.window(2)}, fixed=[0]).double()
    made.o_proj = nn.Identity()
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    v = made.v_proj(x)[..., :4]
    want = torch.stack([v[:, max(0, t - 1) : t + 2].mean(1) for t in range(6)], 1)
    close(made(x)[..., :4], want)
    plain = regard.create("pattern_heads", dim=12, num_heads=3, patterns={0: masks.window(2)}).double()
    assert plain.score_mix is None, "a mask's scores are learned"


def test_segments_of_ids() -> None:
    """What no mark closes or opens is in no sentence; a second mark within one opens none."""
    ids = torch.tensor([5, 1, 6, 1, 7, 2, 8, 2, 1, 9])
    want = torch.zeros(10, 10, dtype=torch.bool)
    want[1:6, 1:6] = True
    assert torch.equal(masks.segments(ids, begin=1, end=2).dense(10)[0, 0], want)
    assert torch.equal(want, naive.sentences(ids))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num_heads": 3}, "pattern_heads: num_heads is too small"),
        ({"patterns": {6: 1}}, "pattern_mask: head is too large"),
        ({"patterns": {0: "next"}}, r"pattern_mask: patterns\[0\] is none"),
        ({"patterns": 1}, "pattern_mask: patterns has the wrong type"),
        ({"patterns": [None] * 6 + [1]}, "pattern_mask: head is too large"),
        ({"fixed": [6]}, "FixedHeads: heads is too large"),
        ({"fixed": 2}, "FixedHeads: heads are none"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        regard.create("pattern_heads", **{"dim": 12, "num_heads": 6, **wrong})


def test_masks_refuse() -> None:
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="segments: begin, end are one token"):
        masks.segments(ids, begin=1, end=1)
    with pytest.raises(TypeError, match="segments: begin has the wrong type"):
        masks.segments(ids, end=1)
    with pytest.raises(ValueError, match="segments: begin, end are not used"):
        masks.segments(ids > 2, end=1)
    with pytest.raises(TypeError, match="same_token: ids has the wrong dtype"):
        masks.same_token(ids.double())
    with pytest.raises(TypeError, match="queries: which has the wrong dtype"):
        masks.queries(ids)
    with pytest.raises(TypeError, match="offset: n has the wrong type"):
        masks.offset(1.0)
    with pytest.raises(ValueError, match="FixedHeads: num_heads is too small"):
        FixedHeads(0, [])
