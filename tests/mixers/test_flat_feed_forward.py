"""Nets in place of attention against loops over rows, whose author read neither code nor test, and the authors'
numbers (B136)."""

import pytest
import torch
from torch import Tensor, nn

import regard
from mixers import naive_flat_feed_forward as naive
from regard import masks
from regard.laws.agreement import close, same
from regard.mixers._flat import hidden_width
from regard.mixers.flat_cross_feed_forward import FlatCrossFeedForward
from regard.mixers.flat_feed_forward import FlatFeedForward, FlatState
from regard.training.layer_distillation import distill, distillation_loss
from vision.shared import filled, gradients, leaves, normal, vectors

KEEP = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]]).bool()


def made(name: str = "flat_feed_forward", *, causal: bool = False, **options) -> nn.Module:
    options = {"max_length": 6, "hidden": 5, **options}
    return filled(regard.create(name, dim=4, num_heads=2, causal=causal, **options))


def nets(layer: nn.Module) -> list[tuple[Tensor, ...]]:
    parts = ([net.norm, net.up, net.inner_norm, net.down] for net in layer.nets)
    return [tuple(z for part in four for z in (part.weight, part.bias)) for four in parts]


def same_gradients(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "padded"])
@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"causal": True}, {"project": True}], ids=str)
def test_equals_the_loops(options: dict, keep: Tensor | None) -> None:
    layer = made(**options)
    (x,) = leaves(normal(1, 2, 4, 4))
    if "causal" in options:
        want = naive.flat_causal(x, nets(layer)[0], 6, keep)
    elif "per_head" in options:
        want = naive.flat_per_head(x, nets(layer), 6, keep)
    else:
        want = naive.flat(x, nets(layer)[0], 6, keep)
    if "project" in options:
        want = naive.output_map(want, layer.o_proj.weight, layer.o_proj.bias)
    got = layer(x, mask=keep)
    close(got, want)
    same_gradients(got, want, [x, *layer.parameters()])


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "padded"])
def test_cross_equals_the_loops(keep: Tensor | None) -> None:
    layer = made("flat_cross_feed_forward")
    x, context = leaves(normal(1, 2, 3, 4), normal(2, 2, 4, 4))
    query_keep = None if keep is None else torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    want = naive.flat_cross(x, context, nets(layer)[0], 6, keep, query_keep)
    got = layer(x, context, mask=keep, query_mask=query_keep)
    close(got, want)
    same_gradients(got, want, [x, context, *layer.parameters()])
    if keep is not None:
        hurt, lost = context.masked_fill(~keep[..., None], torch.nan), x.masked_fill(~query_keep[..., None], torch.nan)
        same(layer(lost, hurt, mask=keep, query_mask=query_keep), got)


PARTS = {0: "norm", 1: "up", 3: "inner_norm", 4: "down"}


def author(case: str, cls: type, heads: int = 1, **options) -> tuple[nn.Module, dict[str, Tensor]]:
    z = vectors("B136", case)
    stems = ["0_", "1_"] if heads == 2 else [""]
    hidden = z[stems[0] + "layers_1_weight"].shape[0]
    layer = cls(6, heads, max_length=7, hidden=hidden, per_head=heads == 2, **options).double()
    state = {
        f"nets.{n}.{part}.{kind}": z[f"{stem}layers_{i}_{kind}"]
        for n, stem in enumerate(stems)
        for i, part in PARTS.items()
        for kind in ("weight", "bias")
    }
    layer.load_state_dict(state)
    return layer, z


@pytest.mark.parametrize("case", ["enc", "dec", "sep"])
def test_gives_the_authors_numbers(case: str) -> None:
    """The heads' outputs, before the teacher's projection."""
    layer, z = author(case, FlatFeedForward, 2 if case == "sep" else 1, causal=case == "dec")
    (x,) = leaves(z["x"])
    y = layer(x, mask=z["keep"]).unflatten(-1, (2, 3)).transpose(1, 2)
    close(y, z["y"])
    if case != "sep":
        (y * z["w"]).sum().backward()
        close(x.grad, z["gx"])
    if case == "enc":
        close(layer.nets[0].up.weight.grad, z["g_layers_1_weight"])


def test_cross_gives_the_authors_numbers() -> None:
    layer, z = author("cross", FlatCrossFeedForward)
    (q,) = leaves(z["q"])
    y = layer(q, z["v"], mask=z["keep"]).unflatten(-1, (2, 3)).transpose(1, 2)
    close(y, z["y"])
    close(torch.autograd.grad((y * z["w"]).sum(), q)[0], z["gq"])


def test_sizes() -> None:
    W = 6400
    assert [hidden_width(s, W) for s in ("XS", "S", "M", "L", "XL")] == [25, 50, 800, 3200, 12800]
    heads = [naive.hidden_width(s, W, heads_form=True) for s in ("XS", "S", "M", "L", "XL")]
    assert [hidden_width(s, W, per_head=True) for s in ("XS", "S", "M", "L", "XL")] == heads
    assert FlatFeedForward(8, max_length=20, hidden="M").hidden == 20
    assert FlatCrossFeedForward(8, max_length=20, hidden="M").hidden == 40
    assert FlatFeedForward(8, 2, max_length=20, hidden="XS", per_head=True).hidden == 5


def test_hidden_tokens_are_zeros() -> None:
    for causal in (False, True):
        layer, x = made(causal=causal), normal(1, 2, 4, 4)
        got = layer(x, mask=masks.padding(KEEP))
        again = layer(x.masked_fill(~KEEP[..., None], torch.nan), mask=KEEP)
        same(again[KEEP], got[KEEP])
        assert (got[~KEEP] == 0).all()
        close(layer(x, mask=torch.arange(4)[None].expand(2, 4) < 3)[:, :3], layer(x[:, :3]))


def test_no_row_sees_later_tokens() -> None:
    """And the net reads from the zeros which row it makes: the same tokens give another output in another place."""
    layer, x = made(causal=True), normal(1, 1, 5, 4)
    seen = torch.autograd.functional.jacobian(lambda z: layer(z).sum((0, 2)), x)[:, 0].ne(0).any(-1)
    same(seen, torch.ones(5, 5, dtype=torch.bool).tril())
    other = FlatFeedForward(4, 2, max_length=9, hidden=5, causal=True)
    assert other.nets[0].norm.weight.shape != layer.nets[0].norm.weight.shape, "nets are tied to their length"


@pytest.mark.parametrize("options", [{}, {"per_head": True, "project": True}], ids=str)
def test_streams(options: dict) -> None:
    layer, x = made(causal=True, **options), 3 + normal(1, 2, 6, 4)
    keep = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 0]]).bool()
    for mask in (None, keep):
        state, outs = layer.init_state(2, 6), []
        for at in (slice(0, 1), slice(1, 1), slice(1, 4), slice(4, 6)):
            y, state = layer.step(x[:, at], state, mask=None if mask is None else mask[:, at])
            outs.append(y)
        close(torch.cat(outs, 1), layer(x, mask=mask))
    with pytest.raises(ValueError, match=r"x is too long \(got 7 tokens\); expected at most max_length = 6"):
        layer.step(x[:, :1], state)


def test_a_cross_net_reads_places_and_later_targets() -> None:
    layer, x, context = made("flat_cross_feed_forward"), normal(1, 1, 3, 4), normal(2, 1, 5, 4)
    y = layer(x, context)
    assert (layer(x, context.flip(1)) - y).abs().max() > 1e-3
    later = x.clone()
    later[:, 2] += 1
    assert (layer(later, context) - y)[:, 0].abs().max() > 1e-3
    close(layer(x, torch.cat([context, torch.zeros(1, 1, 4)], 1)), y)


def test_a_net_is_taught_by_attention() -> None:
    """What a layer of softmax attention does, on sentences that it has not seen; and wider nets learn more of it."""
    torch.manual_seed(0)
    teacher = regard.Attention(4, 1)

    def sentences(n: int) -> tuple[Tensor, Tensor]:
        keep = torch.arange(5) < torch.randint(2, 6, (n, 1))
        return torch.randn(n, 5, 4).requires_grad_(), keep

    x, keep = sentences(500)
    wanted = teacher(x, mask=masks.padding(keep)).detach()
    even = distillation_loss(wanted[keep].mean(0).expand_as(wanted), wanted, keep)
    left = []
    for hidden in (2, 64):
        student = FlatFeedForward(4, max_length=5, hidden=hidden)
        losses = distill(student, teacher, (((x,), keep) for x, keep in (sentences(256) for _ in range(250))), lr=5e-3)
        assert len(losses) == 250
        left.append(float((distillation_loss(student(x, mask=keep), wanted, keep) / even).detach()))
    assert left[1] < 0.5
    assert left[1] < 0.7 * left[0], left


def test_the_loss_is_over_real_tokens() -> None:
    student, teacher = normal(1, 2, 4, 3), normal(2, 2, 4, 3)
    close(distillation_loss(student, teacher, KEEP), naive.distillation_loss(student, teacher, KEEP))
    close(distillation_loss(student, teacher), (student - teacher).square().mean())
    hurt = student.masked_fill(~KEEP[..., None], torch.nan)
    close(distillation_loss(hurt, teacher, KEEP), distillation_loss(student, teacher, KEEP))
    assert distillation_loss(student, teacher, KEEP & False) == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"hidden is unknown \(got 'XXL'\); expected one of 'XS', 'S'"):
        FlatFeedForward(4, hidden="XXL")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hidden is too small \(got 0\)"):
        FlatFeedForward(4, hidden=0)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 3 \(got 4\)"):
        FlatFeedForward(4, 3)
    with pytest.raises(ValueError, match=r"x is too long \(got 7 tokens\); expected at most max_length = 6"):
        made()(normal(1, 1, 7, 4))
    with pytest.raises(ValueError, match="streaming needs causal=True"):
        made().init_state(1, 4)
    layer = made(causal=True)
    with pytest.raises(ValueError, match=r"capacity is too large \(got 9\)"):
        layer.init_state(1, 9)
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the FlatState"):
        layer.step(normal(1, 1, 1, 4), None)
    with pytest.raises(ValueError, match=r"x has another batch than the state \(got 1\); expected 2"):
        layer.step(normal(1, 1, 1, 4), FlatState(*layer.init_state(2, 4)))
    cross = made("flat_cross_feed_forward")
    with pytest.raises(ValueError, match=r"context is too long \(got 7 tokens\)"):
        cross(normal(1, 1, 2, 4), normal(1, 1, 7, 4))
    with pytest.raises(ValueError, match=r"context has another batch than x \(got 2\); expected 1"):
        cross(normal(1, 1, 2, 4), normal(1, 2, 3, 4))
    with pytest.raises(TypeError, match=r"query_mask has the wrong dtype"):
        cross(normal(1, 1, 2, 4), normal(1, 1, 3, 4), query_mask=torch.ones(1, 2))
