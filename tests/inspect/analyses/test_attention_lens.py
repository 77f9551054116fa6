"""The lens against loops; a head that copies a token is read out."""

import pytest
import torch
import torch.nn.functional as F
from tests.inspect.analyses.naive_attention_lens import naive_kl, naive_lens
from torch import Tensor, nn

from regard.inspect.analyses.attention_lens import AttentionLens, fit_lens, head_contributions, lens_loss
from regard.laws.agreement import close


def test_by_hand() -> None:
    """Two heads of width 1 onto two words; the second head says the other word."""
    lens = AttentionLens(2, torch.tensor([[1.0], [-1.0]]), bias=torch.tensor([0.5, 0.0]))
    with torch.no_grad():
        lens.weight[1] *= -1
    heads = torch.tensor([[[2.0], [3.0]]])
    assert lens.heads(heads).tolist() == [[[2.5, -2.0], [-2.5, 3.0]]]
    assert lens(heads).tolist() == [[0.0, 1.0]]
    assert lens.words(heads, top=1).tolist() == [[[0], [1]]]
    even, sure = torch.zeros(1, 2), torch.tensor([[0.0, -100.0]])
    assert lens_loss(even, sure).item() == pytest.approx(0.6931, abs=1e-3), "KL(model || lens), not the other way round"


def test_equals_the_loops() -> None:
    lens = AttentionLens(3, torch.randn(5, 4, dtype=torch.float64), bias=torch.randn(5, dtype=torch.float64))
    with torch.no_grad():
        for p in lens.parameters():
            p.add_(torch.randn_like(p))
    heads, model = torch.randn(2, 6, 3, 4, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)
    got = lens(heads).detach()
    losses = torch.zeros(2, 6, dtype=torch.float64)
    for b in range(2):
        for t in range(6):
            want = naive_lens(heads[b, t], lens.weight.detach(), lens.bias.detach())
            close(got[b, t], want)
            losses[b, t] = naive_kl(model[b, t].tolist(), want.tolist())
    close(lens_loss(got, model), losses.mean())
    mask = torch.rand(2, 6) > 0.5
    close(lens_loss(got, model, mask=mask), losses[mask].mean())


def test_contributions_add_up_to_the_attention_output() -> None:
    projection = nn.Linear(3 * 4, 7).double()
    outputs = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    got = head_contributions(outputs, projection.weight)
    assert got.shape == (2, 5, 3, 7)
    close((got.sum(2) + projection.bias).detach(), projection(outputs.transpose(1, 2).flatten(2)).detach())


def copying(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Head 1 of 3 writes its token's vector, turned; the model then says that token. The others write noise."""
    g = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    embedding, turn = torch.randn(12, 16, generator=fixed), torch.linalg.qr(torch.randn(16, 16, generator=fixed)).Q
    tokens = torch.randint(12, (count,), generator=g)
    heads = 0.5 * torch.randn(count, 3, 16, generator=g)
    heads[:, 1] = embedding[tokens] @ turn
    return heads, 8.0 * F.one_hot(tokens, 12), tokens


def test_reads_out_a_copying_head() -> None:
    """The claim, in small: the loss falls, and the lens of the copying head alone names the token."""
    heads, model, _ = copying(256, 0)
    unembedding = torch.randn(12, 16, generator=torch.Generator().manual_seed(7))
    lens = AttentionLens(3, unembedding)
    losses = fit_lens(lens, [(heads, model)], epochs=120, lr=0.02)
    assert losses[-1] < losses[0] / 20
    assert losses[-1] < 0.1
    other, target, tokens = copying(100, 1)
    assert lens_loss(lens(other), target) < 0.3
    named = lens.words(other, top=1)[..., 0]
    right = (named == tokens[:, None]).float().mean(0)
    assert right[1] > 0.95
    assert right[[0, 2]].max() < 0.3


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"AttentionLens: num_heads is too small \(got 0\); expected an int >= 1"):
        AttentionLens(0, torch.ones(3, 2))
    with pytest.raises(
        ValueError, match=r"AttentionLens: unembedding has the wrong shape \(got \(3,\)\); expected \(V, M\)"
    ):
        AttentionLens(1, torch.ones(3))
    with pytest.raises(ValueError, match=r"AttentionLens: bias has the wrong shape \(got \(2,\)\); expected \(V = 3\)"):
        AttentionLens(1, torch.ones(3, 2), bias=torch.ones(2))
    lens = AttentionLens(2, torch.ones(3, 4))
    with pytest.raises(
        ValueError, match=r"AttentionLens: contributions .*\(got \(5, 3, 4\)\); expected \(\*b, H = 2, M = 4\)"
    ):
        lens(torch.ones(5, 3, 4))
    with pytest.raises(ValueError, match=r"AttentionLens: top is too large \(got 4\); expected an int from 1 to 3"):
        lens.words(torch.ones(2, 4), top=4)
    with pytest.raises(ValueError, match=r"lens_loss: model .*\(got \(2, 4\)\); expected \(\*b, V = 3\)"):
        lens_loss(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"fit_lens: lr is out of range \(got 0\); expected .*> 0"):
        fit_lens(lens, [], lr=0)
    with pytest.raises(ValueError, match=r"head_contributions: weight .*\(got \(5, 6\)\); expected \(M, N = 8\)"):
        head_contributions(torch.ones(1, 2, 3, 4), torch.ones(5, 6))
