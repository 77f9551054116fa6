"""Swin's shifted windows against loops, whose author has read neither code nor test, and timm's numbers (B194)."""

import math

import pytest
import torch

import regard
from laws.measured import flops, largest
from regard.laws.agreement import close
from regard.vision import ShiftedWindowAttention, WindowAttention, window_attention
from vision.naive_swin import shifted_window, window_kernel
from vision.shared import filled, gradients, leaves, normal, vectors


def stacked(layer: ShiftedWindowAttention) -> tuple[torch.Tensor, ...]:
    """The projections as the loops take them, and the table as timm has it."""
    qkv = [layer.q_proj, layer.k_proj, layer.v_proj]
    joined = (torch.cat([p.weight for p in qkv]), torch.cat([p.bias for p in qkv]))
    return *joined, layer.o_proj.weight, layer.o_proj.bias, layer.table.flatten(1).T


@pytest.mark.parametrize("case", ["plain", "shifted", "big"])
def test_gives_timms_numbers(case: str) -> None:
    z = vectors("B194", case)
    M, H, w = z["x"].shape[-1], int(z["heads"]), int(z["window"])
    layer = regard.create("swin", dim=M, num_heads=H, window=w, shift=int(z["shift"]), dtype=torch.float64)
    state = {"table": z["P_relative_position_bias_table"].T.unflatten(1, (2 * w - 1, -1))}
    for kind in ("weight", "bias"):
        parts = zip("qkv", z[f"P_qkv.{kind}"].chunk(3), strict=True)
        state |= {f"{name}_proj.{kind}": part for name, part in parts} | {f"o_proj.{kind}": z[f"P_proj.{kind}"]}
    layer.load_state_dict(state)
    (x,) = leaves(z["x"])
    y = layer(x.movedim(-1, 1)).movedim(1, -1)
    close(y, z["y"])
    wanted = [x, layer.table, layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]
    gx, gtable, *gqkv = torch.autograd.grad((y * z["w"]).sum(), wanted)
    close(gx, z["gx"])
    close(gtable.flatten(1).T, z["gtable"])
    close(torch.cat(gqkv), z["gqkv"])


@pytest.mark.parametrize(("window", "shift", "sizes"), [(3, None, (6, 6)), (3, 2, (6, 9)), (2, 0, (4, 2))])
def test_equals_the_loops(window: int, shift: int | None, sizes: tuple[int, int]) -> None:
    layer = filled(regard.create("swin", dim=4, num_heads=2, window=window, shift=shift))
    (x,) = leaves(normal(1, 1, 4, *sizes))
    told = {"heads": 2, "window": window, "shift": layer.shift, "mask_value": -math.inf}
    got, want = layer(x), shifted_window(x.movedim(1, -1), *stacked(layer), **told).movedim(-1, 1)
    close(got, want)
    wanted = [x, *layer.parameters()]
    for g, h in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        close(g, h)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_many_short_sequences_equal_the_loops(scale: float | None) -> None:
    """At every scale, whose gradients the authors' kernel misses; windows in the order that masks are told in."""
    q, k, v = leaves(*(normal(n, 4, 2, 5, 3) for n in range(3)))
    (bias,), seen = leaves(normal(3, 2, 5, 5)), normal(4, 2, 5, 5) > -0.5
    seen |= torch.eye(5, dtype=torch.bool)

    def laid_out(z: torch.Tensor) -> torch.Tensor:
        return z.unflatten(0, (2, 2)).transpose(1, 2).flatten(2, 3)[..., None, :]

    got = window_attention(*map(laid_out, (q, k, v)), window=(5, 1), bias=bias, mask=seen, scale=scale)
    added = torch.zeros(2, 5, 5, dtype=torch.float64).masked_fill(~seen, -math.inf)
    want = laid_out(window_kernel(q, k, v, bias, added, scale))
    close(got, want)
    for g, h in zip(gradients(got, [q, k, v, bias]), gradients(want, [q, k, v, bias]), strict=True):
        close(g, h)


def test_windows_meet_through_the_shift() -> None:
    plain, shifted = (filled(regard.create("swin", dim=4, num_heads=2, window=4, shift=s)) for s in (0, 2))
    x = normal(2, 1, 4, 8, 8)
    moved = x.clone()
    moved[..., 0, 0] += 1

    def reached(*layers: torch.nn.Module) -> torch.Tensor:
        a, b = x, moved
        for layer in layers:
            a, b = layer(a), layer(b)
        return (a != b).any(1)[0]

    own = torch.zeros(8, 8, dtype=torch.bool)
    own[:4, :4] = True
    assert torch.equal(reached(plain, plain), own)
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:2, :2] = True
    assert torch.equal(reached(shifted), corner), "the other corners are no neighbours"
    beyond = torch.zeros(8, 8, dtype=torch.bool)
    beyond[:6, :6] = True
    assert torch.equal(reached(plain, shifted), beyond)


def test_cost_is_linear_in_pixels() -> None:
    layer = filled(regard.create("swin", dim=8, num_heads=2, window=4))
    small, large = (flops(lambda x=x: layer(x)) for x in (normal(0, 1, 8, 16, 16), normal(0, 1, 8, 32, 64)))
    assert 8 * small <= large <= 8.8 * small, "at borders, of which small maps have more, the shift hides some"


def test_no_score_matrix_is_made() -> None:
    layer, x = regard.create("swin", dim=32, num_heads=8, window=8).eval(), torch.randn(1, 32, 32, 32)
    scores = 16 * 8 * 64**2
    with torch.no_grad():
        assert 4 * largest(lambda: layer(x)) <= scores


def test_maps_of_any_size() -> None:
    """What windows don't divide is padded; a short side is one window without shift."""
    layer = filled(ShiftedWindowAttention(4, 2, window=4, shift=1))
    x = normal(3, 2, 4, 6, 9)
    close(layer(x), layer(torch.nn.functional.pad(x, (0, 3, 0, 2)))[..., :6, :9])
    small = filled(ShiftedWindowAttention(4, 2, window=3, shift=0))
    state = layer.state_dict()
    small.load_state_dict(state | {"table": state["table"][:, 1:-1, 1:-1]})
    close(layer(x[..., :3, :3]), small(x[..., :3, :3]))
    column = layer(x[..., :8, :3])  # shifted downwards alone
    rolled = x[..., :8, :3].roll(-1, 2)
    close(column.roll(-1, 2)[..., :4, :], layer(rolled[..., :4, :]))


def test_starting_values_and_the_window_attention_without_table_and_shift() -> None:
    layer = regard.create("swin", dim=64, num_heads=2)
    assert (layer.window, layer.shift, layer.table.shape) == (7, 3, (2, 13, 13))
    assert float(layer.table.detach().std()) == pytest.approx(0.02, rel=0.2)
    layer = filled(ShiftedWindowAttention(6, 2, window=3, shift=0))
    torch.nn.init.zeros_(layer.table)
    other = WindowAttention(6, 2, window=3).double()
    other.load_state_dict({n: z for n, z in layer.state_dict().items() if n != "table"})
    x = normal(4, 1, 6, 6, 6)
    close(layer(x), other(x))


def test_bad_input() -> None:
    for shift in (3, -1):
        with pytest.raises(ValueError, match="ShiftedWindowAttention: shift is"):
            ShiftedWindowAttention(6, 2, window=3, shift=shift)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 6, 5\)\); expected \(B, M = 6, Y, X\)"):
        ShiftedWindowAttention(6, 2)(normal(0, 2, 6, 5))
