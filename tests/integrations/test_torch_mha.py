"""torch.nn.MultiheadAttention's call, constructor and state dict, with other mechanisms."""

import copy

import pytest
import torch
from torch import nn

from regard import masks
from regard.integrations.torch_mha import MultiheadAttention
from regard.laws.agreement import close

B, T, S, M, H = 2, 5, 7, 12, 3


def pair(**options):
    theirs = nn.MultiheadAttention(M, H, **options).double().eval()
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours = MultiheadAttention(M, H, **options).double().eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 8, "vdim": 6}, {"bias": False}])
def test_equals_torch_s(batch_first, widths):
    ours, theirs = pair(batch_first=batch_first, **widths)
    size = (lambda n: (B, n)) if batch_first else (lambda n: (n, B))
    inputs = tokens(*size(T), M), tokens(*size(S), widths.get("kdim", M)), tokens(*size(S), widths.get("vdim", M))
    hidden = torch.tensor([[False] * S, [False] * 5 + [True] * 2])
    pairs = torch.rand(T, S) < 0.3
    pairs[:, 0] = False
    each = torch.rand(B * H, T, S) < 0.3
    each[..., 0] = False
    added = torch.randn(T, S, dtype=torch.float64).masked_fill(pairs, -torch.inf)
    for options in (
        {},
        {"key_padding_mask": hidden},
        {"attn_mask": pairs},
        {"attn_mask": each, "average_attn_weights": False},
        {"attn_mask": added},
        {
            "attn_mask": added,
            "key_padding_mask": torch.zeros(B, S, dtype=torch.float64).masked_fill(hidden, -torch.inf),
        },
    ):
        (out, weights), (expected, seen) = ours(*inputs, **options), theirs(*inputs, **options)
        close(out, expected)
        close(weights, seen)
        assert ours(*inputs, **options, need_weights=False)[1] is None


def test_without_a_batch():
    ours, theirs = pair()
    q, k = tokens(T, M), tokens(S, M)
    hidden = torch.arange(S) > 4
    for got, expected in zip(ours(q, k, k, key_padding_mask=hidden), theirs(q, k, k, key_padding_mask=hidden)):
        close(got, expected)


def test_same_names_in_the_state_dict_and_gradients():
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = tokens(T, B, M)
    for module in (ours, theirs):
        module(x, x, x)[0].square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        close(mine.grad, other.grad, name)


def test_a_query_that_sees_nothing_gives_the_output_bias():
    ours, _ = pair(batch_first=True)
    x, hidden = tokens(B, T, M), torch.tensor([[False] * T, [True] * T])
    out, weights = ours(x, x, x, key_padding_mask=hidden)
    close(out[1], ours.out_proj.bias.expand(T, M))
    assert not weights[1].any()


def test_the_hint_needs_the_mask_and_equals_it():
    ours, theirs = pair(batch_first=True)
    x, mask = tokens(B, T, M), torch.ones(T, T, dtype=torch.bool).triu(1)
    close(ours(x, x, x, attn_mask=mask, is_causal=True)[0], theirs(x, x, x, attn_mask=mask)[0])
    with pytest.raises(ValueError, match="hint about attn_mask"):
        ours(x, x, x, is_causal=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_torch_s_encoder_layer(training, norm_first):
    """Without gradients torch would take a fast path past the layer, and a mechanism would change nothing."""
    layer = nn.TransformerEncoderLayer(M, H + 1, 16, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    x, hidden = tokens(B, T, M), torch.tensor([[False] * T, [False] * 3 + [True] * 2])
    ours = copy.deepcopy(layer).train(training)
    ours.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    stack = nn.TransformerEncoder(ours, 2, enable_nested_tensor=False).train(training)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    with torch.no_grad():
        expected = plain(x, src_key_padding_mask=hidden)
        close(stack(x, src_key_padding_mask=hidden)[~hidden], expected[~hidden])
        for part in stack.layers:
            part.self_attn = MultiheadAttention.from_torch(layer.self_attn, masks.window(1))
        assert (stack(x) - plain(x)).abs().max() > 1e-2
        only_itself = plain(x, mask=~torch.eye(T, dtype=torch.bool))
        close(stack(x), only_itself)


def test_mechanisms():
    x = tokens(B, T, M)
    options = {"batch_first": True, "dtype": torch.float64}
    entmax = MultiheadAttention(M, H, mechanism="entmax", **options)
    weights = entmax(4 * x, 4 * x, x, average_attn_weights=False)[1]
    assert bool((weights == 0).any())
    close(weights.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
    gated = MultiheadAttention(M, H, mechanism="gated", **options)
    assert {n for n, _ in gated.named_parameters() if n.startswith("parts")} == {
        "parts.gate.proj.weight",
        "parts.gate.proj.bias",
    }
    plain = MultiheadAttention(M, H, **options)
    plain.load_state_dict(gated.state_dict(), strict=False)
    opened = torch.tensor(4.0, dtype=torch.float64).sigmoid()
    close(gated(x, x, x)[0] - gated.out_proj.bias, (plain(x, x, x)[0] - plain.out_proj.bias) * opened)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MultiheadAttention(M, 5), "is no multiple of num_heads = 5"),
        (lambda: MultiheadAttention(M, H, mechanism="performer"), "no softmax pipeline"),
        (lambda: MultiheadAttention(M, H, mechanism="learned"), "before they are projected"),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_calls_that_do_not_fit_are_refused():
    moba = MultiheadAttention(M, H, batch_first=True, mechanism="moba", block=2, topk=1)
    x, y = torch.randn(B, T, M), torch.randn(B, T, M)
    with pytest.raises(ValueError, match="does not support bidirectional"):
        moba(x, x, x)
    with pytest.raises(ValueError, match="does not support cross"):
        moba(x, y, y)
    with pytest.raises(ValueError, match=r"key_padding_mask has the wrong shape \(got \(2, 4\)\); expected \(2, 5\)"):
        moba(x, x, x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="expected bool with True = hidden, or"):
        moba(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"attn_mask": torch.ones(4, 4).triu(1)},
            r"attn_mask looks boolean .*attn_mask.bool\(\) if 1 means hidden",
        ),
        (
            {"key_padding_mask": torch.tensor([[0.0, 0, 1, 1]])},
            "key_padding_mask looks boolean .*_mask.bool",
        ),
        ({"key_padding_mask": torch.tensor([[0.0, 0, 1, torch.nan]])}, r"key_padding_mask holds NaN or \+inf"),
        (
            {"key_padding_mask": torch.ones(1, 4).long()},
            r"key_padding_mask .*_mask.bool\(\) if 1 means",
        ),
        ({"query": torch.ones(1, 4, 7)}, r"query has the wrong shape \(got \(1, 4, 7\)\); expected .* 8 wide"),
        ({"value": torch.ones(1, 3, 8)}, r"value has another length than key \(got 3\); expected 4"),
        ({"value": torch.ones(1, 5, 8)}, r"value has another length than key \(got 5\); expected 4"),
        ({"key": torch.ones(1, 9, 8)}, r"value has another length than key \(got 4\); expected 9"),
        ({"value": torch.ones(2, 4, 8)}, r"value has another batch than query \(got 2\); expected 1"),
        ({"query": torch.ones(2, 4, 8)}, r"key has another batch than query \(got 1\); expected 2"),
        ({"key": torch.ones(4, 8)}, r"key has other axes than query \(got \(4, 8\)\); expected 3"),
        ({"value": torch.ones(4, 8)}, r"value has other axes than query \(got \(4, 8\)\); expected 3"),
        ({"query": torch.ones(4, 8)}, r"key has other axes than query \(got \(1, 4, 8\)\); expected 2"),
        ({"key": torch.ones(1, 1, 4, 8)}, r"key has the wrong shape \(got \(1, 1, 4, 8\)\); expected 2 or 3 axes"),
        ({"value": torch.ones(1, 4, 8).to("meta")}, "value is on another device than the layer"),
        ({"attn_mask": torch.ones(4).bool()}, r"attn_mask has the wrong shape \(got \(4,\)\); expected \(4, 4\) or"),
        ({"attn_mask": torch.ones(3, 4, 4).bool()}, r"attn_mask has the wrong shape .* \(4, 4\) or \(2, 4, 4\)"),
        ({"attn_mask": torch.ones(3, 3).bool(), "is_causal": True}, r"attn_mask has the wrong shape \(got \(3, 3\)"),
        ({"attn_mask": [[False] * 4] * 4}, r"attn_mask has the wrong type \(got list\); expected a Tensor"),
        ({"attn_mask": torch.ones(4, 4).bool().to("meta")}, "attn_mask is on another device than query"),
        ({"attn_mask": torch.ones(4, 4).int()}, r"attn_mask has the wrong dtype \(got torch.int32\)"),
        ({"key_padding_mask": torch.ones(4).bool()}, r"key_padding_mask has the wrong shape .*expected \(1, 4\)"),
        ({"key_padding_mask": torch.ones(1, 5).bool()}, r"key_padding_mask has the wrong shape .*expected \(1, 4\)"),
        ({"key": torch.ones(2, 4, 8), "value": torch.ones(2, 4, 8)}, r"key has another batch than query \(got 2\)"),
        ({"query": torch.ones(1, 4, 8).double()}, r"query has another dtype than the layer \(got torch.float64\)"),
    ],
)
def test_refusals_name_the_drop_ins_own_arguments(change, said):
    x = torch.ones(1, 4, 8)
    with pytest.raises((ValueError, TypeError), match="MultiheadAttention: " + said):
        MultiheadAttention(8, 2, batch_first=True)(**{"query": x, "key": x, "value": x, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": torch.ones(1, 4, 8)}, "key has other axes"),
        ({"value": torch.ones(1, 4, 8)}, "value has other axes"),
        ({"value": torch.ones(3, 8)}, r"value has another length than key \(got 3\); expected 4"),
        ({"key_padding_mask": torch.ones(1, 8).bool()}, r"key_padding_mask has the wrong shape \(got \(1, 8\)\)"),
        ({"key_padding_mask": torch.ones(1, 4).bool()}, r"key_padding_mask has the wrong shape .*; expected \(4,\)"),
        ({"attn_mask": torch.ones(5, 4, 4).bool()}, r"attn_mask has the wrong shape .* \(4, 4\) or \(2, 4, 4\)"),
    ],
)
def test_so_do_those_without_a_batch(change, said):
    x = torch.ones(4, 8)
    for batch_first in (False, True):
        with pytest.raises(ValueError, match="MultiheadAttention: " + said):
            MultiheadAttention(8, 2, batch_first=batch_first)(**{"query": x, "key": x, "value": x, **change})


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_and_batches_that_differ_never_reach_a_kernel(batch_first, need_weights):
    """Torch's fused kernel would read past the values' end."""
    order = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    layer = MultiheadAttention(16, 4, batch_first=batch_first).eval()
    q = order(torch.randn(2, 4, 16))
    for keys, values in ((4, 5), (5, 4), (64, 2), (512, 4)):
        k, v = (order(torch.randn(2, n, 16)) for n in (keys, values))
        with pytest.raises(ValueError, match="value has another length than key"), torch.no_grad():
            layer(q, k, v, need_weights=need_weights)
    for batches in ((2, 1, 1), (1, 2, 2), (2, 3, 3), (2, 2, 1), (1, 1, 2)):
        q, k, v = (order(torch.randn(n, 4, 16)) for n in batches)
        with pytest.raises(ValueError, match="has another batch than query"), torch.no_grad():
            layer(q, k, v, need_weights=need_weights)


def test_the_constructor_refuses_by_its_own_names():
    for given, said in (((15, 2), "embed_dim is no multiple of num_heads = 2"), ((16.0, 2), "embed_dim has the wrong")):
        with pytest.raises((ValueError, TypeError), match="MultiheadAttention: " + said):
            MultiheadAttention(*given)
    with pytest.raises(ValueError, match="dropout is out of range"):
        MultiheadAttention(16, 2, dropout=3)
