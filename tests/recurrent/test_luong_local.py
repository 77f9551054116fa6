"""Luong's local attention against loops over steps and places."""

import pytest
import torch
from torch import Tensor, nn

import regard
from recurrent.naive_luong import naive_luong
from recurrent.test_luong import weights_of
from regard.laws.agreement import close, close_all, run, same
from regard.laws.subject import perturb, tokens
from regard.recurrent import LocalLuongAttention, LuongAttention

SHORT = {"monotonic": "m", "predictive": "p"}


class Naive(nn.Module):
    def __init__(self, layer: LocalLuongAttention, **options: object) -> None:
        super().__init__()
        self.score, self.c_proj = layer.score, layer.c_proj
        self.options = {"score": layer.score.kind, "window": SHORT[layer.alignment], "D": layer.half_width, **options}
        if layer.alignment == "predictive":
            self.p_proj, self.p_vector = layer.p_proj, layer.p_vector

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        place = {"Wp": self.p_proj.weight, "vp": self.p_vector} if hasattr(self, "p_proj") else {}
        return naive_luong(x, context, **weights_of(self), **place, **self.options)  # type: ignore[arg-type]


def build(dim: int, **options: object) -> LocalLuongAttention:
    torch.manual_seed(3)
    layer = LocalLuongAttention(dim, **options).double()  # type: ignore[arg-type]
    perturb(layer, size=0.5)
    return layer


@pytest.mark.parametrize("alignment", ["monotonic", "predictive"])
@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize(("T", "S", "D"), [(1, 1, 1), (9, 7, 2), (5, 12, 3), (4, 5, 10)])
def test_equals_the_loops(alignment: str, score: str, T: int, S: int, D: int) -> None:
    layer = build(5, alignment=alignment, score=score, half_width=D, context_dim=5 if score == "dot" else 4)
    given = tokens(2, T, dim=5), tokens(2, S, dim=layer.context_dim, seed=8)
    close_all(run(layer, *given), run(Naive(layer), *given))


@pytest.mark.parametrize("alignment", ["monotonic", "predictive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_absent(alignment: str, side: str) -> None:
    """Places are counted among the real tokens, whichever side the padding stands on."""
    layer = build(5, alignment=alignment, half_width=2)
    x, context = tokens(2, 8, dim=5), tokens(2, 9, dim=5, seed=8)
    lengths, shown = torch.tensor([9, 6]), torch.arange(9)
    right = shown < lengths[:, None]
    poisoned = context.masked_fill(~right[..., None], torch.nan)
    keep = right
    if side == "left":
        keep = right.flip(1)
        poisoned = torch.stack([row.roll(9 - n, 0) for row, n in zip(poisoned, lengths.tolist(), strict=True)])
    got = run(layer, x, poisoned, mask=keep)
    want = run(Naive(layer, lengths=lengths), x, context)
    assert not got["input1"][~keep].any()
    got["input1"], want["input1"] = got["input1"][keep], want["input1"][right]
    close_all(got, want)


def test_steps_may_start_later() -> None:
    layer = build(5, alignment="monotonic", half_width=1)
    x, context = tokens(2, 6, dim=5), tokens(2, 7, dim=5, seed=8)
    whole = layer(x, context)
    close(torch.cat([layer(x[:, t : t + 1], context, first=t) for t in range(6)], 1), whole)


@pytest.mark.parametrize("alignment", ["monotonic", "predictive"])
def test_only_the_window_is_read(alignment: str) -> None:
    """The paper's claim: 2 D + 1 places and no more. Junk or NaN elsewhere changes no bit."""
    layer = build(5, alignment=alignment, half_width=2)
    x, context = tokens(2, 3, dim=5), tokens(2, 20, dim=5, seed=8)
    lengths = torch.tensor([20, 20])
    p = layer.places(x, lengths)
    near = (torch.arange(20) - p.floor()[..., None]).abs() <= 2
    for junk in (1e4, torch.nan):
        for t in range(3):
            changed = context.masked_fill(~near[:, t, :, None], junk)
            step = x[:, t : t + 1]
            same(layer(step, changed, first=t), layer(step, context, first=t))
    one = context.clone()
    one[0, 4] = torch.nan
    same(layer(x, one).isnan().any(-1)[0], near[0, :, 4])
    assert not layer(x, one)[1].isnan().any()


def test_a_wide_window_without_its_gaussian_is_global() -> None:
    local = build(5, alignment="monotonic", half_width=50)
    globally = LuongAttention(5).double()
    globally.load_state_dict(local.state_dict())
    given = tokens(2, 3, dim=5), tokens(2, 7, dim=5, seed=8)
    close(local(*given), globally(*given))


def test_work_does_not_grow_with_the_source() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer, counts = LocalLuongAttention(8, half_width=3), []
    for S in (50, 500):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, 5, 8), torch.randn(1, S, 8))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_nothing_to_see_leaves_the_decoder_state() -> None:
    layer, x = build(5, half_width=2), tokens(2, 3, dim=5)
    want = torch.tanh(x @ layer.c_proj.weight[:, 5:].T)
    close(layer(x, tokens(2, 4, dim=5), mask=torch.zeros(2, 4, dtype=torch.bool)), want)
    close(layer(x, tokens(2, 0, dim=5)), want)


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"alignment is unknown \(got 'diagonal'\); expected one of 'monotonic'"):
        LocalLuongAttention(5, alignment="diagonal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"half_width is too small \(got 0\); expected an int >= 1"):
        LocalLuongAttention(5, half_width=0)
    with pytest.raises(ValueError, match=r"score is global only \(got 'location'\); expected 'dot'"):
        LocalLuongAttention(5, score="location")
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 4\)\); expected \(B, T, M = 5\)"):
        build(5)(tokens(2, 3, dim=4), tokens(2, 4, dim=5))
    with pytest.raises(ValueError, match="causal"):
        regard.create("luong_local", dim=4, num_heads=2, causal=True)
