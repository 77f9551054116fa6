"""Time-dependent attention against loops and the authors' numbers, and what a time can do to it.

The loops' author saw only an account of the equations, neither code nor tests.
"""

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision import TimeDependentAttention
from regard.vision.diffit_host import DiffiT, DiffiTBlock, grid_features, time_features
from vision import naive_time_dependent as naive
from vision.shared import filled, gradients, leaves, normal, vectors


def own(layer: TimeDependentAttention) -> tuple[tuple[Tensor | None, ...], dict]:
    """The weights as the account stacks them."""
    three = (layer.q_proj, layer.k_proj, layer.v_proj)
    biases = None if three[0].bias is None else torch.cat([f.bias for f in three])
    weights = (
        torch.cat([f.weight for f in three]),
        biases,
        layer.time_proj.weight,
        layer.time_proj.bias,
        layer.o_proj.weight,
        layer.o_proj.bias,
    )
    return weights, {"table": None if layer.table is None else layer.table.flatten(1).T}


def put(layer: TimeDependentAttention, z: dict[str, Tensor], prefix: str = "p_") -> None:
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = z[f"{prefix}qkv.{kind}"].chunk(3)
            for f, part in zip((layer.q_proj, layer.k_proj, layer.v_proj), parts, strict=True):
                getattr(f, kind).copy_(part)
            getattr(layer.time_proj, kind).copy_(z[f"{prefix}qkv_temb.{kind}"])
            getattr(layer.o_proj, kind).copy_(z[f"{prefix}proj.{kind}"])
        layer.table.copy_(z[f"{prefix}relative_position_bias_table"].T.reshape(layer.table.shape))


@pytest.mark.parametrize(("case", "heads", "window"), [("attn", 2, 3), ("one", 1, 2)])
def test_gives_the_authors_numbers(case: str, heads: int, window: int) -> None:
    z = vectors("A183", case)
    layer = TimeDependentAttention(z["x"].shape[2], heads, window=window, time_dim=z["t"].shape[1]).double()
    put(layer, z)
    x, t = leaves(z["x"], z["t"])
    out = layer(x, t)
    assert (out - z["out"]).abs().max() < 1e-10
    found = torch.autograd.grad((out * z["w"]).sum(), (x, t, layer.time_proj.weight, layer.table))
    wanted = (z["gx"], z["gt"], z["g_qkv_temb"], z["g_table"].T.reshape(layer.table.shape))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_the_block_gives_the_authors_numbers() -> None:
    z = vectors("A183", "block")
    block = DiffiTBlock(6, 3, window=3, mlp_ratio=2.0).double()
    put(block.attention, z, "p_attn.")
    with torch.no_grad():
        for ours, theirs in ((block.up, "fc1"), (block.down, "fc2")):
            ours.weight.copy_(z[f"p_mlp.{theirs}.weight"])
            ours.bias.copy_(z[f"p_mlp.{theirs}.bias"])
    x, t = leaves(z["x"], z["t"])
    out = block(x, t)
    assert (out - z["out"]).abs().max() < 1e-10
    gx, gt = torch.autograd.grad((out * z["w"]).sum(), (x, t))
    assert (gx - z["gx"]).abs().max() < 1e-10
    assert (gt - z["gt"]).abs().max() < 1e-10


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("heads", "options"), [(2, {}), (1, {"qkv_bias": False}), (3, {"relative_bias": False, "time_dim": 4})]
)
def test_equals_the_loops(heads: int, options: dict, masked: bool) -> None:
    layer = filled(TimeDependentAttention(6, heads, window=2, **options))
    x, t = leaves(normal(1, 3, 4, 6), normal(2, 3, layer.time_dim))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool) if masked else None
    weights, more = own(layer)
    keep = torch.ones(3, 4, 1, dtype=torch.bool) if mask is None else mask[..., None]
    want = naive.tmsa(x, t, *weights, heads, 2, mask=mask, **more) * keep
    got = layer(x, t, mask=mask)
    close(got, want)
    inputs = [x, t, *layer.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(ours, theirs)


def test_hidden_tokens_may_hold_anything() -> None:
    layer, x, t = filled(TimeDependentAttention(6, 2, window=2)), normal(1, 2, 4, 6), normal(2, 2, 6)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    filled_up = x.masked_fill(~mask[..., None], torch.nan)
    out = layer(filled_up, t, mask=mask)
    assert torch.equal(out, layer(x, t, mask=mask))
    assert not out[1].any()


@pytest.mark.parametrize("sizes", [(4, 6), (3, 5), (2, 7), (1, 1)])
def test_maps_are_cut_into_windows(sizes: tuple[int, int]) -> None:
    """With pixels added that nobody sees where windows don't divide the map."""
    layer = filled(regard.create("time_dependent", dim=6, num_heads=2, window=2))
    x, t, w = normal(1, 2, 6, *sizes), normal(2, 2, 6), 2
    weights, more = own(layer.attention)
    got = layer(x, t)
    if not (sizes[0] % w or sizes[1] % w):
        close(got, naive.on_map(x, t, weights, 2, w, **more))
    for y in range(0, sizes[0], w):
        for c in range(0, sizes[1], w):
            part = x[:, :, y : y + w, c : c + w]
            tall, wide = part.shape[2:]
            room, seen = x.new_zeros(2, 6, w, w), torch.zeros(w, w, dtype=torch.bool)
            room[:, :, :tall, :wide], seen[:tall, :wide] = part, True
            tokens = room.flatten(2).mT
            out = naive.tmsa(tokens, t, *weights, 2, w, mask=seen.flatten().expand(2, -1), **more)
            out = out.mT.unflatten(2, (w, w))[:, :, :tall, :wide]
            close(got[:, :, y : y + w, c : c + w], out)


@torch.no_grad()
def test_time_is_a_score_of_keys_and_a_constant() -> None:
    """q_t . k_j, and v_t in all outputs; k_t is the same for all keys of a query and does nothing."""
    layer = filled(regard.create("time_dependent", dim=6, num_heads=2, window=3))
    x, t = normal(1, 2, 6, 3, 3), normal(2, 2, 6)
    plain, (weights, more) = layer(x, t), own(layer.attention)
    cheap = naive.tmsa_cheap(x.flatten(2).mT, t, *weights, 2, 3, **more)
    close(plain.flatten(2).mT, cheap)
    assert (layer(x, t + normal(3, 2, 6)) - plain).abs().max() > 0.5
    for p in (layer.attention.time_proj.weight, layer.attention.time_proj.bias):
        p[6:12] += normal(4, *p[6:12].shape)
    close(layer(x, t), plain)
    values = layer.attention.time_proj.bias[12:]
    values += 1
    shift = layer(x, t) - plain
    assert shift.abs().max() > 0.1
    close(shift, shift[:, :, :1, :1].expand_as(shift))


@torch.no_grad()
def test_windows_of_a_sample_share_its_time_alone() -> None:
    layer = filled(regard.create("time_dependent", dim=6, num_heads=2, window=2))
    x, t = normal(1, 2, 6, 4, 4), normal(2, 2, 6)
    other = t.clone()
    other[1] += 1
    assert torch.equal(layer(x, other)[0], layer(x, t)[0])
    moved = (layer(x, other) - layer(x, t))[1].abs()
    assert all(bool(moved[:, y : y + 2, c : c + 2].max() > 0.01) for y in (0, 2) for c in (0, 2))
    without, still = layer(x, None), layer.attention.time_proj
    for p in still.parameters():
        p.zero_()
    close(without, layer(x, t))


def test_features_of_times_and_places() -> None:
    t = torch.tensor([0.0, 3.0, 250.5]).double()
    for dim in (6, 7, 256):
        close(time_features(t, dim), naive.time_features(t, dim))
    close(grid_features(8, 2, 3), naive.positions(8, 2, 3))


@pytest.mark.parametrize("labelled", [False, True])
def test_the_latent_model_equals_the_loops(labelled: bool) -> None:
    model = filled(DiffiT(2, 3, 8, 2, size=4, patch=2, classes=4))
    model.places.copy_(grid_features(8, 2, 2))
    x, t = normal(1, 2, 2, 4, 4), torch.tensor([7.0, 30.0]).double()
    labels = torch.tensor([2, -1]) if labelled else None
    pair = [p for f in (model.time_in, model.time_out) for p in (f.weight, f.bias)]
    table, asked = model.labels.weight, labels if labelled else torch.tensor([4, 4])
    time = naive.time_vector(t, *pair, labels=[n % 5 for n in asked.tolist()], label_table=table)
    close(model.time(t, labels), time)
    blocks = []
    for block in model.blocks:
        weights, more = own(block.attention)
        mlp = (block.up.weight, block.up.bias, block.down.weight, block.down.bias)
        blocks.append(lambda z, e, w=weights, m=mlp, o=more: naive.diffit_block(z, e, w, m, 2, 2, **o))
    want = naive.latent_model(
        x, time, model.embed.weight, model.embed.bias, blocks, model.out.weight, model.out.bias, 2
    )
    close(model(x, t, labels), want)
    assert not DiffiT(2, 3, 8, 2, size=4)(x.float(), t.float()).any(), "it starts at 0"


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = TimeDependentAttention(48, 4, window=3)
    bound = (6 / (48 + 3 * 48)) ** 0.5
    for f in (layer.q_proj, layer.time_proj):
        assert 0.95 * bound < f.weight.abs().max() <= bound
        assert not f.bias.any()
    assert 0.01 < layer.table.std() < 0.03


def test_what_is_refused() -> None:
    layer = TimeDependentAttention(6, 2, window=2, time_dim=4).double()
    with pytest.raises(ValueError, match="time has the wrong shape"):
        layer(normal(1, 2, 4, 6), normal(2, 2, 6))
    with pytest.raises(ValueError, match=r"x is no window \(got 5 tokens\); expected 2 x 2"):
        layer(normal(1, 2, 5, 6), normal(2, 2, 4))
    with pytest.raises(ValueError, match="x has other sides than its places"):
        DiffiT(2, 3, 8, 2, size=4)(torch.zeros(1, 2, 5, 4), torch.zeros(1))
