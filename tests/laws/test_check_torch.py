"""What `regard check` finds of torch.nn.MultiheadAttention, law by law, beside what torch documents of it."""

import pytest
import torch
from torch import nn

import regard
from regard.laws.checking import Report

ALL_HIDDEN = "softmax over scores that are all -inf is NaN: https://github.com/pytorch/pytorch/issues/41508"
KNOWN = {
    "rows_that_see_nothing": ALL_HIDDEN,
    "padding_changes_nothing": f"causal and padded on the left, the pads themselves see nothing; {ALL_HIDDEN}",
}
"""Law -> torch's behaviour that breaks it. All else that speaks of it holds."""


@pytest.fixture(scope="module")
def report() -> Report:
    return regard.check("torch.nn:MultiheadAttention", traits={"position_free"})


def test_the_report_is_this_list(report: Report) -> None:
    assert {f.law.name for f in report.failures} == KNOWN.keys(), report
    assert {"causal", "bidirectional", "cross", "padding", "mask", "dropout"} <= set(report.supports)
    held = {f.law.name for f in report.findings if f.outcome == "holds"}
    assert {"future_changes_nothing", "batch_rows_do_not_meet", "order_of_tokens_is_free", "float64_is_float64"} <= held


def test_torch_does_what_the_list_says() -> None:
    """A query that may see nothing gives NaN, and so do all gradients of a loss that reads it."""
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 3, 8)
    hidden = torch.tensor([[False, False, False], [True, True, True], [False, False, False]])
    out, _ = layer(x, x, x, attn_mask=hidden)
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all()
