"""Conditional cross-attention: loops over queries and keys, transformers' layer, and what the place alone does."""

import pytest
import torch
from torch import Tensor, nn

import regard
from detection.naive_conditional import naive_conditional_cross, naive_scaled_sine, naive_sine
from regard.detection.conditional import ConditionalCrossAttention, conditional_attention
from regard.detection.places import pixel_centres, sine_embedding
from regard.laws.agreement import close
from regard.laws.subject import perturb

ROLES = {
    "qcontent": "q_proj",
    "kcontent": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "qpos_sine": "q_spatial_proj",
    "kpos": "k_spatial_proj",
    "qpos": "q_pos_proj",
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(seed: int, dim: int, heads: int, *, first: bool = False) -> ConditionalCrossAttention:
    torch.manual_seed(seed)
    made = ConditionalCrossAttention(dim, heads, first=first).double()
    perturb(made, seed, 0.1)
    return made


def by_loops(made, x, context, reference, context_pos, query_pos=None, state=None, keep=None) -> Tensor:
    p = {role: (getattr(made, n).weight, getattr(made, n).bias) for role, n in ROLES.items() if getattr(made, n)}
    state = x if state is None else state
    rows = []
    for s, r in zip(state.flatten(0, 1), reference.flatten(0, 1)):
        if made.first:
            rows.append(naive_sine(r, made.dim))
        else:
            rows.append(naive_scaled_sine(s, r, *(t for n in (0, 2) for t in made.transform[n].parameters())))
    sine = torch.stack(rows).view(x.shape)
    return naive_conditional_cross(x, context, context_pos, sine, p, made.num_heads, query_pos, keep)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dim", "heads"), [(12, 3), (6, 1), (10, 5)])
def test_equals_the_loops(first: bool, padded: bool, dim: int, heads: int) -> None:
    """Output and every gradient; with a state of its own for the transform."""
    made = layer(dim, dim, heads, first=first)
    T, S = 3, 5
    given = [
        normal(1, 2, T, dim),
        normal(2, 2, S, dim),
        uniform(3, 2, T, 2),
        normal(4, 2, S, dim),
        normal(5, 2, T, dim),
    ]
    for t in given:
        t.requires_grad_()
    extra = {"query_pos" if first else "state": given[4]}
    keep = torch.tensor([[True, True, False, True, False], [True] * 5]) if padded else None
    wanted = [*given, *made.parameters()]
    results = []
    for out in (made(*given[:4], **extra, mask=keep), by_loops(made, *given[:4], **extra, keep=keep)):
        results.append([out.detach(), *torch.autograd.grad(out, wanted, normal(6, 2, T, dim))])
    for n, (got, want) in enumerate(zip(*results)):
        close(got, want, str(n))


@pytest.mark.parametrize("dim", [2, 4, 10, 12])
def test_sines_equal_the_loops(dim: int) -> None:
    points = uniform(1, 3, 2)
    close(sine_embedding(points, dim), torch.stack([naive_sine(p, dim) for p in points]))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_transformers(first: bool, padded: bool) -> None:
    """The cross-attention, the sines and the whole decoder layer around it."""
    pytest.importorskip("transformers")
    from transformers import ConditionalDetrConfig
    from transformers.models.conditional_detr import modeling_conditional_detr as hf

    dim, heads = 24, 6
    config = ConditionalDetrConfig(
        d_model=dim, decoder_attention_heads=heads, decoder_ffn_dim=16, attn_implementation="eager", dropout=0.0
    )
    torch.manual_seed(0)
    theirs = hf.ConditionalDetrDecoderLayer(config).double().eval()
    perturb(theirs, 3, 0.1)
    made = layer(7, dim, heads, first=first)
    names = {
        "q_content_proj": made.q_proj,
        "k_content_proj": made.k_proj,
        "v_proj": made.v_proj,
        "o_proj": made.o_proj,
        "q_pos_sine_proj": made.q_spatial_proj,
        "k_pos_proj": made.k_spatial_proj,
        "q_pos_proj": made.q_pos_proj,
    }
    for name, ours in names.items():
        if ours is not None:
            ours.load_state_dict(getattr(theirs.encoder_attn, name).state_dict())
    entering, memory, query_pos = normal(1, 2, 5, dim), normal(2, 2, 7, dim), normal(3, 2, 5, dim)
    reference, pos = uniform(4, 2, 5, 2), normal(5, 2, 7, dim)
    keep = uniform(6, 2, 7) < 0.7 if padded else None
    sine = sine_embedding(reference, dim)
    theirs_sine = hf.encode_sinusoidal_position_embedding(reference, num_pos_feats=dim // 2)
    assert (sine - theirs_sine).abs().max() < 1e-6  # theirs has frequencies in fp32
    if not first:
        mlp = hf.ConditionalDetrMLPPredictionHead(dim, dim, dim, 2).double()
        for n, ours in enumerate((made.transform[0], made.transform[2])):
            mlp.layers[n].load_state_dict(ours.state_dict())
        sine = mlp(entering) * sine
    mask = None if keep is None else torch.where(keep, 0.0, -torch.inf)[:, None, None].double()
    seen = {}
    theirs.encoder_attn.register_forward_pre_hook(lambda m, a, k: seen.update(x=k["hidden_states"]), with_kwargs=True)
    theirs.encoder_attn.register_forward_hook(lambda m, a, k, out: seen.update(out=out[0]), with_kwargs=True)
    whole = theirs(
        entering,
        spatial_position_embeddings=pos,
        query_position_embeddings=query_pos,
        query_sine_embed=sine,
        encoder_hidden_states=memory,
        encoder_attention_mask=mask,
        is_first=first,
    )
    extra = {"query_pos": query_pos} if first else {"state": entering}
    out = made(seen["x"], memory, reference, pos, **extra, mask=keep)
    close(out, seen["out"])
    h = theirs.encoder_attn_layer_norm(seen["x"] + out)
    close(theirs.final_layer_norm(h + theirs.mlp(h)), whole)


# What the paper says of it


def spatial_map(point: tuple[float, float], shape: tuple[int, int], scale: Tensor | float = 1.0) -> Tensor:
    """The attention map of one head that looks by place alone, with identity projections."""
    dim = 64
    places = sine_embedding(pixel_centres([shape], dtype=torch.float64), dim)[None, None]
    query = sine_embedding(torch.tensor(point).double(), dim)[None, None, None] * scale
    one_hot = torch.eye(places.shape[2]).double()[None, None]
    none = torch.zeros_like(query), torch.zeros_like(places)
    return conditional_attention(none[0], 5 * query, none[1], places, one_hot)[0, 0, 0].view(shape)


@pytest.mark.parametrize("point", [(0.3, 0.7), (0.05, 0.55), (0.81, 0.12)])
@torch.no_grad()
def test_the_place_alone_finds_the_reference(point: tuple[float, float]) -> None:
    """Without any content in queries; each pixel holds its own number one-hot, and so an output is a map."""
    (Y, X), dim = (8, 12), 128
    made = ConditionalCrossAttention(dim, 1).double()
    for part in made.modules():
        if isinstance(part, nn.Linear):
            part.weight.zero_()
            part.bias.zero_()
    for proj, size in ((made.q_spatial_proj, 5.0), (made.k_spatial_proj, 1.0), (made.v_proj, 1.0), (made.o_proj, 1.0)):
        proj.weight.copy_(size * torch.eye(dim))
    made.transform[2].bias.fill_(1.0)
    pixels = torch.eye(Y * X, dim).double()[None]
    places = sine_embedding(pixel_centres([(Y, X)], dtype=torch.float64), dim)[None]
    seen = made(torch.zeros(1, 1, dim).double(), pixels, torch.tensor([[point]]).double(), places)[0, 0, : Y * X]
    assert divmod(int(seen.argmax()), X) == (int(point[1] * Y), int(point[0] * X))


def test_the_transform_selects_a_band() -> None:
    """lambda = 0 for the features of x leaves a map that does not depend on x: a horizontal band; and the other way."""
    half = torch.cat([torch.ones(32), torch.zeros(32)]).double()
    band = spatial_map((0.3, 0.7), (8, 12), half)
    assert (band - band[:, :1]).abs().max() < 1e-12
    assert int(band[:, 0].argmax()) == int(0.7 * 8)
    band = spatial_map((0.3, 0.7), (8, 12), 1 - half)
    assert (band - band[:1]).abs().max() < 1e-12
    assert int(band[0].argmax()) == int(0.3 * 12)


def test_heads_hold_their_own_content_and_place() -> None:
    """Content and place are put together head by head: head h of the output reads head h of both only."""
    made = layer(2, 12, 3)
    with torch.no_grad():
        made.o_proj.weight.copy_(torch.eye(12))
    given = [normal(1, 1, 2, 12), normal(2, 1, 5, 12), uniform(3, 1, 2, 2), normal(4, 1, 5, 12)]
    before = made(*given)
    with torch.no_grad():
        made.q_proj.weight[:4] += 1.0
        made.q_spatial_proj.weight[:4] += 1.0
    after = made(*given)
    assert torch.equal(before[..., 4:], after[..., 4:])
    assert not torch.equal(before[..., :4], after[..., :4])


# Policies


def test_hidden_keys_cannot_poison() -> None:
    made = layer(0, 12, 3)
    x, context, reference, pos = normal(1, 2, 4, 12), normal(2, 2, 7, 12), uniform(3, 2, 4, 2), normal(4, 2, 7, 12)
    keep = torch.arange(7) < torch.tensor([[5], [7]])
    results = []
    for filler in (0.0, 1e4, float("nan")):
        hidden = [z.masked_fill(~keep[..., None], filler).requires_grad_() for z in (context, pos)]
        out = made(x, hidden[0], reference, hidden[1], mask=regard.masks.padding(keep))
        grads = torch.autograd.grad(out.sum(), [*hidden, *made.parameters()])
        assert not grads[0][~keep].any()
        results.append([out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))
    close(results[0][0][:1], made(x[:1], context[:1, :5], reference[:1], pos[:1, :5]))
    nothing = made(x, context, reference, pos, mask=torch.zeros_like(keep))
    close(nothing, made.o_proj.bias.expand(2, 4, 12))


@pytest.mark.parametrize("where", ["x", "reference"])
def test_a_bad_query_is_told(where: str) -> None:
    made = layer(0, 12, 3)
    given = {"x": normal(1, 1, 4, 12), "reference": uniform(3, 1, 4, 2)}
    given[where][0, 2] = float("nan")
    out = made(given["x"], normal(2, 1, 7, 12), given["reference"], normal(4, 1, 7, 12))
    assert out[0].isnan().any(-1).tolist() == [False, False, True, False]
    assert (
        made(normal(1, 1, 4, 12), normal(2, 1, 7, 12) * torch.nan, uniform(3, 1, 4, 2), normal(4, 1, 7, 12))
        .isnan()
        .all()
    )


def test_gradcheck() -> None:
    made = layer(1, 4, 2)
    given = (normal(1, 1, 2, 4), normal(2, 1, 3, 4), uniform(3, 1, 2, 2), normal(4, 1, 3, 4))
    assert torch.autograd.gradcheck(made, tuple(z.requires_grad_() for z in given))


def test_bad_input() -> None:
    made, first = layer(0, 12, 3), layer(0, 12, 3, first=True)
    good = {
        "x": normal(1, 2, 4, 12),
        "context": normal(2, 2, 7, 12),
        "reference": uniform(3, 2, 4, 2),
        "context_pos": normal(4, 2, 7, 12),
    }
    made(**good)
    for change, words in (
        ({"x": good["x"][..., :4]}, r"x has the wrong shape \(got \(2, 4, 4\)\); expected \(B, T, M = 12\)"),
        (
            {"context": good["context"][:1]},
            r"context has the wrong shape \(got \(1, 7, 12\)\); .*\(B = 2, S",
        ),
        (
            {"reference": uniform(3, 2, 4, 4)},
            r"reference has the wrong shape \(got \(2, 4, 4\)\); .*T = 4, 2\)",
        ),
        (
            {"context_pos": good["context_pos"][:, :5]},
            r"context_pos has the wrong shape .*S = 7, M = 12\)",
        ),
        ({"query_pos": good["x"]}, r"query_pos belongs to the first layer.* \(got \(2, 4, 12\)\); expected none"),
        (
            {"state": good["x"][:, :2]},
            r"state has the wrong shape \(got \(2, 2, 12\)\); .*T = 4, M = 12\)",
        ),
        (
            {"mask": torch.ones(2, 4, 7, dtype=torch.bool)},
            r"mask has the wrong shape .* expected \(B = 2, S = 7\) or",
        ),
        ({"mask": regard.masks.causal()}, "mask can only hide keys"),
    ):
        with pytest.raises(ValueError, match=words):
            made(**{**good, **change})
    with pytest.raises(ValueError, match=r"query_pos belongs to the first layer.* \(got none\); expected some"):
        first(**good)
    with pytest.raises(ValueError, match=r"state is of no use to the first layer \(got \(2, 4, 12\)\); expected none"):
        first(**good, query_pos=good["x"], state=good["x"])
    for dim, heads, words in ((10, 4, r"no multiple of num_heads = 4 \(got 10\)"), (9, 3, r"is odd \(got 9\)")):
        with pytest.raises(ValueError, match=f"dim {words}" if "odd" in words else f"dim is {words}"):
            ConditionalCrossAttention(dim, heads)
