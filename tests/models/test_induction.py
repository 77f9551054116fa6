"""The hand-built model does what it is built for, and its two heads are the ones that do it."""

import pytest
import torch

import regard
from regard.models.induction import INDUCTION, PREVIOUS, hand_built


def twice(n: int, batch: int = 3) -> torch.Tensor:
    """Token 0, then n distinct tokens in some order, twice."""
    return torch.stack([torch.cat((torch.tensor([0]), *[torch.randperm(31)[:n] + 1] * 2)) for _ in range(batch)])


@pytest.mark.parametrize("n", [2, 7, 31])
def test_it_continues_what_comes_again(n: int):
    tokens = twice(n)
    with torch.no_grad():
        chances = hand_built()(tokens).logits.softmax(-1)
    right = chances[:, n + 1 : -1].gather(-1, tokens[:, n + 2 :, None])
    assert right.min() > 0.999


def test_each_head_does_what_it_is_said_to_do():
    n, model = 20, hand_built()
    tokens = twice(n)
    trace = regard.trace(model, tokens)
    t = tokens.shape[1]
    for layer in range(2):
        for head in range(2):
            weights = trace.weights(layer)[:, head]
            want = torch.tril(torch.ones(t, t)) / torch.arange(1, t + 1)[:, None]
            if (layer, head) == PREVIOUS:
                want = torch.zeros(t, t)
                want[torch.arange(t), (torch.arange(t) - 1).clamp(min=0)] = 1
            if (layer, head) == INDUCTION:
                want = torch.zeros(t, t)
                want[: n + 1, 0] = 1
                want[n + 1 + torch.arange(n), 2 + torch.arange(n)] = 1
            torch.testing.assert_close(weights, want.expand_as(weights), atol=1e-3, rtol=0)


def test_a_head_taken_away_takes_the_skill():
    tokens = twice(12)

    def right(model):
        return (model(tokens).logits[:, 13:-1].argmax(-1) == tokens[:, 14:]).double().mean()

    model = hand_built()
    with torch.no_grad():
        assert right(model) == 1
        for layer in range(2):
            for head in range(2):
                gates = torch.ones(2, 2)
                gates[layer, head] = 0
                with regard.scale_heads(model, gates):
                    assert (right(model) == 1) == ((layer, head) not in (PREVIOUS, INDUCTION))


def test_the_previous_token_is_found_at_any_distance():
    """No other distance up to the longest sequence comes near: a rotary embedding's cosines could meet again."""
    tokens = torch.cat((torch.tensor([0]), torch.randint(1, 32, (2047,))))[None]
    model = hand_built(length=2048)
    weights = regard.trace(model, tokens, layers=[0]).weights(0)[0, PREVIOUS[1]]
    assert weights.diagonal(-1).min() > 0.999


def test_refusals():
    with pytest.raises(ValueError, match="vocab is too large"):
        hand_built(33)
