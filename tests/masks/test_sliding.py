"""The sliding windows against Longformer's own layer."""

from functools import partial

import pytest
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

import regard
from laws.measured import flops
from regard import masks
from regard.masks.sliding import DILATED, WINDOW


def test_builders_give_the_masks():
    assert WINDOW.parts({}, {}) == {"mask": masks.window(128)}
    assert WINDOW.parts({}, {"window": 4}) == {"mask": masks.window(4)}
    assert DILATED.parts({}, {"window": 3, "dilation": 2}) == {"mask": masks.dilated(3, 2)}
    with pytest.raises(ValueError, match="window: size is too small"):
        WINDOW.parts({}, {"window": 0})
    with pytest.raises(ValueError, match="dilated: dilation is too small"):
        DILATED.parts({}, {"dilation": 0})


@pytest.mark.parametrize("w", [4, 8])
def test_window_is_longformers(w):
    """Its w is ours as 2 * (window - 1). Its softmax runs in fp32 whatever the input, hence the tolerance."""
    torch.manual_seed(w)
    config = LongformerConfig(
        hidden_size=24, num_attention_heads=6, attention_window=[w], attention_probs_dropout_prob=0.0
    )
    layer = LongformerSelfAttention(config, layer_id=0).double().eval()
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    nothing_hidden = torch.zeros(2, 16, dtype=torch.float64)
    theirs = layer(
        x,
        attention_mask=nothing_hidden,
        is_index_masked=nothing_hidden.bool(),
        is_index_global_attn=nothing_hidden.bool(),
        is_global_attn=False,
    )[0]
    q, k, v = (f(x).view(2, 16, 6, 4).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    allowed = WINDOW.parts({}, {"window": w // 2 + 1})["mask"].dense(16)
    ours = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(ours.transpose(1, 2).flatten(2), theirs, rtol=1e-4, atol=1e-6)


def test_stacked_windows_see_layers_times_as_far():
    """l layers reach l * (W - 1) keys back, and l * (W - 1) * d when dilated."""
    for card, options, reach in ((WINDOW, {"window": 4}, 3), (DILATED, {"window": 4, "dilation": 3}, 9)):
        one = (masks.causal() & card.parts({}, options)["mask"]).dense(40)[0, 0].double()
        back = torch.arange(40)[:, None] - torch.arange(40)
        for layers in (1, 2, 3):
            seen = torch.linalg.matrix_power(one, layers) > 0
            assert back[seen].max() == layers * reach


def test_cost_of_a_window_is_linear_in_length():
    """Of the pairs that it allows, and of what its kernel computes beyond the four projections."""
    sizes, mask = (512, 1024, 2048), masks.causal() & WINDOW.parts({}, {"window": 32})["mask"]
    pairs = [int(mask.dense(T).sum()) for T in sizes]
    assert pairs[2] - pairs[1] == 2 * (pairs[1] - pairs[0])
    layer = regard.create("window", dim=16, num_heads=2, causal=True, window=32, kernel="window")
    done = [flops(partial(layer, torch.randn(1, T, 16))) - 4 * 2 * T * 16 * 16 for T in sizes]
    assert done[0] >= 4 * pairs[0] * 16
    assert done[2] <= 2.1 * done[1] <= 2.1 * 2.1 * done[0]


def test_a_dilated_window_allows_as_many_pairs_as_a_plain_one():
    """Where the sequence is long enough for both: its first keys are nearer than the window is wide."""
    seen = {
        name: (masks.causal() & card.parts({}, options)["mask"]).dense(60)[0, 0].sum(-1)
        for name, card, options in (
            ("plain", WINDOW, {"window": 4}),
            ("dilated", DILATED, {"window": 4, "dilation": 3}),
        )
    }
    assert torch.equal(seen["dilated"][9:], seen["plain"][9:])
    assert (seen["dilated"][9:] == 4).all()
