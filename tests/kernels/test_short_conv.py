"""The short convolution against loops, torch's Conv1d and transformers' step of gated DeltaNet."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.kernels.short_conv import centred_conv, short_conv
from regard.laws.agreement import close


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    """Token by token: taps that reach over a start, or a token that is none, add nothing."""
    (B, T, C), K = x.shape, weight.shape[1]
    out = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            for c in range(C):
                total = float(bias[c])
                for j in range(K):
                    if t - j < 0:
                        break
                    if keep[b, t - j]:
                        total += float(weight[c, K - 1 - j]) * float(x[b, t - j, c])
                    if starts[b, t - j]:
                        break
                out[b, t, c] = total
    return out


@pytest.mark.parametrize("K", [1, 2, 4])
def test_is_the_formula(K: int) -> None:
    x, weight, bias = numbers(2, 9, 3), numbers(3, K, seed=1), numbers(3, seed=2)
    keep, starts = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    keep[1, :4] = keep[0, 6] = False
    starts[0, 3] = starts[0, 4] = starts[1, 8] = True
    want = oracle(x, weight, bias, keep, starts)
    got = short_conv(x, weight, bias, keep=keep, starts=starts).out
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    hidden = x.masked_fill(~keep[..., None], torch.nan)
    assert torch.equal(short_conv(hidden, weight, bias, keep=keep, starts=starts).out, got)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_each_token_reads_what_it_sees(K: int) -> None:
    x, weight = numbers(2, 9, 3), numbers(3, K, seed=1)
    sees = numbers(2, 9, K - 1, seed=2) > 0
    want = torch.zeros_like(x)
    for b in range(2):
        for t in range(9):
            for j in range(min(K, t + 1)):
                if j == 0 or sees[b, t, j - 1]:
                    want[b, t] += weight[:, K - 1 - j] * x[b, t - j]
    torch.testing.assert_close(short_conv(x, weight, sees=sees).out, want, rtol=1e-12, atol=1e-12)
    heads = x[:, None].expand(-1, 2, -1, -1)
    got = short_conv(heads, weight.expand(2, -1, -1), sees=sees).out
    torch.testing.assert_close(got, want[:, None].expand(-1, 2, -1, -1), rtol=1e-12, atol=1e-12)


def test_a_document_is_as_if_alone() -> None:
    x, weight = numbers(1, 7, 2), numbers(2, 4, seed=1)
    starts = torch.zeros(1, 7, dtype=torch.bool)
    starts[0, 3] = True
    got = short_conv(x, weight, starts=starts).out
    assert torch.equal(got[:, 3:], short_conv(x[:, 3:], weight).out)
    assert torch.equal(got[:, :3], short_conv(x[:, :3], weight).out)


def test_is_torchs_convolution() -> None:
    """Values, and gradients of tokens, weight and bias."""
    conv = nn.Conv1d(3, 3, 4, groups=3, padding=3).double()
    x = numbers(2, 9, 3).requires_grad_()
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    want = conv(x.mT)[..., :9].mT
    got = short_conv(x, weight[:, 0], bias).out
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    w = numbers(2, 9, 3, seed=5)
    for a, b in zip(*(torch.autograd.grad((z * w).sum(), (x, weight, bias)) for z in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_heads_are_channels() -> None:
    x, weight, bias = numbers(2, 5, 6, 3), numbers(5, 3, 4, seed=1), numbers(5, 3, seed=2)
    flat = x.transpose(1, 2).flatten(2)
    want = short_conv(flat, weight.flatten(0, 1), bias.flatten()).out.unflatten(2, (5, 3)).transpose(1, 2)
    torch.testing.assert_close(short_conv(x, weight, bias).out, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [9], [0, 2, 7]])
def test_piece_by_piece_is_all_at_once(cuts: list[int]) -> None:
    x, weight = numbers(2, 9, 3), numbers(3, 4, seed=1)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[1, 5] = True
    want, end = short_conv(x, weight, starts=starts)
    outs, state = [], None
    for part, begin in zip(x.split(cuts, 1), starts.split(cuts, 1), strict=True):
        out, state = short_conv(part, weight, state=state, starts=begin)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(state, end)
    assert state.shape == (2, 3, 3)


def test_steps_are_those_of_transformers() -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    update = getattr(qwen, "torch_causal_conv1d_update", None) or qwen.causal_conv1d_update  # renamed there once
    x, weight, bias = numbers(2, 6, 3), numbers(3, 4, seed=1), numbers(3, seed=2)
    held, state = torch.zeros(2, 3, 4, dtype=torch.float64), None
    for t in range(6):
        want = update(x[:, t : t + 1].mT, held, weight, bias, activation="silu").mT
        out, state = short_conv(x[:, t : t + 1], weight, bias, state=state)
        torch.testing.assert_close(F.silu(out), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, held[..., 1:].mT, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": torch.zeros(3, 0)}, "has no taps"),
        ({"weight": torch.zeros(2, 3, 4)}, "short_conv"),
        ({"state": torch.zeros(1, 2, 3)}, "holds another number of tokens"),
        ({"sees": torch.ones(1, 5, 2, dtype=torch.bool)}, "is about another number of tokens"),
        ({"keep": torch.ones(1, 4, dtype=torch.bool)}, "short_conv"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        short_conv(torch.zeros(1, 5, 3), **{"weight": torch.zeros(3, 4), **given})


@pytest.mark.parametrize("taps", [1, 3, 33, 65])
@pytest.mark.parametrize("T", [1, 31, 32, 70])
def test_centred_taps_are_torchs_grouped_convolution(taps: int, T: int) -> None:
    g = torch.Generator().manual_seed(T)
    x = torch.randn(2, 3, T, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, taps, generator=g, dtype=torch.float64, requires_grad=True)
    want = F.conv2d(x, weight[:, None, :, None], padding=(taps // 2, 0), groups=3)
    got = centred_conv(x, weight)
    close(got, want, "out")
    for a, b in zip(*(torch.autograd.grad(z.sin().sum(), (x, weight)) for z in (got, want)), strict=True):
        close(a, b, "gradient")


def test_no_tokens_are_convolved_to_none() -> None:
    assert centred_conv(torch.zeros(2, 3, 0, 4), torch.zeros(3, 9)).shape == (2, 3, 0, 4)
