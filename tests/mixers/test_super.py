"""Super attention against loops, whose author saw the formulas only (naive_sliced.py), and a third party's numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_sliced as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.super import SuperAttention, aligned

VECTORS = Path(__file__).parents[1] / "vectors" / "sliced.npz"
M, H = 12, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int = M, heads: int = H, **options) -> SuperAttention:
    made = regard.create("super", dim=dim, num_heads=heads, **{"max_length": 8, **options}).double().eval()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.6 * normal(100 + n, *p.shape))
    return made


def oracle(layer: SuperAttention, x: Tensor, **given) -> Tensor:
    weights = {f"W{n}": getattr(layer, f"{n}_proj").weight for n in "qo"}
    weights |= {f"b{n}": getattr(layer, f"{n}_proj").bias for n in "qo"}
    weights |= {"W_A": layer.alignment, "bias_A": layer.alignment_bias}
    return naive.super_attention(x, **weights, num_heads=layer.num_heads, causal=layer.causal, **given)


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"alignment_bias": True, "bias": True}, {"shared_alignment": False}], ids=["plain", "bias", "each"]
)
def test_is_the_definition(options: dict, causal: bool, padded: bool) -> None:
    layer, x = filled(causal=causal, **options), normal(1, 2, 5, M).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    given = {"mask": masks.padding(keep)} if padded else {}
    got, want = layer(x, **given), oracle(layer, x, keep=keep if padded else None)
    close(got, want, "out")
    same_gradients(got, want, [x, *layer.parameters()])


def test_attends_to_other_tokens() -> None:
    layer = filled()
    x, context = normal(1, 2, 3, M).requires_grad_(), normal(2, 2, 5, M).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    got, want = layer(x, context, mask=masks.padding(keep)), oracle(layer, x, context=context, keep=keep)
    close(got, want, "out")
    same_gradients(got, want, [x, context, *layer.parameters()])


@pytest.mark.parametrize(("case", "heads"), [("super", 3), ("each", 2)])
def test_gives_a_third_partys_numbers(case: str, heads: int) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}
    shared = case == "super"
    options = {"shared_alignment": shared, "alignment_bias": True, "bias": True, "max_length": 5}
    layer, x = filled(12, heads, **options), z["x"].requires_grad_()

    def theirs(what: str, name: str) -> Tensor:
        if name.startswith("o_proj"):
            return z[what + name.replace("o_proj", "W_o")]
        own = [f"{what}layers.Attention_Layer {h}." for h in range(heads)]
        if name.startswith("q_proj"):
            return torch.cat([z[layer + name.replace("q_proj", "W_q")] for layer in own])
        kind = "W_a.bias" if name == "alignment_bias" else "W_a.weight"
        return z[own[0] + kind] if shared else torch.stack([z[layer + kind] for layer in own])

    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(theirs("p_", name))
    out = layer(x)
    assert (out - z["out"]).abs().max() < 1e-10
    (out * z["w"]).sum().backward()
    assert (x.grad - z["grad_x"]).abs().max() < 1e-10
    for name, p in layer.named_parameters():
        assert (p.grad - theirs("g_", name)).abs().max() < 1e-10, name


@pytest.mark.parametrize("sizes", [(1,) * 7, (3, 0, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"alignment_bias": True}, {"shared_alignment": False}], ids=str)
def test_steps_equal_the_full_pass(options: dict, sizes: tuple[int, ...]) -> None:
    layer, x = filled(causal=True, **options), normal(1, 2, 7, M)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, :2] = keep[1, 4] = False
    want, state, outs, at = layer(x, mask=masks.padding(keep)), layer.init_state(2, 7), [], 0
    for t in sizes:
        out, state = layer.step(x[:, at : at + t], state, mask=keep[:, at : at + t])
        outs, at = [*outs, out], at + t
    close(torch.cat(outs, 1)[keep], want[keep], "steps")


@torch.no_grad()
def test_the_identity_is_efficient_attention() -> None:
    layer = regard.create("super", dim=M, num_heads=H, max_length=8, alignment_start="identity").double()
    other = regard.create("sliced", dim=M, num_heads=H).double()
    other.load_state_dict({name: p for name, p in layer.state_dict().items() if name != "alignment"})
    x = normal(1, 2, 6, M)
    close(layer(x), other(x), "out")
    assert sum(p.numel() for p in layer.parameters()) == 2 * M**2 + 8**2


@torch.no_grad()
def test_the_matrix_picks_any_token() -> None:
    """Queries that are 0 see all keys alike; what comes out is one token all the same, which the matrix says."""
    layer, x = filled(), normal(1, 2, 8, M)
    layer.q_proj.weight.zero_()
    layer.o_proj.weight.copy_(torch.eye(M))
    layer.alignment.zero_()[:, 5] = 1.0
    close(layer(x), x[:, 5:6].expand(-1, 8, -1), "token 5, for all")


@torch.no_grad()
def test_triangular_is_causal() -> None:
    layer, x = filled(causal=True), normal(1, 1, 6, M)
    changed = x.clone()
    changed[:, 3] += 1
    close(layer(changed)[:, :3], layer(x)[:, :3], "before")
    whole = aligned(x[:, None], layer.alignment[:6, :6])
    assert (aligned(changed[:, None], layer.alignment[:6, :6]) - whole)[..., :3, :].abs().max() > 0.1, "it is cut"


def test_starting_values() -> None:
    layer = regard.create("super", dim=64, num_heads=4, bias=True, alignment_bias=True, max_length=50)
    for p, bound in ((layer.q_proj.weight, (6 / 128) ** 0.5), (layer.alignment, (6 / 100) ** 0.5)):
        assert 0.9 * bound < float(p.detach().abs().max()) <= bound
    assert not layer.q_proj.bias.any()
    assert not layer.alignment_bias.any()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"max_length": 0}, "max_length"), ({"alignment_start": "zero"}, "alignment_start"), ({"heads": 5}, "num_heads")],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        filled(**wrong)


def test_refuses_more_tokens_than_the_matrix_has() -> None:
    layer = filled(causal=True)
    with pytest.raises(ValueError, match="longer than"):
        layer(normal(0, 1, 9, M))
    _, state = layer.step(normal(0, 1, 8, M), layer.init_state(1, 8))
    with pytest.raises(ValueError, match="longer than"):
        layer.step(normal(0, 1, 1, M), state)
