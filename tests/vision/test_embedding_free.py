"""Embedding-free attention against loops and the authors' numbers, and what pooling more at inference changes.

The loops' author saw only an account of the equations, neither code nor tests.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision import EmbeddingFreeAttention, EmbeddingFreeBlock, EmbeddingFreeStage
from regard.vision.maps import to_map, to_tokens
from vision import naive_embedding_free as naive
from vision.shared import filled, gradients, leaves, normal, vectors


def put(module: torch.nn.Module, z: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Copy the authors' weights, name by name; our parameters by their names."""
    found = dict(module.named_parameters())
    with torch.no_grad():
        for name, p in found.items():
            part, _, kind = name.rpartition(".")
            p.copy_(z[f"p_{names[part]}.{kind}"].reshape(p.shape))
    return {f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": p for n, p in found.items()}


ATTENTION = {"kv_proj": "sr", "o_proj": "proj", "norm": "norm"}
BLOCK = {
    "attention.kv_proj": "attn.sr",
    "attention.o_proj": "attn.proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "up": "mlp.fc1",
    "depth": "mlp.dwconv.dwconv",
    "down": "mlp.fc2",
}


@pytest.mark.parametrize(("case", "heads"), [("enc", 2), ("enc1", 4), ("dec", 3)])
def test_gives_the_authors_numbers(case: str, heads: int) -> None:
    z = vectors("B011", case)
    layer = EmbeddingFreeAttention(z["x"].shape[2], heads, pool=int(z["pool"]), pooled_norm=case == "dec").double()
    theirs = put(layer, z, ATTENTION)
    (x,) = leaves(z["x"])
    out = to_tokens(layer(to_map(x, tuple(z["YX"].tolist()))))
    assert (out - z["out"]).abs().max() < 1e-10
    gx, g_sr = torch.autograd.grad((out * z["w"]).sum(), (x, theirs["sr.weight"]))
    assert (gx - z["gx"]).abs().max() < 1e-10
    assert (g_sr - z["g_sr"][:, :, 0, 0]).abs().max() < 1e-10
    if "isr_out" in z:  # the same weights, pooled more
        layer.pool = int(z["isr_pool"])
        assert (to_tokens(layer(to_map(x, tuple(z["YX"].tolist())))) - z["isr_out"]).abs().max() < 1e-10


def test_the_block_gives_the_authors_numbers() -> None:
    z = vectors("B011", "block")
    block = EmbeddingFreeBlock(6, 2, pool=2, mlp_ratio=2.0).double()
    put(block, z, BLOCK)
    (x,) = leaves(z["x"])
    out = to_tokens(block(to_map(x, tuple(z["YX"].tolist()))))
    assert (out - z["out"]).abs().max() < 1e-10
    assert (torch.autograd.grad((out * z["w"]).sum(), x)[0] - z["gx"]).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("options", "sizes", "reduction"),
    [({}, (2, 3), 1), ({"pool": 2}, (5, 4), 1), ({"pool": 2, "pooled_norm": True}, (4, 5), 2),
     ({"pool": 3, "pooled_conv": False}, (3, 7), 1), ({"pooled_conv": False, "pooled_norm": True}, (2, 2), 2)],
)  # fmt: skip
def test_equals_the_loops(options: dict, sizes: tuple, reduction: int) -> None:
    layer = filled(EmbeddingFreeAttention(6, 3, **options))
    layer.reduction = reduction
    (x,) = leaves(normal(3, 2, 6, *sizes))
    given = {"pool": options.get("pool", 1), "reduction": reduction}
    if layer.kv_proj is not None:
        given |= {"w_sr": layer.kv_proj.weight, "b_sr": layer.kv_proj.bias}
    if layer.norm is not None:
        given |= {"norm": (layer.norm.weight, layer.norm.bias)}
    got, want = layer(x), naive.on_map(x, layer.o_proj.weight, layer.o_proj.bias, 3, **given)
    close(got, want)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("form", ["encoder", "decoder"])
def test_block_and_stage_equal_the_loops(form: str) -> None:
    def weights(block: EmbeddingFreeBlock) -> tuple:
        a, pairs = block.attention, [(m.weight, m.bias) for m in (block.up, block.depth, block.down)]
        attention = (a.o_proj.weight, a.o_proj.bias, a.kv_proj.weight, a.kv_proj.bias)
        return (block.norm1.weight, block.norm1.bias), attention, (block.norm2.weight, block.norm2.bias), sum(pairs, ())

    def looped(own: tuple, z: Tensor, Y: int, X: int) -> Tensor:
        return naive.block(z, *own, 2, Y=Y, X=X)

    block = filled(EmbeddingFreeBlock(4, 2, pool=2, mlp_ratio=1.5, form=form))
    x, norm = normal(1, 2, 4, 3, 4), block.attention.norm
    own = None if norm is None else (norm.weight, norm.bias)
    want = naive.block(to_tokens(x), *weights(block), 2, Y=3, X=4, pool=2, encoder=form == "encoder", norm=own)
    close(to_tokens(block(x)), want)
    if form == "encoder":
        stage, image = filled(EmbeddingFreeStage(3, 4, 2, depth=2, mlp_ratio=2.0)), normal(2, 1, 3, 5, 6)
        blocks = [partial(looped, weights(b)) for b in stage.blocks]
        embedding = (stage.embed.weight, stage.embed.bias, (stage.embed_norm.weight, stage.embed_norm.bias))
        close(stage(image), naive.stage(image, embedding, blocks, (stage.norm.weight, stage.norm.bias), stride=2))


@torch.no_grad()
def test_pooling_more_at_inference_changes_little_where_maps_are_smooth() -> None:
    """Means of keys are keys of means; how far a cell's keys are from their mean is all that is lost."""
    torch.manual_seed(0)
    layer = regard.create("embedding_free", dim=8, num_heads=2, pool=2).double().eval()
    noise, at = normal(1, 1, 8, 16, 16), torch.arange(16).double() / 16
    phases = normal(2, 8, 2)[..., None, None]
    smooth = (2 * at[:, None] + phases[:, 0]).sin() + (2 * at + phases[:, 1]).cos()

    def change(x: Tensor, reduction: int) -> float:
        layer.reduction = 1
        plain = layer(x)
        layer.reduction = reduction
        more = layer(x)
        return float((more - plain).norm() / plain.norm())

    for reduction in (2, 4):
        assert 0 < change(smooth[None], reduction) < 0.3 * change(noise, reduction)
    k = to_map(layer.kv_proj(to_tokens(noise)), (16, 16))
    layer.reduction = 4
    close(layer.pooled(noise), to_tokens(torch.nn.functional.avg_pool2d(k, 8)))


@torch.no_grad()
def test_reduction_counts_in_eval_mode_and_costs_nothing() -> None:
    layer, x = filled(EmbeddingFreeAttention(6, 2, pool=2)), normal(1, 1, 6, 8, 8)
    plain = layer(x)
    layer.reduction = 2
    assert (layer(x) - plain).abs().max() > 0.01
    assert torch.equal(layer.train()(x), plain)
    assert layer.pooled(x).shape[1] == 16
    assert layer.eval().pooled(x).shape[1] == 4
    assert sum(p.numel() for p in layer.parameters()) == 2 * (6 * 6 + 6)


@torch.no_grad()
def test_scores_without_the_map_are_symmetric() -> None:
    """Then, and only then, pixel i weighs j's key as j weighs i's, before the softmax."""
    layer, x = filled(EmbeddingFreeAttention(4, 1, pooled_conv=False)), normal(1, 1, 4, 2, 3)
    scores = to_tokens(x) @ layer.pooled(x).mT
    close(scores, scores.mT)
    with_map = to_tokens(x) @ filled(EmbeddingFreeAttention(4, 1)).pooled(x).mT
    assert (with_map - with_map.mT).abs().max() > 0.1


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = EmbeddingFreeAttention(64, 2)
    assert abs(layer.kv_proj.weight.std().item() / (2 / 64) ** 0.5 - 1) < 0.05
    assert abs(layer.o_proj.weight.std().item() / 0.02 - 1) < 0.05
    assert not layer.o_proj.bias.any()


def test_what_is_refused() -> None:
    layer = EmbeddingFreeAttention(6, 2, pool=3)
    with pytest.raises(
        ValueError, match=r"x is smaller than a cell \(got \(1, 6, 2, 4\)\); expected sides of at least 3"
    ):
        layer(torch.zeros(1, 6, 2, 4))
    with pytest.raises(ValueError, match=r"reduction is too small \(got 0\)"):
        layer.reduction = 0
    with pytest.raises(ValueError, match="x has the wrong shape"):
        layer(torch.zeros(1, 5, 4, 4))
    with pytest.raises(ValueError, match="form is unknown"):
        EmbeddingFreeBlock(6, 2, form="both")  # type: ignore[arg-type]
    assert layer(torch.zeros(0, 6, 4, 4)).shape == (0, 6, 4, 4)
