"""Subsampled attention against loops for given draws, the paper's figure, and that training with it is enough."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.laws.agreement import close
from regard.laws.subject import tokens
from regard.training import SubsampledAttention, attend_in_windows, attend_to_some, local_shuffle, ssa
from training.naive_ssa import naive_ssa


def heads(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(got: Tensor, want: Tensor, leaves: tuple[Tensor, ...]) -> None:
    close(got, want)
    w = heads(9, *want.shape)
    grads = (torch.autograd.grad((z * w).sum(), leaves, materialize_grads=True) for z in (got, want))
    for a, b in zip(*grads, strict=True):
        close(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("N", "ratio"), [(1, 3), (8, 4), (10, 4), (9, 2), (7, 1), (9, 4)])
@pytest.mark.parametrize("kind", ["local", "unbiased"])
def test_equals_the_loops(kind: str, N: int, ratio: int, padded: bool, causal: bool) -> None:
    q, k, v = (heads(n, 2, 2, N, 3).requires_grad_() for n in range(3))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(N))
    kept = -(-N // ratio)
    keep = torch.rand(2, N, generator=torch.Generator().manual_seed(1)) < 0.6 if padded else None
    options = {"causal": causal, "keep": keep}
    if kind == "local":
        got = attend_in_windows(q, k, v, order, ratio, **options)  # type: ignore[arg-type]
    else:
        got = attend_to_some(q, k, v, order[:kept], **options)  # type: ignore[arg-type]
    want = naive_ssa(q, k, v, order.tolist(), keep, kept=kept, local=kind == "local", causal=causal)
    compare(got, want, (q, k, v))


@pytest.mark.parametrize(
    ("order", "windows"),
    [
        ([1, 3, 0, 4, 2, 6, 7, 5], [{1, 3}, {0, 4}, {2, 6}, {5, 7}]),
        ([0, 1, 2, 6, 3, 5, 4, 7], [{0, 1}, {2, 6}, {3, 5}, {4, 7}]),
    ],
)
def test_windows_are_those_of_the_papers_figure(order: list[int], windows: list[set[int]]) -> None:
    one_hot = torch.eye(8).expand(1, 1, 8, 8)
    weights = attend_in_windows(torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2), one_hot, torch.tensor(order), 4)[0, 0]
    seen = [set(row.nonzero().flatten().tolist()) for row in weights]
    assert seen == [windows[i // 2] for i in range(8)]


def test_unbiased_sources_are_those_of_the_papers_figure() -> None:
    one_hot = torch.eye(8).expand(1, 1, 8, 8)
    z = torch.zeros(1, 1, 8, 2)
    weights = attend_to_some(z, z, one_hot, torch.tensor([3, 6, 1, 5]))[0, 0]
    assert all(set(row.nonzero().flatten().tolist()) == {1, 3, 5, 6} for row in weights)


def test_local_shuffles_move_sources_a_little() -> None:
    assert local_shuffle(50, 0.0).equal(torch.arange(50))
    away = [(local_shuffle(500, s) - torch.arange(500)).abs().float().mean() for s in (1.0, 5.0, 1e9)]
    assert 0.3 < away[0] < 2 < away[1] < 10 < 100 < away[2]
    assert local_shuffle(50, 5.0).sort().values.equal(torch.arange(50))


def build(**options: object) -> SubsampledAttention:
    torch.manual_seed(2)
    return SubsampledAttention(8, 2, **options).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["local", "unbiased"])
@pytest.mark.parametrize("causal", [False, True])
def test_training_draws_anew_and_eval_is_dense(kind: str, causal: bool) -> None:
    layer, x = build(kind=kind, causal=causal), tokens(2, 12, dim=8)
    plain = regard.Attention(8, 2, causal=causal).double()
    plain.load_state_dict(layer.state_dict())
    close(layer.eval()(x), plain(x))
    layer.train()
    torch.manual_seed(5)
    one, two = layer(x), layer(x)
    assert not torch.allclose(one, two)
    torch.manual_seed(5)
    close(layer(x), one)
    layer.subsampling = "never"
    close(layer(x), plain(x))
    layer.subsampling = "always"
    assert not torch.allclose(layer.eval()(x), plain(x))


@pytest.mark.parametrize("kind", ["local", "unbiased"])
def test_later_tokens_change_nothing_in_training(kind: str) -> None:
    layer, x = build(kind=kind, causal=True).train(), tokens(2, 12, dim=8)
    changed = x.clone()
    changed[:, 7:] *= -50
    for seed in range(5):
        torch.manual_seed(seed)
        want = layer(x)[:, :7]
        torch.manual_seed(seed)
        close(layer(changed)[:, :7], want)


@pytest.mark.parametrize("kind", ["local", "unbiased"])
def test_across_and_grouped(kind: str) -> None:
    """Other lengths, and fewer key heads, in training: every query sees something."""
    layer = build(kind=kind, num_kv_heads=1, ratio=4).train()
    for S in (3, 5, 9, 20):
        out = layer(tokens(2, 12, dim=8), tokens(2, S, dim=8, seed=6))
        assert out.shape == (2, 12, 8)
        assert out.abs().amin(0).amax(-1).min() > 0


@pytest.mark.parametrize("kind", ["local", "unbiased"])
def test_computes_a_ratio_of_the_scores(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim: what is left out is not computed, so that a layer makes 1 / r of the scores."""
    scores = []

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        scores.append(q.shape[:3].numel() * k.shape[2])
        return regard.attention(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ssa, "attention", counted)
    for ratio in (1, 4, 8):
        build(kind=kind, ratio=ratio).train()(tokens(1, 64, dim=8))
    assert scores == [2 * 64 * 64 // ratio for ratio in (1, 4, 8)]


def test_a_model_trained_on_subsamples_is_as_good_dense() -> None:
    """Fill in masked tokens of a pattern of period 4: subsampled training, dense for the last tenth."""
    work = {}

    def loss_after(subsampling: str) -> float:
        torch.manual_seed(0)
        embed, place, out = nn.Embedding(6, 24), nn.Parameter(0.1 * torch.randn(16, 24)), nn.Linear(24, 5)
        layers = nn.ModuleList(SubsampledAttention(24, 4, subsampling=subsampling) for _ in range(2))  # type: ignore
        parameters = [place, *embed.parameters(), *out.parameters(), *layers.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)

        def loss(seed: int) -> Tensor:
            g = torch.Generator().manual_seed(seed)
            text = torch.randint(5, (32, 4), generator=g).repeat(1, 4)
            hidden = torch.rand(32, 16, generator=g) < 0.3
            z = embed(text.masked_fill(hidden, 5)) + place
            for layer in layers:
                z = z + layer(nn.functional.rms_norm(z, (24,)))
            return nn.functional.cross_entropy(out(z)[hidden], text[hidden])

        for step in range(120):
            if step == 108:
                for layer in layers:
                    layer.subsampling = "never"  # type: ignore[assignment]
            optimizer.zero_grad()
            if step == 0:
                with FlopCounterMode(display=False) as counter:
                    loss(step).backward()
                work[subsampling] = counter.get_total_flops()
            else:
                loss(step).backward()
            optimizer.step()
        with torch.no_grad():
            return sum(loss(10**6 + n).item() for n in range(4)) / 4

    dense, subsampled = loss_after("never"), loss_after("training")
    assert dense < 1.2  # of log 5 = 1.6
    assert subsampled < dense + 0.1
    assert work["training"] < 0.9 * work["never"]


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"ratio is too small \(got 0\); expected an int >= 1"):
        build(ratio=0)
    with pytest.raises(ValueError, match=r"spread is out of range \(got -1\); expected a finite number >= 0"):
        build(spread=-1)
    with pytest.raises(ValueError, match=r"kind is unknown \(got 'global'\); expected one of 'local', 'unbiased'"):
        build(kind="global")
    with pytest.raises(ValueError, match=r"subsampling is unknown \(got 'often'\); expected one of 'training'"):
        build(subsampling="often")
    with pytest.raises(ValueError, match="mask can only hide keys"):
        build()(tokens(2, 12, dim=8), mask=regard.masks.window(3))
