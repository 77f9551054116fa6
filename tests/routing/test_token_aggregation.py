"""Token aggregation: the authors' numbers (A111), and loops whose author has read neither the code nor this test."""

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.routing import TokenAggregation, group_attention
from regard.routing.token_aggregation import sorted_groups
from routing import naive_token_aggregation as naive
from vision.shared import filled, leaves, normal, vectors

CASES = ("eval", "one", "train", "first")
OURS = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "irca_attn.to_k.weight": "center_k_proj.weight",
    "irca_attn.to_v.weight": "center_v_proj.weight",
    "iasa_attn.to_q.weight": "q_proj.weight",
    "iasa_attn.to_k.weight": "k_proj.weight",
    "iasa_attn.to_v.weight": "v_proj.weight",
    "iasa_attn.proj.weight": "o_proj.weight",
    "conv1x1.weight": "conv.weight",
}
FEED = {
    "norm.weight": "ffn_norm_w",
    "norm.bias": "ffn_norm_b",
    "fn.fc1.weight": "fc1_w",
    "fn.fc1.bias": "fc1_b",
    "fn.dwconv.depthwise_conv.0.weight": "dw_w",
    "fn.dwconv.depthwise_conv.0.bias": "dw_b",
    "fn.fc2.weight": "fc2_w",
    "fn.fc2.bias": "fc2_b",
}


def built(z: dict[str, Tensor]) -> TokenAggregation:
    """The layer of a case, its centres and whether it trains."""
    weights = {ours: z[f"P_{theirs}"] for theirs, ours in OURS.items()}
    layer = TokenAggregation(
        z["x"].shape[1],
        int(z["heads"]),
        qk_dim=len(weights["q_proj.weight"]),
        num_centers=len(z["means_before"]),
        group_size=int(z["group_size"]),
        num_iters=int(z["n_iter"]),
        ema_decay=float(z["decay"]),
    ).double()
    layer.load_state_dict(weights | {"means": z["means_before"], "initted": z["initted"].bool()})
    return layer.train(bool(z["training"]))


@pytest.mark.parametrize("case", CASES)
def test_gives_the_authors_numbers(case: str) -> None:
    """Theirs adds the residual and the feed-forward part, here that of the loops."""
    z = vectors("A111", case)
    layer, (x,) = built(z), leaves(z["x"])
    y = x + layer(x)
    feed = {}
    for theirs, ours in FEED.items():
        w = z[f"P_mlp.{theirs}"]
        feed[ours] = w[:, 0] if ours == "dw_w" else w
    y = y + naive.feed_forward(y, feed)
    close(y, z["y"])
    wanted = [x, layer.q_proj.weight, layer.center_k_proj.weight, layer.center_v_proj.weight]
    for got, name in zip(torch.autograd.grad((y * z["w"]).sum(), wanted), ("x", "Wq", "Wkc", "Wvc"), strict=True):
        close(got, z[f"g{name}"])
    close(layer.means, z["means_after"])
    assert bool(layer.initted) == bool(z["training"] or z["initted"])


def plain(layer: TokenAggregation) -> dict[str, Tensor]:
    """Its parameters under the loops' names."""
    names = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    names |= {"center_k_proj": "wkc", "center_v_proj": "wvc"}
    found = {short: getattr(layer, name).weight for name, short in names.items()}
    return found | {"conv": layer.conv.weight[:, :, 0, 0], "norm_w": layer.norm.weight, "norm_b": layer.norm.bias}


def looped(layer: TokenAggregation, x: Tensor, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = {"heads": layer.num_heads, "group_size": layer.group_size, "iters": layer.num_iters}
    options |= {"decay": layer.ema_decay, "training": layer.training}
    return naive.aggregate(x, plain(layer), layer.means.clone(), bool(layer.initted), **(options | changes))


@pytest.mark.parametrize(("training", "initted"), [(True, False), (True, True), (False, True)])
def test_equals_the_loops(training: bool, initted: bool) -> None:
    """5 x 3 tokens in runs of 4 leave one place over; 2 x 4 in one run of 8; 3 x 3 in runs of 8 are too few."""
    for size, group in (((5, 3), 4), ((2, 4), 50), ((3, 3), 8)):
        layer = filled(TokenAggregation(4, 2, qk_dim=2, num_centers=3, group_size=group, num_iters=2, ema_decay=0.6))
        layer.train(training).initted.fill_(initted)
        (x,) = leaves(normal(1, 2, 4, *size))
        want, means, _ = looped(layer, x)
        got = layer(x)
        close(got, want)
        close(layer.means, means)
        wanted = [x, *layer.parameters()]
        g = normal(2, *got.shape)
        for one, other in zip(*(torch.autograd.grad((z * g).sum(), wanted) for z in (got, want)), strict=True):
            close(one, other)


def test_mutants_of_the_loops_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = filled(TokenAggregation(4, 2, num_centers=3, group_size=4)), normal(1, 1, 4, 3, 3)
    layer.initted.fill_(True)
    got, softmax = layer(x), naive.softmax
    close(got, looped(layer, x)[0])
    assert (looped(layer, x, group_size=3)[0] - got).abs().max() > 1e-3
    for mutant in (lambda s: softmax([-z for z in s]), lambda s: softmax([z / 2 for z in s])):
        monkeypatch.setattr(naive, "softmax", mutant)
        assert (looped(layer, x)[0] - got).abs().max() > 1e-3


def test_groups_are_runs_of_the_stable_order() -> None:
    queries, keys, real = sorted_groups(torch.tensor([[1, 0, 1, 0, 0, 1, 0]]), 3)
    assert queries[0].tolist() == [[1, 3, 4], [6, 0, 2], [5, 5, 2]]
    assert keys[0].tolist() == [[1, 3, 4, 6, 0, 2], [6, 0, 2, 5, 5, 2], [5, 5, 2, 0, 6, 4]]
    assert real is None


def textures() -> tuple[Tensor, Tensor]:
    """A checkerboard of 2 x 2 patches of two textures on a map of 8 x 8, and which one each place has."""
    at = torch.arange(8) // 2
    which = (at[:, None] + at) % 2
    colours = torch.tensor([[2.0, -1, 0, -1], [-1, 0, 2, -1]], dtype=torch.float64)
    x = colours[which].movedim(-1, 0)[None] + 0.1 * normal(3, 1, 4, 8, 8)
    return x, which.flatten()


def test_a_token_sees_its_own_texture_across_the_map() -> None:
    """Two centres tell the textures apart after some training; runs of 16 then see 32 of 64 places, all of theirs."""
    x, which = textures()
    layer = TokenAggregation(4, 2, num_centers=2, group_size=16, num_iters=5).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1)) if p.dim() > 1 else None
    for _ in range(3):
        layer.train()(x)
    (x,) = leaves(x)
    found = []
    y = layer.eval()(x)
    for place in (0, 2):  # one of each texture, in the first row
        seen = torch.autograd.grad(y[0, :, 0, place].sum(), x, retain_graph=True)[0].ne(0).any(1).flatten()
        found.append(seen)
        assert seen.sum() < 50, "not the whole map"
        far = seen.view(8, 8)[4:, 4:]
        assert far.any(), "across the map"
    first = found[0] if (layer.norm(x.flatten(2).mT)[0, 0] @ layer.means.mT).argmax() == 0 else found[1]
    assert first.sum() == 32
    assert len(set(which[first].tolist())) == 1, "of one texture alone"


def test_evaluation_knows_no_batch_and_moves_nothing() -> None:
    layer, x = filled(TokenAggregation(4, 2, num_centers=3, group_size=4, num_iters=2)), normal(1, 2, 4, 3, 4)
    alone = layer(x[:1])
    close(layer(x)[:1], alone, "before any training, too")
    layer.train()
    mixed = layer(x)
    assert layer.initted
    layer.initted.fill_(False)
    assert (layer(x[:1]) - mixed[:1]).abs().max() > 1e-3, "training couples images"
    layer.eval()
    held = layer.means.clone()
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    assert torch.equal(held, layer.means)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 1, 1), (1, 4, 1, 9)])
@pytest.mark.parametrize("training", [False, True])
def test_small_and_empty_maps(shape: tuple[int, ...], training: bool) -> None:
    layer = regard.create("token_aggregation", dim=4, num_heads=2, num_centers=7, group_size=8).train(training)
    (x,) = leaves(normal(1, *shape).float())
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    for z in (y, x.grad, layer.means):
        assert z is not None
        assert z.isfinite().all()
    assert bool(layer.initted) == (training and x.numel() > 0)


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = regard.create("token_aggregation", dim=40, num_heads=4, qk_dim=36)
    for name in ("q_proj", "center_k_proj", "v_proj", "o_proj"):
        assert 0.018 < float(getattr(layer, name).weight.detach().std()) < 0.022
    assert 0.9 < float(layer.means.std()) < 1.1
    assert not layer.initted


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"qk_dim is no multiple of num_heads = 4 \(got 6\)"):
        TokenAggregation(8, 4, qk_dim=6)
    with pytest.raises(ValueError, match=r"dim .*\(got 7\)"):
        TokenAggregation(7, 2)
    with pytest.raises(ValueError, match=r"num_centers is too small \(got 0\)"):
        TokenAggregation(8, 4, num_centers=0)
    with pytest.raises(ValueError, match=r"ema_decay is out of range \(got 1.5\)"):
        TokenAggregation(8, 4, ema_decay=1.5)
    with pytest.raises(ValueError, match=r"x has the wrong shape"):
        TokenAggregation(8, 4)(normal(0, 2, 8, 5))
    with pytest.raises(ValueError, match=r"group_attention: size is too small"):
        group_attention(*normal(0, 3, 1, 2, 5, 4), torch.zeros(1, 5, dtype=torch.long), size=0)
