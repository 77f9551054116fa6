"""Grouped attention against loops, whose author saw the formulas only, and the authors' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_grouped as naive
from regard import masks
from regard.laws.agreement import close
from regard.laws.costs import count
from regard.mixers.grouped import GroupedAttention, grouped_attention
from regard.mixers.strided import StridedAttention
from regard.positions.relative_sinusoids import RelativeSinusoids

VECTORS = Path(__file__).parents[1] / "vectors" / "efficient_conformer.npz"
NAMES = {
    "query_layer": "q_proj",
    "key_layer": "k_proj",
    "value_layer": "v_proj",
    "output_layer": "o_proj",
    "pos_layer": "proj",
    "u": "content_bias",
    "v": "position_bias",
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    layer = layer.double().eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 + n, *p.shape))
    return layer


def grouped(dim: int = 12, heads: int = 4, **options) -> GroupedAttention:
    return filled(regard.create("grouped", dim=dim, num_heads=heads, **options))


def maps(layer: torch.nn.Module) -> dict[str, Tensor]:
    kinds = (("W", "weight"), ("b", "bias"))
    return {f"{kind}{n}": getattr(getattr(layer, f"{n}_proj"), name) for n in "qkvo" for kind, name in kinds}


def oracle(layer: GroupedAttention | StridedAttention, x: Tensor, **given) -> Tensor:
    if isinstance(layer, StridedAttention):
        return naive.strided(x, **maps(layer), heads=layer.num_heads, stride=layer.stride, **given)
    r = layer.relative
    rel = None if r is None else (r.content_bias, r.position_bias, r.proj.weight, r.proj.bias)
    own = {"heads": layer.num_heads, "group": layer.group, "causal": layer.causal, "rel": rel}
    return naive.grouped(x, **maps(layer), **own, **given)


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    found = (torch.autograd.grad((o * g).sum(), of, allow_unused=True) for o in (got, want))
    for mine, theirs in zip(*found, strict=True):
        close(*(torch.zeros(()) if z is None else z for z in (mine, theirs)), "gradient")


@pytest.mark.parametrize("position", ["relative", "none"])
@pytest.mark.parametrize(
    ("group", "heads", "T", "causal"),
    [(3, 3, 7, True), (3, 4, 7, False), (2, 2, 5, True), (2, 3, 5, False), (1, 2, 4, False)],
)
def test_is_the_definition(group: int, heads: int, T: int, causal: bool, position: str) -> None:
    layer = grouped(12, heads, group=group, causal=causal, position=position)
    x = normal(1, 1, T, 12).requires_grad_()
    got, want = layer(x), oracle(layer, x)
    close(got, want, "out")
    same_gradients(got, want, [x, *layer.parameters()])


def test_may_see_its_own_group() -> None:
    layer, x = grouped(12, 4, group=3, causal=True, lookahead=True), normal(1, 1, 7, 12)
    close(layer(x), oracle(layer, x), "out")
    later = x.clone()
    later[:, 5] += 1
    moved = (layer(later) - layer(x))[0].abs().amax(-1) > 0
    assert moved.tolist() == [False] * 4 + [True, True, False], "frame 4 sees frame 5 of its group"


def test_attends_to_other_frames() -> None:
    layer = grouped(position="none")
    x, context = normal(1, 1, 4, 12).requires_grad_(), normal(2, 1, 8, 12).requires_grad_()
    got, want = layer(x, context), oracle(layer, x, context=context)
    close(got, want, "out")
    same_gradients(got, want, [x, context, *layer.parameters()])


@pytest.mark.parametrize("position", ["relative", "none"])
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_frames_are_left_out(causal: bool, position: str) -> None:
    """A row is what its real frames are by themselves, wherever the hidden ones stand and whatever they hold."""
    layer, x = grouped(12, 6, causal=causal, position=position), normal(1, 3, 9, 12)
    keep = torch.ones(3, 9, dtype=torch.bool)
    keep[0, 7:] = keep[1, :2] = keep[2, 3:5] = keep[2, 8] = False
    hurt = x.masked_fill(~keep[..., None], torch.nan)
    for mask in (keep, masks.padding(keep)):
        got = layer(hurt, mask=mask)
        for b in range(3):
            close(got[b, keep[b]], layer(x[b : b + 1, keep[b]])[0], f"row {b}")
    if not causal:
        got = layer(x[:, :4], hurt, mask=keep)
        for b in range(3):
            close(got[b], layer(x[b : b + 1, :4], x[b : b + 1, keep[b]])[0], f"context of row {b}")


@pytest.mark.parametrize("position", ["relative", "none"])
def test_steps_equal_the_full_pass(position: str) -> None:
    layer, x = grouped(12, 6, causal=True, position=position), normal(1, 3, 10, 12)
    keep = torch.ones(3, 10, dtype=torch.bool)
    keep[1, :2] = keep[2, 3:5] = False
    for padded in (False, True):
        want = layer(x, mask=keep if padded else None)
        for sizes in ((1,) * 10, (4, 0, 5, 1)):
            state, outs = layer.init_state(3, 10), []
            for part, kept in zip(x.split(sizes, 1), keep.split(sizes, 1), strict=True):
                out, state = layer.step(part, state, mask=kept if padded else None)
                outs.append(out)
            got = torch.cat(outs, 1)
            close(got[keep] if padded else got, want[keep] if padded else want, f"steps of {sizes}")


def test_steps_of_whole_groups_where_heads_straddle() -> None:
    layer, x = grouped(causal=True, lookahead=True), normal(1, 2, 7, 12)
    state, outs = layer.init_state(2, 7), []
    for part in x.split((3, 3, 1), 1):
        out, state = layer.step(part, state)
        outs.append(out)
    close(torch.cat(outs, 1), layer(x), "steps")
    with pytest.raises(ValueError, match=r"state ends within a group \(got \[7, 7\]\); expected multiples of 3"):
        layer.step(x[:, :1], state)


def numbers(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}


def gives(layer: torch.nn.Module, case: str, **given) -> None:
    """The authors' outputs and gradients, with their parameters."""
    z, layer = numbers(case), layer.double().eval()
    own, theirs = {}, {ours: name for name, ours in NAMES.items()}
    for name, _ in layer.named_parameters():
        first, _, kind = name.removeprefix("relative.").removeprefix("position.").partition(".")
        own[name] = theirs[first] + (f".{kind}" if kind else "")
    assert len(own) == sum(k.startswith("p_") for k in z)
    layer.load_state_dict({name: z[f"p_{theirs}"] for name, theirs in own.items()})
    x = z["x"].requires_grad_()
    out = layer(x, **given)
    (out * z["w"]).sum().backward()
    assert ((out - z["out"]) * (z["w"] != 0)).abs().max() < 1e-10
    assert (x.grad - z["grad_x"]).abs().max() < 1e-10
    for name, p in layer.named_parameters():
        assert (p.grad - z[f"g_{own[name]}"]).abs().max() < 1e-10, name


@pytest.mark.parametrize(
    ("case", "dim", "heads", "options"),
    [
        ("plain", 12, 4, {"position": "none"}),
        ("even", 8, 4, {"position": "none", "group": 2}),
        ("rel", 12, 4, {}),
        ("releven", 8, 4, {"group": 2}),
        ("relcausal", 12, 6, {"causal": True}),
        ("relcausal2", 8, 4, {"group": 2, "causal": True}),
        ("padded", 12, 4, {"position": "none"}),
        ("relpadded", 12, 4, {}),
    ],
)
def test_gives_the_authors_numbers(case: str, dim: int, heads: int, options: dict) -> None:
    layer = regard.create("grouped", dim=dim, num_heads=heads, **options)
    keep = numbers(case)["mask"][:, 0, 0] == 0 if "padded" in case else None
    gives(layer, case, mask=keep)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("strided", {"stride": 3, "position": "none"}),
        ("relstrided", {"stride": 3}),
        ("relstridedcausal", {"stride": 2, "causal": True}),
    ],
)
def test_strided_attention_gives_the_authors_numbers(case: str, options: dict) -> None:
    gives(StridedAttention(12, 4, **options), case)


@pytest.mark.parametrize("kernel", ["eager", "chunked"])
@pytest.mark.parametrize(("group", "causal"), [(2, False), (2, True), (3, False)])
def test_kernels_agree_on_distances(kernel: str, group: int, causal: bool) -> None:
    """Of a position in `regard.Attention`, far beyond a tile: what grouped layers are with frames that are groups."""
    part = filled(RelativeSinusoids(6, 3, group=group, causal=causal))
    q, k, v = (normal(n, 1, 3, 9, 2 * group).requires_grad_() for n in range(3))
    mask = masks.causal() if causal else None
    got = regard.attention(q, k, v, mask=mask, position=part, kernel=kernel)
    e = torch.stack([torch.stack([distance(part, i - j) for j in range(9)]) for i in range(9)])  # (T, S, H, d)
    u, w = (z.repeat(group).view(3, 1, -1) for z in (part.content_bias, part.position_bias))
    scores = ((q + u) @ k.mT + torch.einsum("bhid,ijhd->bhij", q + w, e)) / (2 * group) ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    want = scores.softmax(-1) @ v
    close(got, want, "out")
    same_gradients(got, want, [q, k, v, *part.parameters()])


def distance(part: RelativeSinusoids, D: int) -> Tensor:
    at = [naive.position(D, r, part.group, part.causal) for r in range(part.group)]
    return torch.cat([part.proj.weight @ naive.pe(p, part.dim) + part.proj.bias for p in at]).view(part.num_heads, -1)


@pytest.mark.parametrize("causal", [False, True])
def test_strided_attention_is_the_definition(causal: bool) -> None:
    layer, x = filled(StridedAttention(12, 4, stride=3, position="none", causal=causal)), normal(1, 1, 8, 12)
    keep = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0]], dtype=torch.bool)
    allowed = keep[:, None] & (torch.ones(8, 8).tril().bool() if causal else torch.ones(8, 8).bool())
    close(layer(x.masked_fill(~keep[..., None], torch.nan), mask=keep)[:, 0], oracle(layer, x, allowed=allowed)[:, 0])
    close(layer(x, mask=keep), oracle(layer, x, allowed=allowed), "out")
    x[:, 5] = torch.nan
    assert layer(x).isnan().any(-1).tolist() == [[not causal, not causal, True]]


def test_local_attention_is_attention_with_a_mask() -> None:
    layer, x = filled(regard.Attention(12, 4, mask=masks.blocks(3), bias=True)), normal(1, 1, 8, 12)
    close(layer(x), naive.grouped(x, **maps(layer), heads=4, group=1, allowed=naive.local(8, 3)), "out")
    gives(regard.Attention(12, 4, mask=masks.blocks(3), bias=True), "local")


def test_relative_local_attention_gives_the_authors_numbers() -> None:
    """With one head: theirs mixes up heads and windows where it has several of both."""
    part = RelativeSinusoids(12, 1)
    gives(regard.Attention(12, 1, mask=masks.blocks(3), bias=True, position=part), "rellocal")


def test_a_frame_changes_its_own_phase_alone() -> None:
    layer, x = grouped(12, 6), normal(1, 1, 12, 12)
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(12))
    other = x.clone()
    other[:, 4] += 1
    moved = (layer(other) - layer(x))[0].abs().amax(-1) > 1e-9
    assert moved.tolist() == [t % 3 == 1 for t in range(12)]


def test_the_products_fall_with_the_group() -> None:
    counts = {g: count(grouped(group=g, position="none", bias=False), (normal(1, 1, 240, 12),)) for g in (1, 2, 4)}
    assert counts[1] == 2 * counts[2] == 4 * counts[4]


def test_groups_of_one_are_transformer_xl_and_plain_attention() -> None:
    layer, x = grouped(group=1, position="none"), normal(1, 2, 5, 12)
    plain = regard.Attention(12, 4, bias=True).double()
    plain.load_state_dict(layer.state_dict())
    close(layer(x), plain(x), "out")


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = regard.create("grouped", dim=96, num_heads=4)
    assert (layer.group, layer.relative.group, layer.causal) == (3, 3, False)
    bound = (6 / (4 + 24)) ** 0.5
    for z in (layer.relative.content_bias, layer.relative.position_bias):
        assert 0.9 * bound < float(z.detach().abs().max()) <= bound
    for proj in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj, layer.relative.proj):
        assert 0.9 * 96**-0.5 < float(proj.weight.detach().abs().max()) <= 96**-0.5
        assert proj.bias.any()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"group": 0}, "group is too small"),
        ({"group": 1000}, "group is too large"),
        ({"position": "rotary"}, "position is unknown"),
        ({"heads": 5}, "num_heads"),
        ({"causal": True}, r"group makes heads that see later frames \(got 3 for 4 heads\)"),
        ({"dim": 9, "heads": 3}, "dim is no multiple of two"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        grouped(**wrong)


def test_refuses_what_it_cannot_join_or_step_with() -> None:
    q = normal(0, 1, 2, 4, 3)
    with pytest.raises(ValueError, match="k and v have other heads or width than q"):
        grouped_attention(q, q[:, :1], q[:, :1])
    with pytest.raises(TypeError, match="state"):
        grouped(12, 3, causal=True).step(normal(0, 1, 1, 12), None)
    with pytest.raises(ValueError, match="causal"):
        grouped().init_state(1, 1)
