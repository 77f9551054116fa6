"""xPos against loops by one who saw a summary only, neither code nor test (naive_xpos.py), and torchscale's numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from positions import naive_xpos as naive
from positions.naive import close, vectors
from regard import masks
from regard.positions.xpos import XPos, attention_resolution, decay

D = 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(dim: int = 12, heads: int = 2, **options: Any) -> regard.Attention:
    made = regard.create("xpos", dim=dim, num_heads=heads, causal=True, bias=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.5 * normal(n, *p.shape))
    return made


def projections(made: regard.Attention) -> list[Tensor]:
    return [p for name in "qkvo" for p in (getattr(made, f"{name}_proj").weight, getattr(made, f"{name}_proj").bias)]


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"scale_base": 2.0}, {"scale_base": 3.0, "gamma": 0.9, "centre": 2}, {"trained_length": 5}], ids=str
)
def test_is_the_definition(options: dict[str, Any]) -> None:
    made, x = layer(**options), normal(50, 2, 7, 12).requires_grad_()
    keep = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    told = {"base": options.get("scale_base", 512.0), "gamma": options.get("gamma", 0.4)}
    want = naive.layer(
        x,
        *projections(made),
        2,
        **told,
        train_length=options.get("trained_length"),
        allowed=keep[:, None].expand(-1, 7, -1),
    )
    got = made(x, mask=masks.padding(keep))
    close(got, want)
    same_gradients(got, want, [x, *made.parameters()])


@pytest.mark.parametrize("case", ["causal", "small_base_pad"])
def test_gives_torchscales_numbers(case: str) -> None:
    z = {k.removeprefix(f"{case}_"): torch.as_tensor(v) for k, v in vectors("B014").items() if k.startswith(case)}
    made = layer(18, 3, scale_base=float(z["scale_base"]))
    names = {"q": "q", "k": "k", "v": "v", "o": "out"}
    made.load_state_dict(
        {f"{o}_proj.{w}": z[f"{t}_proj_{w}"] for o, t in names.items() for w in ("weight", "bias")}, strict=True
    )
    x = z["x"].requires_grad_()
    out = made(x, mask=None if case == "causal" else masks.padding(~z["key_padding"]))
    close(out, z["out"])
    found = torch.autograd.grad((out * z["w"]).sum(), [x, *made.parameters()])
    close(found[0], z["grad_x"])
    for (name, _), gradient in zip(made.named_parameters(), found[1:], strict=True):
        close(gradient, z["grad_" + name.replace("o_proj", "out_proj").replace(".", "_")])
    if case == "causal":
        state, outs = made.init_state(2, 7), []
        for t in range(7):
            y, state = made.step(x[:, t : t + 1], state)
            outs.append(y)
        close(torch.cat(outs, 1), z["out_incremental"])


def test_gives_torchscales_queries_and_keys() -> None:
    z = {k: torch.as_tensor(v) for k, v in vectors("B014").items() if k.startswith("xpos")}
    part, x, at = XPos(10, scale_base=8.0, centre=4), z["xpos_in"][:, None], torch.arange(7)
    q, k = part.turn(x, x, at, at)
    close(q[:, 0], z["xpos_q"])
    close(k[:, 0], z["xpos_k"])
    close(part.turn(x[:, :, :3], x, at[4:], at)[0][:, 0], z["xpos_q_offset4_len3"])


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_fade_by_distance_alone(interleaved: bool) -> None:
    """A pair of ones at a query and a key scores z^((i - j) / b) cos((i - j) w), wherever they stand."""
    part = XPos(D, scale_base=3.0, base=50.0, interleaved=interleaved)
    z = (torch.arange(0, D, 2).double() / D + 0.4) / 1.4
    close(decay(D, 0.4), z)
    eye = torch.eye(D, dtype=torch.float64)[:: 2 if interleaved else 1][: D // 2]
    for i, j in ((0, 0), (5, 2), (9, 6), (40, 37), (2, 4)):
        q, k = part.turn(eye[None, :, None], eye[None, :, None], torch.tensor([i]), torch.tensor([j]))
        want = z ** ((i - j) / 3) * ((i - j) * 50.0 ** (-torch.arange(0, D, 2).double() / D)).cos()
        close((q * k).sum(-1).squeeze(), want)


def test_the_centre_changes_no_output() -> None:
    x = normal(3, 2, 9, 12)
    close(layer(scale_base=4.0)(x), layer(scale_base=4.0, centre=6)(x))


def expected(part: Any, far: int = 1000) -> Tensor:
    """What a query of ones scores at each distance with keys of ones: g of eq. 8."""
    ones, at = torch.ones(1, 1, far, 64, dtype=torch.float64), torch.arange(far)
    q, k = part.turn(ones[:, :, :1], ones, torch.tensor([far - 1]), at)
    return ((q @ k.mT).flatten() / 8).flip(0)


def test_resolution_exceeds_that_of_rotary() -> None:
    """Scores swing less at a distance, and softmax tells the distances apart by them better."""
    ours, rotary = expected(XPos(64, scale_base=64.0)), expected(regard.positions.Rotary(64, interleaved=True))
    assert ours.diff().clamp(min=0).sum() < 0.5 * rotary.diff().clamp(min=0).sum(), "it rises less"
    assert attention_resolution(ours) > 1.1 * attention_resolution(rotary) > 0
    assert attention_resolution(torch.zeros(9)) == 0


def test_resolution_is_equation_three() -> None:
    s = [1.0, 0.5, 0.7, -2.0]
    e = torch.tensor(s).double().exp()
    want = sum(e[n] * (e[n] - e[n + 1]) for n in range(3)) / e.sum() ** 2
    close(attention_resolution(torch.tensor(s).double()), want)


def test_blocks_show_at_least_one_more_than_their_size() -> None:
    made = layer(trained_length=8)
    assert made.receptive_field() == masks.causal() & masks.blocks(4, before=1)
    counts = made.receptive_field().dense(20)[0, 0].sum(-1)
    assert counts[:4].tolist() == [1, 2, 3, 4]
    assert counts[4:].tolist() == [5, 6, 7, 8] * 4
    dense = [[naive.sees(i, j, 8) for j in range(20)] for i in range(20)]
    assert torch.equal(made.receptive_field().dense(20)[0, 0], torch.tensor(dense))
    x, other = normal(1, 1, 20, 12), normal(2, 1, 20, 12)
    changed = torch.cat([other[:, :8], x[:, 8:]], 1)
    assert torch.equal(made(changed)[:, 12:], made(x)[:, 12:])
    assert not torch.equal(made(changed)[:, 11], made(x)[:, 11])


def test_a_stream_keeps_two_blocks() -> None:
    made, x = layer(trained_length=6, scale_base=9.0), normal(4, 2, 17, 12)
    state, outs = made.init_state(2, 1), []
    assert state.window <= 6
    for size in (1, 4, 2, 7, 1, 1, 1):
        y, state = made.step(x[:, sum(o.shape[1] for o in outs) :][:, :size], state)
        outs.append(y)
    close(torch.cat(outs, 1), made(x))


def test_half_precision_counts_from_the_centre() -> None:
    at = torch.arange(8192)
    z = normal(1, 1, 1, 8192, 4).clamp(-2, 2)  # scales alone come to 23,000
    exact = XPos(4, centre=4096).turn(z, z, at, at)
    half = XPos(4, centre=4096).turn(z.half(), z.half(), at, at)
    for mine, want in zip(half, exact, strict=True):
        assert (mine.double() - want).abs().max() < 2e-3 * want.abs().max()
    with pytest.raises(ValueError, match=r"XPos: positions are too far .* \(got 8191\); expected at most 4532"):
        XPos(4).turn(z.half(), z.half(), at, at)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scale_base": 0.0}, ValueError, "XPos: scale_base is out of range"),
        ({"gamma": 0}, ValueError, "XPos: gamma is out of range"),
        ({"centre": 1.5}, TypeError, "XPos: centre has the wrong type"),
        ({"trained_length": 1}, ValueError, "xpos: trained_length is too small"),
        ({"base": 1.0}, ValueError, "XPos: base is out of range"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        regard.create("xpos", dim=12, num_heads=2, **options)
