"""Skim-Attention alone: loops, the authors' numbers, the layer and the encoder against each other, and a form.

The loops are naive_skim.py, whose author has read neither the code nor this test.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from mixers import naive_skim as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.skim import Layout, SkimAttention, skimming_mask
from regard.mixers.skimformer import PostNorm, Skimformer, SkimWeights
from regard.pipeline import Weighted

VECTORS = Path(__file__).parents[1] / "vectors" / "B144.npz"
CASES = {"full": (2, 3, "boxes"), "pad": (3, 4, "boxes"), "centre": (2, 3, "centre")}
"""Heads, their width, and the layout."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_boxes(count: int, length: int, most: int = 24, seed: int = 0) -> Tensor:
    a, b = torch.randint(most, (2, count, length, 2), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], -1)


def moved(module: Any, size: float = 0.5) -> Any:
    with torch.no_grad():
        for n, p in enumerate(module.parameters()):
            p.add_(size * normal(100 + n, *p.shape))
    return module


def filled(**options) -> SkimAttention:
    made = regard.create("skim", dim=12, num_heads=4, **{"layout_dim": 10, "max_position": 24, **options})
    return moved(made.double().eval())


def numbers(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}


def loaded(case: str, z: dict[str, Tensor]) -> tuple[SkimWeights, list[PostNorm]]:
    """The weights' maker and two layers, of which the numbers have the first halves."""
    (heads, width, kind), (dim, layout) = CASES[case], (z["x"].shape[-1], z["layout"].shape[-1])
    made = SkimWeights(layout, heads, width, layout=kind, max_position=24).double().eval()  # type: ignore[arg-type]
    layers = [PostNorm(dim, Weighted(dim, heads, bias=True), 4, 0.0).double() for _ in range(2)]
    into: dict[str, nn.Parameter] = {f"E{name}": made.layout.tables[name].weight for name in made.layout.tables}
    into |= {"ln_w": made.layout.norm.weight, "ln_b": made.layout.norm.bias}
    parts: list[tuple[str, str, Any]] = [("q", "", made.q_proj), ("k", "", made.k_proj)]
    for n, layer in enumerate(layers):
        parts += [("v", str(n), layer.mixer.v_proj), ("o", str(n), layer.mixer.o_proj)]
        into |= {f"ln{n}_w": layer.norm1.weight, f"ln{n}_b": layer.norm1.bias}
    for name, n, proj in parts:
        into |= {f"W{name}{n}": proj.weight, f"b{name}{n}": proj.bias}
    with torch.no_grad():
        for name, p in into.items():
            p.copy_(z[name])
    return made, layers


@pytest.mark.parametrize("case", CASES)
def test_gives_the_authors_numbers(case: str) -> None:
    """Of weights made once, through two layers; rows of hidden words have numbers, too."""
    z = numbers(case)
    made, layers = loaded(case, z)
    x, keep = z["x"].requires_grad_(), z["keep"].bool()
    weights = made(z["box"], keep)
    first = layers[0].attended(x, lambda t: layers[0].mixer(t, weights))
    second = layers[1].attended(first, lambda t: layers[1].mixer(t, weights))
    found = {"layout": made.layout(z["box"]), "weights": weights, "h1": first, "y": second}
    for name, got in found.items():
        assert (got - z[name]).abs().max() < 1e-10, name
    of = [x, made.q_proj.weight, made.layout.tables["x"].weight]
    for name, got in zip(("x", "Wq", "Ex"), torch.autograd.grad((second * z["w"]).sum(), of), strict=True):
        assert (got - z[f"grad_{name}"]).abs().max() < 1e-10, name
    if case == "full":
        assert torch.equal(skimming_mask(weights, 3, keep), z["topk3_mask"].bool())


def maps(*parts: Any) -> Iterator[Tensor]:
    for part in parts:
        yield from (part.weight, part.bias)


def looked(layer: SkimAttention, boxes: Tensor) -> Tensor:
    """The layout by loops."""
    tables = [layer.position.tables[name].weight for name in layer.position.tables]
    if layer.position.kind == "centre":
        tables += tables
    return naive.layout(boxes, *tables, *maps(layer.position.norm), centre=layer.position.kind == "centre")


@pytest.mark.parametrize("layout", ["boxes", "centre"])
def test_is_the_definition(layout: str) -> None:
    """The layer, whose kernels form no weights, and the maker of weights, with and without padding."""
    layer, x, boxes = filled(layout=layout), normal(1, 2, 6, 12).requires_grad_(), some_boxes(2, 6)
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    for shown in (None, keep):
        weights = naive.skim_weights(looked(layer, boxes), *maps(layer.q_proj, layer.k_proj), 4, shown, penalty=None)
        got = layer(x, positions=boxes, mask=None if shown is None else masks.padding(shown))
        values = layer.v_proj(x).unflatten(-1, (4, 3)).transpose(1, 2)
        want = layer.o_proj((weights @ values).transpose(1, 2).flatten(2))
        close(got, want, "out")
        of, g = [x, *layer.parameters()], normal(9, *got.shape)
        for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
            close(mine, theirs, "gradient")
        maker = SkimWeights(10, 4, 3, layout=layout, max_position=24).double().eval()  # type: ignore[arg-type]
        maker.layout, maker.q_proj, maker.k_proj = layer.position, layer.q_proj, layer.k_proj
        close(maker(boxes, shown), weights, "weights")
        for k in (1, 3, 9):
            assert torch.equal(skimming_mask(weights, k, shown), naive.skimming_mask(weights, k, shown))


def test_the_encoder_is_the_definition() -> None:
    """Weights once, then two whole layers, against loops."""
    model = Skimformer(9, dim=8, num_heads=2, depth=2, hidden=5, layout_dim=6, head_dim=3, max_position=24, dropout=0.0)
    moved(model.double().eval())
    words, boxes = torch.arange(10).view(2, 5) % 9, some_boxes(2, 5)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    skim = model.skim
    tables = [skim.layout.tables[name].weight for name in ("x", "y", "h", "w")]
    layout = naive.layout(boxes, *tables, *maps(skim.layout.norm))
    weights = naive.skim_weights(layout, *maps(skim.q_proj, skim.k_proj), 2, keep, penalty=None)
    z = model.words.weight[words] + model.types.weight[0]
    z = torch.stack([naive.norm(t, *maps(model.norm)) for t in z.flatten(0, 1)]).view_as(z)
    for layer in model.layers:
        z = naive.sublayer(z, weights, *maps(layer.mixer.v_proj, layer.mixer.o_proj, layer.norm1))
        z = naive.feed_forward(z, *maps(layer.mlp[0], layer.mlp[2], layer.norm2))
    close(model(words, boxes, keep), z)


def test_weights_do_not_depend_on_the_text() -> None:
    """The layer is affine in the text; and words moved with their boxes move what comes out."""
    layer, boxes = filled(layout_dim=12), some_boxes(2, 6)
    x, y, z = normal(1, 3, 2, 6, 12)
    close(layer(x, positions=boxes) + layer(y, positions=boxes) - layer(z, positions=boxes),
          layer(x + y - z, positions=boxes))  # fmt: skip
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(layer(x[:, order], positions=boxes[:, order]), layer(x, positions=boxes)[:, order])


def test_weights_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = SkimWeights.forward

    def counted(self: SkimWeights, *given: Any) -> Tensor:
        calls.append(1)
        return plain(self, *given)

    monkeypatch.setattr(SkimWeights, "forward", counted)
    Skimformer(9, dim=8, num_heads=2, depth=5, max_position=24)(torch.zeros(1, 4, dtype=torch.long), some_boxes(1, 4))
    assert len(calls) == 1


def test_context_of_the_layout_sees_no_padding() -> None:
    """What stands in hidden boxes changes no other's weights, and there are weights without any real word."""
    made = moved(SkimWeights(8, 2, 3, max_position=24, contextual=2, context_heads=4).double().eval())
    boxes, keep = some_boxes(2, 5), torch.tensor([[1, 1, 1, 0, 0], [0] * 5], dtype=torch.bool)
    other = boxes.masked_fill(~keep[..., None], 0)
    close(made(boxes, keep)[0, :, :3], made(other, keep)[0, :, :3])
    close(made(boxes, keep)[:1, :, :3, :3], made(boxes[:1, :3]))
    assert not made(boxes, keep)[1].any()
    alone = SkimWeights(8, 2, 3, max_position=24).double().eval()
    alone.load_state_dict(made.state_dict(), strict=False)
    assert (alone(boxes) - made(boxes)).abs().max() > 1e-3


def test_dropout_is_of_all_layers_alike() -> None:
    made = SkimWeights(8, 2, 3, max_position=24, dropout=0.5)
    torch.manual_seed(0)
    assert 0.2 < (made(some_boxes(2, 20)) == 0).float().mean() < 0.8
    assert not (made.eval()(some_boxes(2, 20)) == 0).any()


def test_words_without_boxes_stand_in_a_line() -> None:
    x, at = normal(1, 1, 6, 12), torch.arange(6)
    line = torch.stack([at, 0 * at, at + 1, 0 * at + 1], -1)[None]
    layer = filled()
    close(layer(x), layer(x, positions=line))
    close(layer(x, positions=at + 3), layer(x, positions=line + torch.tensor([3, 0, 3, 0])))
    places = filled(layout="sequence")
    close(places(x), places(x, positions=at))
    layout = places.position(at)
    q, k = (p(layout).unflatten(-1, (4, 3)).transpose(0, 1) for p in (places.q_proj, places.k_proj))
    v = places.v_proj(x[0]).unflatten(-1, (4, 3)).transpose(0, 1)
    close(places(x)[0], places.o_proj(((q @ k.mT / 3**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)))
    assert set(places.position.tables) == {"place"}


def test_steps_take_boxes() -> None:
    layer, x, boxes = filled(causal=True, num_kv_heads=2), normal(1, 2, 6, 12), some_boxes(2, 6)
    want, state, outs, at = layer(x, positions=boxes), layer.init_state(2, 6), [], 0
    for t in (1, 3, 2):
        out, state = layer.step(x[:, at : at + t], state, positions=boxes[:, at : at + t])
        outs, at = [*outs, out], at + t
    close(torch.cat(outs, 1), want)


def form(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels left and values right, two columns of five rows, in any order: words, boxes, and each label's value."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 9, (count, 10), generator=generator)
    rows = torch.arange(5).repeat(count, 1)
    y, x = torch.cat([rows, rows], 1), torch.arange(10).div(5, rounding_mode="floor").expand(count, -1)
    order = torch.rand(count, 10, generator=generator).argsort(1)
    target = torch.cat([words[:, 5:], words[:, 5:]], 1)
    boxes = torch.stack([x, y, x + 1, y + 1], -1)
    return words.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4)), target.gather(1, order)


def test_finds_the_value_of_a_field() -> None:
    """Every word of a row tells the value right in it; what the text says, without places, can't tell which."""
    found = []
    for boxed in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleDict({
            "embed": nn.Embedding(9, 32),
            "skim": regard.create("skim", dim=32, num_heads=2, max_position=8, layout_dim=32),
            "out": nn.Linear(32, 9),
        })  # fmt: skip
        for name, p in model["skim"].named_parameters():
            p.data.mul_(1 if "norm" in name else 8)  # BERT's start is for many more steps
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def told(seed: int, model: nn.ModuleDict = model, boxed: bool = boxed) -> tuple[Tensor, Tensor]:
            words, boxes, target = form(64, seed)
            boxes = boxes if boxed else torch.zeros_like(boxes)
            return model["out"](model["skim"](model["embed"](words), positions=boxes)), target

        for step in range(60):
            out, target = told(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(out.flatten(0, 1), target.flatten()).backward()
            optimizer.step()
        out, target = told(1000)
        found.append((out.argmax(-1) == target).float().mean().item())
    assert found[0] > 0.98
    assert found[1] < 0.5


def test_starting_values() -> None:
    layer = regard.create("skim", dim=48, num_heads=4)
    assert (layer.position.max_position, layer.q_proj.in_features, layer.head_dim) == (1024, 48, 12)
    for p in (*layer.position.tables.parameters(), layer.q_proj.weight, layer.v_proj.weight, layer.o_proj.weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(p.mean().item()) < 0.002
    assert not any(proj.bias.any() for proj in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
    assert torch.equal(layer.position.norm.weight, torch.ones(48))
    model = Skimformer(30, dim=24, num_heads=2, depth=1, hidden=None, contextual=1, context_heads=3)
    assert (model.skim.dropout, model.dropout, model.layers[0].mlp[0].out_features) == (0.1, 0.1, 96)
    assert model.words.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        (torch.tensor([[[3, 0, 2, 1]]]), r"Layout: boxes are upside down"),
        (torch.tensor([[[0, 0, 24, 1]]]), r"Layout: box reaches beyond the tables \(got 0 to 24\); expected 0 to"),
        (torch.tensor([[[-1, 0, 2, 1]]]), r"reaches beyond the tables \(got -1 to 2\)"),
        (torch.zeros(1, 1, 4), r"boxes have the wrong dtype"),
        (torch.zeros(1, 1, 3, dtype=torch.long), r"positions don't fit x"),
    ],
)
def test_refuses_boxes(boxes: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        filled()(normal(1, 1, 1, 12), positions=boxes)


def test_refuses_other_options() -> None:
    with pytest.raises(ValueError, match="layout is unknown"):
        filled(layout="text")
    with pytest.raises(ValueError, match="max_position is too small"):
        Layout(4, "boxes", 1)
    with pytest.raises(ValueError, match="k is too small"):
        skimming_mask(torch.ones(1, 1, 2, 2), 0)
    with pytest.raises(ValueError, match="keep has the wrong shape"):
        skimming_mask(torch.ones(1, 1, 2, 2), 1, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="contextual is too small"):
        SkimWeights(8, 2, 3, contextual=-1)
    with pytest.raises(ValueError, match="context"):
        filled()(normal(1, 1, 3, 12), normal(2, 1, 4, 12))
