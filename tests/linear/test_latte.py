"""Latte against loops; its weights, its state and what its stable form is for (B162)."""

import pytest
import torch
from torch import Tensor

import regard
from linear.naive_latte import naive_latte, naive_latte_weights
from regard.laws.agreement import close, same
from regard.laws.subject import of, tokens
from regard.linear import Latte, causal_latte_attention, latte_attention


def normal(seed: int, *shape: int, size: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, dtype=torch.float64, generator=g)).requires_grad_()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes", [(2, 3, 9, 9, 4, 5), (1, 1, 1, 1, 3, 2), (2, 2, 6, 11, 1, 3), (1, 2, 19, 19, 2, 1)], ids=str
)
@pytest.mark.parametrize("hidden", [False, True])
def test_equals_the_loops(causal: bool, sizes: tuple[int, ...], hidden: bool) -> None:
    B, H, T, S, L, V = sizes
    T = S if causal else T
    given = normal(1, B, H, T, L), normal(2, B, H, S, L, size=3), normal(3, B, H, S, V)
    keep = None
    if hidden:
        keep = torch.rand(B, S, generator=torch.Generator().manual_seed(4)) < 0.6
        keep[:, min(1, S - 1)] = True
    got = causal_latte_attention(*given, keep=keep)[0] if causal else latte_attention(*given, keep=keep)
    seen = torch.ones(B, T, dtype=torch.bool) if keep is None or not causal else keep.cumsum(1) > 0
    rows = seen[:, None, :, None]
    want = torch.where(rows, naive_latte(*given, causal=causal, keep=keep).nan_to_num(), 0.0)
    close(got.detach(), want.detach())
    if not seen.all():
        same(got[~rows.expand_as(got)].detach(), got.new_zeros(int((~rows.expand_as(got)).sum())), "rows without keys")
        return  # the loops' own gradients are NaN there
    direction = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad((got * direction).sum(), given), torch.autograd.grad(want, given, direction)):
        close(g, w)


def test_forwards_where_scores_lie_far_apart() -> None:
    """torch's own logarithms of running sums lose all digits there; hidden keys come first."""
    a, b, v = normal(1, 2, 3, 12, 2), normal(2, 2, 3, 12, 2, size=20), normal(3, 2, 3, 12, 4)
    keep = torch.arange(12) > torch.tensor([[-1], [2]])
    given, ways = [z.detach() for z in (a, b, v)], [normal(n, *z.shape).detach() for n, z in enumerate((a, b, v), 5)]
    out = causal_latte_attention(a, b, v, keep=keep)[0]
    got, forwards = torch.func.jvp(lambda *z: causal_latte_attention(*z, keep=keep)[0], tuple(given), tuple(ways))
    close(got, out.detach())
    direction = normal(4, *out.shape).detach()
    back = torch.autograd.grad((out * direction).sum(), [a, b, v])
    close((forwards * direction).sum(), sum((g * way).sum() for g, way in zip(back, ways, strict=True)))


def test_gradients_where_the_first_keys_are_hidden() -> None:
    """As if the hidden tokens were not there."""
    a, b, v = normal(1, 1, 2, 7, 3), normal(2, 1, 2, 7, 3), normal(3, 1, 2, 7, 4)
    keep = torch.tensor([[False, False, True, False, True, True, True]])
    direction = normal(4, 1, 2, 5, 4).detach()
    out = causal_latte_attention(a, b, v, keep=keep)[0]
    got = torch.autograd.grad((out[:, :, 2:] * direction).sum(), [a, b, v])
    kept = [z[:, :, keep[0]].detach().requires_grad_() for z in (b, v)]
    rows = torch.tensor([0, 0, 1, 2, 3])  # how many kept keys precede each of the queries 2 .. 6
    queries = a[:, :, 2:].detach().requires_grad_()
    want = sum(
        (
            (latte_attention(queries[:, :, n : n + 1], kept[0][:, :, : m + 1], kept[1][:, :, : m + 1])[:, :, 0])
            * direction[:, :, n]
        ).sum()
        for n, m in enumerate(rows.tolist())
    )
    wanted = torch.autograd.grad(want, [queries, *kept])
    close(got[0][:, :, 2:], wanted[0])
    for g, w in zip(got[1:], wanted[1:]):
        close(g[:, :, keep[0]], w)
        same(g[:, :, ~keep[0]], torch.zeros_like(g[:, :, ~keep[0]]), "hidden tokens")


@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_stochastic_and_of_low_rank(causal: bool) -> None:
    """The claim: an attention matrix of rank <= L (bidirectional), whose rows sum to 1, at linear cost."""
    T, L = 12, 3
    a, b = normal(1, 1, 2, T, L).detach(), normal(2, 1, 2, T, L).detach()
    one_hot = torch.eye(T, dtype=torch.float64).expand(1, 2, T, T)
    got = Latte(24, 2, num_latents=L, causal=causal).mix(a, b, one_hot, None)
    close(got, naive_latte_weights(a, b, causal=causal))
    close(got.sum(-1), torch.ones(1, 2, T, dtype=torch.float64))
    assert (got >= 0).all()
    if not causal:
        assert torch.linalg.matrix_rank(got).max() == L


@pytest.mark.parametrize("size", [50.0, 1000.0])
def test_large_logits_in_single_precision(size: float) -> None:
    """Logits that rise and fall by hundreds: plain cumulative sums of exp would give inf / inf or 0 / 0."""
    a, b, v = (normal(n, 1, 2, 90, 4, size=s).detach() for n, s in ((1, 1.0), (2, size), (3, 1.0)))
    want, _ = causal_latte_attention(a, b, v)
    low = [z.float().requires_grad_() for z in (a, b, v)]
    got, state = causal_latte_attention(*low)
    assert (got - want).abs().max() < 1e-3
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.square().sum(), low))
    assert state.averages.abs().max() <= v.abs().max() + 1e-5  # averages of values, whatever the logits are


@torch.no_grad()
def test_the_state_does_not_grow() -> None:
    module = of("latte").build(causal=True)
    states = [module.step(tokens(1, n), module.init_state(1, 1))[1] for n in (1, 300)]
    assert [[t.untyped_storage().nbytes() for t in s] for s in states] == [[8 * 6 * 5 * 4, 8 * 6 * 5]] * 2


def test_the_module_is_the_function() -> None:
    for causal in (False, True):
        module, x = of("latte").build(causal=causal), tokens(1, 5)
        assert module.q_proj.weight.shape == (6 * 5, 24)

        def heads(z: Tensor) -> Tensor:
            return z.unflatten(-1, (6, -1)).transpose(1, 2)

        a, b, v = heads(module.q_proj(x)), heads(module.k_proj(x)), heads(module.v_proj(x))
        want = naive_latte(a, b, v, causal=causal).transpose(1, 2).flatten(2)
        close(module(x), module.o_proj(want))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"num_latents is too small \(got 0\); expected an int >= 1"):
        Latte(8, 2, num_latents=0)
    with pytest.raises(
        ValueError, match=r"b has the wrong shape \(got \(1, 1, 4, 2\)\); expected \(B = 1, H = 1, T = 3, L = 2\)"
    ):
        causal_latte_attention(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    with pytest.raises(
        ValueError, match=r"b has the wrong shape \(got \(1, 1, 4, 3\)\); expected \(B = 1, H = 1, S, L = 2\)"
    ):
        latte_attention(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 2))
    with pytest.raises(ValueError, match=r"a has the wrong shape \(got \(1, 3, 2\)\); expected \(B, H, T, L\)"):
        latte_attention(torch.zeros(1, 3, 2), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    with pytest.raises(ValueError, match="gqa"):
        regard.create("latte", dim=8, num_heads=4, num_kv_heads=2)
