"""transformers' mask rules as regard's masks: entry for entry, and lazily."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import masking_utils as rules

from regard.integrations import transformers_call
from regard.integrations.transformers_masks import LazyMask, lazy_mask, recognise, structure
from regard.masks import causal, full

PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6, 7]])
RULES = {
    "causal": rules.causal_mask_function,
    "bidirectional": rules.bidirectional_mask_function,
    "sliding": rules.sliding_window_causal_mask_function(4),
    "near": rules.sliding_window_bidirectional_mask_function(2),
    "chunked": rules.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)),
    "packed": rules.packed_sequence_compatibility_function(rules.causal_mask_function, PLACES, PACKED),
    "packed sliding": rules.packed_sequence_compatibility_function(
        rules.sliding_window_causal_mask_function(3), PLACES, PACKED
    ),
}
SIZES = {
    "square": {"q_length": 9, "kv_length": 9},
    "cache": {"q_length": 3, "kv_length": 9, "q_offset": 6},
    "one token": {"q_length": 1, "kv_length": 9, "q_offset": 8},
    "static": {"q_length": 3, "kv_length": 12, "q_offset": torch.tensor(4)},
    "sliding cache": {"q_length": 2, "kv_length": 5, "q_offset": 10, "kv_offset": 7},
}
KEEP = torch.ones(2, 12, dtype=torch.bool)
KEEP[0, :4] = KEEP[1, 8:] = False


def asked(rule, size, keep):
    return {"batch_size": 2, "mask_function": rule, "attention_mask": keep, "device": "cpu", **SIZES[size]}


# transformers asks for packed masks only without a cache and without padding, and for rules that look ahead only where
# the last query is the last key's.
CASES = [
    (rule, size, padded)
    for rule in RULES
    for size in SIZES
    for padded in (False, True)
    if ("packed" not in rule or (size == "square" and not padded)) and (rule, size) != ("near", "static")
]


@pytest.mark.parametrize(("rule", "size", "padded"), CASES)
def test_structure_equals_the_tensor(rule, size, padded):
    given = asked(RULES[rule], size, KEEP if padded else None)
    known = structure(**given)
    assert known is not None
    want = rules.sdpa_mask(**given, allow_is_causal_skip=False)
    T, S = given["q_length"], given["kv_length"]
    assert not want[..., known.keys :].any()
    first = known.first_key
    j = torch.arange(first, first + known.keys)
    i = torch.arange(first + known.keys - T, first + known.keys)
    got = torch.ones(1, 1, T, known.keys, dtype=torch.bool) if known.mask is None else known.mask.at(i, j)
    assert torch.equal(got.expand(2, 1, -1, -1), want[..., : known.keys])
    assert known.keys == (7 if size == "static" and rule != "bidirectional" else S)
    assert known.keep is None or padded


def test_plain_masks_keep_their_plain_names():
    assert recognise(rules.causal_mask_function) == causal()
    assert recognise(rules.bidirectional_mask_function) == full()
    assert structure(**asked(rules.causal_mask_function, "square", torch.ones(2, 9, dtype=torch.bool))).mask == causal()
    assert structure(**asked(rules.bidirectional_mask_function, "square", None)).mask is None


def test_rules_of_others_are_not_guessed():
    def rule(batch_idx, head_idx, q_idx, kv_idx):
        return (q_idx + kv_idx) % 2 == 0

    assert recognise(rule) is None
    assert recognise(rules.and_masks(rules.causal_mask_function, rule)) is None
    assert recognise(rules.blockwise_overlay(PACKED)) is None
    assert recognise(rules.chunked_causal_mask_function(4, torch.tensor([0, 2]))) is None
    assert structure(**asked(RULES["near"], "static", None)) is None
    mask = lazy_mask(lambda **_: None, **asked(rule, "square", None))
    assert mask.structure is None
    assert torch.equal(mask[0, 0], (torch.arange(9)[:, None] + torch.arange(9)) % 2 == 0)


def test_a_flex_mask_differs_by_batch_row():
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    given = create_block_mask(lambda b, h, i, j: keep[b, j], 2, None, 5, 5, device="cpu", BLOCK_SIZE=16)
    q = torch.zeros(2, 1, 5, 4)
    mask = transformers_call._mask(torch.nn.Identity(), q, q, given, False)[0]
    assert torch.equal(mask.dense(5), keep[:, None, None].expand(2, 1, 5, 5))


def test_a_lazy_mask_is_formed_when_touched_and_then_is_a_plain_tensor():
    formed = []
    want = rules.sdpa_mask(**asked(rules.causal_mask_function, "square", KEEP), allow_is_causal_skip=False)
    mask = LazyMask((2, 1, 9, 9), "cpu", None, lambda: formed.append(1) or want, lambda: "theirs")
    assert mask.shape == (2, 1, 9, 9)
    assert mask.dtype == torch.bool
    assert mask.for_original() == "theirs"
    assert repr(mask)
    assert not formed
    for touch in (
        lambda m: m[:, :, 2:, :5],
        lambda m: ~m,
        lambda m: m.to(torch.float64),
        lambda m: torch.where(m, 0.0, 1.0),
        lambda m: m.expand(2, 4, 9, 9).reshape(8, 9, 9),
    ):
        got = touch(mask)
        assert type(got) is torch.Tensor
        assert torch.equal(got, touch(want))
    assert formed
