"""What is true of ReBased alone; its map is in test_features.py."""

import torch

import regard
from regard.laws.agreement import close


@torch.no_grad()
def test_weights_are_squares_and_may_be_zero() -> None:
    torch.manual_seed(0)
    layer = regard.create("rebased", dim=8, num_heads=2, dtype=torch.float64)
    for phi in (layer.q_map, layer.k_map):
        phi.norm.weight.normal_()
        phi.norm.bias.normal_()
    q, k = torch.randn(2, 1, 2, 6, 4, dtype=torch.float64)
    u_q, u_k = layer.q_map.norm(q), layer.k_map.norm(k)
    square = (u_q @ u_k.mT) ** 2 / 4
    weights = layer.mix(q, k, torch.eye(6).double().expand(1, 2, -1, -1), None)
    close(weights, square / square.sum(-1, keepdim=True))
    layer.k_map.norm.bias.copy_(-layer.k_map.norm.weight * torch.nn.functional.layer_norm(k[0, 0, 3], (4,)))
    weights = layer.mix(q, k, torch.eye(6).double().expand(1, 2, -1, -1), None)
    assert weights[0, 0, :, 3].abs().max() < 1e-20
    assert weights[0, 0, :, 2].min() > 1e-6
