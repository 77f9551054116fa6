"""Equal budgets are equal within 1%, counted on the model that is really built."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.bench.match import cost, matched, mixer_flops, parameters
from regard.models.lm import LMConfig, language_model

HOST = LMConfig("softmax", dim=64, depth=2, num_heads=4, mlp_dim=256, length=32)
OTHERS = ["rotary", "alibi", "window(window=8)", "gated"]


def host(mechanism):
    return LMConfig(mechanism, HOST.dim, HOST.depth, HOST.num_heads, HOST.mlp_dim, length=HOST.length)


@pytest.mark.parametrize("mechanism", OTHERS)
def test_parameters_match(mechanism):
    goal = parameters(language_model(HOST))
    assert parameters(language_model(matched(host(mechanism), "params"))) == pytest.approx(goal, rel=0.01)


@pytest.mark.parametrize("mechanism", OTHERS)
def test_flops_match(mechanism):
    config = matched(host(mechanism), "flops")
    one, base = (language_model(c).blocks[0].mixer for c in (config, HOST))
    assert cost(config, one, "flops") == pytest.approx(cost(HOST, base, "flops"), rel=0.01)


def test_what_has_more_parameters_gets_a_narrower_mlp():
    assert matched(host("gated"), "params").mlp_dim < HOST.mlp_dim
    assert matched(HOST, "params") == matched(HOST, "flops") == HOST


@pytest.mark.parametrize("mechanism", ["softmax", *OTHERS])
def test_the_formula_counts_what_torch_counts(mechanism):
    config = host(mechanism)
    model = language_model(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, config.length, dtype=torch.long))
    counted = counter.get_total_flops() / config.length
    assert cost(config, model.blocks[0].mixer, "flops") == pytest.approx(counted, rel=1e-6)


def test_hidden_work_counts_at_least_its_parameters():
    class Scan(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decay = torch.nn.Parameter(torch.zeros(64, 100))

        def forward(self, x):
            return x

    assert mixer_flops(Scan(), 64, 32) == 2 * 6400


def test_a_mechanism_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match=r"cannot be matched in params"):
        matched(LMConfig("softmax(head_dim=512)", 64, 2, 4, 16), "params")
