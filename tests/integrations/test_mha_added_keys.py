"""Keys that torch's MultiheadAttention adds (add_bias_kv, add_zero_attn), and keys handed in past the projections."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import masks
from regard.integrations.torch_mha import MultiheadAttention
from regard.laws.agreement import close

B, T, S, M, H = 2, 5, 7, 12, 3
ADDED = [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def pair(**options) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    theirs = nn.MultiheadAttention(M, H, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    return MultiheadAttention.from_torch(theirs), theirs


def masked() -> list[dict[str, Tensor]]:
    hidden = torch.tensor([[False] * S, [False] * 5 + [True] * 2])
    pairs = torch.rand(T, S) < 0.4
    each = torch.rand(B * H, T, S) < 0.4
    pairs[:, 0] = each[..., 0] = False  # else torch gives NaN where it adds no key
    added = tokens(T, S).masked_fill(pairs, -torch.inf)
    number = tokens(B, S).masked_fill(hidden, -torch.inf)
    return [
        {},
        {"key_padding_mask": hidden},
        {"attn_mask": pairs},
        {"attn_mask": each, "key_padding_mask": hidden},
        {"attn_mask": added, "key_padding_mask": number},
    ]


def same(ours: nn.Module, theirs: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, object]) -> None:
    """Outputs, weights, and gradients of all inputs and parameters."""
    results = []
    for module in (ours, theirs):
        module.zero_grad()
        leaves = [z.detach().requires_grad_() for z in inputs]
        out, seen = module(*leaves, **options)
        (out.square().sum() + (0 if seen is None else seen.square().sum())).backward()
        results.append((out, seen, *(z.grad for z in leaves), *(p.grad for p in module.parameters())))
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            close(got, expected)


@pytest.mark.parametrize("widths", [{}, {"kdim": 8, "vdim": 6}, {"bias": False}])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("added", ADDED, ids=lambda added: "+".join(added))
def test_equals_torch_s(added, batch_first, widths):
    ours, theirs = pair(**added, batch_first=batch_first, **widths)
    order = (lambda z: z) if batch_first else (lambda z: z.transpose(0, 1))
    sizes = ((T, M), (S, widths.get("kdim", M)), (S, widths.get("vdim", M)))
    inputs = tuple(order(tokens(B, n, width)) for n, width in sizes)
    for mask, (need, average) in itertools.product(masked(), ((True, True), (True, False), (False, True))):
        same(ours, theirs, inputs, {**mask, "need_weights": need, "average_attn_weights": average})


@pytest.mark.parametrize("added", ADDED, ids=lambda added: "+".join(added))
def test_without_a_batch(added):
    ours, theirs = pair(**added)
    inputs = (tokens(T, M), tokens(S, M), tokens(S, M))
    for mask in ({}, {"key_padding_mask": torch.arange(S) > 4}, {"attn_mask": torch.rand(H, T, S) < 0.4}):
        same(ours, theirs, inputs, mask)


@pytest.mark.parametrize("added", ADDED, ids=lambda added: "+".join(added))
def test_names_starting_values_and_copies(added):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(M, H, **added)
    torch.manual_seed(0)
    ours = MultiheadAttention(M, H, **added)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    copied = MultiheadAttention.from_torch(pair(**added)[1])
    assert (copied.bias_k is not None, copied.add_zero_attn) == (theirs.bias_k is not None, theirs.add_zero_attn)


def test_a_row_that_sees_no_token_sees_the_added_key():
    ours, theirs = pair(add_bias_kv=True, batch_first=True)
    x, hidden = tokens(B, T, M), torch.tensor([[False] * T, [True] * T])
    same(ours, theirs, (x, x, x), {"key_padding_mask": hidden})


def test_the_causal_hint_hides_no_added_key():
    """Torch without weights takes the hint for the whole mask, and no query sees the key that it adds."""
    ours, theirs = pair(add_bias_kv=True, add_zero_attn=True, batch_first=True)
    x, mask = tokens(B, T, M), torch.ones(T, T, dtype=torch.bool).triu(1)
    for need in (False, True):
        close(ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=need)[0], theirs(x, x, x, attn_mask=mask)[0])


def test_inside_torch_s_encoder_layer():
    layer = nn.TransformerEncoderLayer(M, H, 16, dropout=0.0, batch_first=True).double()
    layer.self_attn = nn.MultiheadAttention(M, H, batch_first=True, add_bias_kv=True, dtype=torch.float64)
    x, hidden = tokens(B, T, M), torch.tensor([[False] * T, [False] * 3 + [True] * 2])
    for training in (True, False):
        expected = layer.train()(x, src_key_padding_mask=hidden)
        ours = nn.TransformerEncoderLayer(M, H, 16, dropout=0.0, batch_first=True).double()
        ours.self_attn = MultiheadAttention.from_torch(layer.self_attn)
        ours.load_state_dict(layer.state_dict())
        close(ours.train(training)(x, src_key_padding_mask=hidden), expected)


def function(module: nn.MultiheadAttention, inputs: tuple[Tensor, ...], **options):
    return F.multi_head_attention_forward(
        *inputs, M, H, module.in_proj_weight, module.in_proj_bias, None, None, module.add_zero_attn, 0.0,
        module.out_proj.weight, module.out_proj.bias, training=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("given", ["both", "k", "v"])
def test_static_keys_and_values_equal_those_of_torch_s_function(given, zero):
    ours, theirs = pair(add_zero_attn=zero)
    inputs = (tokens(T, B, M), tokens(S, B, M), tokens(S, B, M))
    static = {name: tokens(B * H, S, M // H) for name in ("static_k", "static_v") if given in ("both", name[-1])}
    for mask in masked():
        for average in (True, False):
            got = ours(*inputs, **mask, **static, average_attn_weights=average)
            expected = function(theirs, inputs, **mask, **static, average_attn_weights=average)
            for one, other in zip(got, expected, strict=True):
                close(one, other)


def test_static_keys_may_be_more_than_the_tokens():
    ours, theirs = pair()
    inputs = (tokens(T, B, M), tokens(S, B, M), tokens(S, B, M))
    static = {"static_k": tokens(B * H, S + 2, M // H), "static_v": tokens(B * H, S + 2, M // H)}
    hidden = {"key_padding_mask": torch.rand(B, S + 2) < 0.3}
    for one, other in zip(ours(*inputs, **static, **hidden), function(theirs, inputs, **static, **hidden), strict=True):
        close(one, other)


def test_mechanisms_that_ask_for_no_places_go_with_them():
    x = tokens(B, T, M)
    layer = MultiheadAttention(
        M, H, batch_first=True, dtype=torch.float64, mechanism="entmax", add_bias_kv=True, add_zero_attn=True
    )
    weights = layer(4 * x, 4 * x, x)[1]
    assert weights.shape == (B, T, T + 2)
    close(weights.sum(-1), torch.ones(B, T, dtype=torch.float64))
    assert bool((weights[..., T:] > 0).any())
    for mechanism in ("alibi", "xattention", masks.window(2)):
        with pytest.raises(ValueError, match=r"MultiheadAttention: mechanism asks where keys stand .* add_bias_kv"):
            MultiheadAttention(M, H, mechanism=mechanism, add_bias_kv=True)


def test_refusals():
    x, right = torch.randn(B, S, M), torch.randn(B * H, S, M // H)
    layer = MultiheadAttention(M, H, batch_first=True)
    for static, said in (
        ({"static_k": right[1:]}, r"static_k has the wrong shape \(got \(5, 7, 4\)\); expected .* \(6, 7, 4\)"),
        ({"static_k": right[:, :4]}, "static_k has the wrong shape"),
        ({"static_v": right[..., 1:]}, "static_v has the wrong shape"),
        ({"static_v": right[0]}, "static_v has the wrong shape"),
        ({"static_k": right, "static_v": right[:, :4]}, "static_v has the wrong shape"),
        ({"static_k": right[:, :4], "static_v": right}, "static_v has the wrong shape"),
        ({"static_k": right.double()}, "static_k has another dtype than the layer"),
        ({"static_v": right.tolist()}, "static_v has the wrong type"),
        ({"static_v": right.to("meta")}, "static_v is on another device"),
    ):
        with pytest.raises((ValueError, TypeError), match="MultiheadAttention: " + said):
            layer(x, x, x, **static)
    with pytest.raises(ValueError, match="static_k and static_v are given beside add_bias_kv"):
        MultiheadAttention(M, H, batch_first=True, add_bias_kv=True)(x, x, x, static_k=right)
    with pytest.raises(TypeError, match="MultiheadAttention: add_zero_attn has the wrong type"):
        MultiheadAttention(M, H, add_zero_attn=1)
