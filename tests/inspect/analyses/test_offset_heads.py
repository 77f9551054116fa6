"""Offset heads: found where they were made, told from local and content-based ones, and read from a rotary model."""

import pytest
import torch
from tests.inspect.analyses.test_rollout import maps
from tests.inspect.minilm import minilm, needs_minilm
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from regard.inspect.analyses.attention_distance import aligned_maps
from regard.inspect.analyses.offset_heads import offset_heads
from regard.laws.agreement import close


def shifted(grid: tuple[int, int], step: tuple[int, int], extra: int = 0) -> Tensor:
    """(T, T) logits that ask for the patch `step` away; border patches that have none ask for nothing."""
    Y, X = grid
    out = torch.zeros(Y * X + extra, Y * X + extra).double()
    for y in range(Y):
        for x in range(X):
            there = y + step[0], x + step[1]
            if 0 <= there[0] < Y and 0 <= there[1] < X:
                out[extra + y * X + x, extra + there[0] * X + there[1]] = 5.0
    return out


def test_by_hand() -> None:
    """Three tokens, each looks at the one before with 0.8; the first can't."""
    one = torch.tensor([[[[1.0, 0.0, 0.0], [0.8, 0.2, 0.0], [0.1, 0.8, 0.1]]]], dtype=torch.float64)
    got = offset_heads([one])
    assert got.found.tolist() == [[True]]
    assert got.offset.tolist() == [[[0, -1]]]
    assert got.share.item() == pytest.approx(0.8)
    assert got.mean[0, 0].tolist() == pytest.approx([0.0, -(0.8 + 0.8 + 0.2) / 3])


def test_finds_the_direction_of_each_head() -> None:
    """The claim, in small: eight directions, a head that looks at itself, a local one, an even one."""
    grid = (5, 6)
    steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
    local = sum(shifted(grid, step, 1) for step in steps)
    rest = [shifted(grid, (0, 0), 1), local, torch.zeros_like(local)]
    logits = torch.stack([shifted(grid, step, 1) for step in steps] + rest)
    attention = (logits + 0.3 * torch.randn(3, 11, 31, 31)).softmax(-1)
    got = offset_heads([attention], grid=grid, extra_tokens=1)
    assert got.found[0].tolist() == [True] * 8 + [False] * 3
    assert [tuple(o) for o in got.offset[0, :9].tolist()] == [*steps, (0, 0)]
    assert got.share[0, :9].min() > 0.7
    assert got.share[0, 9:].max() < 0.4
    assert got.mean[0, 8:].abs().max() < 0.2
    assert (got.mean[0, :8] * torch.tensor(steps)).sum(-1).min() > 0.25


def test_share_leaves_out_queries_without_such_a_token() -> None:
    """A head that always looks 3 on, in a sequence of 5: only two queries can."""
    one = torch.eye(5).double()
    one[[0, 1]] = torch.eye(5).double()[[3, 4]]
    got = offset_heads([one[None, None]], reach=3)
    assert got.offset.tolist() == [[[0, 3]]]
    assert got.share.item() == 1
    assert not offset_heads([one[None, None]], reach=2).found.any()


def test_mean_is_that_of_the_aligned_maps() -> None:
    given = maps(2, 2, 3, 7, 7)
    got, table = offset_heads(given, grid=(2, 3), extra_tokens=1), aligned_maps(given, grid=(2, 3), extra_tokens=1)
    down, right = torch.arange(-1, 2.0).double(), torch.arange(-2, 3.0).double()
    want = torch.stack([torch.stack([(t * down[:, None]).sum((1, 2)), (t * right).sum((1, 2))], -1) for t in table])
    close(got.mean, want)


def test_a_rotary_model() -> None:
    """One frequency turns between neighbours: the key one step back meets a query turned back, whatever the token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        # The pair (0, 2) of a head turns by 1 radian a token. Head 0 has its query turned back by as much.
        turn = torch.tensor(1.0)
        attention.q_proj.bias[0], attention.q_proj.bias[2] = 6 * turn.cos(), -6 * turn.sin()
        attention.k_proj.bias[0] = 6.0
        found = model(torch.randint(16, (2, 6)), output_attentions=True).attentions
    got = offset_heads(found)
    assert got.found.tolist() == [[True, False]]
    assert got.offset[0, 0].tolist() == [0, -1]


@needs_minilm
def test_the_real_minilm() -> None:
    """Its first layer has a head for the token before, its second one for the token after."""
    model, tokenizer = minilm("eager")
    inputs = tokenizer("The quick brown fox jumps over the lazy dog because it was late.", return_tensors="pt")
    with torch.no_grad():
        got = offset_heads(model(**inputs, output_attentions=True).attentions)
    assert {(layer, h): got.offset[layer, h].tolist() for layer, h in got.found.nonzero().tolist()} == {
        (0, 2): [0, -1],
        (1, 8): [0, 1],
    }
    assert got.share[0, 2] > 0.95


def test_what_is_wrong_is_named() -> None:
    given = maps(2, 1, 2, 6, 6)
    with pytest.raises(ValueError, match=r"offset_heads: reach is too small \(got 0\); expected an int >= 1"):
        offset_heads(given, reach=0)
    with pytest.raises(
        ValueError, match=r"offset_heads: attention does not fit extra_tokens = 1 and grid = \(2, 3\) \(got 6 tokens"
    ):
        offset_heads(given, grid=(2, 3), extra_tokens=1)
    with pytest.raises(
        ValueError, match=r"offset_heads: attention\[1\] .*\(got \(1, 1, 6, 6\)\); expected \(B = 1, H = 2,"
    ):
        offset_heads([given[0], given[1][:, :1]])
