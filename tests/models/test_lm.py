"""The host model: causal, position-free but for its mixers, streaming where they stream."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from regard.models.lm import LanguageModel, LMConfig, language_model

SMALL = LMConfig("rotary", dim=16, depth=2, num_heads=2, mlp_dim=20, length=12)
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def model(mechanism="rotary", **changes):
    torch.manual_seed(0)
    return language_model(replace(SMALL, mechanism=mechanism, **changes)).double().eval()


class Mean(nn.Module):
    """A causal mixer that cannot stream."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


@pytest.mark.parametrize("mechanism", ["softmax", "rotary", "alibi", "window(window=3)"])
def test_a_later_byte_changes_no_earlier_prediction(mechanism):
    host, changed = model(mechanism), IDS.clone()
    changed[:, 7] += 1
    before, after = host(IDS), host(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax((0, 2)).gt(1e-6).any()


@pytest.mark.parametrize("mechanism", ["softmax", "rotary", "alibi", "window(window=3)"])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6]])
def test_steps_give_what_the_whole_gives(mechanism, chunks):
    host = model(mechanism)
    states, parts = host.init_state(2, 12), []
    for ids in IDS.split(chunks, 1):
        logits, states = host.step(ids, states)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), host(IDS))


def test_the_host_brings_no_positions():
    """With one block. More of them can tell by causality alone."""
    swapped = IDS[:, [1, 0, *range(2, 12)]]
    with_none, with_rotary = model("softmax", depth=1), model("rotary", depth=1)
    torch.testing.assert_close(with_none(IDS)[:, -1], with_none(swapped)[:, -1])
    assert (with_rotary(IDS)[:, -1] - with_rotary(swapped)[:, -1]).abs().max() > 1e-5


def test_generation_follows_its_seed():
    host = model()

    def drawn(seed, **options):
        return host.generate(IDS[:, :4], 9, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert drawn(0).shape == (2, 13)
    assert torch.equal(drawn(0)[:, :4], IDS[:, :4])
    assert torch.equal(drawn(0, temperature=0.0), drawn(1, top_k=1)), "both take the likeliest"


def test_greedy_generation_with_state_equals_full_passes():
    host = model()
    ids = IDS[:, :4]
    for _ in range(5):
        ids = torch.cat([ids, host(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(host.generate(IDS[:, :4], 5, temperature=0.0), ids)


def test_a_mixer_that_cannot_stream_generates_by_full_passes():
    host = LanguageModel([Mean()], dim=8, mlp_dim=8)
    assert not host.streams
    assert model().streams
    assert host.generate(IDS[:, :3], 4, temperature=0.0).shape == (2, 7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_generation_refuses_what_it_cannot_do(options, said):
    with pytest.raises(ValueError, match=said):
        model().generate(IDS, 2, **options)
    with pytest.raises(ValueError, match="empty"):
        model().generate(IDS[:, :0], 2)


@pytest.mark.parametrize("change", [{"dim": 0}, {"depth": -1}, {"num_heads": 3}, {"mlp_dim": 1.5}, {"vocab": True}])
def test_sizes_that_cannot_be_are_refused(change):
    (name,) = change
    said = rf"LMConfig: ({name} .*expected an int >= 1|dim is no multiple of {name} = 3)"
    with pytest.raises((ValueError, TypeError), match=said):
        replace(SMALL, **change)
