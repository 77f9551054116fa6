"""Shifted groups with sinks against loops, whose author has read neither code nor test."""

import pytest
import torch
from torch import nn

import regard
from masks import naive_shifted as naive
from regard import masks
from regard.laws.agreement import close

T = 12
CASES = [
    (heads, group, shifted, sinks)
    for heads, group in ((1, 4), (4, 3), (5, 6))
    for shifted, sinks in ((None, 0), (1, 2))
]


@pytest.mark.parametrize(("heads", "group", "shifted", "sinks"), CASES)
@pytest.mark.parametrize("wrap", [None, T])
def test_is_the_definition(heads: int, group: int, shifted: int | None, sinks: int, wrap: int | None) -> None:
    causal = wrap is None
    layer = regard.create(
        "shifted_groups",
        **{"dim": 4 * heads, "num_heads": heads, "causal": causal},
        **{"group": group, "shifted": shifted, "sinks": sinks, "wrap": wrap},
    ).double()
    want = naive.allowed_groups(T, group, heads, shifted, sinks, "roll" if wrap else "cut")
    assert torch.equal(layer.receptive_field().dense(T)[0].expand(heads, T, T), want)
    x = torch.randn(2, T, 4 * heads, dtype=torch.float64)
    q, k, v = (f(x).unflatten(-1, (heads, 4)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = (q @ k.mT / 2).masked_fill(~want, -1e300).softmax(-1)
    close(layer(x), layer.o_proj((weights @ v).transpose(1, 2).flatten(2)), "out")


def test_what_is_rolled_sees_the_future_and_what_is_cut_does_not() -> None:
    cut = regard.create("shifted_groups", dim=8, num_heads=2, causal=True, group=4, sinks=0).double()
    rolled = regard.create("shifted_groups", dim=8, num_heads=2, group=4, sinks=0, wrap=T).double()
    rolled.load_state_dict(cut.state_dict())
    x = torch.randn(1, T, 8, dtype=torch.float64)
    other = x.clone()
    other[:, -1] += 1
    assert torch.equal(cut(other)[:, :2], cut(x)[:, :2])
    assert (rolled(other)[:, :2] - rolled(x)[:, :2]).abs().max() > 1e-3
    close(rolled(other)[:, 2:-2], rolled(x)[:, 2:-2], "all others look back")
    close(rolled(x)[:, 2:], cut(x)[:, 2:], "and see what they see where it is cut")


def test_odd_groups_are_shifted_by_one_number() -> None:
    """Half of 5, rounded down, to and fro."""
    field = masks.shifted_groups(5, 2).dense(T)[0, 1]
    assert [int(row.nonzero()[0]) for row in field] == [0, 0, 2, 2, 2, 2, 2, 7, 7, 7, 7, 7]


def test_sinks_reach_everybody_in_one_layer() -> None:
    """Without them news go half a group and then a group in each layer."""
    for sinks in (0, 1):
        layer = regard.create("shifted_groups", dim=8, num_heads=2, causal=True, group=4, sinks=sinks)
        one = layer.receptive_field().dense(24)[0].any(0).double()
        two = torch.linalg.matrix_power(one, 2) > 0
        assert bool(one[-1, 0]) == bool(sinks)
        if not sinks:
            assert int(two[-1].nonzero()[0]) == 24 - 6
            assert int(two[-3].nonzero()[0]) == 24 - 8


def test_a_key_at_the_start_is_found_with_sinks() -> None:
    """One layer is to tell the last token what the first one holds."""
    left = {}
    for sinks in (0, 1):
        torch.manual_seed(0)
        layer = regard.create("shifted_groups", dim=8, num_heads=2, causal=True, group=4, sinks=sinks)
        optimiser = torch.optim.Adam(layer.parameters(), 0.02)
        for _ in range(150):
            key = torch.randint(2, (64,)) * 2.0 - 1
            x = 0.1 * torch.randn(64, 16, 8)
            x[:, 0, 0], x[:, 0, 1], x[:, -1, 2] = key, 3.0, 3.0
            loss = nn.functional.mse_loss(layer(x)[:, -1, 0], key)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        left[sinks] = float(loss)
    assert left[1] < 0.1
    assert left[0] > 0.8


def test_blocks_are_few() -> None:
    mask = masks.causal() & masks.shifted_groups(64, 4, sinks=4)
    layout = mask.layout(512, block=32)
    assert int(layout.row_ptr.diff().max()) == 3
    q, k, v = torch.randn(3, 1, 4, 512, 16)
    assert regard.plan(q, k, v, mask=mask).kernel in ("native", "block_sparse")
    want = regard.attention(q.double(), k.double(), v.double(), mask=mask, kernel="eager")
    for name in ("auto", "block_sparse"):
        torch.testing.assert_close(regard.attention(q, k, v, mask=mask, kernel=name).double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"group": 0}, "group is too small"),
        ({"shifted": 3}, "shifted is too large"),
        ({"sinks": -1}, "sinks is too small"),
        ({"group": 5, "wrap": 12}, "wrap is no multiple of group = 5"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        regard.create("shifted_groups", dim=8, num_heads=2, **wrong)
