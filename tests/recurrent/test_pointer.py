"""The pointer head against loops over steps and inputs, and numbers of a public implementation (A190, case a)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from recurrent.naive_pointer import naive_pointer
from regard.laws.agreement import close, close_all, run
from regard.laws.subject import tokens
from regard.recurrent import PointerAttention, pointer_log_probs

VECTORS = Path(__file__).parents[1] / "vectors" / "A190.npz"


def head(dim: int, **options: int) -> PointerAttention:
    torch.manual_seed(3)
    layer = PointerAttention(dim, **options).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


class Naive(nn.Module):
    def __init__(self, layer: PointerAttention) -> None:
        super().__init__()
        self.k_proj, self.q_proj, self.score = layer.k_proj, layer.q_proj, layer.score

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return naive_pointer(context, x, self.k_proj.weight, self.q_proj.weight, self.score)


def test_gives_the_numbers_of_the_public_code() -> None:
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith("a_")}
    e, d = z["e"].requires_grad_(), z["d"].requires_grad_()
    p = pointer_log_probs(d @ z["W2"].T + z["b2"], e @ z["W1"].T + z["b1"], z["v"]).exp()
    close(p.detach(), z["p"])
    got = torch.autograd.grad((p * z["w"]).sum(), (e, d))
    close(got[0], z["grad_e"])
    close(got[1], z["grad_d"])


@pytest.mark.parametrize(("T", "S", "hidden"), [(1, 1, 3), (3, 7, 5), (4, 2, 1)])
def test_equals_the_loops(T: int, S: int, hidden: int) -> None:
    layer = head(5, context_dim=4, hidden=hidden)
    given = tokens(2, T, dim=5), tokens(2, S, dim=4, seed=7)
    close_all(run(layer, *given), run(Naive(layer), *given))


def test_forbidden_inputs_equal_the_loops() -> None:
    layer = head(5)
    x, context = tokens(2, 3, dim=5), tokens(2, 6, dim=5, seed=4)
    pairs = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    pairs[..., 2] = True
    weights = (layer.k_proj.weight, layer.q_proj.weight, layer.score)
    close(layer(x, context, mask=pairs), naive_pointer(context, x, *weights, keep=pairs))
    keep = pairs[:, 0]
    for mask in (keep, keep[:, None, None], regard.masks.padding(keep)):
        close(layer(x, context, mask=mask), naive_pointer(context, x, *weights, keep=keep))


def test_probabilities_follow_the_input_length() -> None:
    """The same parameters point at 5 inputs or at 50, each time with probabilities that sum to 1."""
    layer = head(4)
    for S in (5, 50):
        p = layer(tokens(2, 3, dim=4), tokens(2, S, dim=4)).exp()
        assert p.shape == (2, 3, S)
        close(p.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_order_of_inputs_is_free() -> None:
    layer, x, context = head(4), tokens(2, 3, dim=4), tokens(2, 6, dim=4, seed=5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(layer(x, context[:, order]), layer(x, context)[..., order])


def test_hidden_inputs_cannot_poison() -> None:
    layer, x, context = head(4), tokens(2, 3, dim=4), tokens(2, 6, dim=4, seed=5)
    keep = (torch.arange(6) < 4).expand(2, 6)
    poisoned = context.clone()
    poisoned[:, 4:] = torch.nan
    for one in (keep, keep[:, None].expand(2, 3, 6)):
        got = layer(x, poisoned, mask=one) if one is keep else layer(x, context, mask=one)
        close(got[..., :4], layer(x, context[:, :4]))
        assert (got[..., 4:] == -torch.inf).all()


def test_nan_reaches_the_steps_that_see_it() -> None:
    layer, x, context = head(4), tokens(2, 3, dim=4), tokens(2, 6, dim=4, seed=5)
    x[0, 1, 0] = torch.nan
    context[1, 2, 0] = torch.inf
    got = layer(x, context).isnan()
    assert got[0, 1].all()
    assert not got[0, [0, 2]].any()
    assert got[1].all()
    pairs = torch.ones(2, 3, 6, dtype=torch.bool)
    pairs[1, 0, 2] = False
    got = layer(x, context, mask=pairs)
    assert got[1, 0, [0, 1, 3, 4, 5]].isfinite().all()
    assert got[1, 1:].isnan().all()


def test_nothing_to_point_at() -> None:
    layer = head(4)
    mask = torch.zeros(1, 6, dtype=torch.bool)
    x = tokens(1, 3, dim=4).requires_grad_()
    out = layer(x, tokens(1, 6, dim=4), mask=mask)
    assert (out == -torch.inf).all()
    (grad,) = torch.autograd.grad(out.exp().sum(), x)
    assert not grad.any()
    assert layer(x, tokens(1, 0, dim=4)).shape == (1, 3, 0)


def test_bad_input_raises() -> None:
    layer, x, context = head(4), tokens(2, 3, dim=4), tokens(2, 6, dim=4)
    with pytest.raises(ValueError, match=r"hidden is too small \(got 0\); expected an int >= 1"):
        PointerAttention(4, hidden=0)
    with pytest.raises(ValueError, match=r"context has .*\(got \(2, 6, 5\)\); expected \(B = 2, S, C = 4\)"):
        layer(x, tokens(2, 6, dim=5))
    with pytest.raises(ValueError, match=r"context has .*\(got \(1, 6, 4\)\); expected \(B = 2, S, C = 4\)"):
        layer(x, context[:1])
    with pytest.raises(ValueError, match=r"mask has the wrong shape \(got \(2, 3, 5\)\); .* \(B = 2, T = 3, S = 6\)"):
        layer(x, context, mask=torch.ones(2, 3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask can only hide keys"):
        layer(x, context, mask=regard.masks.causal())
    with pytest.raises(ValueError, match="causal"):
        regard.create("pointer", dim=4, num_heads=2, causal=True)
