"""Linear additive attention against loops, whose author has read neither code nor test, and the authors' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from linear import naive_lada as naive
from regard import masks
from regard.laws.agreement import close
from regard.linear import Ladaformer, LinearAdditiveAttention, SelfModulatedLadaformer, lada_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "A101.npz"
NORMS = {"h_0": "hidden.0", "mlp_gamma": "gamma", "mlp_beta": "beta"}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int = 3, **options) -> LinearAdditiveAttention:
    layer = regard.create("lada", **{"dim": 12, "num_heads": 3, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(*p.shape, seed=100 * seed + n))
    return layer


def named(layer: LinearAdditiveAttention) -> dict[str, Tensor]:
    """By the names that the loops have."""
    given = {"q_attn": layer.score_proj, "to_out": layer.o_proj}
    theirs = {f"{name}_{kind}": getattr(p, kind) for name, p in given.items() for kind in ("weight", "bias")}
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    return theirs | {
        f"to_qkv_{kind}": torch.cat([getattr(p, kind) for p in projections]) for kind in ("weight", "bias")
    }


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}


def given(layer: LinearAdditiveAttention, z: dict[str, Tensor], before: str = "") -> None:
    """Their parameters."""
    maps: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        maps |= {f"{n}_proj.{kind}": p for n, p in zip("qkv", z[f"{before}to_qkv_{kind}"].chunk(3), strict=True)}
        maps |= {f"o_proj.{kind}": z[f"{before}to_out_{kind}"], f"score_proj.{kind}": z[f"{before}q_attn_{kind}"]}
    layer.load_state_dict(maps)


def fill(module: nn.Module, z: dict[str, Tensor], name: str) -> None:
    for kind, p in module.named_parameters():
        with torch.no_grad():
            p.copy_(z[f"{name}_{kind}"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loops(causal: bool, padded: bool):
    layer, x, g = filled(causal=causal), normal(2, 5, 12).requires_grad_(), normal(2, 5, 12, seed=2)
    keep = torch.tensor([[False, True, False, True, True], [True, True, True, False, False]]) if padded else None
    got, (want, _) = layer(x, mask=keep), naive.mixer(x, named(layer), 3, keep=keep, causal=causal)
    close(got.detach(), want.detach())
    leaves = [x, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((y * g).sum(), leaves) for y in (got, want)), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("case", ["a", "b"])
def test_gives_the_authors_numbers(case: str):
    z = vectors(case)
    layer, x = filled(dim=z["x"].shape[2], num_heads=int(z["H"])), z["x"].requires_grad_()
    given(layer, z)
    out = layer(x)
    assert (out - z["y"]).abs().max() < 1e-10
    gx, gw = torch.autograd.grad((out * z["w"]).sum(), [x, layer.score_proj.weight])
    assert (gx - z["gx"]).abs().max() < 1e-10
    assert (gw - z["g_q_attn"]).abs().max() < 1e-10


@pytest.mark.parametrize("case", ["sm", "blk"])
def test_blocks_give_the_authors_numbers(case: str):
    """Without a residual around the generator's MLP, with one around the discriminator's."""
    z, modulated = vectors(case), case == "sm"
    sizes = {"num_heads": int(z["H"]), "hidden": 7}
    block = (SelfModulatedLadaformer(8, 3, **sizes) if modulated else Ladaformer(8, **sizes)).double()
    given(block.attention, z, "attn_")
    for n, norm in ((1, block.norm1), (2, block.norm2)):
        for theirs, mine in NORMS.items() if modulated else [("", "")]:
            fill(norm.get_submodule(mine), z, f"ln_{n}_{theirs}".rstrip("_"))
    for n in (0, 2):
        fill(block.mlp[n], z, f"mlp_{n}")
    x = z["x"].requires_grad_()
    out = block(x, z["z"]) if modulated else block(x)
    assert (out - z["y"]).abs().max() < 1e-10
    (out * z["w"]).sum().backward()
    assert (x.grad - z["gx"]).abs().max() < 1e-10
    if modulated:
        assert (block.norm1.hidden[0].weight.grad - z["g_ln_1_h"]).abs().max() < 1e-10


@torch.no_grad()
def test_another_tokens_value_changes_nothing():
    """Nor does another token's key: only queries are shared, by their average."""
    layer, x = filled(), normal(2, 6, 12)
    before = layer(x)

    def other(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return torch.cat([out[:, :2], out[:, 2:3] + 1, out[:, 3:]], 1)

    for proj in (layer.v_proj, layer.k_proj):
        hook = proj.register_forward_hook(other)
        changed = (layer(x) - before).abs().amax((0, 2))
        hook.remove()
        assert changed[2] > 1e-3
        assert not changed[[0, 1, 3, 4, 5]].any()
    hook = layer.q_proj.register_forward_hook(other)
    assert (layer(x) - before).abs().amax((0, 2)).min() > 1e-4, "one query reaches all tokens"
    hook.remove()


@torch.no_grad()
def test_no_square_matrix():
    T, sizes = 512, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    layer, x = regard.create("lada", dim=8, num_heads=2), torch.randn(1, T, 8)
    with Watch():
        layer(x, mask=torch.arange(T)[None] < 500)
    assert max(sizes) <= 8 * T


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_fewer_key_heads_are_repeated(causal: bool):
    layer, full = filled(num_kv_heads=1, causal=causal), filled(causal=causal)
    x = normal(2, 5, 12)
    for name in ("q_proj", "o_proj", "score_proj"):
        getattr(full, name).load_state_dict(getattr(layer, name).state_dict())
    for name in ("k_proj", "v_proj"):
        part = getattr(layer, name)
        getattr(full, name).load_state_dict({"weight": part.weight.repeat(3, 1), "bias": part.bias.repeat(3)})
    close(layer(x), full(x))


@torch.no_grad()
def test_hidden_tokens_are_not_there():
    """Whatever they hold, on whichever side; and where all are hidden there is nothing to share."""
    layer, x = filled(), normal(1, 7, 12)
    for real in (slice(0, 4), slice(3, 7)):
        keep = torch.zeros(1, 7, dtype=torch.bool)
        keep[:, real] = True
        poisoned = torch.where(keep[..., None], x, torch.nan)
        close(layer(poisoned, mask=masks.padding(keep))[:, real], layer(x[:, real]))
    nothing = layer(x, mask=torch.zeros(1, 7, dtype=torch.bool))
    close(nothing, layer.o_proj.bias.expand(1, 7, 12))


@torch.no_grad()
def test_steps_equal_the_full_pass():
    layer, x = filled(causal=True), normal(2, 7, 12)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, :2] = keep[1, 4] = False
    want, state, outs, at = layer(x, mask=keep), layer.init_state(2, 7, dtype=torch.float64), [], 0
    for t in (3, 0, 1, 3):
        out, state = layer.step(x[:, at : at + t], state, mask=keep[:, at : at + t])
        outs, at = [*outs, out], at + t
    close(torch.cat(outs, 1)[keep], want[keep])


def test_starts_as_the_authors_code():
    """All linear layers as torch's, with biases: 4 M^2 + M H + 4 M + H numbers."""
    torch.manual_seed(0)
    layer = regard.create("lada", dim=64, num_heads=4)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 64**2 + 64 * 4 + 4 * 64 + 4
    for proj in (layer.q_proj, layer.score_proj, layer.o_proj):
        assert 0.1 < float(proj.weight.detach().abs().max()) <= 1 / 8
        assert proj.bias.any()
    assert regard.create("lada", dim=64, num_heads=4, bias=False).q_proj.bias is None
    block = SelfModulatedLadaformer(8, 3)
    assert (block.norm1.norm.eps, block.mlp[0].out_features, block.attention.num_heads) == (1e-6, 512, 4)
    assert (Ladaformer(8).norm1.eps, Ladaformer(8).mlp[0].out_features) == (1e-5, 512)


def test_refusals():
    q = normal(2, 3, 5, 4)
    with pytest.raises(ValueError, match=r"lada_attention: scores has the wrong shape \(got \(2, 5, 3\)\)"):
        lada_attention(q, q, q, normal(2, 5, 3))
    with pytest.raises(ValueError, match="lada_attention: k has the wrong shape"):
        lada_attention(q[:, :, :2], q, q, normal(2, 3, 2))
    with pytest.raises(ValueError, match="context is not taken"):
        filled()(normal(2, 3, 12), normal(2, 4, 12))
    with pytest.raises(ValueError, match="cond_dim is too small"):
        SelfModulatedLadaformer(8, 0)
    with pytest.raises(ValueError, match=r"SelfModulatedLadaformer: z has the wrong shape"):
        SelfModulatedLadaformer(8, 3)(torch.randn(2, 5, 8), torch.randn(2, 4))
