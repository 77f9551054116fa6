"""Inherently faithful maps against loops and the authors' numbers, and what the mask hides.

The loops' author saw only an account of the equations, neither code nor tests.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from models import naive_faithful as naive
from regard.laws.agreement import close
from regard.models import faithful_parts as parts_of
from regard.models.faithful import FaithfulViT, faithful_loss
from regard.models.masked_vit import MaskedViT, weighted_attention

VECTORS = Path(__file__).parents[1] / "vectors"
OF_BLOCK = {
    "attention.o_proj.weight": "attn.proj.weight",
    "attention.o_proj.bias": "attn.proj.bias",
    "mlp.0.weight": "mlp.fc1.weight",
    "mlp.0.bias": "mlp.fc1.bias",
    "mlp.2.weight": "mlp.fc2.weight",
    "mlp.2.bias": "mlp.fc2.bias",
    "scale1": "ls1.gamma",
    "scale2": "ls2.gamma",
}


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS / "B048.npz") as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(vit: MaskedViT) -> dict[str, Tensor]:
    """Ours under the names of the account."""
    found = {"cls_token": vit.first[:, :1], "reg_token": vit.first[:, 1:], "pos_embed": vit.places}
    found |= {f"patch_embed.proj.{n}": p for n, p in vit.embed.named_parameters()}
    found |= {f"norm.{n}": p for n, p in vit.norm.named_parameters()}
    for at, block in enumerate(vit.blocks):
        for name, p in block.named_parameters():
            if not name.startswith("attention.") or "o_proj" in name:
                found[f"blocks.{at}.{OF_BLOCK.get(name, name)}"] = p
        a = block.attention
        for kind in ("weight", "bias"):
            found[f"blocks.{at}.attn.qkv.{kind}"] = torch.cat(
                [getattr(f, kind) for f in (a.q_proj, a.k_proj, a.v_proj)]
            )
    return found


@torch.no_grad()
def put(vit: MaskedViT, z: dict[str, Tensor]) -> None:
    vit.first.copy_(torch.cat([z["p_cls_token"], z["p_reg_token"]], 1))
    vit.places.copy_(z["p_pos_embed"])
    for part, name in ((vit.embed, "patch_embed.proj"), (vit.norm, "norm")):
        part.load_state_dict({kind: z[f"p_{name}.{kind}"] for kind in ("weight", "bias")})
    for at, block in enumerate(vit.blocks):
        for name, p in block.named_parameters():
            if name in OF_BLOCK or not name.startswith("attention."):
                p.copy_(z[f"p_blocks.{at}.{OF_BLOCK.get(name, name)}"])
        a = block.attention
        for kind in ("weight", "bias"):
            for f, part in zip(
                (a.q_proj, a.k_proj, a.v_proj), z[f"p_blocks.{at}.attn.qkv.{kind}"].chunk(3), strict=True
            ):
                getattr(f, kind).copy_(part)


def small(mask: str = "hard", **options) -> FaithfulViT:
    sizes = {"channels": 2, "classes": 3, "parts": 3, "size": 12, "patch": 4, "depth": 2, "registers": 1}
    model = regard.create("faithful_vit", dim=8, num_heads=2, mask=mask, **{**sizes, **options}).double().eval()
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p.copy_(0.4 * normal(n, *p.shape))
    return model


def as_theirs(model: FaithfulViT) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second, found = weights(model.finder), weights(model.reader), model.discovery
    first |= {"fc_landmarks.weight": found.prototypes, "fc_class_landmarks.weight": found.head.weight}
    first |= {"modulation.weight": found.weight, "modulation.bias": found.bias}
    second |= {"fc_norm.weight": model.norm.weight, "fc_norm.bias": model.norm.bias}
    return first, second | {"head.weight": model.head.weight}


def reader(case: str) -> FaithfulViT:
    """A model whose second stage has the authors' weights."""
    z = vectors("stage2")
    model = FaithfulViT(
        8,
        2,
        channels=2,
        classes=3,
        parts=3,
        size=12,
        patch=4,
        depth=2,
        registers=1,
        mask=case,  # type: ignore[arg-type]
    ).double()
    for n in range(2):  # their MLPs are twice as wide
        model.reader.blocks[n].mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double()
    put(model.reader, z)
    model.norm.load_state_dict({kind: z[f"p_fc_norm.{kind}"] for kind in ("weight", "bias")})
    model.head.load_state_dict({"weight": z["p_head.weight"]})
    return model.eval()


@pytest.mark.parametrize("trained", [False, True])
def test_the_second_stage_gives_the_authors_numbers(trained: bool) -> None:
    """Whether the mask has a gradient or not."""
    z, model = vectors("stage2"), reader("hard")
    x, mask = z["x"].clone().requires_grad_(), z["mask"].double().requires_grad_(trained)
    out = model.read(x, mask)
    assert (out - z["out"]).abs().max() < 1e-10
    assert (torch.autograd.grad((out * z["w"]).sum(), x)[0] - z["gx"]).abs().max() < 1e-10


def test_soft_masks_give_the_authors_numbers() -> None:
    z, model = vectors("soft"), reader("soft")
    mask = z["mask"].clone().requires_grad_()
    out = model.read(z["x"], mask)
    assert (out - z["out"]).abs().max() < 1e-10
    assert (torch.autograd.grad((out * z["w"]).sum(), mask)[0] - z["gmask"]).abs().max() < 1e-10


def test_the_first_stage_gives_the_authors_numbers() -> None:
    z = vectors("stage1")
    vit = MaskedViT(8, 2, channels=2, size=12, patch=4, depth=2, registers=1, mlp_ratio=2.0).double()
    put(vit, z)
    found = parts_of.PartDiscovery(8, 3, 4).double().eval()
    with torch.no_grad():
        found.prototypes.copy_(z["p_fc_landmarks.weight"][:, :, 0, 0])
        found.weight.copy_(z["p_modulation.weight"])
        found.bias.copy_(z["p_modulation.bias"])
        found.head.weight.copy_(z["p_fc_class_landmarks.weight"])
    x = z["x"].clone().requires_grad_()
    tokens = vit(x)[:, 2:]
    assert (tokens.mT - z["tokens"].flatten(2)).abs().max() < 1e-10
    logits = parts_of.part_logits(tokens.mT, found.prototypes)
    assert (logits - z["logits"].flatten(2)).abs().max() < 1e-10
    maps = logits.softmax(1)
    assert (maps - z["part_maps"].flatten(2)).abs().max() < 1e-10
    features = found.features(tokens, maps)
    scores = found.scores(features)
    assert (features - z["features"]).abs().max() < 1e-10
    assert (scores - z["scores"]).abs().max() < 1e-10
    loss = (features * z["wf"]).sum() + (scores * z["ws"]).sum()
    assert (torch.autograd.grad(loss, x, retain_graph=True)[0] - z["gx"]).abs().max() < 1e-10
    ground = parts_of.foreground((logits + z["gumbel"].flatten(2)).softmax(1))
    assert (ground.soft - z["fgbg_soft"].flatten(2)).abs().max() < 1e-10
    assert (ground.hard - z["fgbg_hard"].flatten(2)).abs().max() < 1e-10


def test_the_straight_through_mask_gives_the_authors_numbers() -> None:
    z = vectors("st")
    logits = z["logits"].flatten(2).clone().requires_grad_()
    ground = parts_of.foreground((logits + z["gumbel"].flatten(2)).softmax(1))
    assert (ground.soft - z["soft"].flatten(2)).abs().max() < 1e-10
    assert (ground.hard - z["hard"].flatten(2)).abs().max() < 1e-10
    (grad,) = torch.autograd.grad((ground.hard * z["w"].flatten(2)).sum(), logits)
    assert (grad - z["glogits"].flatten(2)).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("mask", "drop", "tau"), [("hard", (), 1.0), ("soft", (), 0.7), ("hard", (1,), 1.0), ("hard", (0, 1, 2), 1.0)]
)
def test_equals_the_loops(mask: str, drop: tuple, tau: float) -> None:
    model, x = small(mask, tau=tau), normal(90, 2, 2, 12, 12).requires_grad_()
    first, second = as_theirs(model)
    kept = "none" if drop else "weight"
    want = naive.faithful_vit(x, first, second, 2, mask=mask, drop_parts=drop, gradient=kept, tau=tau)
    got = model(x, drop_parts=drop)
    assert 0 < got.mask.sum() < got.mask.numel() or drop
    for name, ours, theirs in zip(got._fields, got, want, strict=False):
        close(ours, theirs, name)
    loss = [(out * normal(80 + n, *out.shape)).sum() for n, out in enumerate((got.logits, want[0]))]
    inputs = [x, *([] if drop else [model.discovery.prototypes])]
    for ours, theirs in zip(*(torch.autograd.grad(one, inputs) for one in loss), strict=True):
        close(ours, theirs)


@torch.no_grad()
def test_parts_equal_the_loops() -> None:
    logits, keep = normal(1, 2, 4, 6), torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    g = logits.softmax(1)
    soft, hard = naive.foreground(logits.unflatten(2, (2, 3)), keep=keep)
    ground = parts_of.foreground(g, keep)
    close(ground.soft, soft.flatten(2))
    close(ground.hard, hard.flatten(2))
    for drop in ((0,), (1, 2), (0, 1, 2)):
        want = naive.without_parts(g.unflatten(2, (2, 3)), drop).flatten(1)
        assert torch.equal(parts_of.without_parts(g, drop), want)
    z, prototypes, least = normal(2, 2, 5, 6), normal(3, 4, 5), torch.tensor([0.0, -9.0, 9.0]).double()
    found = parts_of.thresholded(z, prototypes, least)
    close(found.exp(), naive.thresholded_logits(z.unflatten(2, (2, 3)), prototypes, least).flatten(2).exp())
    assert found[:, 2].isinf().all()
    maps, back = (normal(n, 2, 4, 5, 6).softmax(1) for n in (4, 5))
    for name in ("presence", "background_presence", "total_variation", "pixel_entropy"):
        close(getattr(parts_of, name)(maps), getattr(naive, name)(maps))
    close(parts_of.equivariance(maps, back), naive.equivariance(maps, back))
    features = normal(6, 2, 5, 4)
    close(parts_of.orthogonality(features), naive.orthogonality(features))


def test_what_the_mask_hides_has_no_influence() -> None:
    model, x = small(), normal(1, 1, 2, 12, 12).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 0, 0, 1, 0, 1, 0]]).double()
    out = model(x, mask=mask)[0]
    (grad,) = torch.autograd.grad((out * normal(2, *out.shape)).sum(), x)
    each = grad.abs().unfold(2, 4, 4).unfold(3, 4, 4).amax((1, 4, 5)).flatten(1)
    assert torch.equal(each > 0, mask > 0)
    with torch.no_grad():
        hidden = (mask == 0).view(1, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
        assert torch.equal(model(x + 100 * hidden, mask=mask)[0], out)
        nothing = model(x, mask=0 * mask)[0]
        assert nothing.isfinite().all()
        assert torch.equal(model(x + 1, mask=0 * mask)[0], nothing)


def test_the_second_stage_teaches_the_first() -> None:
    """Of hard masks too, also where a patch is hidden; and hidden keys that are far ahead make no NaN."""
    model = small().train()
    model.noise, model.discovery.dropout = False, 0.0
    out = model(normal(1, 2, 2, 12, 12))
    assert set(out.mask.unique().tolist()) == {0.0, 1.0}
    out.logits.square().sum().backward()
    assert model.discovery.prototypes.grad.abs().max() > 0
    q, k, v = (normal(n, 1, 1, 3, 4).float() for n in range(3))
    k[:, :, 1] = 1e4 * q[:, :, 0]
    weight = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    found = weighted_attention(q, k, v, weight)
    seen = [0, 2]
    want = torch.softmax(q @ k[:, :, seen].mT / 2, -1) @ v[:, :, seen]
    torch.testing.assert_close(found, want)
    found.sum().backward()
    assert weight.grad.isfinite().all()


def test_noise_is_drawn_in_training_alone() -> None:
    model, x = small(parts=5), normal(1, 4, 2, 12, 12)
    with torch.no_grad():
        model.discovery.prototypes.mul_(0.1)
        assert torch.equal(model(x).mask, model(x).mask)
        model.train()
        assert not torch.equal(model(x).mask, model(x).mask)
        model.noise, model.discovery.dropout = False, 0.0
        assert torch.equal(model(x).mask, model.eval()(x).mask)


def test_learns_and_names_its_losses() -> None:
    torch.manual_seed(0)
    model = FaithfulViT(16, 2, channels=1, classes=2, parts=2, size=16, patch=4, depth=1, registers=1)
    labels = torch.arange(16) % 2
    x = 0.1 * torch.randn(16, 1, 16, 16)
    x[labels == 0, :, 4:8, 4:12] += 1
    x[labels == 1, :, 4:12, 4:8] += 1
    optimiser, seen = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(60):
        out = model(x)
        terms = faithful_loss(out, labels, (4, 4), model(x.flip(3)).part_maps.unflatten(2, (4, 4)).flip(3).flatten(2))
        optimiser.zero_grad()
        sum(terms.values()).backward()
        optimiser.step()
        seen.append(terms["class"].item())
    assert seen[-1] < 0.3 * seen[0]
    assert len(terms) == 8
    assert all(p.grad is not None for p in model.parameters())
    maps = out.part_maps.unflatten(2, (4, 4))
    torch.testing.assert_close(terms["background"], 2 * parts_of.background_presence(maps))


def test_what_is_refused() -> None:
    model = small()
    x = normal(1, 1, 2, 12, 12)
    with pytest.raises(ValueError, match="mask is unknown"):
        small("some")
    with pytest.raises(ValueError, match="drop_parts does not go with soft masks"):
        small("soft")(x, drop_parts=(1,))
    with pytest.raises(ValueError, match="part is too large"):
        model(x, drop_parts=(3,))
    with pytest.raises(ValueError, match="image has the wrong shape"):
        model(normal(1, 1, 2, 16, 16))
    with pytest.raises(ValueError, match="sides are too small"):
        parts_of.presence(normal(1, 1, 3, 2, 5))
    assert len(model.mixers) == 4
    assert model(x, thresholds=torch.zeros(3).double()).logits.isfinite().all()
    assert model(x[:0]).logits.shape == (0, 3)
