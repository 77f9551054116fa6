"""Equal budgets are equal within 1%, counted on the model that is really built."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard import tasks
from regard.bench.match import cost, flops, matched, parameters
from regard.models.mixer import parse
from regard.models.tokens import TokenModel
from regard.tasks import Size
from regard.tasks.text import NextByte, Text

TASK = NextByte(length=32, text=Text("test", b"x" * 1000, b"y" * 1000))
SIZE = Size(dim=64, depth=2, heads=4, mlp_dim=256)
SOFTMAX = parse("softmax")
OTHERS = [parse(text) for text in ("rotary", "alibi", "window(window=8)", "gated")]


@pytest.mark.parametrize("mechanism", OTHERS, ids=str)
def test_parameters_match(mechanism):
    goal = parameters(TASK.model(SOFTMAX, SIZE))
    found = matched(TASK, mechanism, SIZE, "params")
    assert parameters(TASK.model(mechanism, found)) == pytest.approx(goal, rel=0.01)


@pytest.mark.parametrize("mechanism", OTHERS, ids=str)
def test_flops_match(mechanism):
    found = matched(TASK, mechanism, SIZE, "flops")
    assert flops(TASK, TASK.model(mechanism, found)) == pytest.approx(cost(TASK, SOFTMAX, SIZE, "flops"), rel=0.01)


@pytest.mark.parametrize("name", ["mqar", "digits", "imputation"])
def test_other_hosts_match_too(name):
    task = tasks.make(name)
    for match in ("params", "flops"):
        found = matched(task, parse("gated"), SIZE, match)
        assert found.mlp_dim < SIZE.mlp_dim
        assert cost(task, parse("gated"), found, match) == pytest.approx(cost(task, SOFTMAX, SIZE, match), rel=0.01)


def test_what_has_more_parameters_gets_narrower_mlps():
    assert matched(TASK, parse("gated"), SIZE, "params").mlp_dim < SIZE.mlp_dim
    assert matched(TASK, SOFTMAX, SIZE, "params") == matched(TASK, SOFTMAX, SIZE, "flops") == SIZE


def test_matching_draws_nothing_from_the_generator():
    torch.manual_seed(5)
    matched(TASK, parse("gated"), SIZE, "params")
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("mechanism", [SOFTMAX, *OTHERS], ids=str)
def test_flops_are_what_torch_counts_for_an_example(mechanism):
    model = TASK.model(mechanism, SIZE).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 32, dtype=torch.long))
    assert flops(TASK, model) == pytest.approx(counter.get_total_flops() / 32, rel=1e-6)


def test_hidden_work_counts_at_least_its_parameters():
    class Scan(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decay = torch.nn.Parameter(torch.zeros(64, 100))

        def forward(self, x):
            return x

    task = tasks.make("imputation")
    parts = torch.nn.Linear(8, 16), [Scan(), Scan()], torch.nn.Linear(16, 4)
    rest = 2 * (8 * 16 + 16 * 4 + 2 * 2 * 16 * 5)
    assert flops(task, TokenModel(*parts, dim=16, mlp_dim=5)) == rest + 2 * 2 * 6400


def test_a_mechanism_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match=r"softmax\(head_dim=512\) cannot be matched in params"):
        matched(TASK, parse("softmax(head_dim=512)"), SIZE, "params")
