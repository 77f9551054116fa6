"""Attentive WaveBlock against loops and the authors' numbers, and its draws.

The loops' author saw only an account of the equations, neither code nor tests.
"""

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision import AttentiveWaveBlock, WaveBlock, waved
from regard.vision.wave_block import stripe
from vision import naive_wave_block as naive
from vision.shared import filled, gradients, leaves, normal, vectors

CBAM = {
    "channel.mlp.down": "ChannelGate.mlp.1",
    "channel.mlp.up": "ChannelGate.mlp.3",
    "spatial.conv": "SpatialGate.spatial.conv",
    "spatial.norm": "SpatialGate.spatial.bn",
}
NONLOCAL = {"q_proj": "theta", "k_proj": "phi", "v_proj": "g", "o_proj": "W.0", "norm": "W.1"}


def put(module: torch.nn.Module, z: dict[str, Tensor], names: dict[str, str]) -> None:
    """The authors' weights; in their places' gate maxima stand before means."""
    state = module.state_dict()
    for name, p in state.items():
        part, _, kind = name.rpartition(".")
        if kind != "num_batches_tracked":
            value = z[f"p_{names[part]}.{kind}"]
            p.copy_(value.flip(1) if part == "spatial.conv" else value.reshape(p.shape))
    module.load_state_dict(state)


@pytest.mark.parametrize("case", ["wave", "wave_b", "wave_c"])
def test_waves_give_the_authors_numbers(case: str) -> None:
    z = {k: v for k, v in vectors("A152", case).items() if k in ("x", "w", "out", "gx", "top", "height")}
    (x,) = leaves(z["x"])
    assert stripe(x.shape[2]) == int(z["height"])
    for top in (int(z["top"]), z["top"]):
        out = waved(x, top)
        assert torch.equal(out, z["out"])
    assert torch.equal(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["gx"])


@pytest.mark.parametrize(("attention", "names"), [("cbam", CBAM), ("nonlocal", NONLOCAL)])
def test_attentions_give_the_authors_numbers(attention: str, names: dict[str, str]) -> None:
    z = vectors("A152", attention)
    layer = AttentiveWaveBlock(z["x"].shape[1], attention=attention).double().eval()  # type: ignore[arg-type]
    put(layer.attention, z, names)
    (x,) = leaves(z["x"])
    out = layer(x)
    assert (out - z["out"]).abs().max() < 1e-10
    found = dict(layer.attention.named_parameters())
    by_theirs = {f"g_{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": p for n, p in found.items()}
    wanted = {n: v for n, v in z.items() if n.startswith("g_")}
    grads = torch.autograd.grad((out * z["w"]).sum(), [x, *(by_theirs[n] for n in wanted)])
    assert (grads[0] - z["gx"]).abs().max() < 1e-10
    assert len(wanted) == 2
    for (name, theirs), ours in zip(wanted.items(), grads[1:], strict=True):
        ours = ours.flip(1) if "conv" in name else ours.reshape(theirs.shape)
        assert (ours - theirs).abs().max() < 1e-10, name


def loops(layer: AttentiveWaveBlock, training: bool):
    """The attention, residual and all, as the account has it."""
    a = layer.attention
    if layer.attention.__class__.__name__ == "CBAM":
        mlp, norm = a.channel.mlp, a.spatial.norm
        p = (mlp.down.weight, mlp.down.bias, mlp.up.weight, mlp.up.bias, a.spatial.conv.weight.flip(1))
        p += (norm.weight, norm.bias, norm.running_mean.clone(), norm.running_var.clone())
        return lambda x: naive.cbam_block(x, *p, training=training)
    parts = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, a.norm)
    p = tuple(z for part in parts for z in (part.weight, part.bias))
    p += (a.norm.running_mean.clone(), a.norm.running_var.clone())
    return lambda x: naive.nonlocal_block(x, *p, training=training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("attention", ["cbam", "nonlocal"])
def test_equals_the_loops(order: str, attention: str, training: bool) -> None:
    layer = filled(AttentiveWaveBlock(6, order=order, attention=attention)).train(training)  # type: ignore[arg-type]
    (x,) = leaves(normal(1, 2, 6, 4, 3))
    layer.wave.generator = torch.Generator().manual_seed(5)
    top = int(torch.randint(4, (), generator=torch.Generator().manual_seed(5)))
    want = naive.attentive_wave_block(x, loops(layer, training), order=order, training=training, top=top)
    got = layer(x)
    close(got, want)
    for ours, theirs in zip(gradients(got, [x]), gradients(want, [x]), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("rows", [1, 2, 5, 10, 15])
def test_stripes_are_drawn_from_all_places(rows: int) -> None:
    torch.manual_seed(0)
    layer, x = WaveBlock().train(), torch.ones(2, 3, rows, 2)
    h, tops = stripe(rows), set()
    assert h == naive.wave_height(rows)
    for _ in range(40 * rows):
        out = layer(x)
        assert torch.equal(out, out[:1, :1, :, :1].expand_as(out)), "one stripe for all"
        kept = (out[0, 0, :, 0] == 1).nonzero().flatten().tolist()
        assert len(kept) == h
        assert set(out.unique().tolist()) <= {1.0, 1.5}
        tops.add(kept[0] if kept else 0)
    assert tops == set(naive.wave_tops(rows) if h else [0])


@torch.no_grad()
def test_two_equal_networks_differ_while_they_train() -> None:
    layers = [regard.create("wave_block", dim=6, num_heads=2) for _ in range(2)]
    x = normal(1, 2, 6, 32, 3)
    for layer, seed in zip(layers, (1, 2), strict=True):
        layer.generator = torch.Generator().manual_seed(seed)
        assert not list(layer.parameters())
    one, other = (layer.train()(x) for layer in layers)
    assert (one - other).abs().max() > 0.1
    one, other = (layer.eval()(x) for layer in layers)
    assert torch.equal(one, x)
    assert torch.equal(other, x)
    layers[1].generator.manual_seed(7)
    layers[0].generator.manual_seed(7)
    assert torch.equal(*(layer.train()(x) for layer in layers))


@torch.no_grad()
def test_attention_stands_before_or_after() -> None:
    """Divided by its wave, a map is the same for all draws where attention stands before it, and not after."""
    x, ratios = normal(1, 1, 6, 8, 3), {}
    for order in ("pre", "post"):
        layer = filled(regard.create("attentive_wave_block", dim=6, num_heads=2, order=order))
        layer.wave.train()
        plain = layer.attended(x)
        ratios[order] = layer(x) / plain
    assert ((ratios["pre"] - 1).abs().minimum((ratios["pre"] - 1.5).abs()) < 1e-12).all()
    assert ((ratios["post"] - 1).abs().minimum((ratios["post"] - 1.5).abs()) > 1e-6).any()
    start = regard.create("attentive_wave_block", dim=6, num_heads=2, attention="nonlocal").double().eval()
    assert torch.equal(start(x), x)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio is out of range"):
        WaveBlock(ratio=1.5)
    with pytest.raises(ValueError, match="order is unknown"):
        AttentiveWaveBlock(4, order="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x has the wrong shape"):
        AttentiveWaveBlock(4)(torch.zeros(1, 5, 2, 2))
    for training in (False, True):
        assert WaveBlock().train(training)(torch.zeros(0, 3, 4, 2)).shape == (0, 3, 4, 2)
