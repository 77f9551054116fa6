"""Point Transformer against loops, torch_geometric, and numbers (A032) of both code bases."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from graph.naive_point import naive_point
from regard.graph.point_transformer import PointTransformer, nearest, vector_attention
from regard.laws.agreement import close
from regard.laws.subject import perturb

VECTORS = Path(__file__).parents[1] / "vectors" / "A032.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k[2:]: torch.from_numpy(file[k]) for k in file if k[0] == case}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(seed: int, dim: int, **options) -> PointTransformer:
    torch.manual_seed(seed)
    made = PointTransformer(dim, **options).double()
    perturb(made, seed)
    return made


def mlp(module: nn.Module) -> list[Tensor]:
    return [*module[0].parameters(), *module[2].parameters()]


@pytest.mark.parametrize("share", [1, 2, 6])
@pytest.mark.parametrize("self_loops", [True, False])
def test_equals_the_loops(share: int, self_loops: bool) -> None:
    """Output and gradients of features, positions and parameters; point 6 has no edge."""
    made = layer(1, 6, share=share, self_loops=self_loops)
    x, pos = normal(2, 7, 6).requires_grad_(), normal(3, 7, 3).requires_grad_()
    edges = torch.tensor([[0, 1, 2, 2, 5, 3, 4, 4, 0], [1, 2, 0, 2, 3, 4, 5, 3, 1]])
    used = [tuple(e) for e in edges.T.tolist()]
    if self_loops:
        used = [(j, i) for j, i in used if j != i] + [(i, i) for i in range(7)]
    weights = made.q_proj.weight, made.k_proj.weight, made.v_proj.weight
    want = naive_point(x, x, pos, pos, used, *weights, mlp(made.theta), mlp(made.gamma))
    wanted, w = [x, pos, *made.parameters()], normal(4, 7, 6)
    results = []
    for out in (made(x, edges, pos), want):
        results.append([out.detach(), *torch.autograd.grad(out, wanted, w)])
    for n, (got, right) in enumerate(zip(*results)):
        close(got, right, str(n))


@pytest.mark.parametrize("case", ["P", "Q"])
def test_gives_the_librarys_numbers(case: str) -> None:
    """P: one set of points; Q: sources and targets are two, and target 3 has no edge."""
    z = vectors(case)
    names = [n for n in ("x_src", "pos_src", "x_dst", "pos_dst") if n in z]
    for n in names:
        z[n].requires_grad_()
    x_dst, pos_dst = z.get("x_dst", z["x_src"]), z.get("pos_dst", z["pos_src"])

    def made(name: str) -> nn.Module:
        W1, b1, W2, b2 = (nn.Parameter(z[f"{name}_{n}"]) for n in ("W1", "b1", "W2", "b2"))
        first, last = (nn.Linear(*W.shape[::-1]) for W in (W1, W2))
        first.weight, first.bias, last.weight, last.bias = W1, b1, W2, b2
        return nn.Sequential(first, nn.ReLU(), last)

    theta, gamma, (j, i) = made("theta"), made("gamma"), z["edge_index"]
    delta = theta(pos_dst[i] - z["pos_src"][j])
    q, k, v = x_dst @ z["W_q"].T, z["x_src"] @ z["W_k"].T, z["x_src"] @ z["W_v"].T
    out = vector_attention(q, k, v, delta, gamma, z["edge_index"])
    close(out.detach(), z["out"])
    if case == "Q":
        assert not out[3].any()
    for name, got in zip(names, torch.autograd.grad(out, [z[n] for n in names], z["w"])):
        close(got, z["grad_" + name], name)
    edges = [tuple(e) for e in z["edge_index"].T.tolist()]
    weights = z["W_q"], z["W_k"], z["W_v"]
    want = naive_point(z["x_src"], x_dst, z["pos_src"], pos_dst, edges, *weights, mlp(theta), mlp(gamma))
    close(want, z["out"])


def test_gives_the_first_authors_numbers() -> None:
    """Their layer has batch norms in its MLPs, weights shared by strided channels, and signs reversed."""
    z = vectors("R")
    theta = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 6)).double().eval()
    gamma = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2))
    gamma = gamma.double().eval()
    for module, name in ((theta, "linear_p."), (gamma, "linear_w.")):
        own = {k.removeprefix(name): t for k, t in z.items() if k.startswith(name)}
        module.load_state_dict(own, strict=False)
    q, k, v = (z["x"].requires_grad_() @ z[f"linear_{n}.weight"].T + z[f"linear_{n}.bias"] for n in "qkv")
    n, neighbours = z["knn_idx"].shape
    j, i = z["knn_idx"].flatten(), torch.arange(n).repeat_interleave(neighbours)
    out = vector_attention(-q, -k, v, theta(z["pos"][j] - z["pos"][i]), gamma, torch.stack([j, i]))
    close(out.detach(), z["out"])
    close(torch.autograd.grad(out, z["x"], z["w"])[0], z["grad_x"])


@pytest.mark.parametrize("self_loops", [True, False])
def test_equals_torch_geometric(self_loops: bool) -> None:
    geometric = pytest.importorskip("torch_geometric")
    made = layer(3, 24, self_loops=self_loops)
    theirs = geometric.nn.PointTransformerConv(
        24, 24, pos_nn=made.theta, attn_nn=made.gamma, add_self_loops=self_loops
    ).double()
    # The library resets the modules that it is handed.
    torch.manual_seed(1)
    perturb(made, 1)
    theirs.load_state_dict(regard.layer_state(made, like=theirs))
    x, pos = normal(4, 9, 24), normal(5, 9, 3)
    edges = torch.randint(9, (2, 30), generator=torch.Generator().manual_seed(5))
    close(made(x, edges, pos), theirs(x, pos, edges))


# What the paper says of it


def test_moves_and_order_change_nothing() -> None:
    made, x, pos = layer(1, 6), normal(2, 10, 6), normal(3, 10, 3)
    edges = nearest(pos, 4)
    want = made(x, edges, pos)
    close(made(x, edges, pos + 3.7), want)
    order = torch.randperm(10)
    close(made(x[order], nearest(pos[order], 4), pos[order]), want[order])


def test_constant_weights_give_the_neighbours_mean() -> None:
    made, x, pos = layer(1, 6), normal(2, 10, 6), normal(3, 10, 3)
    with torch.no_grad():
        made.gamma[2].weight.zero_()
    edges = nearest(pos, 4)
    j, i = edges
    values = made.v_proj(x)[j] + made.theta(pos[i] - pos[j])
    close(made(x, edges, pos), values.view(10, 4, 6).mean(1))


@torch.no_grad()
def test_channels_look_at_different_neighbours() -> None:
    """All channels hold the same numbers, and one softmax for all would leave them so; here the channels disagree."""
    made, x, pos = layer(1, 12), normal(2, 10, 1).expand(-1, 12), normal(3, 10, 3)
    made.v_proj.weight.copy_(torch.eye(12))
    made.theta[2].weight.zero_()
    made.theta[2].bias.zero_()
    edges = nearest(pos, 4)
    assert made(x, edges, pos).std(1).min() > 1e-3
    j, i = edges
    r = made.gamma(made.q_proj(x)[i] - made.k_proj(x)[j]).view(10, 4, 12)
    favourite = r.argmax(1)
    assert (favourite != favourite[:, :1]).any(1).float().mean() > 0.5


def test_nearest() -> None:
    pos, cloud = normal(1, 20, 3), torch.arange(20) % 2
    for rows in (1024, 7):
        source, target = nearest(pos, 5, cloud=cloud, rows=rows)
        assert torch.equal(target, torch.arange(20).repeat_interleave(5))
        for point in range(20):
            own = [n for n in range(20) if n % 2 == point % 2]
            ranked = sorted(own, key=lambda n: float((pos[n] - pos[point]).norm()))
            assert source[target == point].tolist() == ranked[:5]
            assert ranked[0] == point
    with pytest.raises(ValueError, match=r"k exceeds the points of a cloud \(got 11\)"):
        nearest(pos, 11, cloud=cloud)
    for k, words in ((0, "too small"), (21, "too large")):
        with pytest.raises(ValueError, match=rf"k is {words} \(got {k}\); expected an int from 1 to 20"):
            nearest(pos, k)


# Policies


def test_bad_points_reach_their_neighbours_only() -> None:
    made, x, pos = layer(1, 6), normal(2, 10, 6), normal(3, 10, 3)
    edges = nearest(pos, 3)
    x[4] = float("nan")
    hit = [bool(((edges[0] == 4) & (edges[1] == n)).any()) for n in range(10)]
    assert made(x, edges, pos).isnan().any(-1).tolist() == hit


def test_gradcheck() -> None:
    made, x, pos = layer(1, 4, share=2), normal(2, 5, 4).requires_grad_(), normal(3, 5, 3)
    edges = nearest(pos, 3)
    assert torch.autograd.gradcheck(made, (x, edges, pos.requires_grad_()))


def test_bad_input() -> None:
    made, x, pos = layer(1, 6), normal(2, 10, 6), normal(3, 10, 3)
    edges = nearest(pos, 3)
    with pytest.raises(ValueError, match=r"nodes has the wrong shape \(got \(10, 3\)\); expected \(N, M = 6\)"):
        made(x[:, :3], edges, pos)
    with pytest.raises(ValueError, match=r"pos has the wrong shape \(got \(10, 2\)\); expected \(N = 10, P = 3\)"):
        made(x, edges, pos[:, :2])
    with pytest.raises(ValueError, match=r"edge_index names unknown nodes \(got .* expected 0 to 4"):
        made(x[:5], edges, pos[:5])
    with pytest.raises(ValueError, match=r"dim is no multiple of share = 4 \(got 6\)"):
        PointTransformer(6, share=4)
