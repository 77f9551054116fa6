"""Geometric attention alone: loops, the authors' numbers, what leaves it alone, and neighbours to the left.

The loops are naive_box_relation.py, whose author has read neither the code nor this test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from positions import naive_box_relation as naive
from regard import masks
from regard.laws.agreement import close
from regard.pipeline import Attention
from regard.positions.box_relation import BoxRelation, displacement
from regard.stages import Tokens
from regard.vision.region_encoder import RegionEncoder, RegionLayer

VECTORS = Path(__file__).parents[1] / "vectors" / "box_relation.npz"
PROJECTIONS = "qkvo"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_boxes(count: int, regions: int, size: float = 1.0, seed: int = 0) -> Tensor:
    at, sizes = torch.rand(2, count, regions, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return size * torch.cat([at, at + 0.7 * sizes + 0.01], -1)


def filled(
    dim: int = 12, heads: int = 3, *, causal: bool = False, num_kv_heads: int | None = None, **options
) -> Attention:
    part = BoxRelation(heads, **options)
    made = Attention(dim, heads, bias=True, position=part, causal=causal, num_kv_heads=num_kv_heads).double().eval()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.5 * normal(100 + n, *p.shape))
        part.bias_of_heads.add_(0.5)  # so that some pairs are far from the floor
    return made


def numbers() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.mark.parametrize("case", ["sine", "pixels", "plain"])
def test_gives_the_authors_numbers(case: str) -> None:
    """Boxes in [0, 1], boxes of pixels with padding, and the four numbers without sines."""
    z = {k.removeprefix(f"{case}_"): v for k, v in numbers().items() if k.startswith(f"{case}_")}
    part = BoxRelation(8, sine=case != "plain")
    layer = Attention(16, 8, bias=True, position=part).double()
    where = {f"{n}_{k}": getattr(getattr(layer, f"{n}_proj"), k) for n in PROJECTIONS for k in ("weight", "bias")}
    where |= {"geo_weight": part.weight, "geo_bias": part.bias_of_heads}
    with torch.no_grad():
        for name, p in where.items():
            p.copy_(z[name].view_as(p))
    x = z["x"].requires_grad_()
    out = layer(x, positions=z["box"], mask=masks.padding(z["keep"]))
    assert (out - z["y"]).abs().max() < 1e-10
    grads = torch.autograd.grad((out * z["w"]).sum(), [x, *where.values()])
    for name, got in zip(("x", *where), grads, strict=True):
        want = z["gx"] if name == "x" else z[f"g_{name}"].view_as(got)
        assert (got - want).abs().max() < 1e-10, name


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"sine": False}, {"size_offset": 0.0, "floor": 0.3}, {"embed_dim": 16, "wavelength": 50.0}],
)
def test_is_the_definition(options: dict, padded: bool) -> None:
    layer, x, boxes = filled(**options), normal(1, 2, 5, 12).requires_grad_(), some_boxes(2, 5)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)
    maps = [p for n in PROJECTIONS for p in (getattr(layer, f"{n}_proj").weight, getattr(layer, f"{n}_proj").bias)]
    told = {{"embed_dim": "dim"}.get(k, k): v for k, v in options.items()}
    part = layer.position
    want, _ = naive.box_attention(
        x, boxes, *maps, part.weight, part.bias_of_heads, keep=keep if padded else None, **told
    )
    got = layer(x, positions=boxes, mask=masks.padding(keep) if padded else None)
    close(got, want, "out")
    of, g = [x, *layer.parameters()], normal(9, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


def test_inverse_ratios_are_other_signs() -> None:
    """What the paper is said to have and what the code has are one but for signs of weights."""
    part, boxes = filled(embed_dim=16).position, some_boxes(1, 4)
    flipped = part.weight.clone()
    flipped[:, 4:8] *= -1  # the sines of widths and heights
    want = naive.bias(boxes, flipped, part.bias_of_heads, dim=16, paper_ratio=True)
    close(naive.bias(boxes, part.weight, part.bias_of_heads, dim=16), want)


def test_what_changes_nothing() -> None:
    """Shifted boxes; and scaled ones where sizes have no offset."""
    boxes = some_boxes(1, 5)
    for offset, same in ((0.0, True), (1.0, False)):
        want = displacement(boxes, boxes, offset)
        close(displacement(boxes + 0.25, boxes + 0.25, offset), want)
        assert torch.allclose(displacement(2 * boxes, 2 * boxes, offset), want) == same
    assert not torch.allclose(want, want.transpose(1, 2)), "who asks is not who is asked"


def test_boxes_alone_decide_without_queries() -> None:
    layer, x, boxes = filled(), normal(1, 2, 5, 12), some_boxes(2, 5)
    with torch.no_grad():
        layer.q_proj.weight.zero_()
        layer.q_proj.bias.zero_()
    y, z = normal(2, 2, 2, 5, 12)
    close(layer(x, positions=boxes) + layer(y, positions=boxes) - layer(z, positions=boxes),
          layer(x + y - z, positions=boxes))  # fmt: skip


def test_formats_and_counts() -> None:
    x, boxes, at = normal(1, 2, 5, 12), some_boxes(2, 5), torch.arange(5)
    centred = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)
    close(filled(box_format="cxcywh")(x, positions=centred), filled()(x, positions=boxes))
    line = torch.stack([at, 0 * at, at + 1, 0 * at + 1], -1)[None]
    for box_format in ("xyxy", "cxcywh"):
        close(filled(box_format=box_format)(x), filled()(x, positions=line))


def test_steps_take_boxes() -> None:
    layer, x, boxes = filled(heads=4, causal=True, num_kv_heads=2), normal(1, 2, 6, 12), some_boxes(2, 6)
    want, state, outs, at = layer(x, positions=boxes), layer.init_state(2, 6), [], 0
    for t in (1, 3, 2):
        out, state = layer.step(x[:, at : at + t], state, positions=boxes[:, at : at + t])
        outs, at = [*outs, out], at + t
    close(torch.cat(outs, 1), want)


def scene(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regions in a row, in any order: what they are, their boxes, and what is left of each (of the first, itself)."""
    generator = torch.Generator().manual_seed(seed)
    what = torch.randint(8, (count, 6), generator=generator)
    left = torch.cat([what[:, :1], what[:, :-1]], 1)
    x = 2.0 * torch.arange(6).expand(count, -1) + torch.rand(count, 1, generator=generator)
    boxes = torch.stack([x, torch.zeros_like(x), x + 1, torch.ones_like(x)], -1)
    boxes[..., 2] += torch.arange(6) * 0.5  # later ones are larger, which tells left from right
    order = torch.rand(count, 6, generator=generator).argsort(1)
    return what.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4)), left.gather(1, order)


def test_finds_the_nearest_to_the_left() -> None:
    """Regions look like anything; who is left of whom, only boxes tell."""
    found = []
    for boxed in (True, False):
        torch.manual_seed(0)
        layer = regard.create("box_relation", dim=32, num_heads=4)
        model = nn.ModuleDict({"embed": nn.Embedding(8, 32), "mix": layer, "out": nn.Linear(32, 8)})
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def told(seed: int, model: nn.ModuleDict = model, boxed: bool = boxed) -> tuple[Tensor, Tensor]:
            what, boxes, left = scene(64, seed)
            boxes = boxes if boxed else torch.ones_like(boxes)
            return model["out"](model["mix"](model["embed"](what), positions=boxes)), left

        for step in range(80):
            out, left = told(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(out.flatten(0, 1), left.flatten()).backward()
            optimizer.step()
        out, left = told(1000)
        found.append((out.argmax(-1) == left).float().mean().item())

    assert found[0] > 0.9
    assert found[1] < 0.5


def test_the_encoder_gives_the_authors_numbers() -> None:
    """Two layers and the last norm; the code embeds regions before."""
    z = numbers()
    layers = nn.ModuleList(RegionLayer(16, 8, 12, 0.1) for _ in range(2)).double().eval()
    model = RegionEncoder(16, dim=16, num_heads=8, depth=2, hidden=12).double().eval()
    model.layers, model.embed = layers, nn.Identity()  # type: ignore[assignment]
    names = {"feed_forward.w_1": "mlp.0", "feed_forward.w_2": "mlp.3", "sublayer.0.norm": "norm1"}
    names |= {"sublayer.1.norm": "norm2"}
    names |= {f"self_attn.linears.{n}": f"attention.{p}_proj" for n, p in enumerate(PROJECTIONS)}
    into = dict(model.named_parameters())
    with torch.no_grad():
        for theirs, p in ((k.removeprefix("enc_p_"), v) for k, v in z.items() if k.startswith("enc_p_")):
            path, _, leaf = theirs.rpartition(".")
            layer = path.split(".")[1] if path.startswith("layers") else ""
            inner = path.removeprefix(f"layers.{layer}.")
            if inner.startswith("self_attn.WGs"):
                kind = {"weight": "weight", "bias": "bias_of_heads"}[leaf]
                into[f"layers.{layer}.attention.position.{kind}"][int(inner[-1])] = p[0]
                continue
            leaf = {"a_2": "weight", "b_2": "bias"}.get(leaf, leaf)
            into[f"layers.{layer}.{names[inner]}.{leaf}" if layer else f"{path}.{leaf}"].copy_(p)
    assert (model(z["enc_x"], z["enc_box"], z["enc_keep"]) - z["enc_y"]).abs().max() < 1e-10


def test_starting_values() -> None:
    part = regard.create("box_relation", dim=320, num_heads=80).position
    bound = (6 / 65) ** 0.5
    assert part.weight.shape == (80, 64)
    assert 0.99 * bound < part.weight.detach().abs().max().item() <= bound
    assert part.bias_of_heads.unique().numel() == 1
    assert part.bias_of_heads.abs().max() <= 1 / 8
    assert regard.create("box_relation", dim=8, num_heads=2, sine=False).position.weight.shape == (2, 4)
    assert part.start_neutral()
    plain = Attention(320, 80).double()
    layer = Attention(320, 80, position=part).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = normal(1, 1, 4, 320)
    close(layer(x, positions=some_boxes(1, 4)), plain(x))
    model = RegionEncoder(features=10, dim=16, num_heads=2, depth=1)
    assert model.layers[0].mlp[0].out_features == 2048
    assert model(torch.randn(2, 3, 10), some_boxes(2, 3).float()).shape == (2, 3, 16)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"embed_dim": 12}, r"BoxRelation: embed_dim is no multiple of 8 \(got 12\)"),
        ({"floor": 0.0}, "floor is out of range"),
        ({"wavelength": -1.0}, "wavelength is out of range"),
        ({"size_offset": -1.0}, "size_offset is out of range"),
        ({"box_format": "xywh"}, "box_format is unknown"),
        ({"sine": 1}, "sine has the wrong type"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        BoxRelation(2, **wrong)


@pytest.mark.parametrize("box", [(0.0, 0.0, torch.nan, 1.0), (3.0, 0.0, 1.0, 1.0), (0.0, 0.0, torch.inf, 1.0)])
def test_refuses_boxes(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"BoxRelation: boxes have no width or height"):
        filled()(normal(1, 1, 1, 12), positions=torch.tensor([[box]]))


def test_refuses_a_context() -> None:
    with pytest.raises(ValueError, match="context"):
        regard.create("box_relation", dim=12, num_heads=3).double()(normal(1, 1, 3, 12), normal(2, 1, 4, 12))
    x, proj = normal(1, 1, 3, 12), nn.Identity()
    with pytest.raises(ValueError, match="BoxRelation: context stands in no boxes"):
        BoxRelation(3).prepare(Tokens(x, normal(2, 1, 4, 12), torch.arange(3), proj, proj, proj))
