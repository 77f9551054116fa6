"""Shifted chunks and dilated segments against loops, whose author has read neither code nor test."""

import pytest
import torch
from torch import Tensor

import regard
from masks import naive_shifted as naive
from regard import masks
from regard.cache import PagePool
from regard.kernels import KERNELS
from regard.laws.agreement import close

T = 24
CASES = [
    (kind, heads, chunk) for kind in ("fixed", "flow", "mixed", "dilated") for heads, chunk in ((1, 4), (3, 5), (6, 3))
]


def layer(kind: str, heads: int = 6, chunk: int = 3, **options) -> regard.Attention:
    made: dict = {"dim": 4 * heads, "num_heads": heads, "causal": True}
    if kind == "dilated":
        return regard.create("shifted_dilated", **made, segment=6, dilation=chunk, **options).double()
    mixed = {"segment": 6, "dilation": chunk} if kind == "mixed" else {}
    return regard.create("shifted_chunks", **made, kind=kind, chunk=chunk, **mixed, **options).double()


def seen(made: regard.Attention, T: int = T) -> Tensor:
    """(H, T, T)."""
    return made.receptive_field().dense(T)[0].expand(made.num_heads, T, T)


@pytest.mark.parametrize(("kind", "heads", "chunk"), CASES)
def test_is_the_definition(kind: str, heads: int, chunk: int) -> None:
    options = {"groups": -(-T // chunk)} if kind == "flow" else {}
    want = naive.allowed_chunks(T, heads, kind, chunk, 6, chunk)
    assert torch.equal(seen(layer(kind, heads, chunk, **options)), want)


@pytest.mark.parametrize("kind", ["fixed", "flow", "mixed", "dilated"])
def test_the_layer_is_softmax_over_what_a_head_sees(kind: str) -> None:
    """Queries without a key give 0 in their head, and keys keep their own rotation."""
    made, x = layer(kind, position=regard.positions.Rotary(4)), torch.randn(2, T, 24, dtype=torch.float64)
    x.requires_grad_()
    q, k, v = (f(x).unflatten(-1, (6, 4)).transpose(1, 2) for f in (made.q_proj, made.k_proj, made.v_proj))
    at = torch.arange(T)
    q, k = made.position.rotate(q, at), made.position.rotate(k, at)
    allowed = naive.allowed_chunks(T, 6, kind, 3, 6, 3)
    weights = (q @ k.mT / 2).masked_fill(~allowed, -1e300).softmax(-1) * allowed
    want = made.o_proj((weights @ v).transpose(1, 2).flatten(2))
    if kind == "flow":
        assert not allowed[5, :15].any()
        assert allowed[5, 15:].any(-1).all()
    got = made(x)
    close(got, want, "out")
    for mine, theirs in zip(
        *(torch.autograd.grad(y.square().sum(), [x, *made.parameters()]) for y in (got, want)), strict=True
    ):
        close(mine, theirs, "gradient")


def test_keys_wrap_around() -> None:
    shifts = [0, 1, 2, 4, 9, 20]
    want = naive.shifted_chunks(T, 4, shifts, causal=False, wrap=True)
    assert torch.equal(masks.shifted_chunks(4, shifts, wrap=T).dense(T)[0], want)
    kept = regard.create("shifted_chunks", dim=8, num_heads=2, chunk=4, wrap=T).receptive_field().dense(T)
    assert torch.equal(kept[0], want[[0, 2]])


def test_heads_between_them_see_the_whole_past() -> None:
    """In units of chunks: as many back as there are heads, each one of them."""
    for heads, back in ((6, 6), (3, 3)):
        field = seen(layer("flow", heads, 4))
        chunk = torch.arange(T) // 4
        near = chunk[:, None] - chunk < back
        assert torch.equal(field.any(0), near.tril())
        assert (field.sum(-1) <= 4).all()
        assert torch.equal(field.sum(0), near.tril().long()), "none is seen twice"
    spread = layer("flow", 3, 4, groups=6, spread=True)
    assert [int(seen(spread)[h, -1].nonzero()[0]) for h in range(3)] == [20, 12, 4]


def test_layers_carry_news_from_chunk_to_chunk() -> None:
    """Half a chunk in the first layer and one more in each that follows; chunks by themselves would stay among them."""
    one = seen(layer("fixed", 2, 4)).any(0).double()
    for layers in (1, 2, 3):
        first = int((torch.linalg.matrix_power(one, layers) > 0)[-1].nonzero()[0])
        assert first == T - 4 - 2 - 4 * (layers - 1)
    alone = (masks.causal() & masks.blocks(4)).dense(T)[0, 0].double()
    assert int((torch.linalg.matrix_power(alone, 3) > 0)[-1].nonzero()[0]) == T - 4


def test_residues_add_up_to_the_segment() -> None:
    field = seen(layer("dilated", 3, 3))
    assert torch.equal(field.sum(0), (masks.causal() & masks.blocks(6)).dense(T)[0, 0].long())
    assert (field.sum(-1) <= 2).all()


def test_blocks_are_few_and_the_kernels_agree() -> None:
    """At most two key blocks for a query block of any head."""
    mask = masks.causal() & masks.shifted_chunks(32, [0, 16, 32, 64])
    layout = mask.layout(256, block=32)
    assert int(layout.row_ptr.diff().max()) == 2
    q, k, v = torch.randn(3, 1, 4, 256, 16)
    plan = regard.plan(q, k, v, mask=mask)
    assert plan.kernel in ("native", "block_sparse")
    want = regard.attention(q.double(), k.double(), v.double(), mask=mask, kernel="eager")
    for name in KERNELS:
        if name == plan.kernel or (not plan.why_not[name] or plan.why_not[name][0].startswith("about")):
            torch.testing.assert_close(
                regard.attention(q, k, v, mask=mask, kernel=name).double(), want, atol=1e-5, rtol=0
            )


def test_a_stream_keeps_what_its_heads_reach() -> None:
    assert layer("fixed", 2, 4).init_state(1, T).window == 4 - 1 + 2
    assert layer("flow", 3, 4).init_state(1, T).window == 4 - 1 + 8


def test_joined_streams_of_other_lengths_are_refused() -> None:
    """Chunks would count from the first place of the batch."""
    made, x = layer("fixed", 2, 4), torch.randn(1, 5, 8, dtype=torch.float64)
    pool = PagePool(8, page_size=4)
    with torch.no_grad():
        states = [made.step(x[:, :n], made.init_state(1, T, pool=pool))[1] for n in (5, 2)]
    with torch.no_grad(), pytest.raises(ValueError, match="mask counts places in the batch"):
        made.step(x[:, :1].expand(2, -1, -1), states[0].join(states[1]))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"kind": "flows"}, "kind is unknown"),
        ({"chunk": 0}, "chunk is too small"),
        ({"kind": "flow", "groups": 0}, "groups is too small"),
        ({"chunk": 5, "wrap": 12}, "wrap is no multiple of chunk = 5"),
        ({"spread": 1}, "spread"),
        ({"kind": "mixed", "dilation": 0}, "dilation is too small"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        regard.create("shifted_chunks", dim=8, num_heads=2, **wrong)


@pytest.mark.parametrize("shifts", [[], [-1], [0.5], 3, "12"])
def test_refuses_shifts(shifts: object) -> None:
    with pytest.raises((ValueError, TypeError), match="shifted_chunks: shifts"):
        masks.shifted_chunks(4, shifts)
    with pytest.raises((ValueError, TypeError), match="shifted_dilated: offsets"):
        masks.shifted_dilated(4, 2, shifts)
