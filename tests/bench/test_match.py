"""Equal budgets are equal within 1%, counted on the model that is really built."""

from unittest.mock import patch

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
    """Where attention is plain products, less the pairs that the mask forbids."""
    model = TASK.model(mechanism, SIZE).eval()
    found = flops(TASK, model)
    masked = 0.0
    for mixer in model.mixers:
        mixer.kernel = "eager"
        masked += (1 - mixer.receptive_field().density(32)) * 2 * 2 * 32 * 64
    plainly = patch("regard.kernels.plan.counting", lambda p: False)  # so that torch's counter sees operators alone
    with torch.no_grad(), plainly, FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 32, dtype=torch.long))
    assert found == pytest.approx(counter.get_total_flops() / 32 - masked, rel=1e-6)


def test_longer_texts_ask_more_of_softmax_and_not_of_what_sees_a_window():
    """So that at equal FLOPs a window leaves more for the MLPs, the more the longer the text is."""
    long = NextByte(length=256, text=TASK.text)
    near = parse("window(window=8)")
    pairs = [length * (length + 1) / 2 / length for length in (32, 256)]
    more = flops(long, long.model(SOFTMAX, SIZE)) - flops(TASK, TASK.model(SOFTMAX, SIZE))
    assert more == 2 * 2 * 2 * 64 * (pairs[1] - pairs[0])
    assert flops(long, long.model(near, SIZE)) < 1.01 * flops(TASK, TASK.model(near, SIZE))
    widths = [matched(task, near, SIZE, "flops").mlp_dim - SIZE.mlp_dim for task in (TASK, long)]
    assert 0 < 4 * widths[0] < widths[1]


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
