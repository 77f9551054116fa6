"""SeqBoat against loops over tokens, whose author has read neither code nor test, the authors' numbers (A110), and what
packing is for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regard
from mixers.naive_seqboat import seqboat as naive
from regard.laws.agreement import close, same
from regard.mixers.seqboat import SeqBoat, SeqBoatState
from regard.mixers.seqboat_attention import compress, extract

VECTORS = Path(__file__).parents[1] / "vectors"
CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "weighting": "softmax", "window": 3},
    "bi": {"window": 4, "post_norm": True},
    "csq": {"causal": True, "window": 3},
    "whole": {"window": 4, "post_norm": True},
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, dim: int = 5, **options: Any) -> SeqBoat:
    layer = SeqBoat(dim, **{"qk_dim": 4, "value_dim": 6, "ema_dim": 2, "window": 2, **options}).double().eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.7 * normal(100 * seed + n, *p.shape))
    return layer


def balanced(layer: SeqBoat, x: Tensor) -> SeqBoat:
    """The router's bias so that about half of these tokens are active."""
    with torch.no_grad():
        odds = layer.routes(x).probs.logit()[..., 1] * layer.temperature.exp()
        layer.hx_proj.bias[1] -= odds.quantile(0.47)
    return layer


def weights(layer: SeqBoat) -> dict[str, Tensor]:
    """By the loops' names; their delta is our alpha, and the reverse."""
    p = dict(layer.named_parameters())
    own = {"norm_w": "norm.weight", "norm_b": "norm.bias", "omega": "omega", "temp": "temperature"}
    own |= {"gamma_qk": "attention.gamma", "beta_qk": "attention.beta", "rel_bias": "attention.table"}
    for name, where in (("hx", ""), ("mx", "attention."), ("h", "attention.")):
        own |= {f"{name}_{kind[0]}": f"{where}{name}_proj.{kind}" for kind in ("weight", "bias")}
    found = {theirs: p[ours] for theirs, ours in own.items() if ours in p}
    for theirs, ours in (("delta", "alpha"), ("alpha", "delta"), ("beta", "beta"), ("gamma", "eta")):
        found[theirs] = p["average." + ours].flatten(0, 1)
    return found


def loops(layer: SeqBoat, x: Tensor, keep: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    part = layer.attention
    options |= {"window": layer.window, "causal": layer.causal, "activation": part.weighting}
    options |= {"position": "rotary" if part.table is None else "relative", "prenorm": not layer.post_norm}
    return naive(x, weights(layer), keep, **options)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("position", ["relative", "rotary"])
@pytest.mark.parametrize("weighting", ["relu2", "softmax"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_loops(causal: bool, weighting: str, position: str, post_norm: bool) -> None:
    """Outputs of real tokens, routes, and the gradients of x and every parameter."""
    layer = filled(3, causal=causal, weighting=weighting, position=position, post_norm=post_norm, max_positions=4)
    x, keep = normal(1, 2, 9, 5).requires_grad_(), torch.arange(9) < torch.tensor([[9], [6]])
    balanced(layer, x)
    want, active, probs = loops(layer, x, keep)
    got = layer(x, mask=keep)
    found = layer.routes(x, mask=keep)
    assert 0 < active.sum() < keep.sum()
    same(found.active, active)
    close(found.probs.detach(), probs.detach())
    close(got.detach()[keep], want.detach()[keep])
    names = ["x", *(name for name, _ in layer.named_parameters())]
    direction = normal(2, 2, 9, 5)[keep]
    grads = [torch.autograd.grad((y[keep] * direction).sum(), [x, *layer.parameters()]) for y in (got, want)]
    for name, g, w in zip(names, *grads, strict=True):
        close(g, w, name)


def vectors(case: str) -> tuple[SeqBoat, dict[str, Tensor]]:
    with np.load(VECTORS / "A110.npz") as held:
        z = {k.removeprefix(case + "_"): torch.from_numpy(held[k]) for k in held if k.startswith(case + "_")}
    z |= {name: z[name].transpose(0, 1) for name in ("x", "y", "w", "gx")}  # they have time first
    M, N = z["x"].shape[2], z["P_ssm.gamma"].shape[1]
    table = z["P_rel_pos_bias.rel_pos_bias"]
    layer = SeqBoat(
        M,
        qk_dim=z["P_gamma"].shape[1],
        value_dim=z["P_h_proj.weight"].shape[1],
        ema_dim=N,
        max_positions=(len(table) + 1) // 2,
        **CASES[case],
    ).double()
    own = {"omega": "ssm.omega", "temperature": "q_router.temp", "attention.table": "rel_pos_bias.rel_pos_bias"}
    own |= {"attention.gamma": "gamma", "attention.beta": "beta"}
    for kind in ("weight", "bias"):
        own |= {f"norm.{kind}": f"norm.norm.{kind}", f"hx_proj.{kind}": f"hx_proj.{kind}"}
        own |= {f"attention.{name}_proj.{kind}": f"{name}_proj.{kind}" for name in ("mx", "h")}
    state = {ours: z["P_" + theirs] for ours, theirs in own.items()}
    for ours, theirs in (("alpha", "delta"), ("delta", "alpha"), ("beta", "beta"), ("eta", "gamma")):
        state["average." + ours] = z["P_ssm." + theirs].reshape(-1, M, N)
    layer.load_state_dict(state)
    return layer, z


@pytest.mark.parametrize("case", ["causal", "bi", "csq"])
def test_gives_the_authors_numbers(case: str) -> None:
    layer, z = vectors(case)
    x, keep = z["x"].clone().requires_grad_(), z["keep"]
    y = layer(x, mask=None if keep.all() else keep)
    close(y.detach()[keep], z["y"][keep])
    found = layer.routes(x, mask=keep)
    same(found.active, z["active"])
    close(found.probs.detach(), z["route"])
    of = [x, layer.hx_proj.weight, layer.temperature, layer.attention.table]
    for name, grad in zip(("gx", "ghx", "gtemp", "gbias"), torch.autograd.grad((y * z["w"]).sum(), of), strict=True):
        close(grad, z[name], name)


def test_a_sequence_is_packed_whatever_its_batch_holds() -> None:
    """The authors' code packs nothing in a batch with a sequence that is active throughout: what they got for the other
    two is a window among original places."""
    layer, z = vectors("whole")
    y = layer(z["x"]).detach()
    assert [int(n) for n in z["active"].sum(1)] == [7, 11, 5]
    close(y[1], z["y"][1])
    assert (y - z["y"]).abs().amax((1, 2))[[0, 2]].min() > 1e-3
    same(y[:1], layer(z["x"][:1]))
    close(loops(layer, z["x"], original_places=True)[0].detach(), z["y"])


def test_compress_and_extract() -> None:
    x, active = normal(1, 3, 5, 2), torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    packed, index = compress(x, active)
    assert index.tolist() == [[1, 3, 4], [-1, -1, -1], [0, -1, -1]]
    same(packed[0], x[0, [1, 3, 4]])
    assert not packed[1].any()
    same(extract(packed, index, 5), x * active[..., None])
    assert compress(x[:, :0], active[:, :0])[0].shape == (3, 1, 2)
    with pytest.raises(ValueError, match=r"compress: active has the wrong shape \(got \(3, 4\)\)"):
        compress(x, active[:, :4])
    with pytest.raises(ValueError, match=r"extract: index has the wrong shape \(got \(3, 2\)\)"):
        extract(packed, index[:, :2], 5)


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_steps_of_any_size_and_hidden_tokens(position: str) -> None:
    """Sequences have active tokens at other places, so that their windows move apart."""
    layer = filled(6, causal=True, window=3, position=position, max_positions=3)
    x, keep = normal(13, 3, 23, 5), normal(14, 3, 23) < 1
    balanced(layer, x)
    state, outs = layer.init_state(3, 23), []
    for piece, real in zip(x.split([1, 2, 1, 9, 0, 3, 7], 1), keep.split([1, 2, 1, 9, 0, 3, 7], 1), strict=True):
        y, state = layer.step(piece, state, mask=real)
        outs.append(y)
        assert state.k.shape[1] <= 3
    close(torch.cat(outs, 1).detach()[keep], layer(x, mask=keep).detach()[keep])


def marked(layer: SeqBoat, always: bool) -> SeqBoat:
    """Routed by the sign of channel 0, and without a moving average: attention alone carries anything."""
    with torch.no_grad():
        layer.average.eta.zero_()
        layer.omega.fill_(1)
        layer.norm.weight.fill_(1)
        layer.norm.bias.zero_()
        layer.hx_proj.weight[:2].zero_()
        layer.hx_proj.weight[1, 0], layer.hx_proj.bias[:2] = 5.0, torch.tensor([0.0, 9.0 if always else -1.0])
    return layer


def memories(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise of 20 tokens, of which one early and the last are marked by channel 0; what the early one holds."""
    kind, at = torch.randint(4, (n, 20), generator=generator), torch.randint(10, (n,), generator=generator)
    x = torch.cat([torch.full((n, 20, 1), -3.0), F.one_hot(kind, 4).float(), torch.zeros(n, 20, 1)], -1)
    x[torch.arange(n), at, 0] = 3.0
    x[:, -1] = torch.tensor([3.0, 0, 0, 0, 0, 3.0])
    return x, kind[torch.arange(n), at]


def test_a_short_window_reaches_far_where_noise_is_left_out() -> None:
    """A window of one token back copies what stood ten or more tokens ago, as the noise between is not packed. With all
    tokens active it can't, and guesses."""
    right = {}
    for always in (False, True):
        torch.manual_seed(0)
        layer = marked(regard.create("seqboat", dim=6, causal=True, num_heads=1, window=1, weighting="softmax"), always)
        out, generator = nn.Linear(6, 4), torch.Generator().manual_seed(1)
        trained = [*layer.attention.parameters(), *out.parameters()]
        optimizer = torch.optim.Adam(trained, lr=0.05)
        for _ in range(120):
            x, kind = memories(32, generator)
            loss = F.cross_entropy(out(layer(x)[:, -1]), kind)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, kind = memories(500, generator)
        right[always] = float((out(layer(x)[:, -1]).argmax(-1) == kind).float().mean())
        assert layer.routes(x).active.float().mean() == (1 if always else 0.1)
    assert right[False] > 0.95
    assert right[True] < 0.4


def test_an_inactive_token_reaches_others_through_the_average_alone() -> None:
    layer = marked(filled(2, causal=True, window=1), always=False)
    x = torch.cat([torch.tensor([3.0, -3, -3, 3, -3, 3]).double()[:, None], normal(4, 6, 4)], 1)[None]
    changed = x.clone()
    changed[:, 1, 1:] = normal(5, 4)
    assert layer.routes(x).active.tolist() == [[True, False, False, True, False, True]]
    off = (layer(changed) - layer(x)).abs().amax((0, 2))
    assert (off > 0).tolist() == [False, True, False, False, False, False]
    with torch.no_grad():
        layer.average.eta.fill_(1)
    off = (layer(changed) - layer(x)).abs().amax((0, 2))
    assert (off > 0).tolist() == [False] + 5 * [True]


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = regard.create("seqboat", dim=64, num_heads=4, temperature=2.0)
    part = layer.attention
    assert abs(float(layer.temperature.detach().exp()) - 16) < 1e-4
    for p in (layer.hx_proj.weight, part.mx_proj.weight, part.h_proj.weight, part.table):
        assert 0.015 < float(p.detach().std()) < 0.02
        assert float(p.detach().abs().max()) <= 0.04
    assert not any(p.any() for p in (layer.hx_proj.bias, part.mx_proj.bias, part.h_proj.bias, part.beta))
    assert part.table.shape == (2047,)
    assert (layer.qk_dim, layer.value_dim, layer.ema_dim, layer.window) == (16, 128, 16, 256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighting": "tanh"}, r"SeqBoat: weighting is unknown \(got 'tanh'\); expected one of 'relu2', 'softmax'"),
        ({"position": "alibi"}, r"position is unknown \(got 'alibi'\)"),
        ({"position": "rotary", "qk_dim": 3}, r"qk_dim is odd \(got 3\); expected an even int"),
        ({"window": 0}, r"window is too small \(got 0\)"),
        ({"max_positions": 0}, r"max_positions is too small \(got 0\)"),
        ({"temperature": 0.0}, r"temperature is out of range \(got 0.0\)"),
        ({"dropout": 1.5}, r"dropout is out of range \(got 1.5\)"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        filled(1, **options)


def test_bad_input() -> None:
    layer = filled(1, causal=True)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 6\)\); expected \(B, T, M = 5\)"):
        layer(normal(1, 2, 3, 6))
    state = layer.init_state(2, 3)
    assert isinstance(state, SeqBoatState)
    with pytest.raises(ValueError, match=r"x has another batch than the state \(got 3\); expected 2"):
        layer.step(normal(1, 3, 1, 5), state)
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the SeqBoatState"):
        layer.step(normal(1, 2, 1, 5), None)
    with pytest.raises(ValueError, match="causal=True"):
        filled(1).init_state(1, 1)
