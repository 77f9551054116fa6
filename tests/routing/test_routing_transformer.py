"""Routing attention against loops over clusters, a released code's numbers (A005), and full attention."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize
from torch.utils.checkpoint import checkpoint

import regard
from regard import masks
from regard.laws.agreement import close
from regard.laws.subject import tokens
from regard.routing import RoutingAttention
from regard.routing.clusters import clustered_attention, gathered_tokens, nearest
from routing.naive_routing_transformer import naive_official_centroids, naive_routes, naive_routing_transformer

VECTORS = Path(__file__).parents[1] / "vectors" / "A005.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def exact(out: Tensor, routes: list, eps: float) -> Tensor:
    """The loops divide by the count + eps; the exact mean divides by the count."""
    scale = torch.ones(out.shape[:3], dtype=out.dtype)
    for b, h in np.ndindex(*out.shape[:2]):
        for t in range(out.shape[2]):
            count = sum(t in cluster for cluster in routes[b][h])
            scale[b, h, t] = (count + eps) / count if count else 1.0
    return out * scale[..., None]


def routed(q: Tensor, k: Tensor, v: Tensor, means: Tensor, size: int, *, causal: bool, keep: Tensor | None) -> Tensor:
    """The layer's routing heads, as the authors do it."""
    x, y = (layer_norm(z, z.shape[-1:], eps=1e-6) for z in (q, k))
    y = x if causal else y
    queries, keys = (nearest(z, means, size=size, keep=keep) for z in (x, y))
    return clustered_attention(x, y, v, queries, keys, causal=causal, keep=keep, scale=1.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("T", "C", "size", "padded"), [(9, 2, 4, False), (7, 3, 3, True), (5, 4, 9, True), (1, 1, 1, False)]
)
def test_is_the_definition(T: int, C: int, size: int, padded: bool, causal: bool) -> None:
    q, k, v = (normal(n, 2, 3, T, 4).requires_grad_() for n in range(3))
    means = normal(3, 3, C, 4)
    keep = torch.arange(T) < torch.tensor([[T], [max(1, T - 3)]]) if padded else None
    got = routed(q, k, v, means, size, causal=causal, keep=keep)
    want = naive_routing_transformer(q, k, v, means, size, causal=causal, shared=causal, mask=keep)
    routes, _ = naive_routes(q, k, means, size, shared=causal, mask=keep)
    want = exact(want, routes, 1e-2)
    real = torch.ones(2, T, dtype=torch.bool) if keep is None else keep
    real = real[:, None, :, None]
    close(torch.where(real, got, 0.0), torch.where(real, want, 0.0), "out")
    g = normal(4, *got.shape) * real
    grads = [torch.autograd.grad((o * g).sum(), (q, k, v), allow_unused=True) for o in (got, want)]
    for mine, theirs, name in zip(*grads, "qkv", strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            close(mine, theirs, f"gradient of {name}")


def test_gives_a_released_codes_numbers() -> None:
    """Routing by unit vectors, attention by the raw ones: the case without memory slots and with its own keys.

    That code lets padding compete for places, so a row without any is compared.
    """
    z = vectors("c3")
    q, k, v = (z[n][z["mask"].all(1)].clone().requires_grad_() for n in "qkv")
    size = int(z["window"])
    routes = [nearest(normalize(one, dim=-1), z["means"], size=size) for one in (q, k)]
    out = clustered_attention(q, k, v, *routes)
    count = (
        torch.zeros(out.shape[:3])
        .double()
        .scatter_add(2, routes[0].flatten(2), torch.ones(routes[0].flatten(2).shape).double())
    )
    out = out * (count / (count + 1e-5))[..., None]
    assert len(out) == 1
    close(out.detach(), z["out"][z["mask"].all(1)])


@pytest.mark.parametrize("case", ["c1", "c2", "c4"])
def test_tokens_gather_as_in_a_released_code(case: str) -> None:
    """The direction of their sum is its new centroid, of queries and keys together."""
    z = vectors(case)
    parts = [z["q"]] if bool(z["shared"]) else [z["q"], z["k"]]
    found = [gathered_tokens(normalize(one, dim=-1), z["means"]) for one in parts]
    counts, sums = (sum(one) for one in zip(*found, strict=True))
    want = torch.where(counts[..., None] > 0, normalize(sums, dim=-1), z["means"])
    close(want, z["means_new"])


def test_one_cluster_of_all_tokens_is_full_attention() -> None:
    q, k, v = (normal(n, 2, 3, 8, 4) for n in range(3))
    for causal in (True, False):
        x, y = (layer_norm(z, (4,), eps=1e-6) for z in (q, k))
        y = x if causal else y
        want = regard.attention(x, y, v, scale=1.0, mask=masks.causal() if causal else None)
        close(routed(q, k, v, normal(3, 3, 1, 4), 8, causal=causal, keep=None), want)


def test_pairs_grow_as_the_length_to_one_and_a_half() -> None:
    """16 clusters of 16 tokens for 256: 4096 of 65536 pairs."""
    x, means = normal(0, 1, 1, 256, 8), normal(1, 1, 16, 8)
    index = nearest(x, means, size=16)
    assert index.shape == (1, 1, 16, 16)
    assert index.numel() * index.shape[3] == 4096
    assert index.diff(dim=-1).gt(0).all()
    made = RoutingAttention(8, 1, clusters=16, size=16, num_local_heads=0).double().eval()
    weights = made.mix(x, normal(2, 1, 1, 256, 8), torch.eye(256).double()[None, None], None)
    assert 1024 < weights.count_nonzero() <= 4096  # a pair that meets in two clusters counts once


def layer(causal: bool, **options) -> RoutingAttention:
    torch.manual_seed(3)
    return RoutingAttention(24, 6, causal=causal, clusters=3, size=5, window=3, **options).double()


@pytest.mark.parametrize("causal", [True, False])
def test_half_of_the_heads_are_local(causal: bool) -> None:
    module, x = layer(causal).eval(), tokens()
    got = []
    module.o_proj.register_forward_pre_hook(lambda _, given: got.append(given[0].unflatten(-1, (6, 4)).transpose(1, 2)))
    module(x)
    q, k, v = module.split(x, x)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    near = ((i - j).abs() < 3) & ((j <= i) | (not causal))
    weights = (q[:, :3] @ k[:, :3].mT / 2).masked_fill(~near, -torch.inf).softmax(-1)
    close(got[0][:, :3], weights @ v[:, :3], "local heads")
    want = naive_routing_transformer(q[:, 3:], k[:, 3:], v[:, 3:], module.centroids, 5, causal=causal, shared=causal)
    routes, _ = naive_routes(q[:, 3:], k[:, 3:], module.centroids, 5, shared=causal)
    close(got[0][:, 3:], exact(want, routes, 1e-2), "routing heads")


@pytest.mark.parametrize("causal", [True, False])
def test_all_heads_may_route(causal: bool) -> None:
    module, x = layer(causal, num_local_heads=0).eval(), tokens()
    assert [name for name, _ in module.named_parameters()].count("k_proj.weight") == (not causal)
    q, k, v = module.split(x, x)
    routes, _ = naive_routes(q, k, module.centroids, 5, shared=causal)
    want = naive_routing_transformer(q, k, v, module.centroids, 5, causal=causal, shared=causal)
    close(module(x), module.merge(exact(want, routes, 1e-2)))


def test_causal_layers_share_one_projection() -> None:
    assert layer(True).k_proj.weight.shape == (12, 24)
    assert layer(False).k_proj.weight.shape == (24, 24)
    q, k, _ = layer(True).split(tokens(), tokens())
    assert torch.equal(q[:, 3:], k[:, 3:])


def test_no_value_of_a_later_token_reaches_an_earlier_output() -> None:
    """Whatever the routes: the derivative is exactly 0. The routes themselves do depend on later tokens."""
    module, x = layer(True).eval(), tokens(1).requires_grad_()
    for t in range(12):
        grad = torch.autograd.grad(module(x)[0, t].sum(), x)[0][0]
        assert not grad[t + 1 :].any()
    other = x.detach().clone()
    other[:, 9:] *= -3
    changed = (module(other) - module(x)).abs().amax(-1)[0]
    assert changed[:9].gt(0).any(), "no route changed: the test shows nothing"


@pytest.mark.parametrize("causal", [True, False])
def test_centroids_follow_the_tokens_in_training_alone(causal: bool) -> None:
    module, x = layer(causal, decay=0.8), tokens()
    keep = torch.ones(2, 12, dtype=torch.bool)
    counts, sums, means = module.counts.clone(), module.sums.clone(), module.centroids
    module.eval()(x)
    assert torch.equal(module.sums, sums)
    q, k, _ = module.split(x, x)
    absent = k[:, 3:, :0] if causal else k[:, 3:]
    want = naive_official_centroids(q[:, 3:].detach(), absent.detach(), counts, sums, means, decay=0.8)
    module.train()(x, mask=keep)
    for got, expected, name in zip((module.counts, module.sums, module.centroids), want, ("counts", "sums", "means")):
        close(got, expected, name)


def test_padding_moves_no_centroid() -> None:
    one, other, x = layer(True), layer(True), tokens(1)
    one.train()(x, mask=torch.arange(12)[None] < 7)
    other.train()(x[:, :7])
    close(one.centroids, other.centroids)


def test_centroids_find_the_groups_of_tokens() -> None:
    """Tokens around four directions: after some batches every centroid points at one of them."""
    g = torch.Generator().manual_seed(0)
    module = RoutingAttention(8, 2, causal=True, clusters=4, size=4, num_local_heads=1, decay=0.8).double()
    ways = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))[0][:4] * 3
    found = []
    for _ in range(60):
        x = ways[torch.randint(4, (2, 32), generator=g)] + 0.05 * torch.randn(
            2, 32, 8, generator=g, dtype=torch.float64
        )
        q, _, _ = module.split(x, x)
        q = layer_norm(q[:, 1:], (4,), eps=1e-6)
        spread = (q[:, 0, :, None] - module.centroids[0]).norm(dim=-1).amin(-1).mean()
        found.append(float(spread.detach()))
        module.train()(x)
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 0}, r"clusters is too small \(got 0\); expected an int >= 1"),
        ({"num_local_heads": 6}, r"num_local_heads is too large \(got 6\); expected an int from 0 to 5"),
        ({"num_local_heads": -1}, r"num_local_heads is too small \(got -1\); expected an int from 0 to 5"),
        ({"decay": 1.5}, r"decay is out of range \(got 1\.5\); expected a finite number >= 0 and <= 1"),
    ],
)
def test_refuses(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RoutingAttention(24, 6, **options)


def test_checkpoints_of_two_passes() -> None:
    """Both are run once more in one backward, last one first: each with the centroids that it had."""
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        layer = RoutingAttention(8, 2, clusters=2, size=3, num_local_heads=0, decay=0.5).double().train()
        first, second = (normal(n, 2, 7, 8).requires_grad_() for n in (7, 8))
        outs = [checkpoint(layer, x, use_reentrant=False) if again else layer(x) for x in (first, second)]
        (outs[0].square().sum() + outs[1].pow(3).sum()).backward()
        found.append([*outs, first.grad, second.grad, layer.q_proj.weight.grad, layer.counts, layer.sums])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
