"""The loss between orders against loops over samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.laws.agreement import close
from regard.vision import OrderDiversity
from vision import naive_high_order
from vision.shared import filled, leaves, normal


def oracle(layer: OrderDiversity, features: Tensor) -> Tensor:
    norms = []
    for norm in (layer.first_norm, layer.second_norm):
        frozen = () if layer.training else (norm.running_mean, norm.running_var)
        norms.append((norm.weight, norm.bias, *frozen))
    weights = (layer.first.weight, norms[0], layer.second.weight, layer.second.bias, norms[1])
    return naive_high_order.order_diversity(features, layer.orders, *weights, training=layer.training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("orders", [2, 4])
def test_equals_the_loops(orders: int, training: bool) -> None:
    layer = filled(OrderDiversity(5, orders=orders, hidden=6)).train(training)
    (features,) = leaves(normal(1, 3 * orders, 5))
    inputs = [features, *layer.parameters()]
    want = oracle(layer, features)
    wanted = torch.autograd.grad(want, inputs)
    got = layer(features)
    close(got, want)
    for g, w in zip(torch.autograd.grad(got, inputs), wanted, strict=True):
        close(g, w)


def test_only_what_features_get_is_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = filled(OrderDiversity(5, orders=2, hidden=6))
    (features,) = leaves(normal(1, 6, 5))
    inputs = [features, *layer.parameters()]
    reverse, *ours = torch.autograd.grad(layer(features), inputs)
    monkeypatch.setattr(naive_high_order, "reverse_gradient", lambda v: v)
    plain, *theirs = torch.autograd.grad(oracle(layer, features), inputs)
    close(reverse, -plain)
    assert plain.abs().max() > 1e-3
    for g, w in zip(ours, theirs, strict=True):
        close(g, w)


def distance(features: Tensor) -> float:
    one, other = F.normalize(features.detach(), dim=-1).unflatten(0, (2, -1))
    return float((one - other).norm(dim=-1).mean())


def test_features_move_apart_while_the_encoder_resists() -> None:
    """Descent on the one loss: features of two orders go apart, and an encoder alone brings their codes together."""
    torch.manual_seed(0)
    start = torch.randn(8, 6).repeat(2, 1) + 0.1 * torch.randn(16, 6)
    features = start.clone().requires_grad_()
    layer = OrderDiversity(6, orders=2, hidden=16)
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        layer(features).backward()
        optimizer.step()
    assert distance(features) > 3 * distance(start)
    moved = features.detach()
    optimizer, first = torch.optim.Adam(layer.parameters(), lr=0.01), float(layer(moved).detach())
    for _ in range(60):
        optimizer.zero_grad()
        layer(moved).backward()
        optimizer.step()
    assert float(layer(moved).detach()) < 0.8 * first


def test_checkpoints_normalise_as_the_first_pass_did() -> None:
    found = []
    for again in (False, True):
        layer = filled(OrderDiversity(5, orders=2, hidden=6)).train()
        (features,) = leaves(normal(1, 6, 5))
        out = checkpoint(layer, features, use_reentrant=False) if again else layer(features)
        out.backward()
        found.append([out, features.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"orders is too small \(got 1\)"):
        OrderDiversity(5, orders=1)
    layer = OrderDiversity(5, orders=2)
    for number in (0, 3):
        with pytest.raises(ValueError, match=rf"features are no samples .*\(got \({number}, 5\)\); expected 2 B rows"):
            layer(torch.zeros(number, 5))
